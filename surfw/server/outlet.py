"""The one way out of a connection: its answers take turns by priority, within the client's window.

A turn sends one run. Turns are given to the lowest priority number first, and in order of asking among equals, so that
answers of the same priority interleave. Writing a run needs no `await`: an announcement and all of its bytes go out
together, and whoever waits for credit holds no bytes of the cache meanwhile.
"""

import asyncio
import contextlib
import heapq
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
        if self._busy or not self._waiting or self._session.window < self._waiting[0][2]:
            return
        self._busy = True
        heapq.heappop(self._waiting)[-1].set_result(None)

    def send(self, text: str) -> None:
        """Write a message."""
        if self._websocket.state is State.OPEN:
            self._websocket.protocol.send_text(text.encode())
            self._websocket.send_data()

    def send_run(self, announcement: str, run: memoryview) -> None:
        """Write an announcement and the bytes it announces, at least one, without copying them into frames."""
        if self._websocket.state is not State.OPEN:
            return
        self._websocket.protocol.send_text(announcement.encode())
        prefix = b"".join(self._websocket.protocol.data_to_send())
        transport, frame_bytes = self._websocket.transport, self._session.limits.frame_bytes
        for start in range(0, len(run), frame_bytes):
            frame = run[start : start + frame_bytes]
            transport.write(prefix + binary_header(len(frame)))
            transport.write(frame)
            prefix = b""
        self._metrics.add("bytes_sent", len(run))

    async def keep_up(self) -> None:
        """Wait while more than a window and a run lies waiting, for a client that asks and does not read."""
        limits = self._session.limits
        if self._websocket.transport.get_write_buffer_size() > limits.window_bytes + limits.run_bytes:
            await self._drain()

    async def _drain(self) -> None:
        """Wait until little is left to go out. That the connection was lost is for its reader to find."""
        with contextlib.suppress(OSError):
            await self._websocket.drain()
