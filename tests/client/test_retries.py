"""A lost connection is reopened, and a chunk continues after its verified part."""

import asyncio
import json
import logging
import signal
import socket
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.server import ServerConnection

from surfw.client import open_wire_source
from surfw.client.wire_source import WireSource
from surfw.config import KIB, MIB, WireLimits
from surfw.errors import ConnectionFailedError, IntegrityError
from surfw.retry import RetryPolicy
from surfw.server import WeightServer
from surfw.storage import FilesystemBackend
from tests.peers import pretending, until, whole
from tests.servers import serve
from tests.stores import make_store, payload

AT_ONCE = RetryPolicy(attempts=3, first_delay_seconds=0, restart_seconds=0)
Talk = Callable[[ServerConnection], Awaitable[None]]


def sends(data: bytes, *lengths: int, flips: Sequence[int] = ()) -> tuple[list[dict[str, Any]], Talk]:
    """A server that hangs up after this many bytes of its first, second, … answer; it records the requests.

    At each of the offsets `flips`, it damages a byte of the first, second, … answer that includes it.
    """
    asked: list[dict[str, Any]] = []
    left, damage = list(lengths), list(flips)

    async def answer(websocket: ServerConnection) -> None:
        async for message in websocket:
            request = json.loads(message)
            if request["type"] == "credit":
                continue
            asked.append(request)
            start, stop = request["start"], request["stop"]
            body = bytearray(data[start:stop])
            for at in set(damage):
                if start <= at < stop:
                    damage.remove(at)
                    body[at - start] ^= 1 + len(damage)
            length = left.pop(0) if left else len(body)
            for at in range(0, length, 512 * KIB):
                part = body[at : min(at + 512 * KIB, length)]
                run = {"type": "data", "id": request["id"], "start": start + at, "stop": start + at + len(part)}
                await websocket.send(json.dumps(run))
                await websocket.send(bytes(part))
            if length < len(body):
                await until(lambda: websocket.transport.get_write_buffer_size() == 0)
                await websocket.close(1001, "the server is stopping")
                return

    return asked, answer


def test_a_chunk_continues_after_its_verified_blocks(tmp_path: Path) -> None:
    manifest = make_store(tmp_path, sizes=[20 * MIB + 100])
    chunk = manifest.chunks[0]
    data = payload(tmp_path, chunk)
    asked, answer = sends(data, 9 * MIB + 512 * KIB, 0, 5 * MIB)

    async def main() -> None:
        async with pretending(answer) as url, await open_wire_source(url, retry=AT_ONCE) as source:
            read, memory = whole(chunk)
            await source.fetch(manifest, [read])
            assert memory == data
            assert source.fetched_bytes == len(data)

    asyncio.run(main())
    starts = [request["start"] for request in asked]
    assert starts[0] == 0
    assert starts[1] == starts[2] == 8 * MIB  # runs of 4 MiB are verified together
    assert starts[3] == 12 * MIB


def test_a_damaged_block_is_fetched_again_alone_and_fresh(tmp_path: Path) -> None:
    manifest = make_store(tmp_path, sizes=[9 * MIB + 100])
    data = payload(tmp_path, manifest.chunks[0])
    asked, answer = sends(data, flips=[3 * MIB, 4 * MIB + 7, 4 * MIB + 7, 9 * MIB + 50])

    async def main() -> None:
        async with pretending(answer) as url, await open_wire_source(url, retry=AT_ONCE) as source:
            read, memory = whole(manifest.chunks[0])
            await source.fetch(manifest, [read])
            assert memory == data
            assert source.refetched_blocks == 4

    asyncio.run(main())
    ranges = [(request["start"], request["stop"], request.get("fresh", False)) for request in asked]
    assert ranges == [
        (0, 9 * MIB + 100, False),
        (3 * MIB, 5 * MIB, True),
        (4 * MIB, 5 * MIB, True),
        (9 * MIB, 9 * MIB + 100, True),
    ]


def test_blocks_verified_after_a_damaged_one_are_not_fetched_again(tmp_path: Path) -> None:
    manifest = make_store(tmp_path, sizes=[20 * MIB])
    data = payload(tmp_path, manifest.chunks[0])
    asked, answer = sends(data, 9 * MIB, flips=[2 * MIB + 5])

    async def main() -> None:
        async with pretending(answer) as url, await open_wire_source(url, retry=AT_ONCE) as source:
            read, memory = whole(manifest.chunks[0])
            await source.fetch(manifest, [read])
            assert memory == data
            assert source.refetched_blocks == 1

    asyncio.run(main())
    ranges = [(request["start"], request["stop"], request.get("fresh", False)) for request in asked]
    assert ranges == [(0, 20 * MIB, False), (2 * MIB, 3 * MIB, True), (8 * MIB, 20 * MIB, False)]


@pytest.mark.parametrize(
    ("server", "where"),
    [
        (
            lambda data: sends(bytes(MIB) + data[MIB:]),
            r"chunk the model again: it was the same 3 times, so the damage lies in the server's storage",
        ),
        (
            lambda data: sends(data, flips=[5, 5, 5]),
            r"it differed between 3 reads, so it is damaged on the way; check the network",
        ),
    ],
)
def test_lasting_damage_is_an_error_that_says_where_it_is(tmp_path: Path, server: Any, where: str) -> None:
    manifest = make_store(tmp_path, sizes=[2 * MIB])
    asked, answer = server(payload(tmp_path, manifest.chunks[0]))

    async def main() -> None:
        async with pretending(answer) as url, await open_wire_source(url, retry=AT_ONCE) as source:
            with pytest.raises(IntegrityError, match=rf"layers\.0 from ws://.* is damaged: block 0 has .*; {where}"):
                await source.fetch(manifest, [whole(manifest.chunks[0])[0]])
            assert source.refetched_blocks == 2

    asyncio.run(main())
    assert len(asked) == 3


def test_attempts_without_progress_end(tmp_path: Path) -> None:
    manifest = make_store(tmp_path, sizes=[8 * MIB])
    asked, answer = sends(bytes(8 * MIB), 0, 0, 0)

    async def main() -> None:
        async with pretending(answer) as url, await open_wire_source(url, retry=AT_ONCE) as source:
            with pytest.raises(
                ConnectionFailedError, match=r"closed the connection: the server is stopping, after 0 of 8388608 bytes"
            ):
                await source.fetch(manifest, [whole(manifest.chunks[0])[0]])

    asyncio.run(main())
    assert len(asked) == 3


def test_a_server_that_says_that_it_stops_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It gets more time than a server that just disappeared, for which no attempts are left here."""
    manifest = make_store(tmp_path, sizes=[MIB])
    monkeypatch.setattr("surfw.client.wire_source.RESTART_DELAY_SECONDS", 0.005)
    patient = RetryPolicy(attempts=2, first_delay_seconds=0, restart_seconds=60)
    caplog.set_level("INFO", "surfw.client")

    async def main() -> None:
        server = WeightServer(FilesystemBackend(tmp_path), port=0)
        await server.start()
        async with await open_wire_source(server.url, retry=patient) as source:
            again = WeightServer(FilesystemBackend(tmp_path), port=server.port)
            await server.stop()
            reads = [whole(manifest.chunks[0]) for _ in range(3)]
            fetching = [asyncio.create_task(source.fetch(manifest, [read])) for read, _ in reads]
            await until(lambda: caplog.text.count("trying again") > 9 or any(task.done() for task in fetching))
            assert not any(task.done() for task in fetching)
            async with again:
                await asyncio.gather(*fetching)
        assert all(bytes(memory) == payload(tmp_path, manifest.chunks[0]) for _, memory in reads)
        waiting = f"the server at {again.url} is stopping; waiting 60 seconds for it to be back"
        assert caplog.messages.count(waiting) == 1

    asyncio.run(main())


@pytest.mark.parametrize(("attempts", "restart_seconds"), [(2, 0), (2, 0.02), (1, 60)])
def test_a_server_that_does_not_come_back_is_not_waited_for_longer_than_that(
    attempts: int, restart_seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = make_store(tmp_path, sizes=[MIB])
    monkeypatch.setattr("surfw.client.wire_source.RESTART_DELAY_SECONDS", 0.005)
    policy = RetryPolicy(attempts=attempts, first_delay_seconds=0, restart_seconds=restart_seconds)

    async def main() -> None:
        server = WeightServer(FilesystemBackend(tmp_path), port=0)
        await server.start()
        async with await open_wire_source(server.url, retry=policy) as source:
            await server.stop()
            with pytest.raises(ConnectionFailedError, match=r"the server is stopping|connection refused"):
                await source.fetch(manifest, [whole(manifest.chunks[0])[0]])

    asyncio.run(main())


def test_a_server_that_is_killed_and_started_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    manifest = make_store(tmp_path, sizes=[60 * MIB, MIB])
    expected = [payload(tmp_path, chunk) for chunk in manifest.chunks]

    async def main() -> None:
        with serve(tmp_path) as served:
            policy = RetryPolicy(attempts=600, first_delay_seconds=0.05, backoff=1)
            source = await open_wire_source(served.url, retry=policy)
            reads = [whole(chunk) for chunk in manifest.chunks]
            fetching = {asyncio.create_task(source.fetch(manifest, [read for read, _ in reads]))}
            await until(lambda: any(reads[0][1][:4096]))
            served.process.send_signal(signal.SIGKILL)
            served.process.wait()
            with serve(tmp_path, "--port", served.url.rpartition(":")[2]):
                await asyncio.gather(*fetching)
                assert [bytes(memory) for _, memory in reads] == expected
                assert await source.models() == ["toy/model"]
                await source.close()

    with caplog.at_level(logging.INFO, "surfw.client"):
        asyncio.run(main())
    assert "; trying again in" in caplog.text


def test_opening_waits_for_a_server_that_is_about_to_start(tmp_path: Path) -> None:
    make_store(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = int(listener.getsockname()[1])

    async def main() -> None:
        policy = RetryPolicy(attempts=600, first_delay_seconds=0.02, backoff=1)
        opening = asyncio.create_task(open_wire_source(f"ws://127.0.0.1:{port}", retry=policy))
        await asyncio.sleep(0)
        async with WeightServer(FilesystemBackend(tmp_path), port=port), await opening as source:
            assert await source.models() == ["toy/model"]

    asyncio.run(main())


def test_closing_ends_the_attempts(tmp_path: Path) -> None:
    manifest = make_store(tmp_path, sizes=[MIB])
    asked, answer = sends(bytes(MIB), *[0] * 100)

    async def main() -> None:
        policy = RetryPolicy(attempts=1000, first_delay_seconds=0.01, backoff=1)
        async with pretending(answer) as url:
            source = await open_wire_source(url, retry=policy)
            fetching = asyncio.create_task(source.fetch(manifest, [whole(manifest.chunks[0])[0]]))
            await until(lambda: len(asked) == 3)
            await source.close()
            with pytest.raises(ConnectionFailedError):
                await fetching

    asyncio.run(main())
    assert len(asked) < 10


def test_a_connection_that_is_made_while_the_source_is_closed_is_closed_too() -> None:
    class FakeLink:
        url, ended, greeted = "ws://somewhere", False, asyncio.sleep(0)

        async def close(self) -> None:
            self.ended = True

    async def main() -> None:
        asked, answers, link = asyncio.Event(), asyncio.Event(), FakeLink()

        async def connect() -> Any:
            asked.set()
            await answers.wait()
            return link

        source = WireSource("ws://somewhere", connect, AT_ONCE, WireLimits())
        connecting = asyncio.create_task(source.connect())
        await asked.wait()
        await source.close()
        answers.set()
        await connecting
        assert link.ended

    asyncio.run(main())


def test_what_breaks_the_protocol_is_not_tried_again(tmp_path: Path) -> None:
    manifest = make_store(tmp_path, sizes=[MIB])
    connections: list[ServerConnection] = []

    async def answer(websocket: ServerConnection) -> None:
        connections.append(websocket)
        await websocket.recv()
        await websocket.send("nonsense")
        await websocket.wait_closed()

    async def main() -> None:
        async with pretending(answer) as url, await open_wire_source(url, retry=AT_ONCE) as source:
            with pytest.raises(ConnectionFailedError, match="broke the protocol"):
                await source.fetch(manifest, [whole(manifest.chunks[0])[0]])

    asyncio.run(main())
    assert len(connections) == 1
