"""An HTTP proxy for a server: it records requests, and can delay or cut answers.

It forwards whole requests, one after the other on each connection, so that a test decides about each of them.
"""

import contextlib
import socketserver
import threading
from collections.abc import Callable, Iterator
from socket import create_connection
from typing import BinaryIO
from urllib.parse import urlsplit

PASS = -1
"""Forward the server's whole answer."""

Judge = Callable[[str], int]
"""Maps a request's head to the number of bytes of its answer's body to forward, `PASS` for all. It may wait."""


class Proxy(socketserver.ThreadingTCPServer):
    """A proxy for the server at `target`."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, target: str) -> None:
        parts = urlsplit(target)
        self.target = (parts.hostname or "", parts.port or 80)
        self.heads: list[str] = []
        self.judge: Judge = lambda head: PASS
        self.at_once = self.most_at_once = 0
        self.may_cut = threading.Event()
        self.may_cut.set()
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def asked(self, *words: str) -> list[str]:
        """The heads that contain all of these words."""
        return [head for head in self.heads if all(word in head for word in words)]

    @contextlib.contextmanager
    def noted(self, head: str) -> Iterator[None]:
        """Count a request while it is answered."""
        with self.lock:
            self.heads.append(head)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            yield
        finally:
            with self.lock:
                self.at_once -= 1


class _Handler(socketserver.StreamRequestHandler):
    server: Proxy

    def handle(self) -> None:
        with contextlib.suppress(OSError), create_connection(self.server.target) as upstream:
            answers = upstream.makefile("rb")
            while head := _read_head(self.rfile):
                if "expect: 100-continue" in head.lower():
                    self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                body = self.rfile.read(_length(head))
                with self.server.noted(head):
                    most = self.server.judge(head)
                    kept = [line for line in head.split("\r\n") if not line.lower().startswith("expect:")]
                    upstream.sendall("\r\n".join(kept).encode("latin-1") + body)
                    if not self.answer(answers, most, is_head=head.startswith("HEAD ")):
                        return

    def answer(self, answers: BinaryIO, most: int, *, is_head: bool) -> bool:
        """Forward an answer; return False if it was cut."""
        head = _read_head(answers)
        if not head or most == 0:
            return False
        self.wfile.write(head.encode("latin-1"))
        left = 0 if is_head else _length(head)
        if 0 < most < left:
            self.wfile.write(answers.read(most))
            self.server.may_cut.wait(60)
            return False
        while left:
            piece = answers.read(min(left, 1 << 20))
            self.wfile.write(piece)
            left -= len(piece)
        return True


def _read_head(stream: BinaryIO) -> str:
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        line = stream.readline()
        if not line:
            return ""
        head += line
    return head.decode("latin-1")


def _length(head: str) -> int:
    lines = (line.partition(":") for line in head.split("\r\n"))
    return next((int(value) for name, _, value in lines if name.lower() == "content-length"), 0)


@contextlib.contextmanager
def proxy_to(target: str) -> Iterator[Proxy]:
    """Run a proxy."""
    with Proxy(target) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield proxy
        finally:
            proxy.shutdown()
            thread.join()
