"""Whatever a server sends, in whatever pieces, an invalid message ends the connection with one error."""

import asyncio
import json
import random
import select
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.client import ClientProtocol
from websockets.frames import Opcode
from websockets.typing import Subprotocol
from websockets.uri import parse_uri
from websockets.utils import accept_key

from surfw.client import open_wire_source
from surfw.client.connection import WireConnection
from surfw.client.link import Link
from surfw.config import KIB, MAX_FRAME_BYTES, MIB, WireLimits
from surfw.errors import ConnectionFailedError, SurfwError
from surfw.retry import RetryPolicy
from surfw.wire import PROTOCOL, Begin, Get, ListModels, ServerSession
from tests.peers import tcp_server

pytestmark = pytest.mark.timeout(60)  # an invalid message once made the client loop forever


def frame(opcode: int, payload: bytes = b"", *, first: int = 0x80, mask: int = 0) -> bytes:
    """A valid or invalid frame; `first` has FIN and the reserved bits."""
    size = len(payload)
    if size < 126:
        length = bytes([mask | size])
    elif size < 1 << 16:
        length = struct.pack("!BH", mask | 126, size)
    else:
        length = struct.pack("!BQ", mask | 127, size)
    return bytes([first | opcode]) + length + (b"\1\2\3\4" if mask else b"") + payload


def text(message: str | dict[str, Any]) -> bytes:
    return frame(Opcode.TEXT, (message if isinstance(message, str) else json.dumps(message)).encode())


def data(start: int, stop: int, number: int = 0) -> bytes:
    return text({"type": "data", "id": number, "start": start, "stop": stop})


HELLO = text(ServerSession(WireLimits(), server="raw").hello())
RUN = data(0, 300_000)
BEGUN = text({"type": "progress", "id": 0, "bytes": 10})

REFUSED = {
    "not JSON": text("nonsense"),
    "not an object": text("[]"),
    "nested": text("[" * 50_000),
    "no type": text({"id": 0}),
    "an unknown type": text({"type": "gossip"}),
    "a second hello": HELLO,
    "a wrong field": text({"type": "data", "id": 0, "start": "0", "stop": 1}),
    "an unknown id": data(0, 9, number=5),
    "not where it stopped": data(5, 9),
    "more than was asked for": data(0, 2 * MIB),
    "the wrong answer": text({"type": "models", "id": 0, "models": []}),
    "a beginning of a chunk": text({"type": "begin", "id": 0, "size": 1, "digest": "0" * 64}),
    "progress that does not rise": BEGUN + BEGUN,
    "an error for nobody": text({"type": "error", "id": 9, "code": "c", "message": "m"}),
    "escapes for a terminal": text({"type": "error", "id": 0, "code": "c", "message": "\x1b[2J"}),
    "too long a message": text(json.dumps({"type": "gossip", "x": "x" * 300_000})),
    "no UTF-8": frame(Opcode.TEXT, b'{"type":"\xff"}'),
    "much that is no UTF-8": frame(Opcode.TEXT, b"\xff" * 5000),
    "unannounced": frame(Opcode.BINARY, b"?"),
    "much unannounced": frame(Opcode.BINARY, b"?" * 100_000),
    "nothing, unannounced": frame(Opcode.BINARY),
    "more than was announced": data(0, 10) + frame(Opcode.BINARY, b"?" * 11),
    "much more than was announced": data(0, 10_000) + frame(Opcode.BINARY, b"?" * 10_001),
    "a message within a run": RUN + text({"type": "models", "id": 0, "models": []}),
    "a long message within a run": RUN + text("x" * 10_000),
    "too large a frame": RUN + frame(Opcode.BINARY, b"?" * (MAX_FRAME_BYTES + 1)),
    "a huge frame": RUN + b"\x82\x7f" + b"\x7f" * 8,
    "fragments of text": frame(Opcode.TEXT, b"{", first=0),
    "a large fragment": RUN + frame(Opcode.BINARY, b"?" * 100_000, first=0),
    "an end of nothing": frame(Opcode.CONT, b"?"),
    "a large end of nothing": RUN + frame(Opcode.CONT, b"?" * 100_000),
    "a reserved bit": text("{}").replace(b"\x81", b"\xc1", 1),
    "a reserved bit on a large frame": RUN + frame(Opcode.BINARY, b"?" * 100_000, first=0xA0),
    "a reserved opcode": frame(3, b"?"),
    "a reserved control opcode": frame(11),
    "a mask": frame(Opcode.BINARY, b"?" * 9, mask=0x80),
    "a long ping": frame(Opcode.PING, b"?" * 126),
    "a very long ping": RUN + frame(Opcode.PING, b"?" * 100_000),
    "a ping in pieces": frame(Opcode.PING, b"?", first=0),
    "half a close code": frame(Opcode.CLOSE, b"\x03"),
    "no close code": frame(Opcode.CLOSE, struct.pack("!H", 999)),
    "a reason that is no UTF-8": frame(Opcode.CLOSE, struct.pack("!H", 1000) + b"\xff"),
}

BEHIND = {
    "nothing in particular": lambda size: random.Random(size).randbytes(size),
    "zeros": bytes,
    "a frame": lambda size: frame(Opcode.BINARY, b"!" * size),
    "frames": lambda size: frame(Opcode.BINARY, b"!" * 5000) * (size // 5000),
    "announced frames": lambda size: (data(0, 5000) + frame(Opcode.BINARY, b"!" * 5000)) * (size // 5000),
    "text": lambda size: text("!" * size),
    "pings": lambda size: frame(Opcode.PING, b"!" * 100) * (size // 100),
    "a close": lambda size: frame(Opcode.CLOSE, struct.pack("!H", 1001)) + bytes(size),
}


class Wire(asyncio.Transport):
    """A transport without a peer, with a socket if one is given."""

    def __init__(self, near: socket.socket | None = None) -> None:
        super().__init__({"socket": near})
        self.ended = 0

    def write(self, data: bytes | bytearray | memoryview) -> None:
        assert not self.ended

    def abort(self) -> None:
        self.ended += 1

    close = abort

    def is_closing(self) -> bool:
        return bool(self.ended)

    def get_write_buffer_size(self) -> int:
        return 0

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def can_write_eof(self) -> bool:
        return False


class Memory:
    """The destination of a chunk's bytes."""

    def __init__(self) -> None:
        self.received = 0
        self.most_read_bytes = 1 << 30
        self.memory = bytearray(MIB)

    def begin(self, message: Begin) -> None:
        raise AssertionError(message)

    def place(self, offset: int, size: int) -> memoryview:
        return memoryview(self.memory)[offset : offset + size]

    def arrived(self, stop: int) -> None:
        self.received = stop


def linked(wire: Wire) -> tuple[Link, WireConnection]:
    """A link after the exchange of hellos."""
    link = Link("ws://raw", WireLimits(), 60)
    protocol = ClientProtocol(parse_uri("ws://raw"), subprotocols=[Subprotocol(PROTOCOL)], max_size=MAX_FRAME_BYTES)
    connection = link.attach(protocol)
    connection.connection_made(wire)
    protocol.send_request(protocol.connect())
    accepted = f"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: {accept_key(protocol.key)}\r\n"
    receive(connection, f"HTTP/1.1 101 Go\r\n{accepted}Sec-WebSocket-Protocol: {PROTOCOL}\r\n\r\n".encode() + HELLO)
    assert link.greeted.done()
    return link, connection


async def ask_for_a_mib(link: Link) -> tuple[Memory, asyncio.Task[Any]]:
    """The memory for a form's bytes, and the task that has just requested it."""
    transfer = Memory()
    asking = asyncio.create_task(link.receive(lambda number: Get(number, "model", "chunk", "none", 0, MIB), transfer))
    await asyncio.sleep(0)
    return transfer, asking


def receive(connection: WireConnection, sent: bytes, cuts: Sequence[int] = ()) -> None:
    """Pass on bytes as a transport does, in pieces that end at the cuts at the latest."""
    rest, ends = memoryview(sent), sorted(cut for cut in cuts if cut < len(sent))
    at = 0
    while at < len(rest):
        buffer = connection.get_buffer(-1)
        end = min(at + len(buffer), next((cut for cut in ends if cut > at), len(rest)))
        buffer[: end - at] = rest[at:end]
        connection.buffer_updated(end - at)
        at = end


def receive_from(near: socket.socket, far: socket.socket, connection: WireConnection, sent: bytes) -> int:
    """Let bytes arrive at a socket, as many as fit, and pass on what the transport reads.

    Then read the rest. Returns how often the transport has read.
    """
    rest, turns = memoryview(sent), 0
    while rest or select.select([near], [], [], 0)[0]:
        with suppress(BlockingIOError):
            rest = rest[far.send(rest) :]
        connection.buffer_updated(near.recv_into(connection.get_buffer(-1)))
        turns += 1
    return turns


@contextmanager
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two connected sockets that never block."""
    near, far = socket.socketpair()
    with near, far:
        near.setblocking(False)
        far.setblocking(False)
        yield near, far


@pytest.mark.parametrize("name", REFUSED)
@settings(max_examples=12)
@given(
    reads_on=st.booleans(),
    kind=st.sampled_from(sorted(BEHIND)),
    size=st.sampled_from([0, 1, 125, 4095, 4096, 5000, 20_000, 70_000, 600 * KIB]),
    cuts=st.lists(st.integers(1, 620 * KIB), max_size=6),
)
def test_a_refused_message_ends_in_one_error_whatever_follows(
    name: str, reads_on: bool, kind: str, size: int, cuts: list[int]
) -> None:
    async def main(near: socket.socket, far: socket.socket) -> None:
        wire = Wire(near if reads_on else None)
        link, connection = linked(wire)
        transfer, asking = await ask_for_a_mib(link)
        refused = REFUSED[name] + (bytes(1 << 19) if name == "a huge frame" else b"")
        sent = refused + BEHIND[kind](size)
        if reads_on:
            for start, stop in pairwise([0, *sorted(cut for cut in cuts if cut < len(sent)), len(sent)]):
                receive_from(near, far, connection, sent[start:stop])
        else:
            receive(connection, sent, cuts)
        with pytest.raises(ConnectionFailedError, match="the server at ws://raw broke the protocol: ") as caught:
            await asking
        assert not caught.value.transient
        assert wire.ended
        seen, memory = bytes(transfer.memory), transfer.memory
        receive(connection, RUN + frame(Opcode.BINARY, b"!" * 300_000))
        connection.connection_lost(None)
        assert memory == seen
        memory.clear()  # fails if another reference exists
        with pytest.raises(ConnectionFailedError, match="broke the protocol"):
            await link.receive(ListModels)

    with ends() as (near, far):
        asyncio.run(main(near, far))


@settings(max_examples=20)
@given(cuts=st.lists(st.integers(1, MIB), max_size=6), sizes=st.lists(st.integers(1, 300 * KIB), max_size=4))
def test_what_has_arrived_is_read_on_into_its_place(cuts: list[int], sizes: list[int]) -> None:
    payload = random.Random(len(cuts)).randbytes(MIB)

    async def main(near: socket.socket, far: socket.socket) -> None:
        link, connection = linked(Wire(near))
        transfer, asking = await ask_for_a_mib(link)
        sent, at = b"", 0
        for size in [*sizes, MIB]:
            stop = min(at + size, MIB)
            sent += data(at, stop) if stop > at else b""
            while at < stop:
                end = min(at + MAX_FRAME_BYTES, stop)
                sent += frame(Opcode.BINARY, payload[at:end])
                at = end
        for start, stop in pairwise([0, *sorted(cuts), len(sent)]):
            receive_from(near, far, connection, sent[start:stop])
        assert await asking is None
        assert transfer.memory == payload
        assert transfer.received == MIB

    with ends() as (near, far):
        asyncio.run(main(near, far))


def test_frames_that_have_arrived_are_read_in_one_turn() -> None:
    async def main(near: socket.socket, far: socket.socket) -> int:
        link, connection = linked(Wire(near))
        transfer, asking = await ask_for_a_mib(link)
        frames = [frame(Opcode.BINARY, bytes([part]) * 64 * KIB) for part in range(3)]
        turns = receive_from(near, far, connection, data(0, 192 * KIB) + b"".join(frames))
        assert transfer.memory[: 192 * KIB] == b"".join(bytes([part]) * 64 * KIB for part in range(3))
        asking.cancel()
        await asyncio.wait([asking])
        return turns

    with ends() as (near, far):
        assert asyncio.run(main(near, far)) == 1


async def upgrade(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """The server's part of a handshake and of the hellos."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    key = next(line.partition(": ")[2] for line in head.split("\r\n") if line.startswith("Sec-WebSocket-Key"))
    accepted = f"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: {accept_key(key)}\r\n"
    writer.write(f"HTTP/1.1 101 Go\r\n{accepted}Sec-WebSocket-Protocol: {PROTOCOL}\r\n\r\n".encode() + HELLO)


@pytest.mark.parametrize("name", ["not JSON", "much unannounced", "a large fragment", "a reserved bit", "a mask"])
@pytest.mark.parametrize("kind", ["a frame", "nothing in particular"])
def test_it_does_so_over_a_socket_that_stays_open(name: str, kind: str) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await upgrade(reader, writer)
        await reader.read(1)
        writer.write(REFUSED[name] + BEHIND[kind](600 * KIB))

    async def main() -> None:
        retry = RetryPolicy(attempts=1)
        async with tcp_server(talk) as url, await open_wire_source(url, retry=retry) as source:
            with pytest.raises(SurfwError, match="broke the protocol"):
                await source.models()

    asyncio.run(main())


def test_a_server_that_pings_and_reads_nothing_is_left() -> None:
    class Unread(Wire):
        waiting = 0

        def write(self, data: bytes | bytearray | memoryview) -> None:
            self.waiting += len(data)

        def get_write_buffer_size(self) -> int:
            return self.waiting

    async def main() -> None:
        wire = Unread()
        link, connection = linked(wire)
        while not link.ended:
            receive(connection, frame(Opcode.PING, b"!" * 125) * 1000)
        assert link.ended == "broke the protocol: it asks for more than it reads"
        assert wire.waiting < 5 * MIB

    asyncio.run(main())
