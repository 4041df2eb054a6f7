"""A server starts or says why not, serves the current content of the store, and stops without leaving anything."""

import asyncio
import contextlib
import gc
import socket
import ssl
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus
from websockets.typing import Origin, Subprotocol

from surfw.client import open_wire_source
from surfw.config import MIB
from surfw.errors import ConfigurationError, ConnectionFailedError, NotAStoreError
from surfw.retry import RetryPolicy
from surfw.server import WeightServer
from surfw.storage import FilesystemBackend
from surfw.wire import PROTOCOL
from tests.certificates import for_server, make_certificate
from tests.peers import bare_client, serving, until, whole
from tests.storage.dict_backend import DictBackend
from tests.stores import make_store, payload


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    make_store(tmp_path)

    async def main() -> None:
        async with serving(tmp_path) as first:
            second = WeightServer(FilesystemBackend(tmp_path), port=first.port)
            with pytest.raises(
                ConfigurationError,
                match=f"port {first.port} on 127.0.0.1 is in use; 'surfw stats 127.0.0.1:{first.port}' tells",
            ):
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
    with pytest.raises(ConfigurationError, match=r"'a\.\.b' is not a host to listen on; choose another"):
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
            assert await client.closed() == (1001, "the server is stopping, and may be back soon")
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
            assert bytes(memory) == payload(tmp_path, (await server._served.store.manifest("a")).chunks[0])

    asyncio.run(main())


def test_more_clients_than_there_is_room_for_are_told_so(tmp_path: Path) -> None:
    make_store(tmp_path)

    async def main() -> None:
        async with serving(tmp_path, clients=1) as server, bare_client(server.url):
            with pytest.raises(
                ConnectionFailedError, match="takes no more clients: all places for clients are taken; try"
            ):
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
                "sending": ["slow_clients"],
            }
            assert stats["models"] == ["toy/model"]
            assert stats["bytes_sent"] == 2 * 5 * MIB
            assert stats["clients"] == 1
            cache = stats["cache"]
            assert (cache["hits"], cache["misses"], cache["hit_rate"], cache["bytes"]) == (2, 2, 0.5, 5 * MIB)
            assert (cache["policy"], cache["capacity_bytes"]) == ("schedule", 200_000_000)
            assert stats["requests"]["total"] == 2
            assert list(stats["requests"]["latency_seconds"]) == ["p50", "p95", "p99"]
            assert stats["storage"] == {"url": str(tmp_path), "healthy": True}

    asyncio.run(main())


FOLDER = FilesystemBackend("x", create=False)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({}, "neither of storage_backend and model_path was given"),
        ({"storage_backend": FOLDER, "model_path": "x"}, "both of .* were given; a server serves one"),
        ({"model_path": "x", "cache_size_mb": -1}, "cache_size_mb is -1; expected a number of MB from 0 on"),
        ({"model_path": "x", "cache_size_mb": float("nan")}, "cache_size_mb is nan"),
        ({"model_path": "x", "cache_size_mb": float("inf")}, "cache_size_mb is inf"),
        ({"model_path": "x", "clients": 0}, "clients is 0; expected at least 1"),
        ({"model_path": "x", "port": 65536}, "port is 65536; expected 0 .a free one. to 65535"),
        ({"model_path": "x", "port": -1}, "port is -1; expected 0 .a free one. to 65535"),
        ({"model_path": "x", "ssl": ssl.create_default_context()}, "the SSL context is for clients"),
        ({"model_path": "nothing://here"}, "storage nothing://here cannot be opened"),
        ({"storage_backend": "x"}, "storage_backend is 'x', expected a StorageBackend"),
    ],
    ids=range(11),
)
def test_arguments_that_cannot_be_used(arguments: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=complaint):
        WeightServer(**arguments)


class Closable(FilesystemBackend):
    """A folder that records when it is closed."""

    closed = 0

    async def close(self) -> None:
        self.closed += 1


def test_a_storage_that_is_given_stays_open_and_one_that_is_named_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_store(tmp_path / "store")
    opened: list[Closable] = []

    def open_closable(url: Path, options: object) -> Closable:
        opened.append(Closable(url))
        return opened[-1]

    monkeypatch.setattr("surfw.server.served.open_backend", open_closable)

    async def main() -> None:
        given = Closable(tmp_path / "store")
        async with WeightServer(given, port=0):
            pass
        assert (given.closed, opened) == (0, [])
        server = WeightServer(model_path=tmp_path / "store", port=0)
        for _ in range(2):
            async with server, await open_wire_source(server.url) as source:
                assert await source.models() == ["toy/model"]
        assert [backend.closed for backend in opened] == [1, 1]
        empty = WeightServer(model_path=tmp_path, port=0)
        with pytest.raises(NotAStoreError):
            await empty.start()
        assert opened[-1].closed == 1

    asyncio.run(main())


def test_a_custom_storage_that_hangs_is_left_at_the_stop(tmp_path: Path) -> None:
    manifest = make_store(tmp_path)
    objects = {path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in tmp_path.rglob("*.*")}

    class Hanging(DictBackend):
        loading = asyncio.Event()

        async def load(self, key: str) -> bytes:
            if key.startswith("blobs/"):
                self.loading.set()
                await asyncio.Event().wait()
            return await super().load(key)

    async def main() -> None:
        backend = Hanging(objects)
        once = RetryPolicy(attempts=1)
        async with serving(backend) as server, await open_wire_source(server.url, retry=once) as source:
            fetching = asyncio.create_task(source.fetch(manifest, [whole(manifest.chunks[0])[0]]))
            await backend.loading.wait()
            await server.stop()
            with pytest.raises(ConnectionFailedError, match="the server is stopping"):
                await fetching
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


def test_a_server_is_started_once_and_again_after_a_stop(tmp_path: Path) -> None:
    manifest = make_store(tmp_path)
    server = WeightServer(model_path=str(tmp_path), port=0, cache_size_mb=50.5)

    async def main() -> None:
        await server.stop()
        for _ in range(2):
            await server.start()
            with pytest.raises(ConfigurationError, match=rf"^the server at {server.url} is started already; stop it"):
                await server.start()
            async with await open_wire_source(server.url) as source:
                read, memory = whole(manifest.chunks[0])
                await source.fetch(manifest, [read])
            assert bytes(memory) == payload(tmp_path, manifest.chunks[0])
            stats = server.stats()
            assert (stats["requests"]["total"], stats["cache"]["misses"]) == (1, 1), "counted since the start"
            assert stats["cache"]["capacity_bytes"] == 50_500_000
            await asyncio.gather(server.stop(), server.stop())
            assert server.stats()["cache"]["bytes"] == 0
            assert asyncio.all_tasks() == {asyncio.current_task()}

    for _ in range(2):
        asyncio.run(main())


def test_serving_forever_starts_and_ends_when_the_server_is_stopped(tmp_path: Path) -> None:
    make_store(tmp_path)

    async def main() -> None:
        server = WeightServer(model_path=tmp_path, port=0)
        serving_forever = asyncio.create_task(server.serve_forever())
        await until(lambda: server.port != 0)
        async with await open_wire_source(server.url) as source:
            assert await source.models() == ["toy/model"]
        await server.stop()
        await serving_forever
        serving_forever = asyncio.create_task(server.serve_forever())
        await until(lambda: server.port != 0)
        url = server.url
        serving_forever.cancel()
        await asyncio.wait([serving_forever])
        assert serving_forever.cancelled()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        with pytest.raises(ConnectionFailedError, match="connection refused"):
            await open_wire_source(url)

    asyncio.run(main())


def test_a_wait_that_is_given_up_leaves_a_server_that_others_started(tmp_path: Path) -> None:
    make_store(tmp_path)

    async def main() -> None:
        async with serving(tmp_path) as server:
            waiting = asyncio.create_task(server.serve_forever())
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.wait([waiting])
            async with await open_wire_source(server.url) as source:
                assert await source.models() == ["toy/model"]

    asyncio.run(main())


def test_no_socket_stays_after_the_stop(tmp_path: Path) -> None:
    make_store(tmp_path)
    process = psutil.Process()

    async def main() -> None:
        before = process.net_connections()
        async with serving(tmp_path) as server, bare_client(server.url):
            assert len(process.net_connections()) > len(before)
        assert [one for one in process.net_connections() if one not in before and one.status != "TIME_WAIT"] == []

    asyncio.run(main())


def test_health_is_data(tmp_path: Path) -> None:
    store = tmp_path / "store"
    make_store(store)

    async def main() -> None:
        server = WeightServer(model_path=store, port=0)
        idle = {"live": False, "ready": False, "storage": str(store), "models": []}
        assert await server.health() == idle
        async with server:
            up = {"live": True, "ready": True, "storage": str(store), "models": ["toy/model"]}
            assert await server.health() == up
            store.rename(tmp_path / "elsewhere")
            assert await server.health() == up | {"ready": False}
            (tmp_path / "elsewhere").rename(store)
            await asyncio.to_thread(make_store, store, "a", [1])
            assert await server.health() == up | {"models": ["a", "toy/model"]}
        assert not (await server.health())["live"]

    asyncio.run(main())


def test_a_token_beyond_loopback_needs_tls(tmp_path: Path) -> None:
    make_store(tmp_path / "store")
    tls = for_server(make_certificate(tmp_path))

    async def main() -> None:
        with pytest.raises(ConfigurationError, match=r"reads the token, and the weights, in clear text; .*--insecure"):
            async with serving(tmp_path / "store", host="0.0.0.0", token="t"):
                raise AssertionError("it started")
        with pytest.raises(ConfigurationError, match="clients are not authenticated"):
            async with serving(tmp_path / "store", host="0.0.0.0", ssl=tls):
                raise AssertionError("it started")
        async with serving(tmp_path / "store", host="0.0.0.0", token="t", ssl=tls) as server:
            assert server.url == f"wss://0.0.0.0:{server.port}"
        for token in (None, "t"):
            async with serving(tmp_path / "store", host="0.0.0.0", token=token, insecure=True) as server:
                assert server.url == f"ws://0.0.0.0:{server.port}"

    asyncio.run(main())


def test_the_credentials_of_a_storage_are_shown_nowhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_store(tmp_path / "store")
    shown = "custom://***@host/store?key=***"

    class Elsewhere(FilesystemBackend):
        def __init__(self, path: Path) -> None:
            super().__init__(path)
            self.url = "custom://me:secret@host/store?key=secret"

    async def main() -> None:
        async with serving(Elsewhere(tmp_path / "store")) as server:
            assert server.stats()["storage"]["url"] == (await server.health())["storage"] == shown
            (tmp_path / "store/surfw.json").unlink()
            assert not (await server.health())["ready"]
        with pytest.raises(NotAStoreError) as caught:
            await server.start()
        assert str(caught.value).startswith(f"{shown} is not a surfw store")

    asyncio.run(main())
    assert shown in caplog.text
    assert "secret" not in caplog.text


@pytest.mark.parametrize("steps", range(5))
def test_connections_that_are_accepted_while_it_stops_are_closed(tmp_path: Path, steps: int) -> None:
    make_store(tmp_path)

    async def main() -> None:
        server = WeightServer(FilesystemBackend(tmp_path), port=0)
        await server.start()
        clients = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(5)]
        for _ in range(steps):  # the loop has come this far with them
            await asyncio.sleep(0)
        await server.stop()
        for client in clients:
            with client, contextlib.suppress(ConnectionResetError):
                client.settimeout(10)
                assert await asyncio.to_thread(client.recv, 1) == b""

    asyncio.run(main())
    gc.collect()  # an open transport gives a warning
