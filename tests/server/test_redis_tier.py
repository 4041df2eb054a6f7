"""A server reports whether its Redis is reachable, works without it, and never shows its credentials."""

import asyncio
import contextlib
import logging
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from surfw.client import open_wire_source, read_stats
from surfw.errors import ConfigurationError, NotAStoreError
from surfw.server import AdvancedWeightServer
from surfw.server.journal import Journal
from surfw.server.redis_tier import RedisTier
from tests.peers import tcp_server, whole
from tests.services.processes import answers, free_port, running, wait_until
from tests.stores import make_store, payload

SECRET = "pa55word"
UNUSED = {"hits": 0, "misses": 0, "bytes_read": 0, "bytes_written": 0, "poisoned": 0}


def bypassed(state: Any) -> dict[str, Any]:
    """The state of a bypassed Redis, without the reason and the duration."""
    assert state["bypassed"]
    assert 0 <= state["bypassed_seconds"] < 60
    return {name: value for name, value in state.items() if not name.startswith("bypassed")}


@contextlib.asynccontextmanager
async def advanced(store: Path, redis_url: str, **settings: Any) -> AsyncIterator[AdvancedWeightServer]:
    """Run a server on a free port; it leaves nothing behind."""
    async with AdvancedWeightServer(store, redis_url, port=0, **settings) as server:
        yield server
    assert asyncio.all_tasks() == {asyncio.current_task()}


def connections(redis_url: str) -> int:
    """The number of a Redis's clients, without this one."""
    with Redis.from_url(redis_url) as redis:
        return int(redis.info("clients")["connected_clients"]) - 1  # type: ignore[index]


def test_closing_right_after_redis_was_left_closes_its_connection(redis_url: str) -> None:
    before = connections(redis_url)

    async def main() -> None:
        tier = RedisTier(redis_url)
        await tier.open(Journal())
        assert tier._link is not None
        assert await asyncio.to_thread(connections, redis_url) == before + 1
        tier._leave(tier._link, "slower than the storage", is_away=False)  # which begins to close the connection
        await tier.close()
        for _ in range(1000):
            if await asyncio.to_thread(connections, redis_url) == before:
                return
            await asyncio.sleep(0.01)
        pytest.fail("its connection is still there")

    asyncio.run(main())


def test_a_redis_that_answers_is_told_and_left_again(tmp_path: Path, redis_url: str) -> None:
    manifest = make_store(tmp_path, sizes=[1000])
    read, memory = whole(manifest.chunks[0])
    before = connections(redis_url)

    async def main() -> None:
        async with advanced(chunks := tmp_path, redis_url) as server:
            assert server.stats()["redis"] == {"url": redis_url, "reachable": True} | UNUSED
            assert server.stats()["cache"]["capacity_bytes"] == 1_000_000_000
            assert await asyncio.to_thread(connections, redis_url) == before + 1
            async with await open_wire_source(server.url) as source:
                await source.fetch(manifest, [read])
            assert (await asyncio.to_thread(read_stats, server.url))["redis"]["reachable"]
            assert await server.health() == {
                "live": True, "ready": True, "storage": str(chunks), "models": ["toy/model"],
            }  # fmt: skip
        assert server.stats()["redis"]["reachable"] is False

    asyncio.run(main())
    assert bytes(memory) == payload(tmp_path, manifest.chunks[0])
    assert connections(redis_url) == before


def test_without_redis_the_server_serves_and_finds_it_when_it_comes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = make_store(tmp_path / "store", sizes=[1000])
    port = free_port()
    url, shown = f"redis://:{SECRET}@127.0.0.1:{port}/0", f"redis://***@127.0.0.1:{port}/0"
    log = tmp_path / "redis.log"
    command = ["redis-server", "--bind", "127.0.0.1", "--port", str(port), "--save", "", "--requirepass", SECRET]

    async def main() -> None:
        async with advanced(tmp_path / "store", url) as server:
            assert bypassed(server.stats()["redis"]) == {"url": shown, "reachable": False} | UNUSED
            async with await open_wire_source(server.url) as source:
                await source.fetch(manifest, [whole(manifest.chunks[0])[0]])
            assert (await server.health())["ready"]
            with running(command, log) as process:
                await asyncio.to_thread(wait_until, lambda: answers(port, b"PING\r\n", b"-NOAUTH"), process, log)
                assert (await server.health())["ready"]
                assert server.stats()["redis"] == {"url": shown, "reachable": True} | UNUSED
            assert await server.health() == {
                "live": True, "ready": True, "storage": str(tmp_path / "store"), "models": ["toy/model"],
                "redis": "bypassed",
            }  # fmt: skip
            assert bypassed(server.stats()["redis"]) == {"url": shown, "reachable": False} | UNUSED
            events = [event["text"] for event in server.stats()["events"] if event["kind"] == "redis"]
            away = f"Redis at {shown} cannot be reached, and the server goes on without it"
            assert events == [away, f"Redis at {shown} is reached", away]

    with caplog.at_level(logging.INFO, logger="surfw.server"):
        asyncio.run(main())
    told = [record for record in caplog.records if "Redis" in record.message]
    assert [record.levelno for record in told] == [logging.WARNING, logging.INFO, logging.WARNING]
    assert told[0].message.startswith(f"Redis at {shown} cannot be reached, and the server goes on without it: ")
    assert SECRET not in caplog.text


def test_a_wrong_password_is_a_redis_that_cannot_be_reached(
    tmp_path: Path, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    make_store(tmp_path)
    url = redis_url.replace("redis://", f"redis://nobody:{SECRET}@")

    async def main() -> None:
        async with advanced(tmp_path, url) as server:
            state = {"url": redis_url.replace("//", "//***@"), "reachable": False}
            assert bypassed(server.stats()["redis"]) == state | UNUSED

    asyncio.run(main())
    assert "invalid username-password pair" in caplog.text
    assert SECRET not in caplog.text


async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


async def babbling(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"\x1b[2J220 mail.example.org ESMTP\r\n" * 100)
    await writer.drain()


@pytest.mark.parametrize("talk", [silent, babbling])
def test_something_else_at_the_address_of_redis(tmp_path: Path, talk: Any, caplog: pytest.LogCaptureFixture) -> None:
    make_store(tmp_path)

    async def main() -> None:
        async with (
            tcp_server(talk) as url,
            AdvancedWeightServer(tmp_path, url.replace("ws://", "redis://"), port=0) as server,
        ):
            assert not server.stats()["redis"]["reachable"]
            assert (await server.health())["ready"]

    asyncio.run(main())
    assert "cannot be reached" in caplog.text
    assert "\x1b" not in caplog.text


def test_a_server_that_cannot_start_leaves_redis_too(tmp_path: Path, redis_url: str) -> None:
    (tmp_path / "store").mkdir()
    before = connections(redis_url)

    async def main() -> None:
        server = AdvancedWeightServer(tmp_path / "store", redis_url, port=0)
        with pytest.raises(NotAStoreError):
            await server.start()
        await asyncio.to_thread(make_store, tmp_path / "store")
        taken = AdvancedWeightServer(tmp_path / "store", redis_url, host="192.0.2.1", port=0, insecure=True)
        with pytest.raises(ConfigurationError, match="cannot listen"):
            await taken.start()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        async with server:
            assert server.stats()["redis"]["reachable"]

    asyncio.run(main())
    assert connections(redis_url) == before


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://127.0.0.1", "http://127.0.0.1"),
        ("127.0.0.1:6379", "127.0.0.1:6379"),
        ("", ""),
        ("redis://host:port", "redis://host:port"),
        ("redis://host:99999", "redis://host:99999"),
        ("redis+cluster://host:port", "redis+cluster://host:port"),
        ("redis+cluster://host/1", "redis+cluster://host/1"),
        ("rediss+cluster://host?nonsense=1", r"rediss+cluster://host?nonsense=***"),
        ("redis://host?nonsense=1", r"redis://host?nonsense=***"),
        ("redis://host?socket_timeout=soon", "redis://host?socket_timeout=***"),
        (f"redis://:{SECRET}/x@host", "redis://***@host"),
        (f"redis:://u:{SECRET}@host", "redis:://***@host"),
    ],
)
def test_a_url_that_is_not_of_a_redis(url: str, shown: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        RedisTier(url)
    assert str(caught.value).startswith(f"{shown} is not the URL of a Redis; expected redis://HOST:PORT/DB, ")
    assert caught.value.__context__ is None


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "redis.asyncio", None)
    with pytest.raises(ConfigurationError, match=r'which is not installed; pip install "surfw\[redis\]"'):
        RedisTier(f"redis://:{SECRET}@127.0.0.1:6379")
