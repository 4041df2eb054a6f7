"""A WebSocket connection that receives large frames straight into their destination.

The library's connection and protocol do all of WebSocket but two things. Its reader takes the payload of a large frame
from the socket into the memory that the receiver names: otherwise every byte would be copied four times on its way.
And messages go to the receiver at once, not into a queue. Without TLS, what has arrived is read past asyncio: the rest
of a frame and the header of the next one together, without a turn of the event loop for each.
"""

import asyncio
import os
import socket
from collections.abc import Generator
from ssl import SSLError
from typing import Any, Protocol

from websockets.asyncio.client import ClientConnection
from websockets.client import ClientProtocol
from websockets.frames import Frame, Opcode
from websockets.protocol import Event, State
from websockets.streams import StreamReader

from surfw.errors import RemoteProtocolError

_LARGE_BYTES = 4096
_SCRATCH_BYTES = 4096
"""Room for a frame's header and small frames. The rest of a large frame goes to its destination."""
_HEADER_BYTES = 10
"""Of a large frame."""
_READS_ON = 16
"""How often the connection is read in one turn of the event loop, at most; a read takes up to a frame."""
_REASON_BYTES = 120
_HTTP = b"HTTP/"
_UNREAD_BYTES = 4 << 20
"""What may wait to be sent: far more than requests and credit ever take, but not the pongs to endless pings."""


class Receiver(Protocol):
    """Takes what arrives. A `RemoteProtocolError` from `text` or `binary` ends the connection."""

    def place(self, size: int) -> memoryview | None:
        """Where a frame of `size` bytes belongs, or None. Raises nothing."""

    def arriving(self, size: int) -> None:
        """`size` more bytes of a frame that has a place have arrived; the frame may still be incomplete."""

    def text(self, text: str) -> None:
        """A text message arrived."""

    def binary(self, data: bytes | bytearray | memoryview) -> None:
        """A binary message arrived. A `memoryview` lies where `place` said; other bytes have to be copied."""

    def lost(self, error: RemoteProtocolError | None) -> None:
        """The connection is over, because of the error if there is one. This may be called several times."""


class PlacingReader(StreamReader):
    """The library's stream reader, except that large payloads go where the receiver says.

    Attributes:
        asking: whether a large payload comes next, so that the parser has to be stepped once more to ask for its place.
            It is cleared before that step: if the frame was refused, another parser takes the step and never asks.
        target: the memory of the frame that is being received, if it has a place.
        filled: how many of its bytes have arrived.
    """

    def __init__(self, receiver: Receiver) -> None:
        super().__init__()
        self._receiver = receiver
        self.asking = False
        self.target: memoryview | None = None
        self.filled = 0

    def read_exact(self, n: int) -> Generator[None, None, Any]:
        """Read `n` bytes, into a `bytearray` or into their place, a `memoryview`."""
        if n < _LARGE_BYTES:
            return (yield from super().read_exact(n))
        self.asking = True
        yield  # lets the frames before this one be delivered first: its place depends on them
        self.target = self._receiver.place(n)
        if self.target is None:
            return (yield from super().read_exact(n))
        self.filled = min(n, len(self.buffer))
        self.target[: self.filled] = self.buffer[: self.filled]
        del self.buffer[: self.filled]
        self._receiver.arriving(self.filled)
        while self.filled < n:
            if self.eof:
                raise EOFError(f"stream ends after {self.filled} bytes, expected {n} bytes")
            yield
        placed, self.target = self.target, None
        return placed

    def abandon(self) -> None:
        """Let go of the destination: the rest of the frame that is being received is dropped."""
        if self.target is not None:
            self.target = memoryview(bytearray(len(self.target)))


class WireConnection(ClientConnection, asyncio.BufferedProtocol):
    """The library's client connection, with a receiver instead of a queue.

    Attributes:
        heard: when the last byte came, on the loop's clock, or None.
        may_be_http: whether the first bytes, if any came, may begin an HTTP response.
        tls_failure: why TLS has ended the connection, if it has.
    """

    def __init__(self, protocol: ClientProtocol, receiver: Receiver, **options: Any) -> None:
        super().__init__(protocol, **options)
        self.heard: float | None = None
        self.may_be_http = True
        self.tls_failure: SSLError | None = None
        self._receiver = receiver
        self._error: RemoteProtocolError | None = None
        self._scratch = memoryview(bytearray(_SCRATCH_BYTES))
        self._header = memoryview(bytearray(_HEADER_BYTES))
        self._plain: socket.socket | None = None  # the transport's, where nothing is encrypted
        self.reader = protocol.reader = PlacingReader(receiver)
        protocol.parser = protocol.parse()  # the one it has reads from its first reader
        next(protocol.parser)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to receive."""
        super().connection_made(transport)
        if transport.get_extra_info("sslcontext") is None:
            self._plain = transport.get_extra_info("socket")

    def send_now(self, text: str) -> None:
        """Write a message, if the connection is still open."""
        if self.state is State.OPEN:
            self.protocol.send_text(text.encode())
            self.send_data()

    def send_data(self) -> None:
        """Write what the protocol has to send; end the connection if the peer leaves too much of it unread."""
        super().send_data()
        if self._error is None and self.transport.get_write_buffer_size() > _UNREAD_BYTES:
            self._refuse(RemoteProtocolError("it asks for more than it reads", close_code=1008))

    def drop(self) -> None:
        """Abort the connection, if it was ever made, and let go of the destination."""
        self.reader.abandon()
        if hasattr(self, "transport"):
            self.transport.abort()

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the transport may write what it receives next."""
        target = self.reader.target
        return self._scratch if target is None else target[self.reader.filled :]

    def buffer_updated(self, nbytes: int) -> None:
        """`nbytes` were written there; take them in, and more of a large frame if that has arrived."""
        if self.heard is None:
            self.may_be_http = _HTTP.startswith(bytes(self._scratch[: min(nbytes, len(_HTTP))]))
        self.heard = self.loop.time()
        if self.reader.target is None:
            self._take(bytes(self._scratch[:nbytes]))
        else:
            self._place(nbytes)
        for _ in range(_READS_ON):
            if not self._read_on():
                break

    def _read_on(self) -> bool:
        """Read what has arrived of the frame that has a place, and the next header; return whether both are there.

        Over TLS, nothing is read here.
        """
        target, plain = self.reader.target, self._plain
        if target is None or plain is None or self.transport.is_closing():
            return False
        rest = target[self.reader.filled :]
        try:
            count = os.readv(plain.fileno(), [rest, self._header])
        except OSError:  # nothing is there, or the connection is lost, which the transport finds out
            return False
        if count:
            self._place(min(count, len(rest)))
        if count > len(rest):
            self._take(bytes(self._header[: count - len(rest)]))
        return count == len(rest) + len(self._header)

    def _place(self, count: int) -> None:
        """`count` bytes of the frame that is being received were written to its place."""
        reader = self.reader
        reader.filled += count
        self._receiver.arriving(count)
        if reader.target is not None and reader.filled == len(reader.target):
            self._take(b"")

    def _take(self, data: bytes) -> None:
        """Give bytes to the protocol, and have it handle all frames that are complete."""
        self.data_received(data)
        while self.reader.asking:
            self.reader.asking = False
            self.data_received(b"")
        if self.protocol.handshake_exc is not None:
            self.drop()  # the peer might never hang up
        refused = self.protocol.parser_exc
        if refused is not None and self._error is None:
            refused.with_traceback(None)  # its frames would keep the destination alive
            self._refuse(RemoteProtocolError(str(refused)))

    def process_event(self, event: Event) -> None:
        """Give messages to the receiver, and everything else to the library."""
        if isinstance(event, Frame) and event.opcode in {Opcode.TEXT, Opcode.BINARY, Opcode.CONT}:
            if self._error is None:
                try:
                    self._deliver(event)
                except RemoteProtocolError as exc:
                    self._refuse(exc.with_traceback(None))
            return
        super().process_event(event)
        if isinstance(event, Frame) and event.opcode is Opcode.CLOSE and self.protocol.close_rcvd_then_sent:
            self._receiver.lost(self._error)  # the peer says no more, but might not hang up

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

    def _refuse(self, error: RemoteProtocolError) -> None:
        """Close with the reason, and tell the receiver now: the peer might never answer the close."""
        self._error = error
        self.protocol.fail(error.close_code, str(error).encode()[:_REASON_BYTES].decode(errors="ignore"))
        self.send_data()
        self._receiver.lost(error)

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the receiver too, if the handshake succeeded."""
        self.tls_failure = exc if isinstance(exc, SSLError) else None
        super().connection_lost(exc)
        if self.response is not None and self.response.status_code == 101:
            self._receiver.lost(self._error)
