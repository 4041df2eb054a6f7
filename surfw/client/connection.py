"""A WebSocket connection that receives large frames directly into their destination.

It differs from the library's connection and protocol in two ways. Its reader moves the payload of a large frame from
the socket to memory that the receiver provides; otherwise every byte would be copied four times. And messages are
passed to the receiver immediately instead of being queued. Without TLS, data is also read past asyncio: the rest of a
frame together with the header of the next one, without an iteration of the event loop for each.
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
"""Buffer for a frame's header and small frames. The rest of a large frame goes to its destination."""
_HEADER_BYTES = 10
"""The header of a large frame."""
_READS_ON = 16
"""The most reads from the connection in one iteration of the event loop; each reads up to a frame."""
_REASON_BYTES = 120
_HTTP = b"HTTP/"
_UNREAD_BYTES = 4 << 20
"""The most that may be queued for sending: far above requests and credit, but a bound on pongs to endless pings."""


class Receiver(Protocol):
    """Receives what arrives. A `RemoteProtocolError` from `text` or `binary` ends the connection."""

    def place(self, size: int) -> memoryview | None:
        """Return the memory for a frame of `size` bytes, or None. Raises nothing."""

    def arriving(self, size: int) -> None:
        """`size` more bytes of a frame with a destination have arrived; the frame may still be incomplete."""

    def text(self, text: str) -> None:
        """A text message arrived."""

    def binary(self, data: bytes | bytearray | memoryview) -> None:
        """A binary message arrived. A `memoryview` is the one from `place`; other bytes have to be copied."""

    def lost(self, error: RemoteProtocolError | None) -> None:
        """The connection is over, because of the error if there is one. May be called several times."""


class PlacingReader(StreamReader):
    """The library's stream reader, except that large payloads go where the receiver says.

    Attributes:
        asking: whether a large payload comes next, so that the parser has to be stepped once more to ask for its place.
            It is cleared before that step: if the frame was refused, another parser takes the step and never asks.
        target: the destination of the frame that is being received, if it has one.
        filled: how many bytes of it have arrived.
    """

    def __init__(self, receiver: Receiver) -> None:
        super().__init__()
        self._receiver = receiver
        self.asking = False
        self.target: memoryview | None = None
        self.filled = 0

    def read_exact(self, n: int) -> Generator[None, None, Any]:
        """Read `n` bytes, into a `bytearray` or into their destination, a `memoryview`."""
        if n < _LARGE_BYTES:
            return (yield from super().read_exact(n))
        self.asking = True
        yield  # lets earlier frames be delivered first: the destination depends on them
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
        """Release the destination, and discard the rest of the frame that is being received."""
        if self.target is not None:
            self.target = memoryview(bytearray(len(self.target)))


class WireConnection(ClientConnection, asyncio.BufferedProtocol):
    """The library's client connection, with a receiver instead of a queue.

    Attributes:
        heard: when the last byte arrived, on the loop's clock, or None.
        may_be_http: whether the bytes received first, if any, may begin an HTTP response.
        tls_failure: the TLS error that ended the connection, if any.
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
        self._plain: socket.socket | None = None  # the transport's socket, if there is no TLS
        self.reader = protocol.reader = PlacingReader(receiver)
        protocol.parser = protocol.parse()  # the existing parser reads from the original reader
        next(protocol.parser)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start receiving."""
        super().connection_made(transport)
        if transport.get_extra_info("sslcontext") is None:
            self._plain = transport.get_extra_info("socket")

    def send_now(self, text: str) -> None:
        """Write a message, if the connection is still open."""
        if self.state is State.OPEN:
            self.protocol.send_text(text.encode())
            self.send_data()

    def send_data(self) -> None:
        """Write the protocol's pending data; end the connection if the peer leaves too much of it unread."""
        super().send_data()
        if self._error is None and self.transport.get_write_buffer_size() > _UNREAD_BYTES:
            self._refuse(RemoteProtocolError("it asks for more than it reads", close_code=1008))

    def drop(self) -> None:
        """Abort the connection, if it was ever made, and release the destination."""
        self.reader.abandon()
        if hasattr(self, "transport"):
            self.transport.abort()

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return the memory for what the transport receives next."""
        target = self.reader.target
        return self._scratch if target is None else target[self.reader.filled :]

    def buffer_updated(self, nbytes: int) -> None:
        """Process `nbytes` received into the buffer, and more of a large frame if it has arrived."""
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
        """Read the rest of the frame with a destination, and the next header; return whether both were read completely.

        Over TLS, nothing is read here.
        """
        target, plain = self.reader.target, self._plain
        if target is None or plain is None or self.transport.is_closing():
            return False
        rest = target[self.reader.filled :]
        try:
            count = os.readv(plain.fileno(), [rest, self._header])
        except OSError:  # no data, or the connection is lost, which the transport detects
            return False
        if count:
            self._place(min(count, len(rest)))
        if count > len(rest):
            self._take(bytes(self._header[: count - len(rest)]))
        return count == len(rest) + len(self._header)

    def _place(self, count: int) -> None:
        """Account for `count` bytes written to the destination."""
        reader = self.reader
        reader.filled += count
        self._receiver.arriving(count)
        if reader.target is not None and reader.filled == len(reader.target):
            self._take(b"")

    def _take(self, data: bytes) -> None:
        """Feed bytes to the protocol, and have it process all complete frames."""
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
        """Pass messages to the receiver, and everything else to the library."""
        if isinstance(event, Frame) and event.opcode in {Opcode.TEXT, Opcode.BINARY, Opcode.CONT}:
            if self._error is None:
                try:
                    self._deliver(event)
                except RemoteProtocolError as exc:
                    self._refuse(exc.with_traceback(None))
            return
        super().process_event(event)
        if isinstance(event, Frame) and event.opcode is Opcode.CLOSE and self.protocol.close_rcvd_then_sent:
            self._receiver.lost(self._error)  # the peer sends nothing more, but might not hang up

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
        """Close with the reason, and notify the receiver now: the peer might never answer the close."""
        self._error = error
        self.protocol.fail(error.close_code, str(error).encode()[:_REASON_BYTES].decode(errors="ignore"))
        self.send_data()
        self._receiver.lost(error)

    def connection_lost(self, exc: Exception | None) -> None:
        """Notify the receiver too, if the handshake succeeded."""
        self.tls_failure = exc if isinstance(exc, SSLError) else None
        super().connection_lost(exc)
        if self.response is not None and self.response.status_code == 101:
            self._receiver.lost(self._error)
