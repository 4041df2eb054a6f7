"""A server's activity between two of its reports."""

import copy
from typing import Any

import pytest

from surfw.wire import Rates, rates_between
from tests.wire.test_reports import STATS, WITH_MORE


def later(stats: Any, seconds: float, **changes: int) -> Any:
    """A report this many seconds later, with these counters increased."""
    after = copy.deepcopy(stats)
    after["server"]["uptime_seconds"] += seconds
    for name, more in changes.items():
        for part in (after["cache"], after["requests"], after):
            if name in part:
                part[name] += more
    return after


def test_rates_are_differences_per_second_of_the_servers_clock() -> None:
    after = later(WITH_MORE, 2, bytes_sent=5_000_000, bytes_read=1_000_000, total=8, hits=30, misses=10)
    after["connections"][0]["bytes_sent"] += 4_000_000
    assert rates_between(WITH_MORE, after) == Rates(
        seconds=2, sent_bytes=2_500_000, read_bytes=500_000, requests=4, hit_rate=0.75, sent_to={3: 2_000_000}
    )


def test_nothing_happened() -> None:
    assert rates_between(WITH_MORE, later(WITH_MORE, 1)) == Rates(
        seconds=1, sent_bytes=0, read_bytes=0, requests=0, hit_rate=None, sent_to={3: 0}
    )


def test_an_older_server_does_not_say_everything() -> None:
    rates = rates_between(STATS, later(STATS, 1, bytes_sent=7))
    assert rates == Rates(seconds=1, sent_bytes=7, read_bytes=None, requests=0, hit_rate=None, sent_to={})


def test_a_client_that_has_just_come_has_no_rate_yet() -> None:
    after = later(WITH_MORE, 1)
    after["connections"].append(after["connections"][0] | {"number": 4, "bytes_sent": 10**9})
    rates = rates_between(WITH_MORE, after)
    assert rates is not None
    assert rates.sent_to == {3: 0}


@pytest.mark.parametrize(
    "after",
    [
        later(STATS, 0),
        later(STATS, -1),
        *(later(STATS, 10, **{name: -1}) for name in ("bytes_sent", "total", "hits", "misses")),
    ],
)
def test_a_server_that_was_started_again_has_no_rates_yet(after: Any) -> None:
    assert rates_between(STATS, after) is None
