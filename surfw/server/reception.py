"""What clients can make a server do, in measure: their input is taken in by portions, and their log lines are few.

The library would take in all that has arrived, thousands of messages or pings, before anybody else's turn. Here a
connection reads one portion, hands on the messages in it one after the other, and then waits for its turn to read
another. What it does not read stays with the client, so that nothing of a client's piles up here.
"""

import asyncio
import logging
import time
from contextlib import suppress
from typing import Any

from websockets.asyncio.server import ServerConnection
from websockets.frames import Frame, Opcode
from websockets.protocol import Event
from websockets.typing import Data

from surfw.server.fairness import Account, Turns

PORTION_BYTES = 256
"""About one request, or some dozens of pings: as much work as a turn may be."""

_MOST_OPENING = 512

_LOG_SECONDS = 10


class Newcomers:
    """The connections that are not open yet, each from when it was accepted on, its TLS handshake included.

    Of those that are too many, the one goes that has said nothing longest.

    Attributes:
        account: all of them pay from it, so that whoever comes again and again is one among those who are there.
    """

    def __init__(self) -> None:
        """None yet."""
        self.account = Account()
        self._connections: dict[FairConnection, None] = {}

    def __len__(self) -> int:
        return len(self._connections)

    def __contains__(self, connection: object) -> bool:
        return connection in self._connections

    def add(self, connection: "FairConnection") -> None:
        """One was accepted, or has said something."""
        self._connections.pop(connection, None)
        self._connections[connection] = None
        if len(self._connections) > _MOST_OPENING:
            oldest = next(iter(self._connections))
            self.discard(oldest)
            oldest.abort()

    def discard(self, connection: "FairConnection") -> None:
        """One is open, or gone."""
        self._connections.pop(connection, None)


class FairConnection(ServerConnection, asyncio.BufferedProtocol):
    """The library's server connection, whose input waits for its turn.

    Attributes:
        account: who pays for turns of the loop.
    """

    def __init__(
        self, *arguments: Any, turns: Turns, newcomers: Newcomers, most_unsent_bytes: int, **options: Any
    ) -> None:
        """Take the library's arguments, and what all connections share.

        Args:
            arguments: the library's.
            turns: of the loop.
            newcomers: where it is until it is open.
            most_unsent_bytes: while more than this waits to go out, nothing is read.
            options: the library's.
        """
        super().__init__(*arguments, **options | {"max_queue": None})  # the queue is at most a portion
        self.account = newcomers.account
        self._turns = turns
        self._newcomers = newcomers
        self._most_unsent_bytes = most_unsent_bytes
        self._portion = memoryview(bytearray(PORTION_BYTES))
        self._unread = 0
        self._waits_to_read = False
        self._accepting = asyncio.current_task()  # the loop's, until there is a transport: for TLS, after the handshake
        if self._accepting is not None:
            self._accepting.add_done_callback(self._accepted)
        newcomers.add(self)

    def _accepted(self, _: asyncio.Task[Any]) -> None:
        """It has a transport now; one that has none, such as after a failed TLS handshake, is gone without a word."""
        if not hasattr(self, "transport"):
            self._newcomers.discard(self)

    def abort(self) -> None:
        """Hang up, whether it has a transport yet or not."""
        if hasattr(self, "transport"):
            self.transport.abort()
        elif self._accepting is not None:
            self._accepting.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        self._newcomers.discard(self)
        super().connection_lost(exc)

    def opened(self) -> None:
        """It is open: others may not push it out any more, and it pays for itself from now on."""
        self._newcomers.discard(self)
        self.account = Account(self._newcomers.account.paid)

    async def turn(self) -> None:
        """Wait for a turn in the loop."""
        await self._turns.turn(self.account)

    def give_back_turn(self) -> None:
        """What was taken in costs nothing."""
        self.account.paid -= 1

    async def receive(self) -> Data:
        """The next message, in its turn."""
        if self._unread:
            await self.turn()
        message = await self.recv()
        self._unread -= 1
        if not self._unread:
            self._read_on()
        return message

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the transport may write what it receives next."""
        return self._portion

    def buffer_updated(self, nbytes: int) -> None:
        """So much was written there: read on when its messages are taken, in turn, and if what goes out is taken."""
        self.transport.pause_reading()
        if self in self._newcomers:
            self._newcomers.add(self)
        self.data_received(bytes(self._portion[:nbytes]))
        if not self._unread:
            self._read_on()

    def process_event(self, event: Event) -> None:
        """Count the messages."""
        super().process_event(event)
        if isinstance(event, Frame) and event.fin and event.opcode in {Opcode.TEXT, Opcode.BINARY, Opcode.CONT}:
            self._unread += 1

    def send_data(self) -> None:
        """Write all that is to go out in one go, such as the answers to many pings."""
        writes = self.protocol.data_to_send()
        if data := b"".join(writes):
            self.transport.write(data)
        if b"" not in writes:
            return
        if self.transport.can_write_eof():
            with suppress(OSError, RuntimeError):
                self.transport.write_eof()
        else:
            self.transport.close()

    def resume_writing(self) -> None:
        """What waited to go out is taken."""
        super().resume_writing()
        if self._waits_to_read:
            self._waits_to_read = False
            self._read_on()

    def _read_on(self) -> None:
        """Read the next portion in its turn, or as soon as enough of what waits to go out is taken."""
        if self.transport.get_write_buffer_size() > self._most_unsent_bytes:
            self._waits_to_read = True
        elif (turn := self._turns.ask(self.account)) is None:
            self._resume()
        else:
            turn.add_done_callback(self._resume)

    def _resume(self, _: Any = None) -> None:
        if not self.transport.is_closing():
            self.transport.resume_reading()


class SparseLog:
    """Writes the first lines at once, and then at most so many every some seconds."""

    def __init__(self, log: logging.Logger, *, level: int = logging.INFO, most: int = 1) -> None:
        """Nothing was written yet; `most` lines are written at a time."""
        self._log = log
        self._level = level
        self._most = self._left = most
        self._next = float("-inf")
        self._unwritten = 0
        self._last = ""

    def write(self, text: str) -> None:
        """Write the line, or count it."""
        self._unwritten += 1
        self._last = text
        if time.monotonic() >= self._next:
            self._left, self._next = self._most, time.monotonic() + _LOG_SECONDS
        if self._left:
            self._left -= 1
            self.flush()

    def flush(self) -> None:
        """Write what was counted."""
        if not self._unwritten:
            return
        more = f" (and {self._unwritten - 1} times more before)" if self._unwritten > 1 else ""
        self._log.log(self._level, "%s%s", self._last, more)
        self._unwritten = 0


class ClientLog:
    """What a server says of its clients: a sparse log for each kind of line, the same for all of them."""

    def __init__(self, log: logging.Logger) -> None:
        """Nothing was written yet."""
        self.visits = SparseLog(log, most=20)
        self.closings = SparseLog(log, level=logging.WARNING)
        self.refusals = SparseLog(log)
        self.failures = SparseLog(log, level=logging.WARNING)
        self.changes = SparseLog(log, level=logging.ERROR)

    def flush(self) -> None:
        """Write what was counted."""
        for kind in (self.visits, self.closings, self.refusals, self.failures, self.changes):
            kind.flush()
