"""The engine obeys its plan: it never holds too many chunks, evicts none in use, and raises errors where needed."""

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surfw.errors import ModelClosedError, StorageError
from surfw.manifest import Use
from surfw.metrics import Metrics
from surfw.runtime.engine import Engine
from surfw.runtime.run import Run
from surfw.source import Read
from tests.runtime.engines import PAGE, counts, data, running, settle, use, users
from tests.toys import Gate, ToySource, toy_chunk, toy_model, toy_model_of


class GateOpensWhenStalled(Metrics):
    """Lets a fetch through only after the engine has counted a stall."""

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


class Stalled(Metrics):
    """Records that execution has begun to wait."""

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
        source.gate.wait_for("c1")  # prefetched into the other buffer
        guess = engine.host.loads()["c1"]
        metrics.waits.clear()
        found: list[dict[str, bytes]] = []
        other = threading.Thread(target=lambda: found.append(data(engine.acquire("c2"))))
        other.start()
        assert metrics.waits.wait(60)
        assert engine.resident() == ["c0"]  # the engine answers during a run
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
                source.gate.wait_for("c1")  # prefetched
                metrics.waits.clear()
                is_next.set()
                engine.acquire("c2")  # drops c1, and waits for its end

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
    """Runs modules of an engine; checks after every step that memory is within the plan and all bytes are right."""

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
    """Modules run in any order, some inside others, and some fetches fail."""
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
