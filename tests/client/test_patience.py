"""Only progress counts: a server that says anything else, for as long as it likes, is left with one error."""

import asyncio
import contextlib
import itertools
import json
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.server import ServerConnection

from surfw.client import open_wire_source
from surfw.client.source import WireSource
from surfw.config import KIB, MIB, WireLimits
from surfw.errors import ConnectionFailedError
from surfw.retry import RetryPolicy
from surfw.source import Read
from tests.peers import pretending, whole
from tests.stores import make_store, payload

QUICK = 0.4
ONCE = RetryPolicy(attempts=1)
Answer = Callable[[ServerConnection], Awaitable[None]]


async def drips(websocket: ServerConnection) -> None:
    """Sends a byte now and then, in a frame each, and then within a large frame."""
    await websocket.recv()
    await websocket.send(json.dumps({"type": "data", "id": 0, "start": 0, "stop": MIB}))
    for _ in range(10):
        await websocket.send(b"?")
        await asyncio.sleep(QUICK / 20)
    websocket.transport.write(b"\x82\x7f" + (256 * KIB).to_bytes(8))
    while True:
        websocket.transport.write(b"?" * 5000)
        await asyncio.sleep(QUICK / 4)


async def pings(websocket: ServerConnection) -> None:
    await websocket.recv()
    await ping_on(websocket)


async def ping_on(websocket: ServerConnection) -> None:
    while True:
        await websocket.ping()
        await asyncio.sleep(QUICK / 10)


def reads(counts: Iterator[int]) -> Answer:
    """Says again and again that it reads, and gives nothing."""

    async def answer(websocket: ServerConnection) -> None:
        await websocket.recv()
        for count in counts:
            await websocket.send(json.dumps({"type": "progress", "id": 0, "bytes": count}))
            await asyncio.sleep(QUICK / 10)

    return answer


async def announces(websocket: ServerConnection) -> None:
    await websocket.recv()
    await websocket.send(json.dumps({"type": "data", "id": 0, "start": 0, "stop": MIB}))
    await ping_on(websocket)


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (drips, "made no progress for"),
        (pings, "made no progress for"),
        (announces, "made no progress for"),
        (reads(itertools.count(1)), "made no progress for"),
        (reads(itertools.count(1 << 40, 1 << 20)), "made no progress for"),
        (lambda websocket: websocket.wait_closed(), "said nothing for"),
    ],
)
def test_what_is_no_progress_ends_in_one_transient_error(tmp_path: Path, answer: Answer, complaint: str) -> None:
    manifest = make_store(tmp_path, sizes=[MIB])

    async def main() -> None:
        limit = asyncio.timeout(60)  # a guard against a hang
        async with limit, pretending(answer) as url, await _open(url) as source:
            with pytest.raises(ConnectionFailedError, match=rf"{complaint} {QUICK} seconds") as caught:
                await source.fetch(manifest, [whole(manifest.chunks[0])[0]])
            assert caught.value.transient

    asyncio.run(main())


async def _open(url: str, silence: float = QUICK, limits: WireLimits | None = None) -> WireSource:
    return await open_wire_source(url, silence_timeout=silence, retry=ONCE, limits=limits)


class Clock:
    """The loop's clock, put forward by hand: nobody has to wait."""

    def __init__(self) -> None:
        self.ahead = 0.0
        loop = asyncio.get_running_loop()
        time = loop.time
        loop.time = lambda: time() + self.ahead  # type: ignore[method-assign]


def test_a_server_that_reads_on_or_sends_slowly_is_waited_for(tmp_path: Path) -> None:
    manifest = make_store(tmp_path, sizes=[MIB])
    data = payload(tmp_path, manifest.chunks[0])
    clocks: list[Clock] = []

    async def answer(websocket: ServerConnection) -> None:
        await websocket.recv()
        for count in (64 * KIB, 200 * KIB, MIB):
            clocks[0].ahead += 20
            await websocket.send(json.dumps({"type": "progress", "id": 0, "bytes": count}))
            await (await websocket.ping())
        await websocket.send(json.dumps({"type": "data", "id": 0, "start": 0, "stop": MIB}))
        for at in range(0, MIB, 256 * KIB):
            clocks[0].ahead += 20
            websocket.transport.write(b"\x82\x7f" + (256 * KIB).to_bytes(8) + data[at : at + 100 * KIB])
            await asyncio.sleep(0.05)
            clocks[0].ahead += 20
            websocket.transport.write(data[at + 100 * KIB : at + 256 * KIB])
            await asyncio.sleep(0.05)
        await websocket.wait_closed()

    async def main() -> None:
        clocks.append(Clock())
        async with pretending(answer) as url, await _open(url, 30) as source:
            read, memory = whole(manifest.chunks[0])
            await source.fetch(manifest, [read])
            assert memory == data

    asyncio.run(main())


def _ask(source: WireSource, manifest: Any, index: int, priority: int) -> "asyncio.Task[None]":
    return asyncio.create_task(source.fetch(manifest, [whole(manifest.chunks[index])[0]], priority=priority))


@pytest.mark.parametrize(("priority", "waits"), [(0, False), (5, True)])
def test_a_request_may_wait_for_more_urgent_ones_and_not_for_later_ones(
    tmp_path: Path, priority: int, waits: bool
) -> None:
    """Twenty seconds go by with every answer; the first request, of priority 3, is answered last or never."""
    manifest = make_store(tmp_path, sizes=[1000, 1000])
    data = [payload(tmp_path, chunk) for chunk in manifest.chunks]
    clocks: list[Clock] = []

    async def send(websocket: ServerConnection, number: int, body: bytes) -> None:
        await websocket.send(json.dumps({"type": "data", "id": number, "start": 0, "stop": len(body)}))
        await websocket.send(body)

    async def answer(websocket: ServerConnection) -> None:
        first = json.loads(await websocket.recv())
        for _ in range(8):
            asked = json.loads(await websocket.recv())
            if asked["type"] == "cancel":
                await websocket.wait_closed()
            clocks[0].ahead += 20
            await send(websocket, asked["id"], data[1])
        await send(websocket, first["id"], data[0])
        await websocket.wait_closed()

    async def main() -> None:
        clocks.append(Clock())
        limits = WireLimits(requests_in_flight=4)
        async with pretending(answer, limits=limits) as url, await _open(url, 30) as source:
            first = _ask(source, manifest, 0, 3)
            await asyncio.sleep(0)
            with contextlib.suppress(ConnectionFailedError):
                for _ in range(8):
                    if first.done():
                        break
                    await _ask(source, manifest, 1, 3 if not waits else priority - 5)
                    await asyncio.sleep(0.05)
            if waits:
                await first
            else:
                with pytest.raises(ConnectionFailedError, match="answers later requests, and left one for 30 seconds"):
                    await first

    asyncio.run(main())


def test_cancels_that_are_never_answered_do_not_block_what_comes_after(tmp_path: Path) -> None:
    manifest = make_store(tmp_path, sizes=[1000])
    connections: list[ServerConnection] = []

    async def answer(websocket: ServerConnection) -> None:
        connections.append(websocket)
        async for message in websocket:
            asked = json.loads(message)
            if asked["type"] == "models":
                await websocket.send(json.dumps({"type": "models", "id": asked["id"], "models": ["a"]}))

    async def main() -> None:
        limits, limit = WireLimits(requests_in_flight=2), asyncio.timeout(60)  # a guard against a hang
        async with limit, pretending(answer, limits=limits) as url:
            retry = RetryPolicy(attempts=2, first_delay_seconds=0)
            async with await open_wire_source(url, silence_timeout=QUICK, retry=retry) as source:
                for _ in range(2):
                    asking = _ask(source, manifest, 0, 0)
                    await asyncio.sleep(0.02)
                    asking.cancel()
                    await asyncio.gather(asking, return_exceptions=True)
                assert await source.models() == ["a"]
        assert len(connections) == 2

    asyncio.run(main())


def test_ranges_of_nothing_are_answers_too(tmp_path: Path) -> None:
    manifest = make_store(tmp_path, sizes=[MIB])
    chunk = manifest.chunks[0]

    async def answer(websocket: ServerConnection) -> None:
        await websocket.recv()
        await websocket.send('{"type":"data","id":0,"start":0,"stop":0}')
        await websocket.wait_closed()

    async def main() -> None:
        async with pretending(answer) as url, await _open(url) as source:
            await source.fetch(manifest, [Read(chunk, chunk.forms[0], 0, 0, memoryview(bytearray()))])

    asyncio.run(main())
