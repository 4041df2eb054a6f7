"""One client of the server: takes its messages, and answers each request in a task of its own.

What the client does wrong closes its connection, with a code and a reason, and nothing else. What the store or the
server does wrong is an `error` for the request; the details, such as where things lie, go to the log only.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass

from websockets.exceptions import ConnectionClosed, ConnectionClosedOK

from surfw import __version__
from surfw.config import WireLimits
from surfw.errors import RefusedError, RemoteProtocolError, SurfwError
from surfw.metrics import Metrics
from surfw.server.catalog import Catalog
from surfw.server.fairness import Account
from surfw.server.late_digests import LateDigests
from surfw.server.outlet import Outlet
from surfw.server.pages import PROGRESS_SECONDS, PageCache
from surfw.server.pieces import Piece, plan_pieces, use_ahead
from surfw.server.reception import Reception
from surfw.server.single_flight import Reader
from surfw.server.sparse_log import ClientLog
from surfw.storage.base import ChangedObjectError
from surfw.wire import (
    Begin,
    Cancel,
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
    ServerSession,
    printable,
)

log = logging.getLogger("surfw.server")

_HELLO_SECONDS = 10
_REASON_BYTES = 120
"""A close frame has room for 123 bytes of reason."""


@dataclass(slots=True)
class _Open:
    """A request that is being answered: the task, for whom it reads, and the progress that the client was told."""

    task: asyncio.Task[None]
    reader: Reader
    told: int = 0


class Connection:
    """Serves one client until it leaves."""

    def __init__(
        self,
        websocket: Reception,
        *,
        catalog: Catalog,
        digests: LateDigests,
        pages: PageCache,
        limits: WireLimits,
        metrics: Metrics,
        client_log: ClientLog,
    ) -> None:
        """Take over an open WebSocket; counts `requests` and their latency."""
        self.open_requests: dict[int, _Open] = {}
        self._websocket = websocket
        self._catalog = catalog
        self._digests = digests
        self._pages = pages
        self._limits = limits
        self._metrics = metrics
        self._account = Account()
        self._session = ServerSession(limits, server=f"surfw/{__version__}")
        self._outlet = Outlet(websocket, self._session, metrics)
        self._peer = str(websocket.remote_address)
        self._log = client_log

    async def serve(self) -> None:
        """Answer until the client leaves, is closed for what it sent, or the server stops."""
        self._log.visits.write(f"{self._peer} connected")
        telling = asyncio.create_task(self._tell_progress())
        try:
            self._websocket.opened()
            self._outlet.send(self._session.hello())
            async with asyncio.timeout(_HELLO_SECONDS):
                self._session.receive(await self._websocket.receive())
            while True:
                self._take(self._session.receive(await self._websocket.receive()))
                await self._outlet.keep_up()
        except RemoteProtocolError as exc:
            await self._close(exc.close_code, str(exc))
        except TimeoutError:
            await self._close(1008, f"no hello within {_HELLO_SECONDS} seconds")
        except ConnectionClosedOK:
            self._log.visits.write(f"{self._peer} left")
        except ConnectionClosed as exc:
            self._log.visits.write(f"{self._peer} is gone: {exc}")
        finally:
            telling.cancel()
            await asyncio.gather(telling, return_exceptions=True)
            await self._stop_answering()

    async def _close(self, code: int, reason: str) -> None:
        self._log.closings.write(f"{self._peer} is closed: {reason}")
        await self._stop_answering()
        await self._websocket.close(code, reason.encode()[:_REASON_BYTES].decode(errors="ignore"))

    async def _stop_answering(self) -> None:
        tasks = [request.task for request in self.open_requests.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _take(self, message: Request | Cancel | Credit | None) -> None:
        match message:
            case None:
                return
            case Credit():
                if message.bytes >= self._limits.frame_bytes:  # it comes with what it was sent, and asks for nothing
                    self._websocket.give_back_turn()
                self._outlet.grant()
            case Cancel():
                if request := self.open_requests.get(message.id):
                    request.task.cancel()
                self._end(Failed(message.id, "cancelled", "the client gave it up"))
            case _:
                self._metrics.add("requests")
                reader = Reader(self._account, fresh=isinstance(message, Get) and message.fresh)
                task = asyncio.create_task(self._answer(message, reader), name=f"surfw {message.type} {message.id}")
                self.open_requests[message.id] = _Open(task, reader)
                task.add_done_callback(lambda task: self._answered(message, task))

    async def _tell_progress(self) -> None:
        """Tell a client whose requests wait for the storage, now and then, that they get on."""
        while True:
            await asyncio.sleep(PROGRESS_SECONDS)
            for number, request in self.open_requests.items() if self._session.takes_progress else ():
                count = request.reader.progress_bytes
                if count > request.told and self._session.is_open(number):
                    request.told = count
                    self._outlet.send(self._session.send(Progress(number, count)))

    def _end(self, failed: Failed) -> None:
        self._outlet.send(self._session.send(failed), ends=True)

    def _answered(self, request: Request, task: asyncio.Task[None]) -> None:
        del self.open_requests[request.id]
        if not task.cancelled() and (exc := task.exception()):
            log.error("%s: answering %s failed, which is a bug in surfw", self._peer, request, exc_info=exc)
            self._fail(request, "internal", "the server failed; its log says more")

    async def _answer(self, request: Request, reader: Reader) -> None:
        started = time.perf_counter()
        try:
            await self._look_up_and_send(request, reader)
        except RefusedError as exc:
            self._log.refusals.write(f"{self._peer} is refused: {exc}")
            self._fail(request, exc.code, str(exc))
        except ChangedObjectError as exc:
            self._log.changes.write(f"{self._peer} cannot be answered: {exc}")
            self._fail(
                request,
                "changed",
                "the checkpoint that the server serves in place was changed since; start the server again, or run "
                "surfw chunk --in-place again; the server's log names the file",
            )
        except SurfwError as exc:
            self._log.failures.write(f"{self._peer} cannot be answered: {exc}")
            self._fail(request, "storage", "the server could not read it from its storage; its log says more")
        else:
            self._metrics.latency("requests").observe(time.perf_counter() - started)

    def _fail(self, request: Request, code: str, text: str) -> None:
        if self._session.is_open(request.id):
            self._end(Failed(request.id, code, printable(text)))

    async def _look_up_and_send(self, request: Request, reader: Reader) -> None:
        lookup = Reader(reader.account)  # progress is that of the bytes to send, or of a manifest that is asked for
        match request:
            case ListModels():
                names = tuple(await self._catalog.models(reader))
                if sum(len(name) + 3 for name in names) > self._limits.control_bytes // 2:
                    raise RefusedError(f"{len(names)} models are more than one message can list", code="too-many")
                async with self._outlet.turn(0, 0):
                    self._outlet.send(self._session.send(Models(request.id, names)))
            case GetManifest():
                document = await self._catalog.document(request.model, reader)
                self._outlet.send(self._session.send(Begin(request.id, document.size, document.digest)))
                await self._send_bytes(request.id, iter([document]), 0, document.size)
            case GetFile():
                location, digest = await self._catalog.file(request, lookup)
                self._outlet.send(self._session.send(Begin(request.id, location.stop, digest)))
                pieces = plan_pieces(self._pages, [location], 0, location.stop, reader)
                await self._send_bytes(request.id, pieces, 0, location.stop)
            case GetDigests():
                digests = await self._digests.document(request, reader)
                self._outlet.send(self._session.send(Begin(request.id, digests.size, digests.digest)))
                await self._send_bytes(request.id, iter([digests]), 0, digests.size)
            case Get():
                locations = await self._catalog.chunk(request, lookup)
                pieces = plan_pieces(self._pages, locations, request.start, request.stop, reader)
                await self._send_bytes(request.id, pieces, request.start, request.stop, request.priority)

    async def _send_bytes(
        self, request_id: int, pieces: Iterator[Piece], at: int, stop: int, priority: int = 0
    ) -> None:
        """Send pieces in runs, each in its turn. The next pieces are read while the one before them is sent."""
        if at == stop:
            self._outlet.send(self._session.send(Data(request_id, at, stop)))
        async with contextlib.aclosing(use_ahead(pieces, self._pages.read_ahead, self._pages.most_ahead)) as ready:
            async for piece in ready:
                sent = 0
                while sent < piece.size:
                    async with self._outlet.turn(priority, min(self._limits.frame_bytes, piece.size - sent)):
                        size = await self._send_run(request_id, at, piece, sent)
                    sent += size
                    at += size

    async def _send_run(self, request_id: int, at: int, piece: Piece, sent: int) -> int:
        """Send what may be sent now of a piece, and say how much it was.

        The view of it ends with this call. While a client keeps us waiting, none of its requests may hold one: a single
        byte would keep its whole page alive, beyond the cache's budget.
        """
        run = await piece.view(sent, min(piece.size, sent + self._room()))
        self._outlet.send_run(self._session.send(Data(request_id, at, at + len(run))), run)
        return len(run)

    def _room(self) -> int:
        """How long a run may be now: whole frames, unless the window has room for less than one."""
        room = min(self._limits.run_bytes, self._session.credit_bytes)
        return room - room % self._limits.frame_bytes or room
