"""A server's statistics over HTTP."""

import asyncio
import contextlib
import copy
import itertools
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from surfw.client import read_stats
from surfw.errors import ConfigurationError, ConnectionFailedError
from tests.certificates import for_client, for_server, make_certificate
from tests.peers import Talk, serving, tcp_server, until
from tests.stores import make_store


def test_stats_are_those_of_the_server(tmp_path: Path) -> None:
    make_store(tmp_path / "store", "a", [10])
    tls = make_certificate(tmp_path)

    async def main() -> None:
        for options, client in (({}, None), ({"ssl": for_server(tls)}, for_client(tls))):
            async with serving(tmp_path / "store", **options) as server:
                stats = await asyncio.to_thread(read_stats, server.url, ssl=client)
                own = server.stats()
                assert stats["models"] == ["a"]
                assert stats.keys() == own.keys()
                assert (stats["cache"], stats["storage"]) == (own["cache"], own["storage"])

    asyncio.run(main())


def test_a_host_and_a_port_are_enough(tmp_path: Path) -> None:
    make_store(tmp_path)

    async def main() -> None:
        async with serving(tmp_path) as server:
            for prefix in ("", "ws://", "http://"):
                stats = await asyncio.to_thread(read_stats, f"{prefix}127.0.0.1:{server.port}")
                assert stats["models"] == ["toy/model"]

    asyncio.run(main())


def test_a_server_that_has_stopped(tmp_path: Path) -> None:
    make_store(tmp_path)

    async def main() -> None:
        async with serving(tmp_path) as server:
            url = server.url
        with pytest.raises(ConnectionFailedError, match=r"no surfw server at .*: connection refused; start one"):
            await asyncio.to_thread(read_stats, url)

    asyncio.run(main())


@pytest.mark.parametrize("url", ["", "ftp://host", "ws://host:99999", "ws://user:secret@host:port", "ws://["])
def test_a_malformed_address(url: str) -> None:
    with pytest.raises(ConfigurationError, match="is not the address of a server") as caught:
        read_stats(url)
    assert "secret" not in str(caught.value)


def remove(*path: str) -> Callable[[Any], None]:
    def change(stats: Any) -> None:
        for name in path[:-1]:
            stats = stats[name]
        del stats[path[-1]]

    return change


@pytest.mark.parametrize(
    "change",
    [
        remove("models"),
        remove("cache", "hits"),
        remove("storage"),
        lambda stats: stats.update(models="a"),
        lambda stats: stats.update(models=[1]),
        lambda stats: stats.update(clients="1"),
        lambda stats: stats.update(clients=True),
        lambda stats: stats["storage"].update(healthy=1),
        lambda stats: stats["requests"].update(latency_seconds={"p50": None}),
        lambda stats: stats.update(redis={"url": "redis://h"}),
    ],
    ids=range(10),
)
def test_other_answers_are_refused(tmp_path: Path, change: Callable[[Any], None]) -> None:
    make_store(tmp_path)
    said: list[bytes] = []
    status = [200]

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 %d Whatever\r\nContent-Length: %d\r\n\r\n" % (status[0], len(said[0])) + said[0])
        await writer.drain()

    async def main() -> None:
        async with serving(tmp_path) as server:
            good: Any = server.stats()
        async with tcp_server(answer) as url:
            said[:] = [json.dumps(good | {"more": 1}).encode()]
            assert (await asyncio.to_thread(read_stats, url))["models"] == ["toy/model"]
            bad = copy.deepcopy(good)
            change(bad)
            said[:] = [json.dumps(bad).encode()]
            with pytest.raises(ConnectionFailedError, match=r"not a surfw server .*its statistics have another shape"):
                await asyncio.to_thread(read_stats, url)
            said[:] = [b"hello"]
            with pytest.raises(ConnectionFailedError, match=r"not a surfw server .*its statistics are not JSON"):
                await asyncio.to_thread(read_stats, url)
            status[0] = 404
            with pytest.raises(ConnectionFailedError, match=r"not a surfw server \(status 404 for GET /stats\)"):
                await asyncio.to_thread(read_stats, url)

    asyncio.run(main())


def drip(*parts: bytes) -> Talk:
    """A server that sends the first part at once, and then single bytes of the others at intervals, endlessly."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(parts[0])
        with contextlib.suppress(OSError):
            for byte in itertools.cycle(b"".join(parts[1:])):
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(0.02)

    return talk


@pytest.mark.parametrize(
    "talk",
    [
        drip(b"HTTP/1.1 200 OK\r\n", b"A: b\r\n"),
        drip(b"HTTP/1.1 200 OK\r\n", b"A"),
        drip(b"HTTP/1.1 200 OK\r\nServer: surfw/1\r\nContent-Length: 9999\r\n\r\n", b" "),
        drip(b"HTTP/1.1 200 OK\r\nServer: surfw/1\r\nConnection: close\r\n\r\n", b" "),
    ],
)
def test_an_answer_that_never_ends_is_given_up(talk: Talk) -> None:
    async def main() -> None:
        async with tcp_server(talk) as url:
            async with asyncio.timeout(20):  # a guard against a hang
                with pytest.raises(ConnectionFailedError, match=r"no complete answer within 0\.3 seconds"):
                    await asyncio.to_thread(read_stats, url, timeout_seconds=0.3)
            await until(lambda: all(thread.name != "surfw-ask" for thread in threading.enumerate()))

    asyncio.run(main())
