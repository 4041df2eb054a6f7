"""A server starts or says why not, serves what the store holds now, and stops without leaving anything behind."""

import asyncio
import threading
from pathlib import Path

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus
from websockets.typing import Origin, Subprotocol

from surfw.client import open_wire_source
from surfw.config import MIB
from surfw.errors import ConfigurationError, ConnectionFailedError, NotAStoreError
from surfw.server import WeightServer
from surfw.storage import FilesystemBackend
from surfw.wire import PROTOCOL
from tests.peers import bare_client, serving, whole
from tests.stores import make_store, payload


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    make_store(tmp_path)

    async def main() -> None:
        async with serving(tmp_path) as first:
            second = WeightServer(FilesystemBackend(tmp_path), port=first.port)
            with pytest.raises(ConfigurationError, match=f"port {first.port} on 127.0.0.1 is in use.*--port"):
                await second.start()
            await second.stop()

    asyncio.run(main())


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_listening_beyond_loopback_must_be_asked_for(tmp_path: Path, host: str) -> None:
    make_store(tmp_path)
    with pytest.raises(ConfigurationError, match=r"not authenticated.*--insecure"):
        asyncio.run(WeightServer(FilesystemBackend(tmp_path), host=host, port=0).start())


def test_an_address_that_is_not_ours_is_named(tmp_path: Path) -> None:
    make_store(tmp_path)
    server = WeightServer(FilesystemBackend(tmp_path), host="192.0.2.1", port=0, insecure=True)
    with pytest.raises(ConfigurationError, match=r"cannot listen on 192\.0\.2\.1 port 0"):
        asyncio.run(server.start())


def test_a_host_that_cannot_be_one_is_named(tmp_path: Path) -> None:
    make_store(tmp_path)
    server = WeightServer(FilesystemBackend(tmp_path), host="a..b", port=0, insecure=True)
    with pytest.raises(ConfigurationError, match=r"'a\.\.b' is not a host to listen on.*--host"):
        asyncio.run(server.start())


def test_web_pages_may_not_connect(tmp_path: Path) -> None:
    make_store(tmp_path)

    async def main() -> None:
        async with serving(tmp_path) as server:
            with pytest.raises(InvalidStatus, match="HTTP 403"):
                await connect(server.url, subprotocols=[Subprotocol(PROTOCOL)], origin=Origin("https://example.org"))

    asyncio.run(main())


def test_a_folder_that_is_not_a_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotAStoreError, match="not a surfw store"):
        asyncio.run(WeightServer(FilesystemBackend(tmp_path), port=0).start())


def test_stopping_says_goodbye_and_leaves_nothing(tmp_path: Path) -> None:
    manifest = make_store(tmp_path)
    threads = set(threading.enumerate())

    async def main() -> None:
        server = WeightServer(FilesystemBackend(tmp_path), port=0)
        await server.start()
        waiting = asyncio.create_task(server.serve_forever())
        async with bare_client(server.url, window_bytes=MIB) as client:
            await client.say(
                "get", id=0, model=manifest.name, chunk=manifest.chunks[1].id, form="none", start=0, stop=5_000_000
            )
            await client.hear_text()
            stopping = asyncio.create_task(server.stop())
            assert await client.closed() == (1001, "the server is stopping")
            await stopping
        await waiting
        await server.stop()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        with pytest.raises(ConnectionFailedError, match="connection refused"):
            await open_wire_source(server.url)

    asyncio.run(main())
    assert set(threading.enumerate()) == threads


def test_models_that_are_chunked_meanwhile_become_visible(tmp_path: Path) -> None:
    make_store(tmp_path, "a", [10])

    async def main() -> None:
        async with serving(tmp_path) as server, await open_wire_source(server.url) as source:
            assert await source.models() == ["a"]
            await asyncio.to_thread(make_store, tmp_path, "org/b", [20])
            assert (await source.manifest("org/b")).chunks[0].payload_bytes == 20
            assert await source.models() == ["a", "org/b"]
            assert server.stats()["models"] == ["a", "org/b"]

    asyncio.run(main())


def test_a_model_that_is_chunked_again_is_served_as_it_is_now(tmp_path: Path) -> None:
    make_store(tmp_path, "a", [10])

    async def main() -> None:
        async with serving(tmp_path) as server, await open_wire_source(server.url) as source:
            before = await source.manifest("a")
            await asyncio.to_thread(make_store, tmp_path, "a", [30], seed=1)
            after = await source.manifest("a")
            assert (before.chunks[0].payload_bytes, after.chunks[0].payload_bytes) == (10, 30)
            read, memory = whole(after.chunks[0])
            await source.fetch(after, [read])
            assert bytes(memory) == payload(tmp_path, (await server._store.manifest("a")).chunks[0])

    asyncio.run(main())


def test_more_clients_than_there_is_room_for_are_told_so(tmp_path: Path) -> None:
    make_store(tmp_path)

    async def main() -> None:
        async with serving(tmp_path, clients=1) as server, bare_client(server.url):
            with pytest.raises(ConnectionFailedError, match="takes no more clients"):
                await open_wire_source(server.url)

    asyncio.run(main())


def test_stats_have_the_documented_shape(tmp_path: Path) -> None:
    manifest = make_store(tmp_path, sizes=[5 * MIB])

    async def main() -> None:
        async with serving(tmp_path) as server, await open_wire_source(server.url) as source:
            read, _ = whole(manifest.chunks[0])
            for _ in range(2):
                await source.fetch(manifest, [read])
            stats = server.stats()
            assert {name: sorted(value) for name, value in stats.items() if isinstance(value, dict)} == {
                "server": ["uptime_seconds", "version"],
                "cache": ["bytes", "capacity_bytes", "coalesced", "evictions", "hit_rate", "hits", "misses", "policy"],
                "requests": ["in_flight", "latency_seconds", "total"],
                "storage": ["healthy", "url"],
                "resources": ["cpu_percent", "rss_bytes"],
            }
            assert stats["models"] == ["toy/model"]
            assert stats["bytes_sent"] == 2 * 5 * MIB
            assert stats["clients"] == 1
            cache = stats["cache"]
            assert (cache["hits"], cache["misses"], cache["hit_rate"], cache["bytes"]) == (2, 2, 0.5, 5 * MIB)
            assert (cache["policy"], cache["capacity_bytes"]) == ("lru", 200_000_000)
            assert stats["requests"]["total"] == 2
            assert list(stats["requests"]["latency_seconds"]) == ["p50", "p95", "p99"]
            assert stats["storage"] == {"url": str(tmp_path), "healthy": True}

    asyncio.run(main())
