"""The connection to a server: requests go out, and each answer finds its download.

Belongs to the event loop it was opened in. Once it is over it stays so: every request then fails with the same error.

While anything is asked for, the server has to make *progress*: `PROGRESS_BYTES` of answers arrive, an answer is
complete, or the server says that it has read so much more of its storage for a request. What else it says, a ping or a
byte now and then, is none. Without progress for `silence_seconds` the connection is over. A request may well wait
longer while others get on, since answers take turns and the more urgent ones go first; but once as many later and less
urgent requests as may be open at a time were answered before it, its own progress alone counts for it.
"""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from websockets.client import ClientProtocol
from websockets.frames import CloseCode

from surfw import __version__
from surfw.client.connection import WireConnection
from surfw.client.downloads import Download, most_read
from surfw.config import MAX_FRAME_BYTES, PROGRESS_BYTES, WireLimits, format_size
from surfw.errors import ConnectionFailedError, IntegrityError, RefusedError, RemoteProtocolError
from surfw.wire import (
    Begin,
    Cancel,
    ClientSession,
    Data,
    Failed,
    Get,
    ListModels,
    Models,
    Progress,
    Request,
    ServerHello,
    printable,
)

CLOSE_SECONDS = 2
"""How long a server has to say goodbye."""

_FAULTS_OF_OURS = {
    CloseCode.PROTOCOL_ERROR, CloseCode.UNSUPPORTED_DATA, CloseCode.INVALID_DATA, CloseCode.POLICY_VIOLATION,
    CloseCode.MESSAGE_TOO_BIG, CloseCode.MANDATORY_EXTENSION,
}  # fmt: skip
"""With these a server closes because of what it was sent, which would be the same after any other connection."""


@dataclass(slots=True)
class _Pending:
    """A request whose answer is not complete; its download is None if it takes no bytes, or was given up.

    `progressed` is when it last made progress, `read_bytes` how much of the server's reading counted as that, and
    `overtaken` how many later and less urgent requests were answered since.
    """

    request: Request
    done: asyncio.Future[Models | None]
    download: Download | None
    progressed: float
    read_bytes: int = 0
    overtaken: int = 0

    def may_be_overtaken_by(self, other: Request) -> bool:
        """Whether the other request is later, and more urgent."""
        return other.id < self.request.id or _priority(other) < _priority(self.request)


def _priority(request: Request) -> int:
    return request.priority if isinstance(request, Get) else 0


class Link:
    """One connection, with many requests at a time.

    Attributes:
        limits: what both sides hold each other to.
        greeted: done when hellos were exchanged, or failed if the connection was over before.
        shows_token: whether a token, if there is one, is shown where this leads; redirects take it nowhere else.
        ended: what ended the connection, once it is over: "went away", for example.
    """

    def __init__(self, url: str, limits: WireLimits, silence_seconds: float) -> None:
        """Nothing is connected yet: see `open_link`."""
        self.url = url
        self.limits = limits
        self.greeted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.shows_token = True
        self.ended: str | None = None
        self._transient = False
        self._session = ClientSession(limits, client=f"surfw/{__version__}")
        self._connection: WireConnection | None = None
        self._silence_seconds = silence_seconds
        self._loop = asyncio.get_running_loop()
        self._watch: asyncio.TimerHandle | None = None
        self._progressed = 0.0
        self._arrived_since = 0
        self._pending: dict[int, _Pending] = {}
        self._slots = asyncio.Semaphore(0)
        self._receiving = -1
        self._nowhere = memoryview(bytearray(MAX_FRAME_BYTES))

    def attach(self, protocol: ClientProtocol, **options: Any) -> WireConnection:
        """Make the connection that this link receives from."""
        self._connection = WireConnection(protocol, self, **options)
        return self._connection

    @property
    def heard(self) -> float | None:
        """When the last byte came, on the loop's clock; None before the first."""
        return self._connection.heard if self._connection else None

    @property
    def may_be_http(self) -> bool:
        """Whether what came first, if anything, may be the beginning of an HTTP response."""
        return self._connection is None or self._connection.may_be_http

    @property
    def is_surfw(self) -> bool:
        """Whether a surfw server answers, of whatever version: it says so in its HTTP response, or in its hello."""
        response = self._connection.response if self._connection else None
        called = response.headers.get_all("Server") if response else []  # a proxy may have added its own
        return any(one.startswith("surfw/") for one in called) or self._session.offered.startswith("surfw.")

    async def models(self) -> tuple[str, ...]:
        """The names of the server's models."""
        answer = await self._ask(ListModels, None)
        return answer.models if answer else ()

    async def receive(self, make: Callable[[int], Request], download: Download) -> None:
        """Send the request that `make` gives for an id, and return when its answer is in the download.

        However it ends, nothing is written through the download afterwards.

        Raises:
            RefusedError: the server does not give it.
            ConnectionFailedError: the connection is over.
        """
        await self._ask(make, download)

    async def _ask(self, make: Callable[[int], Request], download: Download | None) -> Models | None:
        await self._slots.acquire()
        if self.ended:
            self._slots.release()
            raise self._over()
        request, now = make(self._session.next_id()), self._loop.time()
        if not self._pending:
            self._progressed, self._arrived_since = now, 0
        pending = _Pending(request, self._loop.create_future(), download, now)
        self._pending[request.id] = pending
        self._send(self._session.send(request))
        if self._watch is None and not self.ended:
            self._watch = self._loop.call_later(self._silence_seconds, self._look)
        try:
            return await pending.done
        finally:
            self._give_up(request.id, pending)

    def _look(self) -> None:
        """See whether there was progress, and look again when that would be due anew."""
        self._watch = None
        if self.ended or not self._pending:
            return
        due = self._progressed + self._silence_seconds
        now = self._loop.time()
        if now >= due:
            self._end(self._stalled(), transient=True)
            return
        for pending in self._pending.values():
            if pending.overtaken >= self._session.requests and not pending.done.done():
                last = pending.progressed + self._silence_seconds
                if now >= last:
                    what = f"answers later requests, and left one for {self._silence_seconds:g} seconds"
                    pending.done.set_exception(self._failure(what, transient=True))
                else:
                    due = min(due, last)
        self._watch = self._loop.call_at(due, self._look)

    def _stalled(self) -> str:
        """What kind of silence it is."""
        seconds, heard = self._silence_seconds, self.heard
        if heard is None or heard + seconds <= self._loop.time():
            return f"said nothing for {seconds:g} seconds"
        least = format_size(PROGRESS_BYTES)
        return f"made no progress for {seconds:g} seconds: it sent less than {least} of what was asked for"

    def _progress(self, pending: _Pending | None) -> None:
        """The server gets on, and with this request, if any."""
        self._progressed, self._arrived_since = self._loop.time(), 0
        if pending:
            pending.progressed, pending.overtaken = self._progressed, 0

    def _give_up(self, request_id: int, pending: _Pending) -> None:
        """Make sure that nothing more goes to the download; if the answer is not complete, cancel it."""
        pending.download = None
        if not pending.done.cancel() and not pending.done.cancelled():
            pending.done.exception()  # whoever was cancelled while it failed does not look at it
        if self._session.is_open(request_id) and self._connection and not self.ended:
            if self._receiving == request_id:
                self._connection.reader.abandon()
            self._send(self._session.send(Cancel(request_id)))

    def _send(self, text: str) -> None:
        if self._connection:
            self._connection.send_now(text)

    def place(self, size: int) -> memoryview | None:
        """Where a frame belongs; None for one that may not come, which `binary` then refuses."""
        try:
            self._receiving, offset = self._session.place(size)
        except RemoteProtocolError:
            return None
        download = self._pending[self._receiving].download
        return download.place(offset, size) if download else self._nowhere[:size]

    def arriving(self, size: int) -> None:
        """Bytes of an answer arrived."""
        self._arrived_since += size
        if self._arrived_since >= PROGRESS_BYTES:
            self._progress(self._pending.get(self._receiving))

    def binary(self, data: bytes | bytearray | memoryview) -> None:
        """A frame arrived."""
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
        """A message arrived."""
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
                self._read_on(self._pending[message.id], message)
            case Failed():
                self._finish(message.id, RefusedError(f"{self.url}: {message.message}", code=message.code))

    def _begin(self, pending: _Pending, message: Begin) -> None:
        """Begin the download; one that does not want what is coming fails at once, and takes nothing."""
        try:
            if pending.download:
                pending.download.begin(message)
        except IntegrityError as exc:
            pending.download = None
            if not pending.done.done():
                pending.done.set_exception(exc)

    def _read_on(self, pending: _Pending, message: Progress) -> None:
        """The server has read for a request; more than there is to read does not count."""
        if pending.done.done():  # it was given up
            return
        most = pending.download.most_read_bytes if pending.download else most_read(self.limits.control_bytes)
        read_bytes = min(message.bytes, most)
        if read_bytes >= pending.read_bytes + PROGRESS_BYTES:
            pending.read_bytes = read_bytes
            self._progress(pending)

    def _finish(self, request_id: int, outcome: Models | RefusedError | None) -> None:
        finished = self._pending.pop(request_id)
        done = finished.done
        self._slots.release()
        self._progress(None)
        for pending in self._pending.values():
            pending.overtaken += not pending.may_be_overtaken_by(finished.request)
        if done.done():
            return
        if isinstance(outcome, RefusedError):
            done.set_exception(outcome)
        else:
            done.set_result(outcome)

    def lost(self, error: RemoteProtocolError | None) -> None:
        """The connection is over."""
        close = self._connection.protocol.close_rcvd if self._connection else None
        if error:
            self._end(f"broke the protocol: {error}")
        elif close and (close.reason or close.code in _FAULTS_OF_OURS):
            why = close.reason or f"with code {close.code}"
            self._end(f"closed the connection: {why}", transient=close.code not in _FAULTS_OF_OURS)
        else:
            self._end("went away", transient=True)

    def _end(self, what: str, *, transient: bool = False) -> None:
        """Fail everything that waits, and all that will be asked; the first reason counts."""
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
        self._slots.release()  # wakes those who wait for a slot, one by the other

    def _over(self) -> ConnectionFailedError:
        return self._failure(self.ended or "", transient=self._transient)

    def _failure(self, what: str, *, transient: bool) -> ConnectionFailedError:
        return ConnectionFailedError(f"the server at {self.url} {what}", transient=transient)

    def abort(self) -> None:
        """Drop the connection without a word."""
        self.greeted.cancel()
        self._end("was left")

    async def close(self) -> None:
        """Say goodbye, and wait a little for the answer."""
        if self._connection and not self.ended:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_SECONDS):
                    await self._connection.close()
        self._end("was left")
