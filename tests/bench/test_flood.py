"""The floods are within the protocol, and what a good client keeps is measured beside each of them."""

import pytest

from surfw.bench.flood import FLOODS, bench_flood


def test_it_measures_what_it_says() -> None:
    found = bench_flood(seconds=0.2, floods=["get, cancel, never read", "single bytes of one page"])
    assert [row.name for row in found.rows] == [
        "get, cancel, never read",
        "get, cancel, never read: a new client, at worst",
        "single bytes of one page",
        "single bytes of one page: a new client, at worst",
    ]
    for rate, newcomer in (found.rows[:2], found.rows[2:]):
        assert rate.unit == "GB/s"
        assert rate.baseline is not None
        assert rate.ratio == rate.value / rate.baseline > 0
        assert (newcomer.unit, rate.verified) == ("s", True)
        assert newcomer.value > 0


def test_there_are_floods() -> None:
    assert len(FLOODS) == 12
    with pytest.raises(KeyError):
        FLOODS["no such flood"]
