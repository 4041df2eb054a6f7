"""Many clients are compared with as many raw connections, starting with an empty cache."""

import json
from dataclasses import asdict

import pytest

from surfw.bench import clients
from surfw.bench.clients import ClientsWork, bench_clients
from surfw.config import MB
from surfw.errors import ConfigurationError, SurfwError


def test_it_measures_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "_MADE_UP", (3 * MB, 5 * MB))
    said: list[str] = []
    work = ClientsWork(clients=2, idle=3, rounds=1, seconds=0.2, direct=True)
    found = bench_clients(work, on_progress=said.append)
    rows = {row.name: row for row in found.rows}
    raw = rows["raw TCP sockets"]
    for name in ("unverified", "verified"):
        row = rows[name]
        assert (row.verified, row.baseline, row.unit) == (name == "verified", raw.value, "GB/s")
        assert row.ratio == row.value / raw.value > 0
        assert row.note == "each has 2 chunks under way"
    direct = rows["the storage, without a server"]
    assert rows["verified, against that"].baseline == direct.value > 0
    assert rows["the fastest client, against the slowest"].value >= 1
    assert rows["read of the storage, against the model"].value == 1
    assert (raw.note, rows["hits of the cache"].note) == ("2 connections at the same time", "the policy is schedule")
    memory = rows["the server's memory, at most"]
    assert memory.ceiling == pytest.approx(8 + 64 + 2 * 8.388608 + 128)
    assert memory.share == pytest.approx(memory.value / memory.ceiling)
    assert rows["idle connections that stayed"].value == rows["idle connections that stayed"].ceiling == 3
    assert said == [
        "round 1 of 1: raw",
        "round 1 of 1: unverified",
        "round 1 of 1: verified",
        "going on for 0.2 seconds",
        "round 1 of 1: direct",
    ]
    assert json.loads(json.dumps(asdict(found)))["benchmark"] == "clients"


@pytest.mark.parametrize("wrong", [{"clients": 0}, {"rounds": 0}, {"idle": -1}, {"seconds": float("nan")}])
def test_numbers_that_make_no_sense_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        ClientsWork(**wrong)  # type: ignore[arg-type]


def test_a_store_that_is_none_is_refused_before_anything_starts(tmp_path: object) -> None:
    with pytest.raises(SurfwError, match="store"):
        bench_clients(ClientsWork(store=str(tmp_path)))
