"""The schedule policy: LRU without announced reads, close to the optimum if all reads are announced."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surfw.bench.cache import Arrangement, bench_cache, find_optimum, generate, simulate
from surfw.server.cache import ProvingCache
from surfw.server.policies import ScheduledCache

NAMES = st.sampled_from("abcdef")
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), NAMES, st.integers(1, 6)),
        st.tuples(st.just("use"), NAMES, st.integers(1, 6)),
        st.tuples(st.just("foresee"), NAMES, st.integers(1, 9)),
        st.tuples(st.just("delete"), NAMES, st.just(0)),
        st.tuples(st.just("trim"), st.just(""), st.integers(0, 12)),
    ),
    max_size=60,
)


@settings(deadline=None)
@given(st.integers(0, 16), STEPS)
def test_it_keeps_its_budget_and_without_announcements_it_is_lru(
    capacity: int, steps: list[tuple[str, str, int]]
) -> None:
    plain: ProvingCache[str, bytes] = ProvingCache(capacity, len)
    other: ScheduledCache[str, bytes] = ScheduledCache(capacity, len, lambda _: math.inf, lambda: now)
    coming: dict[str, float] = {}
    foresees: ScheduledCache[str, bytes] = ScheduledCache(
        capacity, len, lambda key: coming.get(key, math.inf), lambda: now
    )
    for now, (step, name, size) in enumerate(steps, 1):
        for cache in (plain, other, foresees):
            match step:
                case "put":
                    cache[name] = bytes(size)
                case "use" | "foresee":
                    cache.get(name)
                    coming[name] = now + size if step == "foresee" else math.inf
                    cache.note_use(name, size, foreseen=cache is foresees and step == "foresee")
                case "delete":
                    cache.pop(name, None)
                case "trim":
                    cache.trim(size)
            assert cache.bytes == sum(len(cache._values[key]) for key in cache) <= capacity
        assert list(other) == list(plain)
        assert other.evictions == plain.evictions


def test_what_is_needed_last_makes_room_and_what_nobody_needs_before_it() -> None:
    coming = {"a": 5.0, "b": 9.0, "c": 7.0}
    cache: ScheduledCache[str, bytes] = ScheduledCache(4, len, lambda key: coming.get(key, math.inf), lambda: 1.0)
    for name in "abcx":
        cache[name] = b"1"
        cache.note_use(name, 1, foreseen=True)
    cache["d"] = b"1"
    assert set(cache) == {"a", "b", "c", "d"}
    cache["e"] = b"1"
    assert set(cache) == {"a", "c", "d", "e"}
    coming["c"] = 2.0
    cache.note_use("d", 1, foreseen=True)
    coming["d"] = 3.0
    cache["f"] = b"1"
    assert set(cache) == {"c", "d", "e", "f"}, "times are looked up anew"


def test_what_others_use_may_be_needed_as_long_after_its_last_use_as_that_is_ago() -> None:
    now, coming = 0.0, {"soon": 14.0, "late": 30.0}
    cache: ScheduledCache[str, bytes] = ScheduledCache(3, len, lambda key: coming.get(key, math.inf), lambda: now)
    for name in ("other", "soon", "late"):
        cache[name] = b"1"
        cache.note_use(name, 1, foreseen=name != "other")
    now = 10.0
    cache["d"] = b"1"
    assert set(cache) == {"other", "soon", "d"}
    cache.note_use("d", 1, foreseen=True)
    coming["d"] = 11.0
    cache["e"] = b"1"
    assert set(cache) == {"soon", "d", "e"}


def test_ten_clients_hit_within_two_points_of_the_optimum_and_better_than_lru() -> None:
    for row in bench_cache(layers=10, passes=4).rows:
        assert row.ceiling is not None
        assert row.baseline is not None
        assert row.value >= row.ceiling - 2, row
        assert row.value > row.baseline, row


def test_one_client_hits_as_often_as_it_can() -> None:
    one = Arrangement(name="one", places=[0], speeds=[1], kept=[()])
    trace = generate(one, layers=8, passes=6)
    assert simulate(trace, 32, "lru") == 0
    assert simulate(trace, 32, "schedule") == find_optimum(trace, 32) == pytest.approx(32 * 5 / (6 * 64))
    assert find_optimum(trace, 64) == simulate(trace, 64, "schedule") == 5 / 6
    assert find_optimum([], 1) == simulate([], 1, "schedule") == 0
