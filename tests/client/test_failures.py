"""Servers that are missing, are something else, disappear, stall or break the protocol."""

import asyncio
import contextlib
import itertools
import json
import signal
import socket
from functools import partial
from pathlib import Path

import pytest
from websockets.asyncio.server import ServerConnection

from surfw.client import open_wire_source as open_and_retry
from surfw.client import probe
from surfw.config import DAMAGE_RETRIES, KIB, MIB
from surfw.errors import ConfigurationError, ConnectionFailedError, IntegrityError, ManifestError
from surfw.manifest import payload_digest
from surfw.retry import RetryPolicy
from tests.peers import Talk, pretending, serving, tcp_server, until, whole
from tests.servers import serve
from tests.stores import make_store

QUICK = 0.3

open_wire_source = partial(open_and_retry, retry=RetryPolicy(attempts=1))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def test_no_server_says_what_to_do() -> None:
    url = f"ws://127.0.0.1:{free_port()}"
    with pytest.raises(ConnectionFailedError) as caught:
        asyncio.run(open_wire_source(url))
    assert str(caught.value) == (
        f"no surfw server at {url}: connection refused; start one with 'surfw serve', or name another"
    )


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1", "127.0.0.1:8765", "ws://", "ws://host:99999", "ws://host:port", ""]
)
def test_a_malformed_address(url: str) -> None:
    with pytest.raises(ConfigurationError, match="is not the address of a server"):
        asyncio.run(open_wire_source(url))


async def http_server(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n" + b"hello" * 1000)
    await writer.drain()


async def silent_server(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


async def babbling_server(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"220 mail.example.org ESMTP\r\n" * 100)
    await writer.drain()


async def dripping_server(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    with contextlib.suppress(OSError):
        for byte in itertools.chain(b"HTTP/1.1 101 Switching Protocols\r\n", itertools.cycle(b"A: b\r\n")):
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(QUICK / 10)


async def server_cut_off(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 101 Switching Pro")
    writer.close()


async def hanging_up_server(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.close()


@pytest.mark.parametrize("talk", [http_server, babbling_server])
def test_something_else_listens_there(talk: Talk) -> None:
    async def main() -> None:
        async with tcp_server(talk) as url:
            with pytest.raises(ConnectionFailedError, match="answers, but is not a surfw server") as caught:
                await open_wire_source(url, connect_timeout=10)
            assert (caught.value.transient, caught.value.absent) == (False, True)
            assert not await probe(url, 10)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("talk", "patience", "complaint"),
    [
        (silent_server, QUICK, f"no answer within {QUICK} seconds"),
        (dripping_server, 4 * QUICK, f"answers, but said no hello within {4 * QUICK} seconds"),
        (hanging_up_server, 10, "hung up before it said hello"),
        (server_cut_off, 10, "hung up before it said hello"),
    ],
)
def test_something_there_says_too_little(talk: Talk, patience: float, complaint: str) -> None:
    async def main() -> None:
        async with tcp_server(talk) as url:
            for ask in (open_wire_source(url, connect_timeout=patience), probe(url, patience)):
                with pytest.raises(ConnectionFailedError, match=complaint) as caught:
                    await ask
                assert (caught.value.transient, caught.value.absent) == (True, False)

    asyncio.run(main())


@pytest.mark.parametrize("hello", ["hi", '{"type":"hello"}', b"\0\1", '{"type":"models","id":0,"models":[]}'])
def test_a_websocket_that_does_not_speak_our_protocol(hello: str | bytes) -> None:
    async def answer(websocket: ServerConnection) -> None:
        await websocket.send(hello)
        await websocket.wait_closed()

    async def main() -> None:
        async with pretending(answer, greet=False) as url:
            with pytest.raises(ConnectionFailedError, match="answers, but is not a surfw server"):
                await open_wire_source(url)
            assert not await probe(url)

    asyncio.run(main())


def test_probe_finds_a_server_and_nothing_else(tmp_path: Path) -> None:
    make_store(tmp_path, sizes=[1])

    async def main() -> None:
        async with serving(tmp_path) as server:
            assert await probe(server.url, 10)
            await until(lambda: server.stats()["clients"] == 0)
        assert not await probe(server.url)
        with pytest.raises(ConfigurationError, match="is not the address of a server"):
            await probe("ws://127.0.0.1:99999")

    asyncio.run(main())


def test_a_server_that_is_killed_during_a_fetch(tmp_path: Path) -> None:
    manifest = make_store(tmp_path, sizes=[60 * MIB])
    chunk = manifest.chunks[0]

    async def main() -> None:
        with serve(tmp_path) as served:
            source = await open_wire_source(served.url)
            read, memory = whole(chunk)
            fetching = asyncio.create_task(source.fetch(manifest, [read]))
            await until(lambda: any(memory[:4096]))
            served.process.send_signal(signal.SIGKILL)
            with pytest.raises(ConnectionFailedError) as caught:
                await fetching
            text = str(caught.value)
            assert text.startswith(f"the server at {served.url} went away, after ")
            last = f"; the last attempt: no surfw server at {served.url}: connection refused"
            said = text.replace(last, "")  # unless it disappeared during that attempt, too
            advice = "see what became of the server, and run it again"
            assert said.endswith(f" of {60 * MIB} bytes of chunk layers.0; {advice}")
            seen = bytes(memory)
            await asyncio.to_thread(served.process.wait)  # until then, it may still be listening
            with pytest.raises(ConnectionFailedError, match="connection refused"):
                await source.models()
            await source.close()
            assert bytes(memory) == seen

    asyncio.run(main())


def test_a_server_that_falls_silent(tmp_path: Path) -> None:
    manifest = make_store(tmp_path, sizes=[MIB])

    async def answer(websocket: ServerConnection) -> None:
        await websocket.recv()
        await websocket.send('{"type":"data","id":0,"start":0,"stop":262144}')
        await websocket.send(bytes(128 * KIB))
        await websocket.wait_closed()

    async def main() -> None:
        async with pretending(answer) as url, await open_wire_source(url, silence_timeout=QUICK) as source:
            with pytest.raises(
                ConnectionFailedError, match=rf"said nothing for {QUICK} seconds, after 131072 of 1048576 bytes"
            ):
                await source.fetch(manifest, [whole(manifest.chunks[0])[0]])

    asyncio.run(main())


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        (["nonsense"], "not JSON"),
        ([b"unasked"], "binary data that no message announced"),
        ([bytes(100_000)], "binary data that no message announced"),
        (['{"type":"data","id":0,"start":0,"stop":10}', bytes(11)], "a binary frame of 11 bytes; 10 are left"),
        (['{"type":"data","id":0,"start":0,"stop":10000}', bytes(10_001)], "a binary frame of 10001 bytes"),
        (['{"type":"data","id":0,"start":0,"stop":2000000}'], "data is out of order"),
        (['{"type":"data","id":5,"start":0,"stop":1}'], "data for id 5, which is not open"),
        (['{"type":"data","id":0,"start":0,"stop":9}', '{"type":"models","id":0,"models":[]}'], "within a run"),
        ([b"x" * 600 * KIB], "broke the protocol: frame with 614400 bytes"),
        ([[b"in", b"fragments"]], "fragmented"),
        (['{"type":"data","id":0,"start":0,"stop":9}', '{"type":"error","id":0,' + " " * 5000 + "}"], "within a run"),
    ],
)
def test_a_server_that_breaks_the_protocol(
    tmp_path: Path, messages: list[str | bytes | list[bytes]], complaint: str
) -> None:
    manifest = make_store(tmp_path, sizes=[MIB])

    async def answer(websocket: ServerConnection) -> None:
        await websocket.recv()
        for message in messages:
            await websocket.send(message)
        await websocket.wait_closed()

    async def main() -> None:
        async with pretending(answer) as url, await open_wire_source(url, silence_timeout=5) as source:
            with pytest.raises(ConnectionFailedError, match=complaint):
                await source.fetch(manifest, [whole(manifest.chunks[0])[0]])

    asyncio.run(main())


def test_a_server_that_leaves_says_why(tmp_path: Path) -> None:
    manifest = make_store(tmp_path, sizes=[MIB])

    async def answer(websocket: ServerConnection) -> None:
        await websocket.recv()
        await websocket.close(1001, "the server is stopping")

    async def main() -> None:
        async with pretending(answer) as url, await open_wire_source(url) as source:
            with pytest.raises(
                ConnectionFailedError, match="closed the connection: the server is stopping, after 0 of"
            ):
                await source.fetch(manifest, [whole(manifest.chunks[0])[0]])

    asyncio.run(main())


@pytest.mark.parametrize(
    ("document", "digest", "error"),
    [
        (b"{}", None, ManifestError),
        (b"\xff\0", None, ManifestError),
        (b"{}", "0" * 64, IntegrityError),
        ("other", None, ManifestError),
    ],
)
def test_a_manifest_that_is_not_the_one_asked_for(
    tmp_path: Path, document: bytes | str, digest: str | None, error: type[Exception]
) -> None:
    body = document if isinstance(document, bytes) else make_store(tmp_path, document, [1]).public().encode()

    async def answer(websocket: ServerConnection) -> None:
        for number in itertools.count():
            await websocket.recv()
            begin = {"type": "begin", "id": number, "size": len(body), "digest": digest or payload_digest(body)}
            await websocket.send(json.dumps(begin))
            await websocket.send(json.dumps({"type": "data", "id": number, "start": 0, "stop": len(body)}))
            await websocket.send(body)

    async def main() -> None:
        async with pretending(answer) as url, await open_wire_source(url) as source:
            with pytest.raises(error):
                await source.manifest("toy/model")

    asyncio.run(main())


def test_many_requests_at_once_fail_together(tmp_path: Path) -> None:
    manifest = make_store(tmp_path, sizes=[MIB])

    async def answer(websocket: ServerConnection) -> None:
        await websocket.recv()
        websocket.transport.abort()

    async def main() -> None:
        async with pretending(answer) as url, await open_wire_source(url) as source:
            waiting = [source.fetch(manifest, [whole(manifest.chunks[0])[0]]) for _ in range(200)]
            ended = await asyncio.gather(*waiting, return_exceptions=True)
            assert {type(one) for one in ended} == {ConnectionFailedError}

    asyncio.run(main())


def test_a_path_that_a_server_does_not_have(tmp_path: Path) -> None:
    make_store(tmp_path, sizes=[1])

    async def main() -> None:
        async with serving(tmp_path) as server:
            with pytest.raises(ConnectionFailedError, match=r"path /foo with status 404; expected ws://HOST:PORT$"):
                await open_wire_source(f"{server.url}/foo")

    asyncio.run(main())


def test_a_server_that_takes_any_number_of_requests(tmp_path: Path) -> None:
    async def answer(websocket: ServerConnection) -> None:
        hello = {"server": "s", "frame_bytes": 128 * KIB, "window_bytes": MIB, "requests": 1 << 53}
        await websocket.send(json.dumps({"type": "hello", "protocol": "surfw.v1"} | hello))
        await websocket.recv()
        await websocket.close(1001, "\x1b[2Jgone")

    async def main() -> None:
        async with pretending(answer, greet=False) as url, await open_wire_source(url) as source:
            with pytest.raises(ConnectionFailedError, match=r"closed the connection: \?\[2Jgone"):
                await source.models()

    asyncio.run(main())


@pytest.mark.parametrize("size", [0, 5, MIB])
def test_a_file_of_another_size_is_not_taken(tmp_path: Path, size: int) -> None:
    manifest = make_store(tmp_path, sizes=[1])
    heard = []

    async def answer(websocket: ServerConnection) -> None:
        for number in range(1 + DAMAGE_RETRIES):
            await websocket.recv()
            begin = {"type": "begin", "id": number, "size": size, "digest": manifest.files[0].digest}
            await websocket.send(json.dumps(begin))
            heard.append(await websocket.recv())
            failed = {"type": "error", "id": number, "code": "cancelled", "message": "given up"}
            await websocket.send(json.dumps(failed))
        await websocket.recv()
        await websocket.send('{"type":"models","id":3,"models":["still","here"]}')
        await websocket.wait_closed()

    async def main() -> None:
        async with pretending(answer) as url, await open_wire_source(url) as source:
            with pytest.raises(
                IntegrityError,
                match="is not the one its manifest lists; chunk the model again: it was the same 3 times",
            ):
                await source.file(manifest, manifest.files[0].path)
            assert source.refetched_blocks == 2
            assert await source.models() == ["here", "still"]

    asyncio.run(main())
    assert heard == [f'{{"type":"cancel","id":{number}}}' for number in range(3)]
