"""An engine's plan changes while it runs: memory is reserved, slots are added and removed, all is cleared."""

from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surfw.config import Policy
from surfw.errors import ConfigurationError, StorageError
from surfw.runtime.plan import Limit
from surfw.runtime.rows import TableUnit
from surfw.runtime.run import Run
from tests.runtime.engines import PAGE, counts, data, running, settle, spare_bytes, use
from tests.toys import Gate, toy_model


def test_what_is_reserved_is_given_up_by_the_weights_and_comes_back() -> None:
    manifest, source = toy_model([100] * 10)
    cycle = [f"c{index}" for index in range(10)]
    with running(manifest, source, budget_bytes=8 * PAGE) as engine:
        use(engine, cycle * 2)
        assert engine.resident_bytes == 8 * PAGE
        engine.reserve(3 * PAGE)
        assert engine.resident_bytes <= 5 * PAGE
        use(engine, cycle * 2)
        assert engine.resident_bytes <= 5 * PAGE
        with pytest.raises(ConfigurationError, match=r"a memory budget of .* is too small for toy, .* for the KV"):
            engine.reserve(7 * PAGE)
        use(engine, cycle)
        engine.reserve(0)
        use(engine, cycle * 2)
        assert engine.resident_bytes == 8 * PAGE
        assert all(
            data(engine.acquire(name)) == {f"{name}.t0": source.payloads[manifest.by_name[name].id]}
            for name in cycle[:2]
        )


def test_what_is_reserved_is_free_though_all_weights_were_on_their_way() -> None:
    manifest, source = toy_model([100] * 10)
    source.gate = Gate()
    with running(manifest, source, budget_bytes=10 * PAGE) as engine:
        engine.warm()
        source.gate.wait_for("c9")
        engine.reserve(3 * PAGE)
        assert engine.resident_bytes <= 7 * PAGE
        for index in range(10):
            source.gate.open(f"c{index}")
        use(engine, [f"c{index}" for index in range(10)] * 2)
        assert engine.resident_bytes <= 7 * PAGE


def test_a_reserve_that_was_interrupted_is_made_good_by_the_next() -> None:
    manifest, source = toy_model([100] * 10)
    source.gate = Gate(stubborn=True)
    with running(manifest, source, budget_bytes=10 * PAGE) as engine:
        engine.warm()
        source.gate.wait_for("c9")
        run = Run()
        run.interrupt(StorageError("enough"))
        with pytest.raises(StorageError, match="enough"), engine.running(run):
            engine.reserve(3 * PAGE)
        assert engine.resident_bytes == 10 * PAGE
        for index in range(10):
            source.gate.open(f"c{index}")
        engine.reserve(3 * PAGE)
        assert engine.resident_bytes <= 7 * PAGE


def test_every_plan_is_announced_to_the_source() -> None:
    manifest, source = toy_model([100] * 4)
    cycle = ["c0", "c1", "c2", "c3"]
    with running(manifest, source, budget_bytes=4 * PAGE) as engine:
        engine.reserve(PAGE)
        kept = [name for name in cycle if name in engine.plan.pinned]
        engine.reserve(2 * PAGE)
        use(engine, cycle)
    assert source.announced == [(cycle, cycle), (cycle, kept), (cycle, [])]
    assert len(kept) == 1


def test_more_slots_are_used_at_once() -> None:
    manifest, source = toy_model([100] * 6)
    with running(manifest, source, cache_layers=1) as engine:
        use(engine, [f"c{i}" for i in range(6)] * 2)
        assert len(engine.resident()) == 2
        engine.resize(10)
        assert engine.plan.slots == 6
        use(engine, [f"c{i}" for i in range(6)])
        before = engine.metrics.count("hits")
        use(engine, [f"c{i}" for i in range(6)])
        assert engine.metrics.count("hits") == before + 6


def test_fewer_slots_evict_what_is_idle_at_once_and_the_rest_after_its_use() -> None:
    manifest, source = toy_model([100] * 6)
    with running(manifest, source) as engine:
        use(engine, [f"c{i}" for i in range(6)])
        held = [data(engine.acquire(name)) for name in ("c0", "c1", "c2")]
        engine.resize(1)
        assert engine.resident() == ["c0", "c1", "c2"]
        assert engine.resident_bytes == 3 * PAGE
        assert held == [{f"c{i}.t0": source.payloads[manifest.by_name[f"c{i}"].id]} for i in range(3)]
        for name in ("c0", "c1", "c2"):
            engine.release(name)
        settle(engine)
        assert engine.resident_bytes == 2 * PAGE
        with pytest.raises(ConfigurationError, match="a cache of 0 layers is too small"):
            engine.resize(0)


def test_clearing_keeps_what_is_in_use_only() -> None:
    manifest, source = toy_model([100] * 4)
    with running(manifest, source) as engine:
        use(engine, ["c0", "c1", "c2", "c3"])
        held = engine.acquire("c1")
        engine.clear()
        assert engine.resident() == ["c1"]
        assert engine.resident_bytes == PAGE
        assert data(held) == {"c1.t0": source.payloads[manifest.by_name["c1"].id]}
        engine.release("c1")
        use(engine, ["c2"])
        assert source.reads[:5] == ["c0", "c1", "c2", "c3", "c2"]


def test_chunks_are_fetched_when_asked_for_as_many_as_there_is_room_for() -> None:
    manifest, source = toy_model([100] * 6)
    with running(manifest, source, cache_layers=2) as engine:
        loads = engine.fetch(["c4", "c1", "c5", "c0"])
        assert len(loads) == 3
        assert [name for name, _ in loads] == ["c4", "c1", "c5"]
        for _, load in loads:
            load.result(60)
        assert engine.resident() == ["c4", "c1", "c5"]
        ((_, load),) = engine.fetch(["c0"])
        load.result(60)
        assert engine.resident() == ["c1", "c5", "c0"]
        assert counts(engine) == {"hits": 0, "prefetched": 0, "stalls": 0}
        engine.acquire("c0")
        assert counts(engine) == {"hits": 1, "prefetched": 0, "stalls": 0}


@pytest.mark.parametrize("policy", ["auto", "lru"])
def test_a_run_without_prefetch_keeps_within_a_plan_that_changes(policy: Policy) -> None:
    """The engine gets no request between a load and the release of its chunk."""
    manifest, source = toy_model([100] * 10)
    names = list(manifest.by_name)
    with (
        running(manifest, source, budget_bytes=8 * PAGE, policy=policy) as engine,
        engine.running(Run(), prefetch=False),
    ):
        for name in names:
            engine.acquire(name)
            engine.reserve(5 * PAGE)
            engine.release(name)
            assert engine.resident_bytes <= 3 * PAGE
            engine.reserve(0)
            for other in names[:7]:
                engine.acquire(other)
                engine.release(other)
                assert engine.resident_bytes <= 8 * PAGE
            engine.reserve(5 * PAGE)
            assert engine.resident_bytes <= 3 * PAGE
            engine.reserve(0)


def test_buffers_of_an_earlier_plan_are_not_kept_for_a_later_one() -> None:
    manifest, source = toy_model([40 * PAGE] * 3 + [10 * PAGE] * 6)
    names = [f"c{index}" for index in range(9)]
    with running(manifest, source, budget_bytes=200 * PAGE) as engine:
        use(engine, names * 2)
        for reserved in (100, 25):
            engine.reserve(reserved * PAGE)
            use(engine, names * 2)
            assert engine.resident_bytes + spare_bytes(engine) + reserved * PAGE <= 200 * PAGE


def test_what_cannot_be_kept_is_refused_and_the_engine_still_works() -> None:
    manifest, source = toy_model([100] * 6)
    with running(manifest, source, budget_bytes=2 * PAGE) as engine:
        with pytest.raises(ConfigurationError, match=r"a memory budget of .* is too small for toy"):
            engine.pin("c3")
        engine.release("c3")
        engine.reserve(0)
        use(engine, [f"c{index}" for index in range(6)] * 2)
        assert engine.resident_bytes <= 2 * PAGE


def test_a_table_that_rows_are_not_enough_of_has_a_place_in_the_plan_or_none_at_all() -> None:
    manifest, source = toy_model([3 * PAGE, 100, 100, 100])
    table = {"c0": TableUnit(("c0",), ("c0.t0",), ())}
    for budget, fits in ((3, False), (5, True)):
        with running(manifest, source, budget_bytes=budget * PAGE, tables=table) as engine:
            use(engine, ["c1", "c2", "c3"])
            assert engine.by_rows("c0")
            if fits:
                use(engine, ["c0"])
                assert "c0" in engine.plan.sizes
            else:
                with pytest.raises(ConfigurationError, match=r"a memory budget of .* is too small for toy"):
                    engine.acquire("c0")
                use(engine, ["c1", "c2", "c3"])
            assert engine.resident_bytes <= budget * PAGE


pages = st.integers(1, 5).map(lambda count: count * PAGE)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(pages, min_size=3, max_size=7),
    st.lists(st.integers(0, 12), min_size=1, max_size=5),
    st.integers(10, 30),
    st.sampled_from(["auto", "lru"]),
)
def test_whatever_is_reserved_all_buffers_fit_beside_it(
    sizes: list[int], reserves: list[int], budget: int, policy: Policy
) -> None:
    """This includes the buffers that wait for reuse, and those of an earlier, larger ring."""
    manifest, source = toy_model(sizes)
    cycle = list(manifest.by_name)
    with suppress(ConfigurationError), running(manifest, source, budget_bytes=budget * PAGE, policy=policy) as engine:
        for reserved in reserves:
            with suppress(ConfigurationError):
                engine.reserve(reserved * PAGE)
            for name in cycle * 2:
                use(engine, [name])
                room = budget * PAGE - engine.limit.reserved_bytes
                assert engine.resident_bytes + spare_bytes(engine) <= room, engine.plan
                assert engine.plan.peak_bytes <= room


def test_another_limit_can_be_asked_for_and_changes_nothing() -> None:
    manifest, source = toy_model([PAGE] * 4)
    with running(manifest, source, budget_bytes=3 * PAGE) as engine:
        before, limit = engine.plan, engine.limit
        assert (before.bytes_per_pass, engine.plan_with(Limit(budget_bytes=4 * PAGE)).bytes_per_pass) == (3 * PAGE, 0)
        assert engine.least_budget_bytes == 2 * PAGE
        with pytest.raises(ConfigurationError, match=f"{2 * PAGE} bytes"):
            engine.plan_with(Limit(budget_bytes=2 * PAGE - 1))
        assert (engine.plan, engine.limit) == (before, limit)
        engine.reserve(PAGE)
        assert engine.least_budget_bytes == 3 * PAGE
