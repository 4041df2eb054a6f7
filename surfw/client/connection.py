"""A WebSocket that receives large frames straight into the memory they are meant for.

The library's connection and protocol do all of WebSocket. Two seams are ours: its reader takes the payload of a large
frame directly from the socket into the memory that the receiver names, and messages go to the receiver at once, not
into a queue. Without the first, every byte would be copied four times between the socket and its place.
"""

import asyncio
from collections.abc import Generator
from typing import Any, Protocol

from websockets.asyncio.client import ClientConnection
from websockets.client import ClientProtocol
from websockets.exceptions import WebSocketException
from websockets.frames import Frame, Opcode
from websockets.protocol import Event, State
from websockets.streams import StreamReader

from surfw.errors import RemoteProtocolError

_LARGE_BYTES = 4096
_SCRATCH_BYTES = 4096
"""Room for a frame's header and the little that comes with it; the rest of a large frame needs none."""
_REASON_BYTES = 120


class Receiver(Protocol):
    """Takes what arrives. `RemoteProtocolError` from `text` and `binary` closes the connection."""

    def place(self, size: int) -> memoryview | None:
        """Where a frame of `size` bytes belongs; None if there is no such place. Raises nothing."""

    def text(self, text: str) -> None:
        """A text message arrived."""

    def binary(self, data: bytes | bytearray | memoryview) -> None:
        """A binary message arrived; as a `memoryview`, it lies where `place` said."""

    def lost(self, error: RemoteProtocolError | None) -> None:
        """The connection is over, because of the error if there is one."""


class PlacingReader(StreamReader):
    """The library's stream reader, except that large payloads go where the receiver says.

    Attributes:
        asking: whether a large payload comes next, whose place is asked for at the next step.
        target: the memory of the frame that is being received, if it has a place.
        filled: how many of its bytes are there.
    """

    def __init__(self, receiver: Receiver) -> None:
        """Nothing was received yet."""
        super().__init__()
        self._receiver = receiver
        self.asking = False
        self.target: memoryview | None = None
        self.filled = 0

    def read_exact(self, n: int) -> Generator[None, None, Any]:
        """Read `n` bytes: `bytearray`, or the `memoryview` of their place."""
        if n < _LARGE_BYTES:
            return (yield from super().read_exact(n))
        self.asking = True
        yield  # the frames before this one are to be delivered first: the place of this one depends on them
        self.asking = False
        self.target = self._receiver.place(n)
        if self.target is None:
            return (yield from super().read_exact(n))
        self.filled = min(n, len(self.buffer))
        self.target[: self.filled] = self.buffer[: self.filled]
        del self.buffer[: self.filled]
        while self.filled < n:
            if self.eof:
                raise EOFError(f"stream ends after {self.filled} bytes, expected {n} bytes")
            yield
        placed, self.target = self.target, None
        return placed

    def abandon(self) -> None:
        """Let go of the memory: the rest of the frame that is being received goes nowhere."""
        if self.target is not None:
            self.target = memoryview(bytearray(len(self.target)))


class WireConnection(ClientConnection, asyncio.BufferedProtocol):
    """The library's client connection, with a receiver instead of a queue.

    Attributes:
        heard: when the last byte came, on the loop's clock; before the first, None.
    """

    def __init__(self, protocol: ClientProtocol, receiver: Receiver, **options: Any) -> None:
        """Take the protocol before it has received anything."""
        super().__init__(protocol, **options)
        self.heard: float | None = None
        self._receiver = receiver
        self._error: RemoteProtocolError | None = None
        self._scratch = memoryview(bytearray(_SCRATCH_BYTES))
        self.reader = protocol.reader = PlacingReader(receiver)
        protocol.parser = protocol.parse()  # the one it was made with holds on to the reader it was made with
        next(protocol.parser)

    def send_now(self, text: str) -> None:
        """Write a message; nothing happens if the connection is not open any more."""
        if self.state is State.OPEN:
            self.protocol.send_text(text.encode())
            self.send_data()

    def drop(self) -> None:
        """End the connection without a word, if it was ever made."""
        if hasattr(self, "transport"):
            self.transport.abort()

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the transport may write what it receives next."""
        target = self.reader.target
        return self._scratch if target is None else target[self.reader.filled :]

    def buffer_updated(self, nbytes: int) -> None:
        """So much was written there."""
        self.heard = self.loop.time()
        if self.reader.target is None:
            self.data_received(bytes(self._scratch[:nbytes]))
        else:
            self.reader.filled += nbytes
            if self.reader.filled == len(self.reader.target):
                self.data_received(b"")
        while self.reader.asking:
            self.data_received(b"")

    def process_event(self, event: Event) -> None:
        """Give messages to the receiver, and everything else to the library."""
        if not isinstance(event, Frame) or event.opcode not in {Opcode.TEXT, Opcode.BINARY, Opcode.CONT}:
            super().process_event(event)
            return
        if self._error is not None:
            return
        try:
            self._deliver(event)
        except RemoteProtocolError as exc:
            self._error = exc
            self.protocol.fail(exc.close_code, str(exc).encode()[:_REASON_BYTES].decode(errors="ignore"))
            self.send_data()
            self.transport.close()

    def _deliver(self, frame: Frame) -> None:
        if not frame.fin or frame.opcode is Opcode.CONT:
            raise RemoteProtocolError("a fragmented message", close_code=1003)
        if frame.opcode is Opcode.BINARY:
            self._receiver.binary(frame.data)
            return
        try:
            text = bytes(frame.data).decode()
        except UnicodeDecodeError as exc:
            raise RemoteProtocolError("a text message is not UTF-8", close_code=1007) from exc
        self._receiver.text(text)

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the receiver too, if there ever was a session."""
        super().connection_lost(exc)
        refused = self.protocol.parser_exc
        if self._error is None and isinstance(refused, WebSocketException):
            self._error = RemoteProtocolError(str(refused))
        if self.response is not None and self.response.status_code == 101:
            self._receiver.lost(self._error)
