"""One client of the server: receives its messages, and answers each request in a task of its own.

A client's mistake closes its connection, with a code and a reason, and affects nothing else. A failure of the store or
the server is an `error` for the request; details such as storage locations go only to the log.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from websockets.exceptions import ConnectionClosed, ConnectionClosedOK
from websockets.frames import CloseCode

from surfw import __version__
from surfw.config import WireLimits, printable
from surfw.errors import RefusedError, RemoteProtocolError, SurfwError
from surfw.manifest import Form
from surfw.server.access import Access
from surfw.server.fairness import Account, Reader
from surfw.server.futures import Future
from surfw.server.journal import ClientLog
from surfw.server.pacing import ClientPace
from surfw.server.pages import PROGRESS_SECONDS, StoredPiece
from surfw.server.reception import FairConnection
from surfw.server.sending import Document, Sender
from surfw.server.served import ServedStore
from surfw.storage.base import ChangedObjectError
from surfw.threads import cancel_all
from surfw.wire import (
    Begin,
    Cancel,
    ClientFacts,
    Credit,
    Data,
    Failed,
    Get,
    GetDigests,
    GetFile,
    GetManifest,
    ListModels,
    Models,
    Progress,
    Request,
    Schedule,
    ServerSession,
)

_HELLO_SECONDS = 10
_REASON_BYTES = 120
"""A close frame has room for 123 bytes of reason."""

_MOST_FUTURES = 2
"""The most models that one client's schedules may cover; further ones are ignored. Each takes at most 0.3 MB."""


@dataclass(slots=True)
class _Open:
    """A request that is being answered: its task, its reader, and the progress last reported to the client."""

    task: asyncio.Task[None]
    reader: Reader
    told: int = 0


class Connection:
    """Serves one client until it leaves.

    A client has joined once it sends a request. One that leaves after its hello, such as a probe, is not logged.

    Attributes:
        open_requests: the requests being answered, by id.
    """

    def __init__(
        self,
        number: int,
        websocket: FairConnection,
        served: ServedStore,
        access: Access,
        *,
        limits: WireLimits,
        client_log: ClientLog,
        pace: ClientPace,
        slow_seconds: float,
    ) -> None:
        """Take over an open WebSocket; counts `requests` and their latency, and `slow_clients`.

        The client is sent data at its `pace`, and is disconnected if it takes none of it for `slow_seconds`.
        """
        self._number = number
        self._since = time.monotonic()
        self._has_joined = False
        self._takes_requests = True
        self._model = ""
        self.open_requests: dict[int, _Open] = {}
        self._websocket = websocket
        self._served = served
        self._access = access
        self._limits = limits
        self._account = Account()
        self._futures: dict[str, Future] = {}
        self._session = ServerSession(
            limits, server=f"surfw/{__version__}", takes_schedules=served.pages.cache.policy == "schedule"
        )
        self._sender = Sender(websocket, self._session, served.metrics, pace)
        self._slow_seconds = slow_seconds
        self._peer = websocket.shown_address
        self._log = client_log

    async def serve(self) -> None:
        """Answer requests until the client leaves, is closed for what it sent, or the server stops."""
        telling = asyncio.create_task(self._tell_progress())
        try:
            self._websocket.opened()
            self._sender.hello()
            async with asyncio.timeout(_HELLO_SECONDS):
                self._session.receive(await self._websocket.receive())
            while True:
                self._take(self._session.receive(await self._websocket.receive()))
                await self._sender.keep_up()
        except RemoteProtocolError as exc:
            await self._close(exc.close_code, str(exc))
        except TimeoutError:
            await self._close(1008, f"no hello within {_HELLO_SECONDS} seconds")
        except ConnectionClosedOK:
            self._note_departure("left")
        except ConnectionClosed as exc:
            self._note_departure(f"is gone: {exc}")
        finally:
            await cancel_all([telling])
            await self._stop_answering()
            for future in self._futures.values():
                self._served.pages.futures.remove(future)
            if self._served.recording and self._has_joined:
                self._served.recording.left(self._number)

    @property
    def facts(self) -> ClientFacts:
        """Facts about the client for the statistics."""
        return {
            "number": self._number,
            "name": self._session.client,
            "address": self._peer,
            "connected_seconds": time.monotonic() - self._since,
            "model": self._model,
            "in_flight": len(self.open_requests),
            "bytes_sent": self._sender.sent_bytes,
        }

    def take_no_more(self) -> Iterable[asyncio.Task[None]]:
        """Accept no more requests, and return the tasks of those being answered.

        A request that arrives from now on gets no answer: the connection is closed soon, with a reason.
        """
        self._takes_requests = False
        return [request.task for request in self.open_requests.values()]

    def _note_request(self) -> None:
        self._served.metrics.add("requests")
        if not self._has_joined:
            self._has_joined = True
            grant = self._websocket.grant
            by = f" with {grant.shown}" if grant.name else ""
            self._log.arrivals.note(f"{self._session.client} at {self._peer} joined{by}")

    def _note_departure(self, how: str) -> None:
        if self._has_joined:
            self._log.departures.note(f"{self._session.client} at {self._peer} {how}")

    def _note_model(self, model: str) -> None:
        """Remember which model the client reads; the model exists."""
        if model != self._model:
            self._model = model
            self._served.note_reading(model)

    async def _close(self, code: int, reason: str) -> None:
        self._log.closings.note(f"{self._peer} is closed: {reason}", code=str(code))
        await self._stop_answering()
        await self._websocket.close(code, reason.encode()[:_REASON_BYTES].decode(errors="ignore"))

    async def _stop_answering(self) -> None:
        await cancel_all(request.task for request in self.open_requests.values())

    def _take(self, message: Request | Cancel | Credit | Schedule | None) -> None:
        match message:
            case None:
                return
            case Schedule():
                self._take_schedule(message)
            case Credit():
                if message.bytes >= self._limits.frame_bytes:  # follows from what was sent, and costs little
                    self._websocket.give_back_turn()
                self._sender.grant()
            case Cancel():
                if request := self.open_requests.get(message.id):
                    request.task.cancel()
                self._sender.send(Failed(message.id, "cancelled", "the client gave it up"))
            case _ if not self._takes_requests:
                self._log.refusals.note(f"{self._peer} is refused: the server is stopping", code="stopping")
            case _:
                self._note_request()
                reader = Reader(self._account)
                task = asyncio.create_task(self._answer(message, reader), name=f"surfw {message.type} {message.id}")
                self.open_requests[message.id] = _Open(task, reader)
                task.add_done_callback(lambda task: self._answered(message, task))

    def _take_schedule(self, schedule: Schedule) -> None:
        """Replace a client's schedule for a model."""
        try:
            self._access.check(self._websocket.grant, schedule.model)
        except RefusedError:  # reported when it sends requests; a schedule has no answer
            return
        futures = self._served.pages.futures
        if self._served.recording:
            self._served.recording.scheduled(self._number, schedule)
        if before := self._futures.pop(schedule.model, None):
            futures.remove(before)
        if schedule.cycle and len(self._futures) < _MOST_FUTURES:
            self._futures[schedule.model] = futures.add(schedule.cycle, schedule.kept)

    async def _tell_progress(self) -> None:
        """Periodically report the storage's progress to a client whose requests wait for it.

        A client that takes nothing of what it requested for too long is disconnected.
        """
        taken, since = 0, time.monotonic()
        while True:
            await asyncio.sleep(PROGRESS_SECONDS)
            if not self._sender.is_blocked or self._sender.taken_bytes > taken:
                taken, since = self._sender.taken_bytes, time.monotonic()
            elif time.monotonic() - since >= self._slow_seconds:
                self._served.metrics.add("slow_clients")
                reason = f"it took nothing of what it asked for in {self._slow_seconds:g} seconds"
                await self._close(CloseCode.TRY_AGAIN_LATER, reason)
                return
            for number, request in self.open_requests.items() if self._session.takes_progress else ():
                count = request.reader.progress_bytes
                if count > request.told and self._session.is_open(number):
                    request.told = count
                    self._sender.send(Progress(number, count))

    async def _answer(self, request: Request, reader: Reader) -> None:
        started = time.perf_counter()
        try:
            await self._send_answer(request, reader)
        except RefusedError as exc:
            self._log.refusals.note(f"{self._peer} is refused: {exc}", code=exc.code)
            self._fail(request, exc.code, str(exc))
        except ChangedObjectError as exc:
            self._log.changes.note(f"{self._peer} cannot be answered", str(exc), code="changed")
            self._fail(
                request,
                "changed",
                "the checkpoint that the server serves in place was changed since; start the server again, or run "
                "surfw chunk --in-place again; the server's log names the file",
            )
        except SurfwError as exc:
            self._log.failures.note(f"{self._peer} cannot be answered", str(exc), code="storage")
            self._fail(request, "storage", "the server could not read it from its storage; its log says more")
        else:
            self._served.metrics.latency("requests").observe(time.perf_counter() - started)

    def _answered(self, request: Request, task: asyncio.Task[None]) -> None:
        del self.open_requests[request.id]
        if not task.cancelled() and (exc := task.exception()):
            text = f"{self._peer} cannot be answered, which is a bug in surfw"
            self._log.bugs.note(text, str(request), code="internal", trace=exc)
            self._fail(request, "internal", "the server failed; its log says more")

    def _fail(self, request: Request, code: str, text: str) -> None:
        if self._session.is_open(request.id):
            self._sender.send(Failed(request.id, code, printable(text)))

    async def _send_answer(self, request: Request, reader: Reader) -> None:
        catalog = self._served.catalog
        model = None if isinstance(request, ListModels) else request.model
        grant = self._access.check(self._websocket.grant, model)
        looking_up = Reader(reader.account)  # the same account pays, but progress is not reported
        match request:
            case ListModels():
                await self._send_models(request.id, grant.choose(await catalog.models(reader)))
            case GetManifest():
                await self._send_document(request.id, await catalog.document(request.model, reader))
            case GetDigests():
                await self._send_document(request.id, await self._served.digests.document(request, reader))
            case GetFile():
                location, digest = await catalog.file(request, looking_up)
                self._sender.send(Begin(request.id, location.stop, digest))
                pieces = self._served.pages.read([location], 0, location.stop, reader)
                await self._send_stored(request.id, 0, location.stop, pieces)
            case Get():
                form = await catalog.chunk(request, looking_up)
                self._note_model(request.model)
                reader.fresh, reader.priority = request.fresh, request.priority
                await self._send_chunk(request, form, reader)

    async def _send_models(self, number: int, names: Sequence[str]) -> None:
        if sum(len(name) + 3 for name in names) > self._limits.control_bytes // 2:
            raise RefusedError(f"{len(names)} models are more than one message can list", code="too-many")
        async with self._sender.turn(0, 0):
            self._sender.send(Models(number, tuple(names)))

    async def _send_document(self, number: int, document: Document) -> None:
        self._sender.send(Begin(number, document.size, document.digest))
        await self._sender.send_piece(number, 0, document)

    async def _send_chunk(self, request: Get, form: Form, reader: Reader) -> None:
        read, future = self._served.pages.read, self._futures.get(request.model)
        if future and future.knows(request.chunk):
            read = partial(self._served.pages.read_foreseen, future=future)
        if self._served.recording:
            self._served.recording.asked(self._number, request, form.locations)
        reader.chunk = request.chunk
        pieces = read(form.locations, request.start, request.stop, reader, form=form)
        await self._send_stored(request.id, request.start, request.stop, pieces, priority=request.priority)

    async def _send_stored(
        self, number: int, start: int, stop: int, pieces: AsyncGenerator[StoredPiece, None], *, priority: int = 0
    ) -> None:
        """Send bytes `start` to `stop` of an answer in pieces, while the next ones are read."""
        if start == stop:
            self._sender.send(Data(number, start, stop))
        async with contextlib.aclosing(pieces):
            async for piece in pieces:
                await self._sender.send_piece(number, start, piece, priority)
                start += piece.size
