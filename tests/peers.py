"""Peers to test against: a surfw server in this process, a client that sends any message, and fake servers."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from ssl import SSLContext
from typing import Any

from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.typing import Subprotocol

from surfw.config import MIB, WireLimits
from surfw.manifest import Chunk
from surfw.server import WeightServer
from surfw.source import Read
from surfw.storage import FilesystemBackend, StorageBackend
from surfw.wire import PROTOCOL, ServerSession


@contextlib.asynccontextmanager
async def serving(store: Path | StorageBackend, **settings: Any) -> AsyncIterator[WeightServer]:
    """Run a server on a free port."""
    backend = FilesystemBackend(store) if isinstance(store, Path) else store
    async with WeightServer(backend, port=0, **settings) as server:
        yield server


async def until(true: Callable[[], bool]) -> None:
    """Let other tasks run until a condition holds."""
    while not true():  # noqa: ASYNC110 - what is waited for has no event
        await asyncio.sleep(0)


class BareClient:
    """A WebSocket client that sends any message, valid or not."""

    def __init__(self, websocket: ClientConnection) -> None:
        self.websocket = websocket

    async def say(self, kind: str, **fields: Any) -> None:
        await self.websocket.send(json.dumps({"type": kind} | fields))

    async def hear(self) -> dict[str, Any] | bytes:
        message = await self.websocket.recv()
        return json.loads(message) if isinstance(message, str) else message

    async def hear_text(self) -> dict[str, Any]:
        """Return the next message that is not binary."""
        while isinstance(message := await self.hear(), bytes):
            pass
        return message

    async def closed(self) -> tuple[int | None, str | None]:
        """Return the code and the reason with which the server closes."""
        with contextlib.suppress(Exception):
            while True:
                await self.websocket.recv()
        await self.websocket.wait_closed()
        return self.websocket.close_code, self.websocket.close_reason


@contextlib.asynccontextmanager
async def bare_client(url: str, *, greet: bool = True, window_bytes: int = 8 * MIB) -> AsyncIterator[BareClient]:
    """Connect and say hello, unless `hello` is off."""
    options: dict[str, Any] = {"compression": None, "max_size": None, "proxy": None, "close_timeout": 1}
    async with connect(url, subprotocols=[Subprotocol(PROTOCOL)], **options) as websocket:
        client = BareClient(websocket)
        if greet:
            assert (await client.hear_text())["type"] == "hello"
            await client.say("hello", client="bare", window_bytes=window_bytes)
        yield client


@contextlib.asynccontextmanager
async def pretending(
    answer: Callable[[ServerConnection], Awaitable[None]], *, greet: bool = True, limits: WireLimits | None = None
) -> AsyncIterator[str]:
    """Run a WebSocket server that exchanges hellos and then calls `answer`; yields its address."""

    async def handle(websocket: ServerConnection) -> None:
        if greet:
            await websocket.send(ServerSession(limits or WireLimits(), server="pretender").hello())
            await websocket.recv()
        with contextlib.suppress(ConnectionClosed):
            await answer(websocket)

    options: dict[str, Any] = {"compression": None, "subprotocols": [Subprotocol(PROTOCOL)], "close_timeout": 1}
    options["ping_interval"] = None
    async with serve(handle, "127.0.0.1", 0, **options) as server:
        yield f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}"


Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def tcp_server(talk: Talk, ssl: SSLContext | None = None) -> AsyncIterator[str]:
    """Run any TCP server; yields its address in the form of a surfw server's address."""
    writers: list[asyncio.StreamWriter] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        await talk(reader, writer)

    server = await asyncio.start_server(handle, "127.0.0.1", 0, ssl=ssl)
    try:
        yield f"{'wss' if ssl else 'ws'}://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for writer in writers:
            writer.close()
        await asyncio.gather(*(writer.wait_closed() for writer in writers), return_exceptions=True)
        await server.wait_closed()


async def pass_on(port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, head: bytes = b"") -> None:
    """Act as a proxy for a connection whose first bytes, `head`, were already read."""
    there, to = await asyncio.open_connection("127.0.0.1", port)
    to.write(head)

    async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(1 << 16):
                target.write(data)
                await target.drain()
        target.close()

    await asyncio.gather(copy(reader, to), copy(there, writer))


def whole(chunk: Chunk) -> tuple[Read, bytearray]:
    """Return a read of a whole chunk, and the memory it is read into."""
    form = chunk.forms[0]
    memory = bytearray(form.stored_bytes)
    return Read(chunk, form, 0, form.stored_bytes, memoryview(memory)), memory
