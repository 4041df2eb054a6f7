"""What an engine prefetches, and which chunk is evicted for it."""

import pytest

from surfw.manifest import Use
from surfw.runtime.run import Run
from surfw.runtime.schedule import Phases
from tests.runtime.engines import PAGE, counts, data, running, use
from tests.toys import Gate, toy_chunk, toy_model, toy_model_of


def test_the_ring_fetches_as_far_ahead_as_it_has_buffers_that_nobody_uses() -> None:
    manifest, source = toy_model([100] * 8)
    source.gate = Gate()
    with running(manifest, source, cache_layers=1, policy="auto") as engine:
        engine.warm()
        for name in ("c0", "c1"):
            source.gate.wait_for(name)
        assert source.reads == ["c0", "c1"]
        for name in engine.manifest.by_name:
            source.gate.open(name)
        use(engine, ["c0"])
        assert engine.resident() == ["c1", "c2"]
        engine.acquire("c1")
        assert engine.resident_bytes == 2 * PAGE


def test_what_is_fetched_ahead_is_asked_for_in_order_and_after_what_is_needed_now() -> None:
    manifest, source = toy_model([100] * 8)
    with running(manifest, source, cache_layers=3) as engine:
        use(engine, ["c0", "c1", "c2"])
        priorities = dict(zip(source.reads, source.priorities, strict=True))
        assert priorities["c0"] == 0
        ahead = [priority for name, priority in priorities.items() if name != "c0"]
        assert ahead == sorted(set(ahead))
        assert min(ahead) > 0


def test_no_more_than_a_window_of_bytes_is_in_flight_ahead() -> None:
    manifest, source = toy_model([40 << 20] * 5)
    source.gate = Gate()
    with running(manifest, source, policy="auto") as engine:
        engine.warm()
        for name in ("c0", "c1"):
            source.gate.wait_for(name)
        assert source.reads == ["c0", "c1"]
        source.gate.open("c0")
        engine.acquire("c0")
        source.gate.wait_for("c2")
        assert source.reads == ["c0", "c1", "c2"]
        for name in engine.manifest.by_name:
            source.gate.open(name)


@pytest.mark.parametrize("layers", [1, 2, 3, 5, 8, 13, 21, 40])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.8, 1.0])
def test_no_policy_hits_more_often_on_a_cycle(layers: int, share: float) -> None:
    manifest, source = toy_model([100] * layers)
    slots, turns = int(share * layers), 4
    cycle = [f"c{index}" for index in range(layers)]
    with running(manifest, source, budget_bytes=(slots + 2) * PAGE) as engine:
        use(engine, cycle * turns)
        kept = layers if slots + 2 >= layers else slots
        assert counts(engine)["hits"] == kept * (turns - 1)
        assert engine.resident_bytes <= (slots + 2) * PAGE
        ahead = len(source.reads) - (layers + (layers - kept) * (turns - 1))
        assert 0 <= ahead <= 2  # for the turn that would come next
        assert sum(counts(engine).values()) == layers * turns
        assert counts(engine)["stalls"] <= 1


def test_chunks_that_recur_share_the_room_by_beladys_rule() -> None:
    names = [f"c{index}" for index in range(6)]
    made = [toy_chunk(name, [("U8", (100,))], seed=index) for index, name in enumerate(names)]
    order = [
        Use(f"{name}.{turn}", (name,))
        for pair in ("01", "23", "45")
        for turn in range(2)
        for name in (f"c{pair[0]}", f"c{pair[1]}")
    ]
    manifest, source = toy_model_of(made, order=order)
    modules = [use.module for use in order]
    with running(manifest, source, budget_bytes=4 * PAGE) as engine:
        assert engine.plan.floating == set(names)
        use(engine, modules)
        before = counts(engine)["hits"]
        use(engine, modules)
        assert counts(engine)["hits"] - before == 6  # each pair is read once, and still resident the second time
        assert engine.resident_bytes <= 4 * PAGE


def test_an_encoder_runs_once_and_a_decoder_in_a_cycle() -> None:
    manifest, source = toy_model([100] * 13)
    encoder, decoder = [f"c{index}" for index in range(5)], [f"c{index}" for index in range(5, 13)]
    phases = Phases(once=tuple(encoder), cycle=tuple(decoder))
    with running(manifest, source, budget_bytes=5 * PAGE, phases=phases) as engine:
        assert engine.plan.pinned < set(decoder)
        for _ in range(2):
            with engine.running(Run()):
                use(engine, encoder + decoder * 3)
        assert counts(engine)["hits"] == 3 * 2 + 3 * 3
        assert counts(engine)["stalls"] <= 2
        assert engine.plan.bytes_per_pass == 5 * PAGE
        assert engine.resident_bytes <= 5 * PAGE


def test_another_schedule_than_expected_gets_another_plan() -> None:
    manifest, source = toy_model([100] * 10)
    with running(manifest, source, budget_bytes=6 * PAGE) as engine:
        assert len(engine.plan.pinned) == 4
        half = [f"c{index}" for index in range(5)]
        use(engine, half * 6)
        assert engine.plan.pinned >= set(half) - {"c0", "c1", "c2", "c3", "c4"}
        before = source.reads.copy()
        use(engine, half * 2)
        assert len(engine.plan.pinned & set(half)) == 4
        assert len(source.reads) - len(before) <= 2 + 2
        assert engine.resident_bytes <= 6 * PAGE


@pytest.mark.parametrize(
    ("cache_layers", "kept"), [(1, {"c3", "c4"}), (2, {"c3", "c4", "c5"}), (3, {"c3", "c4", "c5", "c0"})]
)
def test_used_chunks_make_way_for_those_that_come(cache_layers: int, kept: set[str]) -> None:
    manifest, source = toy_model([100] * 6)
    with running(manifest, source, cache_layers=cache_layers) as engine:
        use(engine, ["c0", "c1", "c2", "c3"])
        assert set(engine.resident()) == kept
        assert engine.resident_bytes == (cache_layers + 1) * PAGE


def test_the_least_recently_used_chunk_makes_way_for_one_that_is_needed_now() -> None:
    manifest, source = toy_model([100] * 6)
    with running(manifest, source, cache_layers=2) as engine, engine.running(Run(), prefetch=False):
        use(engine, ["c1", "c0", "c4", "c1", "c3"])
        assert engine.resident() == ["c4", "c1", "c3"]


def test_what_is_needed_sooner_is_not_evicted_for_what_is_needed_later() -> None:
    manifest, source = toy_model([100] * 3)
    with running(manifest, source, cache_layers=1) as engine:
        use(engine, ["c0", "c1", "c0", "c1", "c0"])  # learned: these two alternate
        assert set(engine.resident()) == {"c0", "c1"}
        source.reads.clear()
        use(engine, ["c1", "c0", "c1", "c0"])
        assert source.reads == []


def test_a_wrong_prediction_does_not_stop_the_fetching_ahead() -> None:
    manifest, source = toy_model([100] * 6)
    with running(manifest, source, cache_layers=2) as engine:
        use(engine, ["c0"])
        assert "c1" in engine.resident()  # not the next one
        use(engine, ["c3", "c4", "c5", "c3", "c4", "c5", "c3"])
        assert "c1" not in engine.resident()
        before = counts(engine)
        use(engine, ["c4", "c5", "c3", "c4"])
        assert counts(engine)["stalls"] == before["stalls"]


def test_a_chunk_that_arrives_too_late_for_one_who_does_not_need_it_gives_its_buffer_to_another() -> None:
    manifest, source = toy_model([100] * 4)
    source.gate = Gate()
    for name in ("c0", "c3"):
        source.gate.open(name)
    with running(manifest, source, cache_layers=1) as engine:
        engine.acquire("c0")
        engine.release("c0")
        source.gate.wait_for("c1")  # being prefetched
        engine.acquire("c3")
        engine.release("c3")
        assert engine.resident_bytes == 2 * PAGE
        source.gate.open("c1")
        source.gate.open("c2")
        tensors = engine.acquire("c2")
        assert data(tensors) == {"c2.t0": source.payloads[manifest.by_name["c2"].id]}
        assert engine.resident_bytes == 2 * PAGE


def test_a_run_without_prefetch_fetches_only_what_it_needs() -> None:
    manifest, source = toy_model([100] * 4)
    with running(manifest, source, cache_layers=2) as engine:
        with engine.running(Run(), prefetch=False):
            use(engine, ["c0", "c1"])
            assert source.reads == ["c0", "c1"]
        use(engine, ["c2"])
        assert source.reads[:4] == ["c0", "c1", "c2", "c3"]


def test_a_chunk_that_is_needed_with_another_one_does_not_make_way_for_it() -> None:
    made = [toy_chunk(f"c{index}", [("U8", (100,))], seed=index) for index in range(8)]
    order = [Use("ab", ("c0", "c1")), *(Use(f"m{index}", (f"c{index}",)) for index in range(2, 8))]
    manifest, source = toy_model_of(made, order=order)
    with running(manifest, source, budget_bytes=5 * PAGE) as engine:
        for schedule in (["ab", "m2", "m3"], ["ab", *(f"m{index}" for index in range(2, 8))], ["m4", "ab", "m5"]):
            for _ in range(3):
                for module in schedule:
                    tensors = engine.acquire(module)
                    assert len(tensors) == (2 if module == "ab" else 1)
                    engine.release(module)
                    assert engine.resident_bytes <= 5 * PAGE
