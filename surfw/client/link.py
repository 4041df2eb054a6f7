"""The link to a server: sends requests, and passes the bytes of each answer to its download.

A link belongs to the event loop in which it was opened. Once it has ended, every request fails with the same error. It
also ends when the server makes no progress for too long, as `ServerPatience` decides.
"""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from ssl import SSLError
from typing import Any

from websockets.client import ClientProtocol
from websockets.frames import CloseCode

from surfw import __version__
from surfw.client.connection import WireConnection
from surfw.client.downloads import DocumentDownload, Download, most_read
from surfw.client.patience import ServerPatience
from surfw.config import MAX_FRAME_BYTES, PROGRESS_BYTES, WireLimits, format_size, printable
from surfw.errors import ConnectionFailedError, IntegrityError, RefusedError, RemoteProtocolError
from surfw.wire import (
    Begin,
    Cancel,
    ClientSession,
    Data,
    Failed,
    Models,
    Progress,
    Request,
    Schedule,
    ServerHello,
)

CLOSE_SECONDS = 2
"""How long to wait for the server in a closing handshake."""

_FAULTS_OF_OURS = {
    CloseCode.PROTOCOL_ERROR, CloseCode.UNSUPPORTED_DATA, CloseCode.INVALID_DATA, CloseCode.POLICY_VIOLATION,
    CloseCode.MESSAGE_TOO_BIG, CloseCode.MANDATORY_EXTENSION,
}  # fmt: skip
"""Close codes that blame what the client sent; reconnecting would not help."""
_GOODBYES = {CloseCode.GOING_AWAY, CloseCode.SERVICE_RESTART}


@dataclass(slots=True)
class _Pending:
    """A request whose answer is not complete.

    Attributes:
        done: done when the answer is complete; cancelled with the request.
        download: receives the answer's bytes; None if the answer has no bytes, or they are no longer wanted.
    """

    done: asyncio.Future[Models | None]
    download: Download | None


class Link:
    """One connection with many requests at a time.

    Attributes:
        url: the address without secrets, with the one that a redirect led to.
        greeted: done when hellos were exchanged; fails if the link ends before.
        shows_token: whether the token was sent; it is not sent after a redirect to another server.
        ended: why the link has ended ("went away", for example), or None.
        said_goodbye: whether it has ended because the server is stopping and may be back soon.
    """

    def __init__(self, url: str, limits: WireLimits, silence_seconds: float) -> None:
        """Create a link that is not connected yet; `open_link` connects it."""
        self.url = url
        self.greeted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.shows_token = True
        self.ended: str | None = None
        self.said_goodbye = False
        self._transient = False
        self._session = ClientSession(limits, client=f"surfw/{__version__}")
        self._connection: WireConnection | None = None
        self._loop = asyncio.get_running_loop()
        self._patience = ServerPatience(silence_seconds, self._loop.time)
        self._watch: asyncio.TimerHandle | None = None
        self._pending: dict[int, _Pending] = {}
        self._slots = asyncio.Semaphore(0)
        self._receiving = -1
        self._nowhere = memoryview(bytearray(MAX_FRAME_BYTES))

    def attach(self, protocol: ClientProtocol, **options: Any) -> WireConnection:
        """Create this link's connection, for the library to connect."""
        self._connection = WireConnection(protocol, self, **options)
        return self._connection

    @property
    def heard(self) -> float | None:
        """When the last byte arrived, on the loop's clock; None before the first."""
        return self._connection.heard if self._connection else None

    @property
    def may_be_http(self) -> bool:
        """Whether the bytes received first, if any, may begin an HTTP response."""
        return self._connection is None or self._connection.may_be_http

    @property
    def tls_failure(self) -> SSLError | None:
        """The TLS error that ended the connection, if any; mostly the server's alert."""
        return self._connection.tls_failure if self._connection else None

    @property
    def is_surfw(self) -> bool:
        """Whether a surfw server of any version answers, by its HTTP response or its hello."""
        response = self._connection.response if self._connection else None
        called = response.headers.get_all("Server") if response else []  # a proxy may have added its own
        return any(one.startswith("surfw/") for one in called) or self._session.offered.startswith("surfw.")

    async def receive(self, make: Callable[[int], Request], download: Download | None = None) -> Models | None:
        """Send the request that `make` returns for an id, and return when the download has received its answer.

        When this has ended, even by an error or a cancellation, nothing is written through the download any more.

        Returns:
            The answer to `ListModels`, which needs no download.

        Raises:
            RefusedError: the server refused the request.
            ConnectionFailedError: the link has ended.
        """
        await self._slots.acquire()
        if self.ended:
            self._slots.release()
            raise self._over()
        request = make(self._session.next_id)
        self._patience.asked(
            request, download.most_read_bytes if download else most_read(self._session.limits.control_bytes)
        )
        pending = self._pending[request.id] = _Pending(self._loop.create_future(), download)
        self._send(self._session.send(request))
        if self._watch is None and not self.ended:
            self._watch = self._loop.call_later(self._patience.silence_seconds, self._look)
        try:
            return await pending.done
        finally:
            self._give_up(request.id, pending)

    def announce(self, schedule: Schedule) -> None:
        """Send a schedule, if the server accepts schedules."""
        if self._session.takes_schedules and not self.ended:
            self._send(self._session.send(schedule))

    def _look(self) -> None:
        """End the link, or fail an overtaken request, after too long without progress; else check again later."""
        self._watch = None
        if self.ended or not self._pending:
            return
        now = self._loop.time()  # read before `stalls`: a request that is due by then is stalled, not the whole link
        due, stalled = self._patience.stalls(self._session.requests)
        if now >= due:
            self._end(self._stalled(), transient=True)
            return
        for pending in (self._pending[request_id] for request_id in stalled):
            if not pending.done.done():
                what = f"answers later requests, and left one for {self._patience.silence_seconds:g} seconds"
                pending.done.set_exception(self._failure(what, transient=True))
        self._watch = self._loop.call_at(due, self._look)

    def _stalled(self) -> str:
        """Describe how the server failed to make progress."""
        seconds, heard = self._patience.silence_seconds, self.heard
        if heard is None or heard + seconds <= self._loop.time():
            return f"said nothing for {seconds:g} seconds"
        least = format_size(PROGRESS_BYTES)
        return f"made no progress for {seconds:g} seconds: it sent less than {least} of what was asked for"

    def _give_up(self, request_id: int, pending: _Pending) -> None:
        """Detach the download, and cancel the request if its answer is not complete."""
        pending.download = None
        self._patience.given_up(request_id)
        if not pending.done.cancel() and not pending.done.cancelled():
            pending.done.exception()  # retrieved, in case this was cancelled while the request failed
        if self._session.is_open(request_id) and self._connection and not self.ended:
            if self._receiving == request_id:
                self._connection.reader.abandon()
            self._send(self._session.send(Cancel(request_id)))

    def _send(self, text: str) -> None:
        if self._connection:
            self._connection.send_now(text)

    def place(self, size: int) -> memoryview | None:
        """Return the memory for a frame; None if it may not come now, which `binary` then refuses."""
        try:
            self._receiving, offset = self._session.place(size)
        except RemoteProtocolError:
            return None
        download = self._pending[self._receiving].download
        return download.place(offset, size) if download else self._nowhere[:size]

    def arriving(self, size: int) -> None:
        """Bytes of the answer that is being received have arrived."""
        self._patience.arrived(self._receiving, size)

    def binary(self, data: bytes | bytearray | memoryview) -> None:
        """Handle a complete frame."""
        size = len(data)
        arrival = self._session.receive_binary(size)
        download = self._pending[arrival.id].download
        if not isinstance(data, memoryview):
            self._receiving = arrival.id
            self.arriving(size)
            if download:
                download.place(arrival.start, size)[:] = data
        if credit := self._session.credit():
            self._send(credit)
        if download:
            download.arrived(arrival.stop)
        if arrival.last:
            self._finish(arrival.id, None)

    def text(self, text: str) -> None:
        """Handle a text message."""
        message = self._session.receive(text)
        match message:
            case ServerHello():
                self._send(self._session.hello())
                for _ in range(self._session.requests):
                    self._slots.release()
                if not self.greeted.done():
                    self.greeted.set_result(None)
            case Begin():
                self._begin(self._pending[message.id], message)
            case Data():
                if not self._session.is_open(message.id):
                    self._finish(message.id, None)
            case Models():
                self._finish(message.id, message)
            case Progress():
                self._patience.read(message.id, message.bytes)
            case Failed():
                self._finish(message.id, RefusedError(f"{self.url}: {message.message}", code=message.code))

    def _begin(self, pending: _Pending, message: Begin) -> None:
        """Begin the download. If it rejects the answer, the request fails at once, and the bytes are discarded."""
        try:
            if isinstance(pending.download, DocumentDownload):
                pending.download.begin(message)
        except IntegrityError as exc:
            pending.download = None
            if not pending.done.done():
                pending.done.set_exception(exc)

    def _finish(self, request_id: int, outcome: Models | RefusedError | None) -> None:
        done = self._pending.pop(request_id).done
        self._slots.release()
        self._patience.answered(request_id)
        if done.done():
            return
        if isinstance(outcome, RefusedError):
            done.set_exception(outcome)
        else:
            done.set_result(outcome)

    def lost(self, error: RemoteProtocolError | None) -> None:
        """Determine why the connection is over, and end the link."""
        close = self._connection.protocol.close_rcvd if self._connection else None
        if error:
            self._end(f"broke the protocol: {error}")
        elif close and (close.reason or close.code in _FAULTS_OF_OURS):
            why = close.reason or f"with code {close.code}"
            self.said_goodbye |= not self.ended and close.code in _GOODBYES
            self._end(f"closed the connection: {why}", transient=close.code not in _FAULTS_OF_OURS)
        else:
            self._end("went away", transient=True)

    def _end(self, what: str, *, transient: bool = False) -> None:
        """Fail all requests, open and future. Only the first reason counts."""
        if self.ended:
            return
        self.ended = printable(what)
        self._transient = transient
        if self._watch:
            self._watch.cancel()
            self._watch = None
        if self._connection:
            self._connection.drop()
        waiting: list[asyncio.Future[Any]] = [self.greeted, *(pending.done for pending in self._pending.values())]
        for future in waiting:
            if not future.done():
                future.set_exception(self._over())
        self._slots.release()  # wakes the requests waiting for a slot: each fails, and wakes the next

    def _over(self) -> ConnectionFailedError:
        return self._failure(self.ended or "", transient=self._transient)

    def _failure(self, what: str, *, transient: bool) -> ConnectionFailedError:
        return ConnectionFailedError(f"the server at {self.url} {what}", transient=transient)

    def abort(self) -> None:
        """Drop the connection without a closing handshake."""
        self.greeted.cancel()
        self._end("was left")

    async def close(self) -> None:
        """Close the connection, and wait up to `CLOSE_SECONDS` for the server to do so."""
        if self._connection and not self.ended:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_SECONDS):
                    await self._connection.close()
        self._end("was left")
