"""The engine obeys its plan: never too many chunks, never one taken away in use, and failures told to who needs it."""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surfw.config import Policy
from surfw.errors import ConfigurationError, ModelClosedError, StorageError
from surfw.manifest import Manifest, Use
from surfw.metrics import Metrics
from surfw.runtime.engine import Engine
from surfw.runtime.loader import Loader
from surfw.runtime.plan import Limit
from surfw.runtime.rows import TableUnit
from surfw.runtime.run import IoThread, Run
from surfw.runtime.schedule import Phases
from surfw.source import Read
from tests.toys import Gate, ToySource, toy_chunk, toy_model, toy_model_of, toy_needs

PAGE = 4096


@contextmanager
def running(
    manifest: Manifest,
    source: ToySource,
    *,
    cache_layers: int | None = None,
    budget_bytes: int | None = None,
    policy: Policy | None = None,
    phases: Phases | None = None,
    tables: dict[str, TableUnit] | None = None,
    metrics: Metrics | None = None,
) -> Iterator[Engine]:
    """An engine over a source, a plain LRU cache where layers are counted; nothing of it is left afterwards."""
    io = IoThread()
    policy = policy or ("auto" if budget_bytes else "lru")
    limit = Limit(cache_layers=cache_layers, budget_bytes=budget_bytes, policy=policy)
    loader = Loader(source, manifest)
    needs = replace(toy_needs(manifest), tables=frozenset(tables or ()))
    engine = Engine(manifest, needs, limit, loader, io=io, metrics=metrics or Metrics(), phases=phases, tables=tables)
    try:
        yield engine
    finally:
        engine.close()
        io.close()
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("surfw")] == []


def settle(engine: Engine) -> list[str]:
    """Wait for everything in flight; what is in memory then."""
    for load in engine.host.loads().values():
        load.exception()
    return engine.resident()


def use(engine: Engine, modules: Sequence[str]) -> None:
    """Run modules one after another, each once all that was fetched ahead has arrived."""
    for module in modules:
        engine.acquire(module)
        settle(engine)
        engine.release(module)
        settle(engine)


def counts(engine: Engine) -> dict[str, int]:
    return {name: engine.metrics.count(name) for name in ("hits", "prefetched", "stalls")}


def users(engine: Engine) -> dict[str, int]:
    """How many modules hold each chunk that is in use."""
    return {slot.name: slot.users for slot in engine.table if slot.users}


def spare_bytes(engine: Engine) -> int:
    """Memory of the ring's empty buffers."""
    return sum(buffer.capacity_bytes for buffer in engine.host.spare)


def data(tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: bytes(tensor.numpy()) for name, tensor in tensors.items()}


class GateOpensWhenStalled(Metrics):
    """Lets a fetch through only once the engine has counted that it waits."""

    def __init__(self, gate: Gate, name: str) -> None:
        super().__init__()
        self.opened = lambda: gate.open(name)

    def add(self, name: str, amount: int = 1) -> None:
        super().add(name, amount)
        if name == "stalls":
            self.opened()


def test_a_module_gets_the_values_of_its_chunks() -> None:
    made = [toy_chunk("a", [("U8", (5,)), ("I32", (2, 2))]), toy_chunk("b", [("U8", (3,))])]
    manifest, source = toy_model_of(made, order=[Use("one", ("a",)), Use("both", ("a", "b"))])
    with running(manifest, source) as engine:
        one, both = engine.acquire("one"), engine.acquire("both")
        assert set(one) == {"a.t0", "a.t1"}
        assert set(both) == {"a.t0", "a.t1", "b.t0"}
        assert one["a.t0"] is both["a.t0"]
        assert bytes(both["b.t0"].numpy()) == made[1][1]
        assert tuple(one["a.t1"].shape) == (2, 2)
        assert one["a.t1"].dtype == torch.int32
        assert not one["a.t1"].requires_grad


def test_the_three_kinds_of_use_are_counted_apart() -> None:
    manifest, source = toy_model([100] * 3)
    source.gate = Gate()
    for name in ("c1", "c2"):
        source.gate.open(name)
    with running(manifest, source, metrics=GateOpensWhenStalled(source.gate, "c0")) as engine:
        use(engine, ["c0"])
        assert counts(engine) == {"hits": 0, "prefetched": 0, "stalls": 1}
        use(engine, ["c1", "c2"])
        assert counts(engine) == {"hits": 0, "prefetched": 2, "stalls": 1}
        use(engine, ["c0", "c1", "c2", "c0"])
        assert counts(engine) == {"hits": 4, "prefetched": 2, "stalls": 1}
        assert source.reads == ["c0", "c1", "c2"]
        assert engine.metrics.latency("fetch").count == 3
        assert engine.metrics.seconds("stall") > 0


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
        assert counts(engine)["hits"] - before == 6  # each pair is read once, and found there the second time
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
        assert "c1" in engine.resident()  # which is not what comes
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
        source.gate.wait_for("c1")  # fetched ahead, and not there yet
        engine.acquire("c3")
        engine.release("c3")
        assert engine.resident_bytes == 2 * PAGE
        source.gate.open("c1")
        source.gate.open("c2")
        tensors = engine.acquire("c2")
        assert data(tensors) == {"c2.t0": source.payloads[manifest.by_name["c2"].id]}
        assert engine.resident_bytes == 2 * PAGE


class Stalled(Metrics):
    """Notes that execution has begun to wait."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = threading.Event()

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        with super().span(name):
            if name == "stall":
                self.waits.set()
            yield


def test_a_wrong_guess_is_cancelled_and_its_buffer_used_again_only_when_nothing_writes_to_it_any_more() -> None:
    manifest, source = toy_model([100] * 3)
    source.gate, metrics = Gate(stubborn=True), Stalled()
    for name in ("c0", "c2"):
        source.gate.open(name)
    with running(manifest, source, cache_layers=1, metrics=metrics) as engine:
        engine.acquire("c0")
        source.gate.wait_for("c1")  # fetched ahead, into the other buffer
        guess = engine.host.loads()["c1"]
        metrics.waits.clear()
        found: list[dict[str, bytes]] = []
        other = threading.Thread(target=lambda: found.append(data(engine.acquire("c2"))))
        other.start()
        assert metrics.waits.wait(60)
        assert engine.resident() == ["c0"]  # the engine can be asked while a run waits
        assert "c2" not in source.reads
        source.gate.open("c1")
        other.join()
        assert guess.cancelled()
        assert source.reads == ["c0", "c1", "c2"]
        assert found == [{"c2.t0": source.payloads[manifest.by_name["c2"].id]}]


def test_a_load_that_an_interrupted_run_gave_up_is_made_again_for_the_next_run() -> None:
    manifest, source = toy_model([100] * 3)
    source.gate, metrics = Gate(stubborn=True), Stalled()
    for name in ("c0", "c2"):
        source.gate.open(name)
    with running(manifest, source, cache_layers=1, metrics=metrics) as engine:
        run, found, is_next = Run(), [], threading.Event()

        def first() -> None:
            with suppress(StorageError), engine.running(run):
                engine.acquire("c0")
                source.gate.wait_for("c1")  # fetched ahead
                metrics.waits.clear()
                is_next.set()
                engine.acquire("c2")  # gives c1 up, and waits for its end

        thread = threading.Thread(target=first)
        thread.start()
        assert is_next.wait(60)
        assert metrics.waits.wait(60)
        run.interrupt(StorageError("enough"))
        thread.join(60)
        metrics.waits.clear()
        thread = threading.Thread(target=lambda: found.append(data(engine.acquire("c1"))))
        thread.start()
        assert metrics.waits.wait(60)
        source.gate.open("c1")
        thread.join(60)
        assert found == [{"c1.t0": source.payloads[manifest.by_name["c1"].id]}]
        assert source.reads.count("c1") == 2


def fail_once(name: str) -> Callable[[Read], None]:
    left = {name}

    def before(read: Read) -> None:
        if read.chunk.name in left:
            left.remove(read.chunk.name)
            raise StorageError(f"{name} could not be read, once")

    return before


def test_a_failed_load_is_reported_to_the_one_who_needs_it_and_tried_again() -> None:
    manifest, source = toy_model([100] * 3)
    source.before_fetch = fail_once("c0")
    with running(manifest, source, cache_layers=1) as engine:
        with pytest.raises(StorageError, match="c0 could not be read, once"):
            engine.acquire("c0")
        assert data(engine.acquire("c0")) == {"c0.t0": source.payloads[manifest.by_name["c0"].id]}
        engine.release("c0")
        use(engine, ["c1", "c2", "c0"])
        assert engine.resident_bytes == 2 * PAGE


def test_what_failed_ahead_of_time_is_loaded_again_when_it_is_needed() -> None:
    manifest, source = toy_model([100] * 3)
    source.before_fetch = fail_once("c1")
    with running(manifest, source) as engine:
        use(engine, ["c0"])
        assert source.reads.count("c1") == 1
        assert data(engine.acquire("c1")) == {"c1.t0": source.payloads[manifest.by_name["c1"].id]}


def test_a_module_that_fails_to_get_one_chunk_holds_none() -> None:
    made = [toy_chunk(name, [("U8", (50,))]) for name in "abcd"]
    manifest, source = toy_model_of(made, order=[Use("ab", ("a", "b")), Use("c", ("c",)), Use("d", ("d",))])
    source.before_fetch = fail_once("b")
    with running(manifest, source, cache_layers=1) as engine:
        with pytest.raises(StorageError, match="b could not be read"):
            engine.acquire("ab")
        assert users(engine) == {}
        use(engine, ["c", "d", "ab", "c"])
        assert engine.resident_bytes == 2 * PAGE


def test_a_pinned_module_stays_and_is_spoken_of_once(caplog: pytest.LogCaptureFixture) -> None:
    manifest, source = toy_model([100] * 5)
    with caplog.at_level(logging.WARNING, "surfw"), running(manifest, source, cache_layers=1) as engine:
        tensors = engine.pin("c1")
        engine.pin("c1")
        use(engine, ["c0", "c2", "c3", "c4", "c0"])
        assert "c1" in engine.resident()
        assert data(tensors) == {"c1.t0": source.payloads[manifest.by_name["c1"].id]}
        assert engine.resident_bytes == 3 * PAGE
    assert [record.getMessage() for record in caplog.records] == [
        "toy uses weights of c1 outside of its forward; they stay in memory (4.1 kB)"
    ]


def test_after_an_interrupt_everything_can_be_evicted_again() -> None:
    manifest, source = toy_model([100] * 5)
    with running(manifest, source, cache_layers=1) as engine:
        engine.acquire("c0")
        engine.acquire("c1")
        engine.release_all()
        use(engine, ["c2", "c3"])
        assert engine.resident() == ["c3", "c4"]


def test_closing_cancels_what_is_in_flight_and_lets_go_of_all_memory() -> None:
    manifest, source = toy_model([100] * 3)
    source.gate = Gate()
    with running(manifest, source) as engine:
        engine.warm()
        source.gate.wait_for("c0")
        load = engine.host.loads()["c0"]
        engine.close()
        with pytest.raises(CancelledError):
            load.result(60)
        assert (engine.resident(), engine.resident_bytes) == ([], 0)
        engine.release("c0")
        assert engine.resident_bytes == 0
        source.gate.open("c0")


class Driver:
    """Runs modules of an engine, and checks after every step that memory is within the plan and all bytes are right."""

    def __init__(self, engine: Engine, source: ToySource) -> None:
        self.engine = engine
        chunks = engine.manifest.chunks
        self.expected = {chunk.name: {chunk.tensors[0].name: source.payloads[chunk.id]} for chunk in chunks}
        self.held: dict[str, dict[str, torch.Tensor]] = {}

    def check(self) -> None:
        assert self.engine.resident_bytes <= self.engine.plan.buffers * PAGE
        for name, tensors in self.held.items():
            assert data(tensors) == self.expected[name]

    @contextmanager
    def within(self, name: str) -> Iterator[None]:
        self.held[name] = self.engine.acquire(name)
        self.check()
        yield
        self.check()
        del self.held[name]
        self.engine.release(name)
        self.check()


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(2, 6),
    cache_layers=st.integers(1, 6),
    steps=st.lists(st.tuples(st.integers(0, 5), st.none() | st.integers(0, 5), st.booleans()), max_size=25),
    failing=st.sets(st.integers(1, 20), max_size=3),
)
def test_the_invariants_hold_on_any_schedule(
    count: int, cache_layers: int, steps: list[tuple[int, int | None, bool]], failing: set[int]
) -> None:
    """Modules run in any order, some within another, and some fetches fail."""
    manifest, source = toy_model([17 * (index + 1) for index in range(count)])

    def before_fetch(read: Read) -> None:
        if len(source.reads) in failing:
            raise StorageError("on purpose")

    source.before_fetch = before_fetch
    with running(manifest, source, cache_layers=cache_layers) as engine:
        driver = Driver(engine, source)
        for outer, inner, settled in steps:
            with suppress(StorageError), driver.within(f"c{outer % count}"):
                if inner is not None and inner % count != outer % count:
                    with suppress(StorageError), driver.within(f"c{inner % count}"):
                        pass
            if settled:
                settle(engine)
            driver.check()
        assert driver.held == {}
        assert users(engine) == {}
        assert sum(counts(engine).values()) <= 2 * len(steps)


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


def test_a_run_without_prefetch_fetches_only_what_it_needs() -> None:
    manifest, source = toy_model([100] * 4)
    with running(manifest, source, cache_layers=2) as engine:
        with engine.running(Run(), prefetch=False):
            use(engine, ["c0", "c1"])
            assert source.reads == ["c0", "c1"]
        use(engine, ["c2"])
        assert source.reads[:4] == ["c0", "c1", "c2", "c3"]


@pytest.mark.parametrize("policy", ["auto", "lru"])
def test_a_run_without_prefetch_keeps_within_a_plan_that_changes(policy: Policy) -> None:
    """Nothing is asked of the engine between a load and the release of its chunk."""
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


def test_an_interrupt_ends_a_wait_and_leaves_an_engine_that_works() -> None:
    manifest, source = toy_model([100] * 3)
    source.gate, metrics = Gate(), Stalled()
    with running(manifest, source, cache_layers=1, metrics=metrics) as engine:
        run, raised = Run(), []

        def work() -> None:
            with engine.running(run), suppress(StorageError):
                try:
                    engine.acquire("c0")
                except StorageError as exc:
                    raised.append(str(exc))
                    raise

        thread = threading.Thread(target=work)
        thread.start()
        assert metrics.waits.wait(60)
        run.interrupt(StorageError("enough"))
        run.interrupt(StorageError("too late"))
        thread.join(60)
        assert raised == ["enough"]
        with pytest.raises(StorageError, match="enough"), engine.running(run):
            engine.acquire("c1")
        for name in ("c0", "c1", "c2"):
            source.gate.open(name)
        assert data(engine.acquire("c0")) == {"c0.t0": source.payloads[manifest.by_name["c0"].id]}
        assert sum(users(engine).values()) == 1


def test_closing_the_thread_below_ends_a_wait() -> None:
    manifest, source = toy_model([100] * 2)
    source.gate, metrics = Gate(), Stalled()
    with running(manifest, source, metrics=metrics) as engine:
        errors: list[Exception] = []

        def work() -> None:
            try:
                engine.acquire("c0")
            except ModelClosedError as exc:
                errors.append(exc)

        thread = threading.Thread(target=work)
        thread.start()
        assert metrics.waits.wait(60)
        engine.host._io.close()
        thread.join(60)
        assert [str(error) for error in errors] == [f"the source of {manifest.name} was closed while it was read"]


def test_buffers_of_an_earlier_plan_are_not_kept_for_a_later_one() -> None:
    manifest, source = toy_model([40 * PAGE] * 3 + [10 * PAGE] * 6)
    names = [f"c{index}" for index in range(9)]
    with running(manifest, source, budget_bytes=200 * PAGE) as engine:
        use(engine, names * 2)
        for reserved in (100, 25):
            engine.reserve(reserved * PAGE)
            use(engine, names * 2)
            assert engine.resident_bytes + spare_bytes(engine) + reserved * PAGE <= 200 * PAGE


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


def test_a_backward_pass_through_weights_that_are_gone_fails() -> None:
    made = [toy_chunk(f"c{index}", [("F32", (4,))], seed=index) for index in range(6)]
    manifest, source = toy_model_of(made)
    with running(manifest, source, budget_bytes=2 * PAGE) as engine:
        given = torch.ones(4, requires_grad=True)
        seen = (given * engine.acquire("c0")["c0.t0"]).sum()
        engine.release("c0")
        use(engine, ["c1", "c2", "c3"])
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            seen.backward()


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
    """Also those that wait for their next use, and those of a ring that was larger before."""
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
