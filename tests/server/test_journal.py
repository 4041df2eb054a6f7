"""Events are logged, and listed in the statistics; clients are listed while they are connected."""

import asyncio
import logging
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from surfw.client import open_wire_source
from surfw.client.connect import probe
from surfw.config import MIB
from surfw.server import pages
from surfw.server.connection import Connection
from surfw.server.journal import KEPT_EVENTS, Journal, Sparse
from surfw.server.reception import show_address
from tests.peers import bare_client, serving, until, whole
from tests.server.backends import GatedBackend
from tests.stores import make_store


def told(server: Any, kind: str) -> list[str]:
    """The events of a kind in the statistics."""
    return [event["text"] for event in server.stats()["events"] if event["kind"] == kind]


def test_one_call_writes_a_line_and_an_event(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "surfw.server")
    journal = Journal()
    journal.note("failed", "a \x1b[2J client cannot be answered", "/secret/place")
    journal.note("joined", "somebody joined")
    assert caplog.messages == ["a \x1b[2J client cannot be answered: /secret/place", "somebody joined"]
    events, own = journal.recent(), journal.recent(details=True)
    assert [event["text"] for event in events] == ["a ?[2J client cannot be answered", "somebody joined"]
    assert own[0] == events[0] | {"text": "a ?[2J client cannot be answered: /secret/place"}
    assert own[1] == events[1]


def test_the_latest_events_are_kept() -> None:
    journal = Journal()
    for number in range(KEPT_EVENTS + 5):
        journal.note("joined", f"{number}")
    assert [event["text"] for event in journal.recent()] == [str(number) for number in range(5, KEPT_EVENTS + 5)]


def test_what_others_cause_is_counted() -> None:
    journal = Journal()
    sparse = Sparse(journal, "refused", logging.INFO, most=2)
    for number in range(5):
        sparse.note(f"{number}", "why")
    sparse.flush()
    sparse.flush()
    assert [event["text"] for event in journal.recent(details=True)] == [
        "0: why", "1: why", "4: why (and 2 times more before)"
    ]  # fmt: skip


def test_clients_and_what_they_read(tmp_path: Path) -> None:
    manifest = make_store(tmp_path, "org/a", sizes=[5 * MIB])

    async def main() -> None:
        async with serving(tmp_path) as server, bare_client(server.url) as idle:
            async with await open_wire_source(server.url) as source:
                read, _ = whole(manifest.chunks[0])
                await source.fetch(manifest, [read])
                stats = server.stats()
                busy, other = stats["connections"]
                assert busy["name"].startswith("surfw/")
                assert (busy["model"], busy["bytes_sent"], busy["in_flight"]) == ("org/a", 5 * MIB, 0)
                assert (other["name"], other["model"], other["bytes_sent"]) == ("bare", "", 0)
                assert other["address"] == show_address(idle.websocket.local_address)
                assert 0 <= busy["connected_seconds"] <= other["connected_seconds"] <= stats["server"]["uptime_seconds"]
                assert stats["bytes_read"] == 5 * MIB
                assert told(server, "joined") == [f"{busy['name']} at {busy['address']} joined"]
            await until(lambda: server.stats()["clients"] == 1)
            assert told(server, "left") == [f"{busy['name']} at {busy['address']} left"]

    asyncio.run(main())


def test_the_busiest_clients_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_store(tmp_path, sizes=[100])
    monkeypatch.setattr("surfw.server.server.MOST_CONNECTIONS", 2)

    async def main() -> None:
        async with (
            serving(tmp_path) as server,
            bare_client(server.url),
            bare_client(server.url) as busy,
            bare_client(server.url),
        ):
            await busy.say("manifest", id=0, model="toy/model")
            await busy.hear_text()
            await until(lambda: len(server.stats()["connections"]) == 2)
            stats = server.stats()
            assert stats["clients"] == 3
            assert stats["connections"][0]["address"] == show_address(busy.websocket.local_address)

    asyncio.run(main())


def test_whoever_only_looks_for_a_server_leaves_no_trace(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_store(tmp_path, sizes=[100])
    caplog.set_level("INFO", "surfw.server")

    async def main() -> None:
        async with serving(tmp_path) as server:
            for _ in range(3):
                assert await probe(server.url)
            await until(lambda: server.stats()["clients"] == 0)
            assert server.stats()["events"] == []

    asyncio.run(main())
    assert caplog.messages == []


def test_refusals_say_why(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_store(tmp_path, sizes=[100])

    async def main() -> None:
        async with serving(tmp_path, clients=1) as server, bare_client(server.url) as client:
            await client.say("manifest", id=0, model="nope")
            await client.hear_text()
            mine = show_address(client.websocket.local_address)
            assert not await _connects(server.url)
            first, second = told(server, "refused")
            assert first == f"{mine} is refused: there is no model 'nope' here"
            assert second.endswith(" is refused: all places for clients are taken")
            assert not await _connects(server.url)
            assert not await _connects(server.url)
            assert len(told(server, "refused")) == 2
            await client.websocket.send("garbage")
            await client.closed()
            assert told(server, "closed")[0].startswith(f"{mine} is closed: ")

    asyncio.run(main())
    (counted,) = [line for line in caplog.messages if "more before" in line]
    assert counted.endswith(" is refused: all places for clients are taken (and 1 time more before)")


async def _connects(url: str) -> bool:
    try:
        async with bare_client(url):
            return True
    except Exception:  # noqa: BLE001 - of the library's, for any status
        return False


def test_a_storage_that_fails_and_comes_back(tmp_path: Path) -> None:
    manifest = make_store(tmp_path / "store", sizes=[100])
    wanted = {"model": manifest.name, "chunk": manifest.chunks[0].id, "form": "none", "start": 0, "stop": 100}

    async def main() -> None:
        backend = GatedBackend(tmp_path / "store")
        backend.gate.set()
        backend.failing = True
        async with serving(backend) as server, bare_client(server.url) as client:
            await client.say("get", id=0, **wanted)
            assert (await client.hear_text())["code"] == "storage"
            (failed,) = told(server, "failed")
            assert failed == f"{show_address(client.websocket.local_address)} cannot be answered"
            (detailed,) = [event["text"] for event in server.stats(details=True)["events"] if event["kind"] == "failed"]
            assert detailed.startswith(f"{failed}: ")
            backend.failing = False
            (tmp_path / "store").rename(tmp_path / "elsewhere")
            for _ in range(3):
                assert not (await server.health())["ready"]
            (tmp_path / "elsewhere").rename(tmp_path / "store")
            assert (await server.health())["ready"]
            lost = f"the storage {tmp_path / 'store'} cannot be reached"
            assert told(server, "storage") == [lost, lost, f"the storage {tmp_path / 'store'} answers again"]
            counted = [event["text"] for event in server.stats(details=True)["events"] if lost in event["text"]]
            assert counted[1].endswith(" (and 1 time more before)"), "however long the path is"

    asyncio.run(main())


def test_a_request_that_fails_because_of_a_bug(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make_store(tmp_path, sizes=[100])
    monkeypatch.setattr(Connection, "_send_answer", Mock(side_effect=ValueError("a bug")))

    async def main() -> None:
        async with serving(tmp_path) as server, bare_client(server.url) as client:
            await client.say("models", id=0)
            assert (await client.hear_text())["code"] == "internal"
            mine = show_address(client.websocket.local_address)
            assert told(server, "failed") == [f"{mine} cannot be answered, which is a bug in surfw"]

    asyncio.run(main())
    (record,) = [record for record in caplog.records if "which is a bug in surfw: ListModels" in record.message]
    assert record.levelname == "ERROR"
    assert record.exc_info is not None
    assert str(record.exc_info[1]) == "a bug"


def test_a_slow_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = make_store(tmp_path, sizes=[1_000_000])
    monkeypatch.setattr(pages, "PROGRESS_SECONDS", 0)

    async def main() -> None:
        async with serving(tmp_path) as server, await open_wire_source(server.url) as source:
            read, _ = whole(manifest.chunks[0])
            await source.fetch(manifest, [read])
            (slow,) = told(server, "storage")
            assert slow.startswith("the storage is slow: reading 1.0 MB took ")

    asyncio.run(main())


def test_models_that_come_and_go(tmp_path: Path) -> None:
    make_store(tmp_path, "a", [10])

    async def main() -> None:
        async with serving(tmp_path) as server:
            assert told(server, "models") == []
            for name in ("b", "c", "d", "e"):
                await asyncio.to_thread(make_store, tmp_path, name, [10])
            await server.health()
            (tmp_path / "models" / "a.json").unlink()
            await server.health()
            assert told(server, "models") == ["4 models new in the store: b, c, d and 1 more", "1 model gone: a"]

    asyncio.run(main())


def test_a_cache_smaller_than_one_pass(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    small = make_store(tmp_path, "small", [MIB])
    large = make_store(tmp_path, "large", [15 * MIB, 15 * MIB])
    caplog.set_level("INFO", "surfw.server")

    async def main() -> None:
        async with serving(tmp_path, cache_size_mb=20) as server, await open_wire_source(server.url) as source:
            for manifest in (small, large, large):
                for chunk in manifest.chunks:
                    await source.fetch(manifest, [whole(chunk)[0]])
                shortage = server.stats().get("cache_shortage")
                if manifest is small:
                    assert shortage is None
            assert shortage == {"model": "large", "pass_bytes": 30 * MIB, "cache_mb": 50}
            text = (
                "the cache of 20.0 MB is smaller than one pass over large (31.5 MB), so every pass reads from the "
                "storage; --cache-mb 50 would hold it"
            )
            assert told(server, "cache") == [text]
            assert caplog.messages.count(text) == 1

    asyncio.run(main())
    asyncio.run(_the_size_that_helps(tmp_path, large))


async def _the_size_that_helps(store: Path, large: Any) -> None:
    async with serving(store, cache_size_mb=50) as server, await open_wire_source(server.url) as source:
        for _ in range(2):
            for chunk in large.chunks:
                await source.fetch(large, [whole(chunk)[0]])
        stats = server.stats()
        assert "cache_shortage" not in stats
        assert (stats["cache"]["evictions"], stats["cache"]["hit_rate"]) == (0, 0.5)
