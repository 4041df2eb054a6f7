"""What a socket does not accept at once is sent later as views, in order, and copied only if necessary."""

import asyncio
import errno
import gc
import socket
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from ctypes import c_char
from pathlib import Path

import pytest

from surfw.bench.raw_peer import RawPeer, message, ping
from surfw.config import KIB, MIB
from surfw.server.outbox import Outbox
from tests.peers import serving, until
from tests.stores import make_store, payload

PAGE = bytes(range(256)) * (16 * KIB)


class Transport:
    """A transport that only records what it is given."""

    def __init__(self, ours: socket.socket, *, tls: bool) -> None:
        self.extra = {"socket": ours, "sslcontext": "context" if tls else None}
        self.given: list[object] = []
        self.closing = False

    def get_extra_info(self, name: str) -> object:
        return self.extra[name]

    def get_write_buffer_size(self) -> int:
        return sum(len(part) for part in self.given)  # type: ignore[arg-type]

    def is_closing(self) -> bool:
        return self.closing

    def write(self, data: object) -> None:
        self.given.append(data)


class Ends:
    """An outbox, its transport, and the other end of the socket."""

    def __init__(self, ours: socket.socket, theirs: socket.socket, *, tls: bool) -> None:
        self.theirs = theirs
        self.transport = Transport(ours, tls=tls)
        self.outbox = Outbox(self.transport)  # type: ignore[arg-type]

    async def receive(self, size: int) -> bytes:
        received = bytearray()
        while len(received) < size:
            received += await asyncio.get_running_loop().sock_recv(self.theirs, 1 << 20)
        return bytes(received)

    def send_page(self) -> "weakref.ref[object]":
        """Send a page and drop its reference; the result says whether another reference exists."""
        memory = (c_char * len(PAGE)).from_buffer_copy(PAGE)
        self.outbox.write([b"header", memoryview(memory).cast("B")])
        return weakref.ref(memory)


@asynccontextmanager
async def ends(*, tls: bool = False) -> AsyncIterator[Ends]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        both = Ends(ours, theirs, tls=tls)
        yield both
        both.outbox.close()


def test_what_waits_goes_out_from_where_it_lies_and_then_is_let_go_of() -> None:
    async def main() -> None:
        async with ends() as both:
            page = both.send_page()
            assert both.outbox.is_waiting, "a socket does not take so much at once"
            assert page() is not None
            sent = asyncio.create_task(both.outbox.sent())
            await asyncio.sleep(0)
            assert not sent.done()
            assert await both.receive(6 + len(PAGE)) == b"header" + PAGE
            await sent
            assert page() is None
            assert not both.transport.given
            assert both.outbox.sent_bytes == 6 + len(PAGE)
            await both.outbox.sent()

    asyncio.run(main())


def test_a_copy_goes_to_the_transport_where_the_page_is_needed() -> None:
    async def main() -> None:
        async with ends() as both:
            page = both.send_page()
            sent = asyncio.create_task(both.outbox.sent())
            await asyncio.sleep(0)
            both.outbox.let_go()
            gc.collect()
            assert page() is None
            await sent
            assert all(type(part) is bytes for part in both.transport.given)
            before = both.outbox.sent_bytes
            both.outbox.write([b"more"])
            rest = b"".join(both.transport.given)  # type: ignore[arg-type]
            assert await both.receive(before) + rest == b"header" + PAGE + b"more"
            assert not both.outbox.is_waiting

    asyncio.run(main())


def test_a_transport_that_encrypts_is_given_copies() -> None:
    async def main() -> None:
        async with ends(tls=True) as both:
            assert both.send_page()() is None
            assert b"".join(both.transport.given) == b"header" + PAGE  # type: ignore[arg-type]

    asyncio.run(main())


def test_what_waits_goes_to_the_transport_where_no_descriptor_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: socket.socket) -> socket.socket:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(socket.socket, "dup", fail)

    async def main() -> None:
        async with ends() as both:
            assert both.send_page()() is None
            await both.outbox.sent()
            before = both.outbox.sent_bytes
            assert 0 < before < 6 + len(PAGE), "a socket does not take so much at once"
            rest = b"".join(both.transport.given)  # type: ignore[arg-type]
            assert await both.receive(before) + rest == b"header" + PAGE

    asyncio.run(main())


def test_a_lost_connection_keeps_nobody_waiting_and_no_page() -> None:
    async def main() -> None:
        async with ends() as both:
            page = both.send_page()
            sent = asyncio.create_task(both.outbox.sent())
            await asyncio.sleep(0)
            both.theirs.close()
            await sent
            assert page() is None
            both.transport.closing = True
            assert both.send_page()() is None
        async with ends() as both:
            page = both.send_page()
            sent = asyncio.create_task(both.outbox.sent())
            await asyncio.sleep(0)
            both.outbox.close()
            await sent
            assert page() is None

    asyncio.run(main())


def test_a_message_does_not_cut_into_a_run_that_waits(tmp_path: Path) -> None:
    manifest = make_store(tmp_path, sizes=[4 * MIB])
    chunk = {"model": manifest.name, "chunk": manifest.chunks[0].id, "form": "none", "start": 0, "stop": 4 * MIB}

    async def main() -> None:
        async with serving(tmp_path) as server:
            peer = await asyncio.to_thread(lambda: RawPeer(server.port, receive_bytes=4096).shake_hands())
            await asyncio.to_thread(peer.greet)
            (connection,) = server._connections
            await asyncio.to_thread(peer.send, message("get", id=0, **chunk))
            await until(lambda: connection._websocket.outbox.is_waiting)
            await asyncio.to_thread(peer.send, message("models", id=1) + ping(b"x"))
            await until(lambda: not connection._websocket.outbox.is_waiting)
            received = bytearray()
            while len(received) < 4 * MIB:
                heard = await asyncio.to_thread(peer.hear)
                received += heard if isinstance(heard, bytes) else b""
            assert bytes(received) == payload(tmp_path, manifest.chunks[0])
            assert (await asyncio.to_thread(peer.hear_text))["models"] == ["toy/model"]
            peer.close()

    asyncio.run(main())
