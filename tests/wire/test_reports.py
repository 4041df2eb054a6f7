"""Statistics have the documented shape, or are refused with one kind of error."""

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surfw.errors import RemoteProtocolError
from surfw.wire import ServerStats, find_shortage, parse_stats

STATS: ServerStats = {
    "server": {"version": "1", "uptime_seconds": 2},
    "models": ["a", "org/b"],
    "cache": {
        "hits": 1, "misses": 2, "coalesced": 3, "hit_rate": 0.5, "bytes": 4, "capacity_bytes": 5, "evictions": 6,
        "policy": "lru",
    },
    "requests": {"total": 7, "in_flight": 8, "latency_seconds": {"p50": 0.1, "p95": 0.2, "p99": 1}},
    "bytes_sent": 9,
    "clients": 10,
    "storage": {"url": "/store", "healthy": True},
    "resources": {"rss_bytes": 11, "cpu_percent": 12.5},
}  # fmt: skip
WITH_MORE: ServerStats = STATS | {
    "bytes_read": 12,
    "connections": [
        {
            "number": 3, "name": "surfw/1", "address": "127.0.0.1:50412", "connected_seconds": 13.5, "model": "org/b",
            "in_flight": 1, "bytes_sent": 14,
        }
    ],
    "events": [{"time": 1.5e9, "kind": "joined", "text": "surfw/1 at 127.0.0.1:50412 joined"}],
    "cache_shortage": {"model": "org/b", "pass_bytes": 15, "cache_mb": 30},
    "heat": [{"model": "org/b", "chunks": 2, "resident": [1.0, 0.5], "hits": [3, 0]}],
    "sending": {"slow_clients": 16, "max_bytes_per_second": 17},
}  # fmt: skip
"""With fields that older servers do not report."""
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
JSON = PLAIN | st.lists(PLAIN, max_size=3) | st.dictionaries(st.text(max_size=5), PLAIN, max_size=3)


def test_statistics_are_read_as_they_were_written() -> None:
    assert parse_stats(json.dumps(STATS).encode()) == STATS
    assert parse_stats(json.dumps(WITH_MORE).encode()) == WITH_MORE
    with_redis = STATS | {"redis": {"url": "redis://h", "reachable": False}}
    assert parse_stats(json.dumps(with_redis).encode()) == with_redis


def test_a_cache_is_too_small_for_who_reads_more_than_it_holds_in_each_pass() -> None:
    assert find_shortage(WITH_MORE, 6) == WITH_MORE["cache_shortage"]
    assert find_shortage(WITH_MORE, 5) is None
    assert find_shortage(STATS, 6) is None


@pytest.mark.parametrize("key", sorted(WITH_MORE))
@given(value=JSON)
def test_a_part_of_another_shape_is_refused(key: str, value: object) -> None:
    changed = WITH_MORE | {key: value}
    fits = (
        (key == "models" and isinstance(value, list) and all(isinstance(one, str) for one in value))
        or (key in {"connections", "events", "heat"} and value == [])
        or (
            key in {"bytes_sent", "bytes_read", "clients"}
            and isinstance(value, int)
            and not isinstance(value, bool)
            and abs(value) <= 1 << 53
        )
    )
    if fits:
        assert parse_stats(json.dumps(changed).encode()) == changed
    else:
        with pytest.raises(RemoteProtocolError, match="its statistics have another shape"):
            parse_stats(json.dumps(changed).encode())


@given(st.binary(max_size=40))
def test_any_bytes_are_statistics_or_refused(data: bytes) -> None:
    with contextlib.suppress(RemoteProtocolError):
        parse_stats(data)
        raise AssertionError("so few bytes are no statistics")


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(RemoteProtocolError, match="not JSON"):
        parse_stats(b"[" * 200_000)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("storage", {"url": "s" * 4097, "healthy": True}),
        ("server", {"version": "1", "uptime_seconds": float("nan")}),
        ("server", {"version": "1", "uptime_seconds": float("inf")}),
        ("server", {"version": "1", "uptime_seconds": 10**400}),
        ("bytes_sent", 10**400),
        ("requests", {"total": 7, "in_flight": 8, "latency_seconds": {f"p{rank}": 1.0 for rank in range(17)}}),
        ("requests", {"total": 7, "in_flight": 8, "latency_seconds": {"p" * 4097: 1.0}}),
    ],
)
def test_values_that_could_not_be_shown_are_refused(part: str, value: object) -> None:
    with pytest.raises(RemoteProtocolError, match="its statistics have another shape"):
        parse_stats(json.dumps(STATS | {part: value}).encode())
