"""A simulated fleet behaves like its caches, plans and links, and like the real fleet it is compared with."""

import sys
from dataclasses import replace

import pytest

from surfw.bench import fleet, fleet_measured
from surfw.bench.fleet import Fleet, bench_fleet, rows_of, simulate
from surfw.bench.fleet_measured import bench_measured
from surfw.config import MB, PAGE_BYTES
from surfw.errors import ConfigurationError

ONE = Fleet(clients=1, servers=1, model_bytes=10 * 8 * MB, chunks=10, cache_bytes=200 * MB, arrivals=0.0)
"""One client of a server that holds the model."""

MANY = Fleet(clients=12, servers=2, model_bytes=16 * 4 * MB, chunks=16, passes=4, cache_bytes=32 * MB, arrivals=1.0)


def test_one_clients_first_pass_misses_and_its_others_hit() -> None:
    found = simulate(replace(ONE, passes=3))
    assert (ONE.parts, found.misses, found.hits, found.coalesced) == (2, 20, 40, 0)
    assert found.storage_bytes == ONE.model_bytes
    assert found.sent_bytes == 3 * ONE.model_bytes
    assert found.hit_rate == pytest.approx(2 / 3)


def test_links_limit_when_the_first_token_comes() -> None:
    by_client = simulate(ONE).first[0]
    assert by_client == pytest.approx(ONE.model_bytes / ONE.client_link, rel=0.1)
    by_storage = simulate(replace(ONE, storage_link=10e6)).first[0]
    assert by_storage == pytest.approx(ONE.model_bytes / 10e6, rel=0.1)
    by_server = simulate(replace(ONE, clients=4, link=125e6)).first
    assert max(by_server) == pytest.approx(4 * ONE.model_bytes / 125e6, rel=0.1)
    by_compute = simulate(replace(ONE, compute_seconds=1.0)).first[0]
    assert by_compute == pytest.approx(10, rel=0.1)


def test_what_clients_keep_is_read_once() -> None:
    kept = replace(ONE, passes=3, budget_bytes=5 * 8 * MB)
    assert 0 < len(kept.kept()) < 5
    per_pass = (10 - len(kept.kept())) * 8 * MB
    assert simulate(kept).sent_bytes == kept.model_bytes + 2 * per_pass
    with pytest.raises(ConfigurationError, match="memory"):
        simulate(replace(ONE, budget_bytes=MB))


def test_the_policy_is_the_servers_own() -> None:
    """Cyclic reads of more than the cache holds: LRU never hits, announced schedules do."""
    alone = replace(ONE, passes=6, model_bytes=40 * 8 * MB, chunks=40, cache_bytes=160 * MB)
    assert simulate(replace(alone, policy="lru")).hits == 0
    assert simulate(alone).hit_rate > 0.3


def test_servers_share_what_redis_holds() -> None:
    without = simulate(MANY)
    with_redis = simulate(replace(MANY, redis_bytes=100 * MB))
    assert with_redis.storage_bytes == MANY.model_bytes < without.storage_bytes
    assert with_redis.redis_bytes > 0
    names = [row.name for row in rows_of(replace(MANY, redis_bytes=100 * MB), with_redis)]
    assert "cost of Redis" in names
    assert "read of Redis" in names


def test_the_same_seed_gives_the_same_figures() -> None:
    assert simulate(MANY) == simulate(MANY)
    assert simulate(MANY).first != simulate(replace(MANY, seed=1)).first


def test_large_fleets_move_larger_parts_and_lose_no_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "_MOST_USES", 2000)
    large = replace(MANY, clients=50, model_bytes=16 * 40 * MB + 3, cache_bytes=320 * MB, passes=1)
    assert (large.parts, -(-large.chunk_bytes // PAGE_BYTES)) == (2, 10)
    assert simulate(large).sent_bytes == 50 * 16 * 40 * MB


def test_rows_say_what_it_costs() -> None:
    rows = {row.name: row for row in bench_fleet(MANY).rows}
    read = rows["read of the storage"]
    cost = rows["cost of storage"]
    assert cost.value == pytest.approx(read.value * MANY.storage_price)
    assert read.baseline == pytest.approx(12 * 4 * 16 * 4 * MB / 1e9)
    assert cost.baseline == pytest.approx(read.baseline * MANY.storage_price)
    assert "12 clients of 2 servers, each keeps 0 of 16 chunks" in rows["hits of the servers' caches"].note


@pytest.mark.parametrize(
    "wrong", [{"clients": 0}, {"link": 0.0}, {"arrivals": float("nan")}, {"cache_bytes": MB}, {"model_bytes": 3}]
)
def test_numbers_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError):
        Fleet(**wrong)  # type: ignore[arg-type]


def test_without_simpy_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "simpy", None)
    with pytest.raises(ConfigurationError, match=r"needs the package simpy: pip install 'surfw\[simulation\]'"):
        simulate(ONE)


def test_a_measured_fleet_reads_what_its_simulation_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    small = Fleet(
        clients=4, servers=2, model_bytes=6 * 5 * MB, chunks=6, passes=2, arrivals=0.3, cache_bytes=40 * MB,
        link=50e6, client_link=30e6, budget_bytes=25 * MB, storage_seconds=0.002, reads=2,
    )  # fmt: skip
    rows = {row.name: row for row in bench_measured(small).rows}
    assert rows["sent to clients"].ratio == pytest.approx(1, rel=0.01)
    assert rows["read of the storage"].value == rows["read of the storage"].baseline == 2 * small.model_bytes / 1e9
    first = rows["time to first token"].baseline
    assert first is not None
    assert first > small.model_bytes / small.client_link * 0.9
    assert fleet_measured.SMALL.clients == 16
