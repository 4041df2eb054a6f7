"""Bounds the work that clients can cause before they are answered: input is read in small portions, in fair turns.

The library would process everything that has arrived, thousands of messages or pings, before any other connection gets
a turn. Here a connection reads one portion, delivers its messages one by one, and then waits for its turn to read
another. Unread data stays with the client, so that nothing piles up here.
"""

import asyncio
from contextlib import suppress
from typing import Any

from websockets.asyncio.server import ServerConnection
from websockets.frames import CloseCode, Frame, Opcode
from websockets.protocol import Event, State
from websockets.typing import Data

from surfw.server.access import EVERYTHING, Grant
from surfw.server.fairness import Account, Turns
from surfw.server.outbox import Outbox

PORTION_BYTES = 256
"""About one request, or a few dozen pings: the most work for one turn."""

_MOST_OPENING = 512
_MOST_FRAGMENTS = 1024
"""The most fragments of a message. Even empty ones take memory until the last one arrives."""


class Newcomers:
    """Connections that were accepted but are not open yet, including those in their TLS handshake.

    If there are too many, the one that has been silent longest is dropped.

    Attributes:
        account: pays for all of them, so that clients that keep reconnecting share one client's portion.
    """

    def __init__(self) -> None:
        self.account = Account()
        self._connections: dict[FairConnection, None] = {}

    def __len__(self) -> int:
        return len(self._connections)

    def __contains__(self, connection: object) -> bool:
        return connection in self._connections

    def add(self, connection: "FairConnection") -> None:
        """Add a connection that was accepted, or move one that has sent something to the end."""
        self._connections.pop(connection, None)
        self._connections[connection] = None
        if len(self._connections) > _MOST_OPENING:
            oldest = next(iter(self._connections))
            self.discard(oldest)
            oldest.abort()

    def discard(self, connection: "FairConnection") -> None:
        """Remove a connection that is open or closed."""
        self._connections.pop(connection, None)


class FairConnection(ServerConnection, asyncio.BufferedProtocol):
    """The library's server connection, with input that waits for its turn.

    Attributes:
        account: pays for turns of the event loop.
        grant: the grant of the token in the request that opened the connection.
        outbox: sends runs; exists once there is a transport.
    """

    grant: Grant = EVERYTHING

    def __init__(
        self, *arguments: Any, turns: Turns, newcomers: Newcomers, most_unsent_bytes: int, **options: Any
    ) -> None:
        """Start receiving, as a newcomer; other arguments are the library's.

        `turns` and `newcomers` are shared by all connections. Nothing is read while more than `most_unsent_bytes` are
        waiting to be sent.
        """
        super().__init__(*arguments, **options | {"max_queue": None})  # the queue holds at most a portion
        self.account = newcomers.account
        self._turns = turns
        self._newcomers = newcomers
        self._most_unsent_bytes = most_unsent_bytes
        self._portion = memoryview(bytearray(PORTION_BYTES))
        self._unread = self._fragments = 0
        self._waits_to_read = False
        self._hang_up: asyncio.TimerHandle | None = None
        self._accepting = asyncio.current_task()  # runs until there is a transport: with TLS, after the handshake
        if self._accepting is not None:
            self._accepting.add_done_callback(self._accepted)
        newcomers.add(self)

    def _accepted(self, _: asyncio.Task[Any]) -> None:
        """Discard a connection without a transport, as after a failed TLS handshake: the library drops it silently."""
        if not hasattr(self, "transport"):
            self._newcomers.discard(self)

    def abort(self) -> None:
        """Drop the connection, whether or not it has a transport yet."""
        if hasattr(self, "transport"):
            self.transport.abort()
        elif self._accepting is not None:
            self._accepting.cancel()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Create the outbox."""
        super().connection_made(transport)
        self.outbox = Outbox(self.transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Clean up."""
        self._newcomers.discard(self)
        self.outbox.close()
        super().connection_lost(exc)
        if self._hang_up is not None:
            self._hang_up.cancel()

    def opened(self) -> None:
        """Mark the connection as open: newcomers no longer displace it, and it pays from its own account."""
        self._newcomers.discard(self)
        self.account = Account(self._newcomers.account.paid)

    async def turn(self) -> None:
        """Wait for a turn of the event loop."""
        await self._turns.turn(self.account)

    def give_back_turn(self) -> None:
        """Refund the turn for the message that was just received."""
        self.account.paid -= 1

    async def receive(self) -> Data:
        """Return the next message, in turn."""
        if self._unread:
            await self.turn()
        message = await self.recv()
        self._unread -= 1
        if not self._unread:
            self._read_on()
        return message

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return the memory for what the transport receives next."""
        return self._portion

    def buffer_updated(self, nbytes: int) -> None:
        """Process a portion. The next is read, in turn, once its messages were received, unless too much is unsent."""
        self.transport.pause_reading()
        if self in self._newcomers:
            self._newcomers.add(self)
        self.data_received(bytes(self._portion[:nbytes]))
        if not self._unread:
            self._read_on()

    def process_event(self, event: Event) -> None:
        """Count the messages that were not received yet, and the fragments of an incomplete one."""
        super().process_event(event)
        if not isinstance(event, Frame) or event.opcode not in {Opcode.TEXT, Opcode.BINARY, Opcode.CONT}:
            return
        self._unread += event.fin
        self._fragments = 0 if event.fin else self._fragments + 1
        if self._fragments > _MOST_FRAGMENTS and self.protocol.state is State.OPEN:
            self.protocol.fail(CloseCode.MESSAGE_TOO_BIG, f"a message in more than {_MOST_FRAGMENTS} fragments")
            self.send_data()

    def send_data(self) -> None:
        """Write all pending output at once, such as the answers to many pings.

        If the connection is closing, the client has a few seconds to read it and to hang up; the library would wait
        until the next ping for a client that does neither.
        """
        writes = self.protocol.data_to_send()
        if self.protocol.state in {State.CLOSING, State.CLOSED} and self._hang_up is None:
            self._hang_up = self.loop.call_later(self.close_timeout or 0, self.transport.abort)
        self.outbox.let_go()
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
        """Resume reading if it was paused until the client takes what was sent."""
        super().resume_writing()
        if self._waits_to_read:
            self._waits_to_read = False
            self._read_on()

    def _read_on(self) -> None:
        """Read the next portion in turn or, if too much is unsent, once the client has taken enough of it."""
        if self.transport.get_write_buffer_size() > self._most_unsent_bytes:
            self._waits_to_read = True
        elif (turn := self._turns.ask(self.account)).done():
            self._resume()
        else:
            turn.add_done_callback(self._resume)

    def _resume(self, _: Any = None) -> None:
        if not self.transport.is_closing():
            self.transport.resume_reading()

    @property
    def shown_address(self) -> str:
        """The client's address for people: `127.0.0.1:50412`, `[::1]:50412`."""
        return show_address(self.remote_address)


def show_address(address: Any) -> str:
    """Format a socket address for people; without one, as for a closed socket, say that it is unknown."""
    if not isinstance(address, tuple):
        return str(address or "an unknown address")
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
