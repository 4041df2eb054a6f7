"""Queues what a client's socket does not accept at once, and sends it without copying.

asyncio's transport copies queued data twice, which with several clients is most of what is sent. So runs are written to
the socket directly, from views of the pages. Everything else that a connection sends goes through the transport; before
that, what is queued here is copied to the transport, so that the order is kept.
"""

import asyncio
import os
import socket
from collections import deque
from collections.abc import Sequence
from contextlib import suppress


class Outbox:
    """The queued runs of one connection. Usable once the transport exists."""

    def __init__(self, transport: asyncio.WriteTransport) -> None:
        """Write to this transport's socket or, with TLS, to the transport."""
        self._transport = transport
        self._is_plain = transport.get_extra_info("sslcontext") is None
        self._waiting: deque[bytes | memoryview] = deque()
        self._sent: asyncio.Future[None] | None = None
        self._watched: socket.socket | None = None  # a duplicate, since asyncio reserves the transport's own
        self.sent_bytes = 0

    @property
    def is_waiting(self) -> bool:
        """Whether anything is queued."""
        return bool(self._waiting)

    def write(self, parts: Sequence[bytes | memoryview]) -> None:
        """Send parts in order. Queued parts are referenced until they are sent or released."""
        self._waiting.extend(parts)
        if self._is_plain and not self._transport.get_write_buffer_size():
            self._send()
        else:
            self.let_go()

    def _send(self) -> None:
        """Send what the socket accepts."""
        waiting = self._waiting
        try:
            descriptor = self._transport.get_extra_info("socket").fileno()
            if self._transport.is_closing():
                waiting.clear()
            if waiting:
                self._drop(os.writev(descriptor, waiting))
            if waiting:  # the socket is full
                self._watch()
                return
        except BlockingIOError:
            self._watch()
            return
        except OSError:  # the connection is lost, which the transport detects
            waiting.clear()
        self._done()

    def _drop(self, sent: int) -> None:
        """Drop references to the bytes that were sent."""
        self.sent_bytes += sent
        waiting = self._waiting
        while waiting and sent >= len(waiting[0]):
            sent -= len(waiting.popleft())
        if sent:
            waiting[0] = memoryview(waiting[0])[sent:]

    def _watch(self) -> None:
        if self._sent is not None:
            return
        try:
            self._watched = self._watched or self._transport.get_extra_info("socket").dup()
        except OSError:  # out of descriptors; the transport has its own
            self.let_go()
            return
        loop = asyncio.get_running_loop()
        self._sent = loop.create_future()
        loop.add_writer(self._watched.fileno(), self._send)  # the selector takes longer over a socket

    def _done(self) -> None:
        if self._sent is not None and self._watched is not None:
            asyncio.get_running_loop().remove_writer(self._watched.fileno())
            if not self._sent.done():
                self._sent.set_result(None)
            self._sent = None

    def let_go(self) -> None:
        """Release all parts: the transport copies what is queued."""
        if not self._waiting:
            return
        for part in self._waiting:
            self._transport.write(bytes(part))
        self._waiting.clear()
        self._done()

    async def sent(self) -> None:
        """Wait until nothing is queued."""
        if self._sent is not None:
            await asyncio.shield(self._sent)

    def close(self) -> None:
        """Discard everything, after the connection was lost."""
        self._waiting.clear()
        self._done()
        if self._watched is not None:
            with suppress(OSError):
                self._watched.close()
            self._watched = None
