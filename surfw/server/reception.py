"""What bounds the work that clients can cause before they are answered: input in small portions, in turns.

The library would take in all that has arrived, thousands of messages or pings, before it is anybody else's turn. Here a
connection reads one portion, hands on the messages in it one by one, and then waits for its turn to read another. What
it does not read stays with the client, so that nothing piles up here.
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
"""About one request, or a few dozen pings: as much work as a turn may be."""

_MOST_OPENING = 512
_MOST_FRAGMENTS = 1024
"""Of one message. Even empty ones take memory until the last is there."""


class Newcomers:
    """The connections that are not open yet, from the moment they are accepted, so also during their TLS handshake.

    If there are too many, the one that has been silent longest is dropped.

    Attributes:
        account: pays for all of them, so that clients that connect again and again have one client's share.
    """

    def __init__(self) -> None:
        """Start with no connections."""
        self.account = Account()
        self._connections: dict[FairConnection, None] = {}

    def __len__(self) -> int:
        return len(self._connections)

    def __contains__(self, connection: object) -> bool:
        return connection in self._connections

    def add(self, connection: "FairConnection") -> None:
        """Add one that was accepted, or that has sent something."""
        self._connections.pop(connection, None)
        self._connections[connection] = None
        if len(self._connections) > _MOST_OPENING:
            oldest = next(iter(self._connections))
            self.discard(oldest)
            oldest.abort()

    def discard(self, connection: "FairConnection") -> None:
        """Remove one that is open, or gone."""
        self._connections.pop(connection, None)


class FairConnection(ServerConnection, asyncio.BufferedProtocol):
    """The library's server connection, with input that waits for its turn.

    Attributes:
        account: pays for turns of the loop.
        grant: what the token of the request that opened it allows.
        outbox: what runs go out through; there is one once there is a transport.
    """

    grant: Grant = EVERYTHING

    def __init__(
        self, *arguments: Any, turns: Turns, newcomers: Newcomers, most_unsent_bytes: int, **options: Any
    ) -> None:
        """Begin to receive, as one of the newcomers; what else is given is the library's.

        The turns of the loop and the newcomers are shared by all connections. While more than `most_unsent_bytes` wait
        to be sent, nothing is read.
        """
        super().__init__(*arguments, **options | {"max_queue": None})  # the queue is at most a portion
        self.account = newcomers.account
        self._turns = turns
        self._newcomers = newcomers
        self._most_unsent_bytes = most_unsent_bytes
        self._portion = memoryview(bytearray(PORTION_BYTES))
        self._unread = self._fragments = 0
        self._waits_to_read = False
        self._hang_up: asyncio.TimerHandle | None = None
        self._accepting = asyncio.current_task()  # the loop's, until there is a transport: for TLS, after the handshake
        if self._accepting is not None:
            self._accepting.add_done_callback(self._accepted)
        newcomers.add(self)

    def _accepted(self, _: asyncio.Task[Any]) -> None:
        """Forget one that got no transport, such as after a failed TLS handshake: the library drops it silently."""
        if not hasattr(self, "transport"):
            self._newcomers.discard(self)

    def abort(self) -> None:
        """Hang up, whether it has a transport yet or not."""
        if hasattr(self, "transport"):
            self.transport.abort()
        elif self._accepting is not None:
            self._accepting.cancel()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to send, too."""
        super().connection_made(transport)
        self.outbox = Outbox(self.transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._newcomers.discard(self)
        self.outbox.close()
        super().connection_lost(exc)
        if self._hang_up is not None:
            self._hang_up.cancel()

    def opened(self) -> None:
        """It is open: newcomers no longer push it out, and from now on it pays from an account of its own."""
        self._newcomers.discard(self)
        self.account = Account(self._newcomers.account.paid)

    async def turn(self) -> None:
        """Wait for a turn in the loop."""
        await self._turns.turn(self.account)

    def give_back_turn(self) -> None:
        """Make the message that was just received free of charge."""
        self.account.paid -= 1

    async def receive(self) -> Data:
        """Return the next message, in its turn."""
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
        """Take in a portion. The next is read once its messages were received, in turn, unless too much is unsent."""
        self.transport.pause_reading()
        if self in self._newcomers:
            self._newcomers.add(self)
        self.data_received(bytes(self._portion[:nbytes]))
        if not self._unread:
            self._read_on()

    def process_event(self, event: Event) -> None:
        """Count the messages that are not received yet, and the fragments of one that is not complete."""
        super().process_event(event)
        if not isinstance(event, Frame) or event.opcode not in {Opcode.TEXT, Opcode.BINARY, Opcode.CONT}:
            return
        self._unread += event.fin
        self._fragments = 0 if event.fin else self._fragments + 1
        if self._fragments > _MOST_FRAGMENTS and self.protocol.state is State.OPEN:
            self.protocol.fail(CloseCode.MESSAGE_TOO_BIG, f"a message in more than {_MOST_FRAGMENTS} fragments")
            self.send_data()

    def send_data(self) -> None:
        """Write what is to be sent in one go, such as the answers to many pings.

        If the connection is being closed, the client has a few seconds to take that and to hang up: the library would
        wait for as long as it does neither, up to the next ping.
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
        """Read on, if that waited for the client to take what was sent."""
        super().resume_writing()
        if self._waits_to_read:
            self._waits_to_read = False
            self._read_on()

    def _read_on(self) -> None:
        """Read the next portion in its turn, or, if too much is unsent, once the client has taken enough of it."""
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
        """Where the client is, as people write it: `127.0.0.1:50412`, `[::1]:50412`."""
        return show_address(self.remote_address)


def show_address(address: Any) -> str:
    """Write the address of a socket as people do; one that has none, such as a closed one's, is unknown."""
    if not isinstance(address, tuple):
        return str(address or "an unknown address")
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
