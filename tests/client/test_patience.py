"""Only progress counts: if a server sends anything else, the client gives up with one error."""

import asyncio
import contextlib
import itertools
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.server import ServerConnection

from surfw.client import open_wire_source
from surfw.client.patience import ServerPatience
from surfw.client.wire_source import WireSource
from surfw.config import KIB, MIB, WireLimits
from surfw.errors import ConnectionFailedError
from surfw.retry import RetryPolicy
from surfw.source import Read
from surfw.wire import Get
from tests.peers import pretending, until, whole
from tests.stores import make_store, payload

SILENCE = 30
ONCE = RetryPolicy(attempts=1)
Answer = Callable[[ServerConnection, "Clock"], Awaitable[None]]


class Clock:
    """The loop's clock, advanced by hand, so that no test waits or depends on the machine's speed."""

    def __init__(self) -> None:
        self.ahead = 0.0
        loop = asyncio.get_running_loop()
        time = loop.time
        loop.time = lambda: time() + self.ahead  # type: ignore[method-assign]


async def others_go_on() -> None:
    """Let the other tasks run until they wait."""
    for _ in range(20):
        await asyncio.sleep(0)


async def drips(websocket: ServerConnection, clock: Clock) -> None:
    """Sends a byte at intervals: first as separate frames, then within a large frame."""
    await websocket.send(json.dumps({"type": "data", "id": 0, "start": 0, "stop": MIB}))
    for _ in range(10):
        await websocket.send(b"?")
        await (await websocket.ping())
        clock.ahead += 1
    websocket.transport.write(b"\x82\x7f" + (256 * KIB).to_bytes(8))
    while not websocket.transport.is_closing():
        websocket.transport.write(b"?" * 5000)
        await others_go_on()
        clock.ahead += 5


async def pings(websocket: ServerConnection, clock: Clock) -> None:
    while True:
        await (await websocket.ping())
        clock.ahead += 5


def reads(counts: Iterator[int]) -> Answer:
    """Reports again and again that it is reading, and sends nothing."""

    async def answer(websocket: ServerConnection, clock: Clock) -> None:
        for count in counts:
            await websocket.send(json.dumps({"type": "progress", "id": 0, "bytes": count}))
            await (await websocket.ping())
            clock.ahead += 5

    return answer


async def announces(websocket: ServerConnection, clock: Clock) -> None:
    await websocket.send(json.dumps({"type": "data", "id": 0, "start": 0, "stop": MIB}))
    await pings(websocket, clock)


async def says_nothing(websocket: ServerConnection, clock: Clock) -> None:
    clock.ahead += SILENCE + 1
    await websocket.wait_closed()


async def _open(url: str, limits: WireLimits | None = None, retry: RetryPolicy = ONCE) -> WireSource:
    return await open_wire_source(url, silence_timeout=SILENCE, retry=retry, limits=limits)


@contextlib.asynccontextmanager
async def asked(answer: Answer, clock: Clock) -> AsyncIterator[WireSource]:
    """A source whose server runs `answer` after the first request."""

    async def when_asked(websocket: ServerConnection) -> None:
        await websocket.recv()
        await answer(websocket, clock)

    async with pretending(when_asked) as url, await _open(url) as source:
        yield source


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (drips, "made no progress for"),
        (pings, "made no progress for"),
        (announces, "made no progress for"),
        (reads(itertools.count(1)), "made no progress for"),
        (reads(itertools.count(1 << 40, 1 << 20)), "made no progress for"),
        (says_nothing, "said nothing for"),
    ],
)
def test_without_progress_a_fetch_fails_transiently(tmp_path: Path, answer: Answer, complaint: str) -> None:
    manifest = make_store(tmp_path, sizes=[MIB])

    async def main() -> None:
        async with asked(answer, Clock()) as source:
            with pytest.raises(ConnectionFailedError, match=rf"{complaint} {SILENCE} seconds") as caught:
                await source.fetch(manifest, [whole(manifest.chunks[0])[0]])
            assert caught.value.transient

    asyncio.run(main())


def test_a_server_that_reads_on_or_sends_slowly_is_waited_for(tmp_path: Path) -> None:
    manifest = make_store(tmp_path, sizes=[MIB])
    data = payload(tmp_path, manifest.chunks[0])
    read, memory = whole(manifest.chunks[0])

    async def send(websocket: ServerConnection, clock: Clock, sent: bytes, stop: int) -> None:
        clock.ahead += 20
        websocket.transport.write(sent)
        await until(lambda: memory[stop - 64 : stop] == data[stop - 64 : stop])

    async def answer(websocket: ServerConnection, clock: Clock) -> None:
        for count in (64 * KIB, 200 * KIB, MIB):
            clock.ahead += 20
            await websocket.send(json.dumps({"type": "progress", "id": 0, "bytes": count}))
            await (await websocket.ping())
        await websocket.send(json.dumps({"type": "data", "id": 0, "start": 0, "stop": MIB}))
        for at in range(0, MIB, 256 * KIB):
            middle, stop = at + 100 * KIB, at + 256 * KIB
            await send(websocket, clock, b"\x82\x7f" + (256 * KIB).to_bytes(8) + data[at:middle], middle)
            await send(websocket, clock, data[middle:stop], stop)
        await websocket.wait_closed()

    async def main() -> None:
        async with asked(answer, Clock()) as source:
            await source.fetch(manifest, [read])
            assert memory == data

    asyncio.run(main())


@pytest.mark.parametrize(("counts", "waits"), [(range(MIB, 9 * MIB, MIB), True), (itertools.count(1, 1 << 30), False)])
def test_a_server_that_lists_its_models_may_report_progress(counts: Iterable[int], waits: bool) -> None:
    async def answer(websocket: ServerConnection, clock: Clock) -> None:
        for count in counts:
            clock.ahead += 20
            await websocket.send(json.dumps({"type": "progress", "id": 0, "bytes": count}))
            await (await websocket.ping())
        await websocket.send(json.dumps({"type": "models", "id": 0, "models": ["a"]}))
        await websocket.wait_closed()

    async def main() -> None:
        async with asked(answer, Clock()) as source:
            if waits:
                assert await source.models() == ["a"]
            else:
                with pytest.raises(ConnectionFailedError, match=f"made no progress for {SILENCE} seconds"):
                    await source.models()

    asyncio.run(main())


def _ask(source: WireSource, manifest: Any, index: int, priority: int) -> "asyncio.Task[None]":
    return asyncio.create_task(source.fetch(manifest, [whole(manifest.chunks[index])[0]], priority=priority))


@pytest.mark.parametrize(("priority", "waits"), [(0, False), (5, True)])
def test_a_request_may_wait_for_more_urgent_ones_and_not_for_later_ones(
    tmp_path: Path, priority: int, waits: bool
) -> None:
    """Each answer takes twenty seconds; the first request, of priority 3, is answered last or never."""
    manifest = make_store(tmp_path, sizes=[1000, 1000])
    data = [payload(tmp_path, chunk) for chunk in manifest.chunks]
    clocks: list[Clock] = []
    heard: list[dict[str, Any]] = []

    async def send(websocket: ServerConnection, number: int, body: bytes) -> None:
        await websocket.send(json.dumps({"type": "data", "id": number, "start": 0, "stop": len(body)}))
        await websocket.send(body)

    async def answer(websocket: ServerConnection) -> None:
        first = json.loads(await websocket.recv())
        heard.append(first)
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
        async with pretending(answer, limits=limits) as url, await _open(url, limits) as source:
            first = _ask(source, manifest, 0, 3)
            await until(lambda: bool(heard))
            with contextlib.suppress(ConnectionFailedError):
                for _ in range(8):
                    if first.done():
                        break
                    await _ask(source, manifest, 1, 3 if not waits else priority - 5)
                    await others_go_on()
            if waits:
                await first
            else:
                with pytest.raises(ConnectionFailedError, match="answers later requests, and left one for 30 seconds"):
                    await first

    asyncio.run(main())


def test_cancels_that_are_never_answered_do_not_block_what_comes_after(tmp_path: Path) -> None:
    manifest = make_store(tmp_path, sizes=[1000])
    connections: list[ServerConnection] = []
    heard: list[str] = []

    async def answer(websocket: ServerConnection) -> None:
        connections.append(websocket)
        async for message in websocket:
            request = json.loads(message)
            heard.append(request["type"])
            if request["type"] == "models":
                await websocket.send(json.dumps({"type": "models", "id": request["id"], "models": ["a"]}))

    async def main() -> None:
        clock, limits = Clock(), WireLimits(requests_in_flight=2)
        retry = RetryPolicy(attempts=2, first_delay_seconds=0)
        async with pretending(answer, limits=limits) as url, await _open(url, retry=retry) as source:
            for number in (1, 2):
                asking = _ask(source, manifest, 0, 0)
                await until(lambda number=number: heard.count("get") == number)
                asking.cancel()
                await asyncio.gather(asking, return_exceptions=True)
                await until(lambda number=number: heard.count("cancel") == number)
            listing = asyncio.create_task(source.models())
            await others_go_on()
            assert heard == ["get", "cancel"] * 2
            clock.ahead += SILENCE + 1
            assert await listing == ["a"]
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


class Decisions:
    """A `ServerPatience` of ten seconds, and its clock."""

    def __init__(self) -> None:
        self.now = 0.0
        self.patience = ServerPatience(10, lambda: self.now)

    def ask(self, number: int, priority: int = 0) -> None:
        self.patience.asked(Get(number, "m", "c", "none", 0, MIB, priority), 8 * MIB)


def test_arrived_and_read_bytes_put_the_end_of_patience_off() -> None:
    decisions = Decisions()
    patience = decisions.patience
    decisions.ask(0)
    assert patience.stalls(4) == (10, [])
    decisions.now = 3
    patience.arrived(0, 64 * KIB - 1)
    patience.read(0, 64 * KIB - 1)
    assert patience.stalls(4) == (10, [])
    patience.arrived(0, 1)
    assert patience.stalls(4) == (13, [])
    decisions.now = 5
    patience.read(0, 64 * KIB)
    patience.read(0, 100 * MIB)
    assert patience.stalls(4) == (15, [])
    decisions.now = 9
    patience.read(0, 101 * MIB)  # more than can be left to read
    assert patience.stalls(4) == (15, [])
    decisions.ask(1)
    patience.given_up(0)
    patience.read(0, 102 * MIB)
    assert patience.stalls(4) == (15, [])
    patience.answered(0)
    assert patience.stalls(4) == (19, [])


def test_patience_begins_when_the_first_request_is_open() -> None:
    decisions = Decisions()
    decisions.now = 100
    decisions.ask(0)
    assert decisions.patience.stalls(4) == (110, [])


def test_a_request_that_is_overtaken_too_often_is_stalled_alone() -> None:
    decisions = Decisions()
    patience = decisions.patience
    decisions.ask(0, priority=1)
    for number, priority in enumerate([1, 0, 2], 1):
        decisions.ask(number, priority)
        decisions.now += 4
        patience.answered(number)
    assert patience.stalls(3) == (22, [])  # the more urgent request did not count
    assert patience.stalls(2) == (22, [0])
    decisions.now = 9
    assert patience.stalls(2) == (10, [])
    patience.given_up(0)
    assert patience.stalls(2) == (22, [])
