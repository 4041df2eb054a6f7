"""A client built only from a socket and the protocol's documentation, for floods and for tests of the server."""

import json
import socket
import struct
from typing import Any, Self

_TEXT, _BINARY, _CLOSE, _PING = 0x1, 0x2, 0x8, 0x9
_SMALL = 126
_SECONDS = 30.0
_HANDSHAKE = (
    "GET / HTTP/1.1\r\nHost: 127.0.0.1:{}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Key: c3VyZncgaXMgYSB0ZXN0IQ==\r\nSec-WebSocket-Version: 13\r\n"
    "Sec-WebSocket-Protocol: surfw.v1\r\n\r\n"
)


def message(kind: str, **fields: Any) -> bytes:
    """Encode a message of less than 64 KiB as a frame."""
    return _frame(_TEXT, json.dumps({"type": kind, **fields}).encode())


def ping(payload: bytes = b"") -> bytes:
    """Encode a ping, which the server answers with the same payload."""
    return _frame(_PING, payload)


def _frame(opcode: int, payload: bytes) -> bytes:
    """A masked frame, as required of clients; its mask is 0, which leaves the payload unchanged."""
    size = len(payload)
    length = struct.pack("!B", 0x80 | size) if size < _SMALL else struct.pack("!BH", 0x80 | _SMALL, size)
    return bytes([0x80 | opcode]) + length + bytes(4) + payload


def http_request(port: int, path: str) -> bytes:
    """Send a plain HTTP request to a server on this machine, and return its whole response."""
    with socket.create_connection(("127.0.0.1", port), _SECONDS) as connection, connection.makefile("rb") as answer:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
        return answer.read()


class RawPeer:
    """One blocking connection, which sends and reads only when told to.

    Raises:
        OSError: the server cannot be reached, does not answer, or has closed the connection.
    """

    def __init__(self, port: int, *, receive_bytes: int | None = None) -> None:
        """Connect to a port of this machine, with a receive buffer of this size."""
        self.socket = socket.socket()
        if receive_bytes is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        self.socket.settimeout(_SECONDS)
        self._port = port
        self._received = self.socket.makefile("rb")
        try:
            self.socket.connect(("127.0.0.1", port))
        except OSError:
            self.close()
            raise

    def shake_hands(self) -> Self:
        """Open the WebSocket."""
        self.send(_HANDSHAKE.format(self._port).encode())
        status = self._received.readline()
        if b" 101 " not in status:
            raise ConnectionRefusedError(status.decode(errors="replace"))
        while self._received.readline().strip():
            pass
        return self

    def greet(self, window_bytes: int = 8 << 20) -> dict[str, Any]:
        """Exchange hellos, and return the server's."""
        hello = self.hear_text()
        self.send(message("hello", client="raw", window_bytes=window_bytes))
        return hello

    def send(self, frames: bytes) -> None:
        """Send encoded frames."""
        self.socket.sendall(frames)

    def hear(self) -> dict[str, Any] | bytes:
        """Return the next message: a decoded text message, or the bytes of a binary one."""
        while True:
            opcode, size = self._read(2)
            if size >= _SMALL:
                size = int.from_bytes(self._read(2 if size == _SMALL else 8))
            payload = self._read(size)
            if opcode & 0xF == _TEXT:
                return dict(json.loads(payload))
            if opcode & 0xF == _BINARY:
                return payload
            if opcode & 0xF == _CLOSE:
                raise ConnectionResetError(f"closed: {payload[2:].decode(errors='replace')}")

    def hear_text(self) -> dict[str, Any]:
        """Return the next text message, skipping binary ones."""
        while isinstance(heard := self.hear(), bytes):
            pass
        return heard

    def _read(self, size: int) -> bytes:
        payload = self._received.read(size)
        if len(payload) < size:
            raise ConnectionResetError("the server hung up")
        return payload

    def close(self) -> None:
        """Close the connection."""
        self._received.close()
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
