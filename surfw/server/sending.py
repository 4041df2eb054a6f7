"""The writing side of a connection: its answers take turns by priority, within the client's credit.

A turn sends one run. The lowest priority number goes first, and equal ones in order of asking, so that their answers
interleave. A run is written without `await`: an announcement and all of its bytes go out together, and an answer that
waits for credit holds no bytes of the cache. What the socket does not accept at once waits as views of its page (see
`outbox`), and is copied if the page is evicted; otherwise a client could keep pages alive indefinitely. So a client
that does not read costs one run, and the messages that end its requests, which are counted.
"""

import asyncio
import contextlib
import heapq
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

from websockets.protocol import State

from surfw.metrics import Metrics
from surfw.server.pacing import ClientPace, Pacing
from surfw.server.pages import StoredPiece
from surfw.server.reception import FairConnection
from surfw.wire import Begin, Data, Failed, Models, Progress, ServerSession, binary_header

_RUN_SECONDS = 0.1
"""Runs that take longer to send are shortened."""


@dataclass(frozen=True, slots=True)
class Document:
    """A whole answer, such as a manifest. It holds no bytes while it waits to be sent.

    Attributes:
        size: the number of bytes.
        digest: their BLAKE3.
        load: returns them; called for every run.
    """

    size: int
    digest: str
    load: Callable[[], Awaitable[bytes]]

    async def view(self, start: int, stop: int) -> memoryview:
        """Return bytes `start` to `stop`, valid until the next `await`."""
        return memoryview(await self.load())[start:stop]


class Sender:
    """Sends a session's messages and runs over a WebSocket.

    Attributes:
        sent_bytes: bytes of models and other answers sent so far, without messages.
    """

    def __init__(
        self, websocket: FairConnection, session: ServerSession, metrics: Metrics, pace: ClientPace | None = None
    ) -> None:
        """Take over the writing side of the connection, limited to a pace; counts `bytes_sent`."""
        self._pace = pace or Pacing().client()
        self._websocket = websocket
        self._session = session
        self._limits = session.limits
        self._metrics = metrics
        self._waiting: list[tuple[int, int, int, asyncio.Future[None]]] = []
        self._asked = 0
        self._busy = False
        self._untaken = 0
        self._run_bytes = self._limits.run_bytes
        self.sent_bytes = 0

    def hello(self) -> None:
        """Write the first message."""
        self._write_text(self._session.hello())

    def send(self, message: Models | Begin | Progress | Failed | Data) -> None:
        """Write a message. Error messages are counted until the socket has taken them."""
        self._write_text(self._session.send(message))
        if isinstance(message, Failed) and self._is_open() and self._websocket.transport.get_write_buffer_size():
            self._untaken += 1

    async def send_piece(self, request_id: int, at: int, piece: Document | StoredPiece, priority: int = 0) -> None:
        """Send a piece, which begins at byte `at` of the answer, in runs, each in its turn.

        Raises:
            StorageError: the piece cannot be read.
        """
        sent = 0
        while sent < piece.size:
            async with self.turn(priority, min(self._limits.frame_bytes, piece.size - sent)):
                sent += await self._send_run(request_id, at + sent, piece, sent, priority)

    async def _send_run(self, request_id: int, at: int, piece: Document | StoredPiece, sent: int, priority: int) -> int:
        """Send as much of a piece as may be sent now; return how much that was.

        None of a client's requests may hold a view while waiting for the client: even a single byte would keep a whole
        page alive, beyond the cache's budget. The run that waits for the socket releases its page on eviction.
        """
        room = min(self._run_bytes, self._session.credit_bytes)
        room = room - room % self._limits.frame_bytes or room  # whole frames, unless credit is less than one
        if (most := self._pace.most_bytes) is not None:
            room = min(room, most)
            await self._pace.wait(min(room, piece.size - sent), priority)
        run = await piece.view(sent, min(piece.size, sent + room))
        size, started = len(run), time.monotonic()
        self._write_run(self._session.send(Data(request_id, at, at + size)), run)
        del run
        outbox = self._websocket.outbox
        if isinstance(piece, StoredPiece):
            with piece.held(outbox):
                await outbox.sent()
        else:  # a view would keep the whole document alive
            outbox.let_go()
        self._adapt(time.monotonic() - started)
        return size

    def _adapt(self, seconds: float) -> None:
        """Shorten runs while they are slow, so that more urgent answers and cancellations need not wait."""
        if seconds > _RUN_SECONDS:
            self._run_bytes = max(self._limits.frame_bytes, self._run_bytes // 2)
        else:
            self._run_bytes = min(self._limits.run_bytes, 2 * self._run_bytes)

    @contextlib.asynccontextmanager
    async def turn(self, priority: int, least_bytes: int) -> AsyncIterator[None]:
        """Wait for a turn and for credit of `least_bytes`; the turn ends with the body, which sends one run."""
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
        """Give the next turn, if none is in use and there is credit for it."""
        while self._waiting and self._waiting[0][-1].done():
            heapq.heappop(self._waiting)
        if self._busy or not self._waiting or self._session.credit_bytes < self._waiting[0][2]:
            return
        self._busy = True
        heapq.heappop(self._waiting)[-1].set_result(None)

    @property
    def taken_bytes(self) -> int:
        """How much the client has taken so far: the bytes its system received plus those it credited."""
        return self._websocket.outbox.sent_bytes + self._session.credited_bytes

    @property
    def is_blocked(self) -> bool:
        """Whether answers wait for the client: it reads nothing, or gives no credit."""
        wants_credit = bool(self._waiting) and not self._busy and self._session.credit_bytes < self._waiting[0][2]
        is_full = self._websocket.outbox.is_waiting or bool(self._websocket.transport.get_write_buffer_size())
        return wants_credit or is_full

    async def keep_up(self) -> None:
        """If as many errors are unsent as requests may be open, wait until the client has received them."""
        if self._untaken >= self._limits.requests_in_flight:
            self._websocket.transport.set_write_buffer_limits(0)  # until nothing is left
            try:
                await self._drain()
            finally:
                self._websocket.transport.set_write_buffer_limits(self._limits.frame_bytes)

    async def _drain(self) -> None:
        """Wait until little is left to send. If the connection is lost, the receiving side detects it."""
        with contextlib.suppress(OSError):
            await self._websocket.drain()
        if not self._websocket.transport.get_write_buffer_size():
            self._untaken = 0

    def _is_open(self) -> bool:
        return self._websocket.state is State.OPEN and not self._websocket.transport.is_closing()

    def _write_text(self, text: str) -> None:
        if self._is_open():
            self._websocket.protocol.send_text(text.encode())
            self._websocket.send_data()

    def _write_run(self, announcement: str, run: memoryview) -> None:
        """Write an announcement and the bytes that it announces, at least one, without copying them into frames."""
        if not self._is_open():
            return
        self._websocket.protocol.send_text(announcement.encode())
        prefix = b"".join(self._websocket.protocol.data_to_send())
        parts: list[bytes | memoryview] = []
        for start in range(0, len(run), self._limits.frame_bytes):
            frame = run[start : start + self._limits.frame_bytes]
            parts += [prefix + binary_header(len(frame)), frame]
            prefix = b""
        self.sent_bytes += len(run)  # counted before the client can receive them
        self._metrics.add("bytes_sent", len(run))
        self._websocket.outbox.write(parts)
