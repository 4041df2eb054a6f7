"""Parsers of data from connections: messages of both sides, frames, and Redis."""

import asyncio
import json
import logging
import struct
from collections.abc import Sequence
from typing import Any

from websockets.client import ClientProtocol
from websockets.datastructures import Headers
from websockets.frames import Frame, Opcode
from websockets.http11 import Response
from websockets.protocol import State
from websockets.server import ServerProtocol
from websockets.uri import parse_uri

from surfw.config import KIB, MAX_FRAME_BYTES, WireLimits
from surfw.errors import ConnectionFailedError, RefusedError, RemoteProtocolError
from tests.fuzz.parser import Parser

_CLIENT_LINES = (
    {"type": "hello", "client": "surfw/1", "window_bytes": 8 << 20, "progress": True},
    {"type": "models", "id": 0},
    {"type": "manifest", "id": 1, "model": "org/m"},
    {"type": "file", "id": 2, "model": "m", "path": "tokenizer.json"},
    {"type": "digests", "id": 3, "model": "m", "chunk": "c"},
    {"type": "get", "id": 4, "model": "m", "chunk": "c", "form": "none", "start": 0, "stop": 9, "priority": -1,
     "fresh": True},
    {"type": "cancel", "id": 4},
    {"type": "credit", "bytes": 5},
    {"type": "schedule", "model": "m", "cycle": ["a", "b"], "kept": ["a"]},
)  # fmt: skip
_SERVER_LINES = (
    {"type": "hello", "protocol": "surfw.v1", "server": "surfw/1", "frame_bytes": 1 << 19, "window_bytes": 8 << 20,
     "requests": 64, "schedules": True},
    {"type": "models", "id": 0, "models": ["org/m"]},
    {"type": "begin", "id": 1, "size": 9, "digest": "0" * 64},
    {"type": "data", "id": 1, "start": 0, "stop": 9},
    {"type": "progress", "id": 2, "bytes": 7},
    {"type": "error", "id": 2, "code": "unknown-file", "message": "no such file"},
    {"type": "data", "id": 4, "start": 0, "stop": 9},
)  # fmt: skip


def _lines(messages: Sequence[dict[str, Any]]) -> bytes:
    return b"\n".join(json.dumps(one, separators=(",", ":")).encode() for one in messages)


def client_messages() -> Parser:
    """A client's messages to a server, one per line."""
    from surfw.wire import Cancel, Credit, ServerSession
    from surfw.wire.messages import encode, parse_client_message

    def parse(data: bytes) -> None:
        session = ServerSession(WireLimits(), server="surfw/1", takes_schedules=True)
        session.hello()
        for line in data.split(b"\n"):
            text = line.decode("utf-8", "replace")
            message = session.receive(text)
            assert 0 <= session.credit_bytes <= session.limits.window_bytes
            if message is not None:
                assert parse_client_message(encode(message)) == message
                assert isinstance(message, Cancel | Credit) or not hasattr(message, "id") or session.is_open(message.id)

    return Parser(
        parse=parse,
        errors=(RemoteProtocolError,),
        seeds=[_lines([*_CLIENT_LINES[:7], _CLIENT_LINES[8]]), _lines(_CLIENT_LINES[:1] + _CLIENT_LINES[7:8])],
    )


def server_messages() -> Parser:
    """A server's messages to a client that has requested everything, one per line; `=N` is a frame of N bytes."""
    from surfw.wire import ClientSession, Get, GetDigests, GetFile, GetManifest, ListModels
    from surfw.wire.messages import encode, parse_server_message

    asked = (
        ListModels(0), GetManifest(1, "m"), GetFile(2, "m", "f"), GetDigests(3, "m", "c"),
        Get(4, "m", "c", "none", 0, 9),
    )  # fmt: skip

    def parse(data: bytes) -> None:
        session = ClientSession(WireLimits(), client="surfw/1")
        for line in data.split(b"\n"):
            if line.startswith(b"=") and line[1:].isdigit() and len(line) < 9:
                size = int(line[1:])
                number, offset = session.place(size)
                arrival = session.receive_binary(size)
                assert (arrival.id, arrival.start) == (number, offset)
                session.credit()
                continue
            was_greeted = bool(session.requests)
            message = session.receive(line.decode("utf-8", "replace"))
            assert parse_server_message(encode(message)) == message
            if not was_greeted:
                for request in asked[: session.requests]:
                    session.send(request)

    answers = _lines(_SERVER_LINES[:4]) + b"\n=4\n=5\n" + _lines(_SERVER_LINES[4:]) + b"\n=9"
    return Parser(
        parse=parse, errors=(RemoteProtocolError,), seeds=[answers, _lines(_SERVER_LINES[:2])], words=[b"\n=9\n"]
    )


def _frame(opcode: int, payload: bytes, *, mask: bool = False) -> bytes:
    size = len(payload)
    length = bytes([mask << 7 | size]) if size < 126 else struct.pack("!BH", mask << 7 | 126, size)
    return bytes([0x80 | opcode]) + length + (bytes(4) if mask else b"") + payload


def server_frames() -> Parser:
    """The bytes of a server's WebSocket, in pieces, which the client's connection reads into memory."""
    from surfw.client.link import Link
    from surfw.wire import Get
    from tests.client.test_connection import HELLO, Memory, Wire, receive

    logging.getLogger("websockets").disabled = True
    loop, uri, accepted = asyncio.new_event_loop(), parse_uri("ws://raw"), Response(101, "Go", Headers())

    async def talk(data: bytes) -> None:
        wire, memory, size = Wire(), Memory(), 5000 if data[0] > 15 else 9
        link = Link("ws://raw", WireLimits(), 60)
        connection = link.attach(ClientProtocol(uri, state=State.OPEN, max_size=MAX_FRAME_BYTES), ping_interval=None)
        connection.response = accepted
        connection.connection_made(wire)
        receive(connection, HELLO)
        asking = asyncio.create_task(link.receive(lambda number: Get(number, "m", "c", "none", 0, size), memory))
        await asyncio.sleep(0)
        step = data[0] & 15 or 1 << 20
        try:
            receive(connection, data[1:], range(step, len(data), step))
            connection.connection_lost(None)
            await asyncio.sleep(0)
            await asking
        finally:
            asking.cancel()
            link.abort()
        assert memory.received == size

    def parse(data: bytes) -> None:
        if data:
            loop.run_until_complete(talk(data))

    run = _frame(Opcode.TEXT, b'{"type":"data","id":0,"start":0,"stop":5000}') + _frame(Opcode.BINARY, bytes(4100))
    return Parser(
        parse=parse,
        errors=(ConnectionFailedError, RefusedError),
        seeds=[
            b"\0" + _frame(Opcode.TEXT, b'{"type":"data","id":0,"start":0,"stop":9}') + _frame(Opcode.BINARY, bytes(9)),
            b"\0" + run[:4000],
            b"\7" + _frame(Opcode.TEXT, b'{"type":"data","id":0,"start":0,"stop":8}') + _frame(Opcode.BINARY, bytes(8)),
            b"\1" + _frame(Opcode.PING, b"?") + _frame(Opcode.CLOSE, b"\x03\xe9bye"),
            b"\0" + _frame(Opcode.TEXT, b'{"type":"error","id":0,"code":"c","message":"m"}'),
        ],
        words=[b'{"type":"data","id":0,"start":0,"stop":', b"\x82\x7e", b"\x81\x7e", b"\x82\x7f" + bytes(5)],
    )  # fmt: skip


def client_frames() -> Parser:
    """The bytes of a client's WebSocket, from its handshake on, which the library passes to a session."""
    from surfw.server.access import EVERYTHING
    from surfw.wire import ServerSession, shown_token
    from surfw.wire.access import is_meant

    logging.getLogger("websockets").disabled = True
    request = (
        b"GET / HTTP/1.1\r\nHost: localhost:8765\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n"
        b"Sec-WebSocket-Protocol: surfw.v1\r\nAuthorization: Bearer x\r\n\r\n"
    )

    def parse(data: bytes) -> None:
        protocol, session = ServerProtocol(max_size=256 * KIB), ServerSession(WireLimits(), server="surfw/1")
        if data[:1] != b"G":
            protocol.state = State.OPEN
            protocol.parser = protocol.parse()
            next(protocol.parser)
        protocol.receive_data(data)
        for event in protocol.events_received():
            if not isinstance(event, Frame):
                is_meant(", ".join(event.headers.get_all("Host")), ["localhost"])
                shown_token(event.headers.get_all("Authorization"))
                assert EVERYTHING.may_read(event.path)
                if protocol.eof_sent:
                    return  # as surfw.server.http does
                protocol.send_response(protocol.accept(event))
            elif event.opcode is Opcode.TEXT:
                try:
                    text = bytes(event.data).decode()
                except UnicodeDecodeError:
                    return
                session.receive(text)

    frames = b"".join(_frame(Opcode.TEXT, json.dumps(one).encode(), mask=True) for one in _CLIENT_LINES)
    return Parser(
        parse=parse,
        errors=(RemoteProtocolError,),
        seeds=[request + frames, frames, request, b"GET /stats HTTP/1.1\r\nHost: [::1]\r\n\r\n"],
        words=[b"\x81\x80\0\0\0\0", b"\r\n", b"Host: ", b"Authorization: Bearer "],
    )


def redis() -> Parser:
    """The bytes with which a Redis answers a request for a segment of five bytes."""
    from blake3 import blake3
    from redis.asyncio.connection import Connection

    from surfw.server.redis_link import AwayError, RedisLink
    from surfw.server.redis_tier import Segment

    loop = asyncio.new_event_loop()
    connection = Connection(protocol=2)
    segment = Segment("0" * 64, 0, blake3(b"12345").digest())

    class Pipeline:
        """Replaces redis-py's pipeline, reading the bytes of an answer."""

        def __init__(self, data: bytes) -> None:
            self._data, self._asked = data, 0

        def getrange(self, *_: object) -> None:
            self._asked += 1

        async def execute(self, *, raise_on_error: bool) -> list[Any]:
            assert not raise_on_error
            connection._reader = asyncio.StreamReader()
            connection._reader.feed_data(self._data)
            connection._reader.feed_eof()
            connection._parser.on_connect(connection)
            return [await connection._parser.read_response(disable_decoding=True) for _ in range(self._asked)]

    async def read(data: bytes) -> None:
        link._client.pipeline = lambda **_: Pipeline(data)
        found = await link.read("key", 5)
        destination = memoryview(bytearray(5))
        if segment.take(found, destination) and found:
            assert bytes(destination) == b"12345"

    async def make() -> RedisLink:
        return RedisLink("redis://localhost")

    link = loop.run_until_complete(make())

    return Parser(
        parse=lambda data: loop.run_until_complete(read(data)),
        errors=(AwayError,),
        seeds=[b"$5\r\n12345\r\n", b"-WRONGTYPE no\r\n", b"$-1\r\n", b"*1\r\n:5\r\n+OK\r\n", b"-ERR x\r\n"],
        words=[b"\r\n", b"$5\r\n", b"*1\r\n", b"-MOVED 1 h:1\r\n"],
    )
