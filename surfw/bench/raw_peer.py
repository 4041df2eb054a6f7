"""A client made of a socket and the protocol's page alone, for floods and for tests of the server."""

import json
import socket
import struct
from typing import Any, Self

_TEXT, _BINARY, _CLOSE, _PING = 0x1, 0x2, 0x8, 0x9
_SMALL, _MEDIUM = 126, 1 << 16
_SECONDS = 30.0


def text_frame(payload: bytes, opcode: int = _TEXT) -> bytes:
    """A masked frame, as a client has to send it; its mask is 0, which leaves the payload as it is."""
    size = len(payload)
    if size < _SMALL:
        header = struct.pack("!BB", 0x80 | opcode, 0x80 | size)
    elif size < _MEDIUM:
        header = struct.pack("!BBH", 0x80 | opcode, 0x80 | 126, size)
    else:
        header = struct.pack("!BBQ", 0x80 | opcode, 0x80 | 127, size)
    return header + bytes(4) + payload


def message(kind: str, **fields: Any) -> bytes:
    """A message, ready to be sent."""
    return text_frame(json.dumps({"type": kind, **fields}).encode())


def ping(payload: bytes = b"") -> bytes:
    """A frame that wants an answer with the same payload."""
    return text_frame(payload, _PING)


def http_request(port: int, path: str) -> bytes:
    """Return the answer of a server on this machine to a plain HTTP request."""
    with socket.create_connection(("127.0.0.1", port), _SECONDS) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
        answer = bytearray()
        while received := connection.recv(1 << 16):
            answer += received
    return bytes(answer)


class RawPeer:
    """One blocking connection. It sends and reads nothing by itself.

    Raises:
        OSError: the server cannot be reached, does not answer, or has closed the connection.
    """

    def __init__(self, port: int, *, receive_bytes: int | None = None) -> None:
        """Connect to a port of this machine, with a receive buffer of so many bytes."""
        self.socket = socket.socket()
        if receive_bytes is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        self.socket.settimeout(_SECONDS)
        try:
            self.socket.connect(("127.0.0.1", port))
        except OSError:
            self.socket.close()
            raise
        self._buffer = bytearray()
        self._port = port

    def shake_hands(self) -> Self:
        """Open the WebSocket; if that fails, hang up."""
        try:
            self._shake_hands()
        except OSError:
            self.close()
            raise
        return self

    def _shake_hands(self) -> None:
        key = "c3VyZncgaXMgYSB0ZXN0IQ=="
        self.socket.sendall(
            f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{self._port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n"
            "Sec-WebSocket-Protocol: surfw.v1\r\n\r\n".encode()
        )
        while (end := self._buffer.find(b"\r\n\r\n")) < 0:
            self._fill()
        answer, self._buffer = bytes(self._buffer[:end]), self._buffer[end + 4 :]
        if b" 101 " not in answer.splitlines()[0]:
            raise ConnectionRefusedError(answer.decode(errors="replace"))

    def greet(self, window_bytes: int = 8 << 20) -> dict[str, Any]:
        """Exchange hellos; return the server's."""
        hello = self.hear_text()
        self.send(message("hello", client="raw", window_bytes=window_bytes))
        return hello

    def send(self, frames: bytes) -> None:
        """Send frames, all of them."""
        self.socket.sendall(frames)

    def hear(self) -> dict[str, Any] | bytes:
        """The next message: a text one decoded, or the bytes of a binary one."""
        while True:
            opcode, payload = self._frame()
            if opcode == _TEXT:
                return dict(json.loads(payload))
            if opcode == _BINARY:
                return payload
            if opcode == _CLOSE:
                raise ConnectionResetError(f"closed: {payload[2:].decode(errors='replace')}")

    def hear_text(self) -> dict[str, Any]:
        """The next message that is not binary."""
        while isinstance(heard := self.hear(), bytes):
            pass
        return heard

    def _frame(self) -> tuple[int, bytes]:
        opcode, size = self._exactly(2)
        if size == _SMALL:
            (size,) = struct.unpack("!H", self._exactly(2))
        elif size > _SMALL:
            (size,) = struct.unpack("!Q", self._exactly(8))
        return opcode & 0xF, self._exactly(size)

    def _exactly(self, size: int) -> bytes:
        while len(self._buffer) < size:
            self._fill()
        taken = bytes(self._buffer[:size])
        del self._buffer[:size]
        return taken

    def _fill(self) -> None:
        received = self.socket.recv(1 << 20)
        if not received:
            raise ConnectionResetError("the server hung up")
        self._buffer += received

    def close(self) -> None:
        """Hang up."""
        self.socket.close()

    def __enter__(self) -> Self:
        """The peer itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Hang up."""
        self.close()
