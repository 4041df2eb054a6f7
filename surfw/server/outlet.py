"""The one way out of a connection: its answers take turns by priority, within the client's window.

A turn sends one run. Turns are given to the lowest priority number first, and in order of asking among equals, so that
answers of the same priority interleave. Writing a run needs no `await`: an announcement and all of its bytes go out
together, and whoever waits for credit holds no bytes of the cache meanwhile. What the socket does not take at once is
copied: a view of it would keep its page alive as long as the client likes. So a client that does not read costs one run
and the messages that end its requests, and those are counted.
"""

import asyncio
import contextlib
import heapq
import os
from collections.abc import AsyncIterator

from websockets.asyncio.server import ServerConnection
from websockets.protocol import State

from surfw.metrics import Metrics
from surfw.wire import ServerSession, binary_header


class Outlet:
    """Sends a session's messages and runs over a WebSocket."""

    def __init__(self, websocket: ServerConnection, session: ServerSession, metrics: Metrics) -> None:
        """Take over the writing side of the connection; counts `bytes_sent`."""
        self._websocket = websocket
        self._session = session
        self._metrics = metrics
        self._waiting: list[tuple[int, int, int, asyncio.Future[None]]] = []
        self._asked = 0
        self._busy = False
        self._untaken = 0

    @contextlib.asynccontextmanager
    async def turn(self, priority: int, least_bytes: int) -> AsyncIterator[None]:
        """Wait until it is our turn and the window has room for `least_bytes`; leave it after one run."""
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (priority, self._asked, least_bytes, granted))
        self._asked += 1
        self.grant()
        try:
            await granted
            yield
            await self._drain()
        finally:
            if granted.cancelled():
                self._waiting = [turn for turn in self._waiting if not turn[-1].done()]
                heapq.heapify(self._waiting)
            elif granted.done():
                self._busy = False
            self.grant()

    def grant(self) -> None:
        """Give the next turn, if it is free and the window has room."""
        while self._waiting and self._waiting[0][-1].done():
            heapq.heappop(self._waiting)
        if self._busy or not self._waiting or self._session.credit_bytes < self._waiting[0][2]:
            return
        self._busy = True
        heapq.heappop(self._waiting)[-1].set_result(None)

    def send(self, text: str, *, ends: bool = False) -> None:
        """Write a message; one that `ends` a request is counted as untaken until the socket has it."""
        if self._is_open():
            self._websocket.protocol.send_text(text.encode())
            self._websocket.send_data()
            if ends and self._websocket.transport.get_write_buffer_size():
                self._untaken += 1

    def send_run(self, announcement: str, run: memoryview) -> None:
        """Write an announcement and the bytes it announces, at least one, without copying them into frames."""
        if not self._is_open():
            return
        self._websocket.protocol.send_text(announcement.encode())
        prefix = b"".join(self._websocket.protocol.data_to_send())
        frame_bytes = self._session.limits.frame_bytes
        parts: list[bytes | memoryview] = []
        for start in range(0, len(run), frame_bytes):
            frame = run[start : start + frame_bytes]
            parts += [prefix + binary_header(len(frame)), frame]
            prefix = b""
        self._write(parts)
        self._metrics.add("bytes_sent", len(run))

    def _is_open(self) -> bool:
        return self._websocket.state is State.OPEN and not self._websocket.transport.is_closing()

    def _write(self, parts: list[bytes | memoryview]) -> None:
        """Write without keeping a view of any part. A TLS transport copies what it is given; others may keep it."""
        transport = self._websocket.transport
        if transport.get_extra_info("sslcontext") is not None:
            for part in parts:
                transport.write(part)
            return
        written = 0
        if not transport.get_write_buffer_size():
            with contextlib.suppress(OSError):  # full, or lost, which the transport finds out with the rest
                written = os.writev(transport.get_extra_info("socket").fileno(), parts)
        for part in parts:
            if written < len(part):
                transport.write(bytes(part[written:]))
            written = max(0, written - len(part))

    async def keep_up(self) -> None:
        """Wait while as many requests as may be open have ended and the client has not taken that in."""
        if self._untaken >= self._session.limits.requests_in_flight:
            self._websocket.transport.set_write_buffer_limits(0)  # until nothing is left
            try:
                await self._drain()
            finally:
                self._websocket.transport.set_write_buffer_limits(self._session.limits.frame_bytes)

    async def _drain(self) -> None:
        """Wait until little is left to go out. That the connection was lost is for its reader to find."""
        with contextlib.suppress(OSError):
            await self._websocket.drain()
        if not self._websocket.transport.get_write_buffer_size():
            self._untaken = 0
