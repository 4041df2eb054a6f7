"""The benchmark completes, compares within one run, and returns its results as data."""

import json
import os
import re
from dataclasses import asdict

import pytest

from surfw.bench.wire import SIZES, Fetch, bench_wire
from surfw.errors import SurfwError


def test_it_measures_what_it_says() -> None:
    found = bench_wire(rounds=2, sizes=[300_000, 5_000_000])
    raw, unverified, verified = found.rows
    assert [row.name for row in found.rows] == ["raw TCP socket", "unverified", "verified"]
    assert (unverified.verified, verified.verified) == (False, True)
    for row in (unverified, verified):
        assert row.unit == "GB/s"
        assert row.low is not None
        assert row.high is not None
        assert 0 < row.low <= row.value <= row.high
        assert row.baseline == raw.value > 0
        assert row.ratio == row.value / raw.value
        assert row.ceiling is not None
        assert row.share == row.value / row.ceiling
        assert re.fullmatch(r"both sides keep \d+\.\d of \d+ cores busy", row.note)
    document = json.loads(json.dumps(asdict(found)))
    assert document["benchmark"] == "wire"
    assert {"cpu", "cores", "memory", "python", "websockets", "blake3"} <= set(document["machine"])
    assert set(document["rows"][0]) == {
        "name", "value", "unit", "low", "high", "baseline", "ratio", "ceiling", "share", "verified", "note", "ratios",
    }  # fmt: skip


def test_sizes_are_those_of_real_layers() -> None:
    assert len(SIZES) == 16
    assert (min(SIZES), max(SIZES)) == (8_000_000, 87_999_995)


async def refuse(*_: object) -> None:
    """Fails like a fetch without a reason."""
    raise TimeoutError


async def end(*_: object) -> None:
    """Ends like a killed client."""
    os._exit(1)


@pytest.mark.parametrize(
    ("fetch", "said"),
    [(refuse, "failed, so nothing was measured: TimeoutError"), (end, "process ended, so nothing was measured")],
)
def test_a_client_that_fails_is_an_error(fetch: Fetch, said: str) -> None:
    with pytest.raises(SurfwError, match=said):
        bench_wire(rounds=1, sizes=[1000], fetch=fetch)
