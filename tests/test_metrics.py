"""Counters, percentiles and spans, with a clock that the test advances."""

import asyncio
import json
import math
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surfw import metrics
from surfw.metrics import Latency, Metrics, hit_rate


class Clock:
    """Replaces `time.perf_counter`."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(metrics.time, "perf_counter", clock)
    return clock


def test_no_observations_rank_as_zero() -> None:
    assert Latency().percentiles(50, 95) == {"p50": 0.0, "p95": 0.0}


def test_percentiles_are_observations() -> None:
    latency = Latency()
    for value in (0.4, 0.1, 0.3, 0.2):
        latency.observe(value)
    assert latency.percentiles(0, 25, 50, 75, 100) == {"p0": 0.1, "p25": 0.1, "p50": 0.2, "p75": 0.3, "p100": 0.4}
    assert (latency.count, latency.total_seconds) == (4, pytest.approx(1.0))


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=300), st.integers(1, 100))
def test_a_percentile_is_the_least_value_that_enough_observations_reach(values: list[float], rank: int) -> None:
    latency = Latency()
    for value in values:
        latency.observe(value)
    enough = math.ceil(rank * len(values) / 100)
    assert latency.percentiles(rank)[f"p{rank}"] == sorted(values)[enough - 1]


def test_only_the_latest_observations_are_kept() -> None:
    latency = Latency(keep=3)
    for value in range(10):
        latency.observe(value)
    assert latency.percentiles(1, 100) == {"p1": 7, "p100": 9}
    assert latency.count == 10


def test_counters_lose_nothing_between_threads() -> None:
    counted = Metrics()
    start = threading.Barrier(8)

    def count() -> None:
        start.wait()
        for _ in range(1000):
            counted.add("hits")
            counted.add("bytes", 3)

    threads = [threading.Thread(target=count) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (counted.count("hits"), counted.count("bytes"), counted.count("never")) == (8000, 24000, 0)


def test_spans_add_up_and_count_while_they_are_open(clock: Clock) -> None:
    timed = Metrics()
    with timed.span("stall"):
        clock.now += 2
    with timed.span("stall"):
        clock.now += 3
        assert timed.seconds("stall") == 5
        assert timed.seconds("forward") == 0
    timed.add_seconds("stall", 0.5)
    assert timed.seconds("stall") == 5.5


def test_a_span_ends_with_its_exception(clock: Clock) -> None:
    timed = Metrics()

    def fail() -> None:
        with timed.span("forward"):
            clock.now += 7
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    clock.now += 100
    assert timed.seconds("forward") == 7


def test_a_snapshot_is_plain_data_of_its_moment(clock: Clock) -> None:
    counted = Metrics()
    counted.add("hits", 2)
    with counted.span("stall"):
        clock.now += 1
    taken = counted.snapshot()
    counted.add("hits")
    assert json.loads(json.dumps(taken)) == {"counters": {"hits": 2}, "seconds": {"stall": 1.0}}


def test_a_latency_is_made_once() -> None:
    counted = Metrics()
    counted.latency("fetch").observe(1.0)
    assert counted.latency("fetch").count == 1
    assert counted.latency("verify").count == 0


@pytest.mark.parametrize(("hits", "misses", "rate"), [(0, 0, 0.0), (3, 1, 0.75), (0, 5, 0.0), (5, 0, 1.0)])
def test_hit_rate(hits: int, misses: int, rate: float) -> None:
    assert hit_rate(hits, misses) == rate


def test_what_is_off_the_record_is_taken_back() -> None:
    metrics = Metrics()
    metrics.add("hits", 2)
    metrics.add_seconds("stall", 1.5)
    metrics.latency("fetch").observe(0.25)
    with metrics.off_the_record():
        metrics.add("hits")
        metrics.add("misses")
        metrics.add_seconds("stall", 1)
        metrics.latency("fetch").observe(4)
        assert (metrics.count("hits"), metrics.seconds("stall")) == (3, 2.5)
    assert metrics.snapshot() == {"counters": {"hits": 2}, "seconds": {"stall": 1.5}}
    assert (metrics.latency("fetch").count, metrics.latency("fetch").total_seconds) == (1, 0.25)


def test_what_others_count_while_something_is_off_the_record_stays(clock: Clock) -> None:
    counted = Metrics()
    counted.add("hits", 2)
    away, counted_too, over = threading.Event(), threading.Event(), threading.Event()
    seen = []

    def other() -> None:
        with counted.span("forward"), counted.span("stall"):  # starts before the interval and ends in it
            assert away.wait(60)
            counted.add("hits", 10)
            counted.add_seconds("decode", 0.5)
            counted.latency("fetch").observe(7.0)
            clock.now += 3
        seen.append((counted.count("hits"), counted.seconds("forward"), counted.seconds("read")))
        with counted.span("forward"):  # starts in the interval and ends after it
            counted_too.set()
            assert over.wait(60)
            clock.now += 5

    thread = threading.Thread(target=other)
    thread.start()
    with counted.off_the_record():
        counted.add("hits", 100)
        counted.latency("fetch").observe(50.0)
        away.set()
        assert counted_too.wait(60)
        with counted.span("read"):
            clock.now += 1
        assert (counted.count("hits"), counted.seconds("read"), counted.seconds("forward")) == (112, 1, 4)
    over.set()
    thread.join(60)
    assert seen == [(12, 3, 0)]
    assert counted.snapshot() == {"counters": {"hits": 12}, "seconds": {"stall": 3, "decode": 0.5, "forward": 9}}
    assert (counted.latency("fetch").count, counted.latency("fetch").total_seconds) == (1, 7.0)


def test_tasks_that_were_started_off_the_record_stay_there() -> None:
    counted, other = Metrics(), Metrics()

    async def work() -> None:
        await asyncio.sleep(0)
        counted.add("hits")
        other.add("hits")

    async def main() -> None:
        with counted.off_the_record():
            task = asyncio.create_task(work())
        await task
        await work()

    asyncio.run(main())
    assert (counted.count("hits"), other.count("hits")) == (1, 2)
