"""One client of the server: takes its messages, and answers each request in a task of its own.

What the client does wrong closes its connection, with a code and a reason, and nothing else. What the store or the
server does wrong is an `error` for the request; the details, such as where things lie, go to the log only.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterator

from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed

from surfw import __version__
from surfw.config import WireLimits
from surfw.errors import RefusedError, RemoteProtocolError, SurfwError
from surfw.manifest import payload_digest
from surfw.metrics import Metrics
from surfw.server.catalog import Catalog
from surfw.server.late_digests import LateDigests
from surfw.server.outlet import Outlet
from surfw.server.pages import PageCache
from surfw.server.pieces import HeldPiece, Piece, plan_pieces, use_ahead
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
    Request,
    ServerSession,
    printable,
)

log = logging.getLogger("surfw.server")

_HELLO_SECONDS = 10
_SIGN_SECONDS = 5
"""How often a client that waits for digests hears that the server is at work."""
_REASON_BYTES = 120
"""A close frame has room for 123 bytes of reason."""


class Connection:
    """Serves one client until it leaves."""

    def __init__(
        self,
        websocket: ServerConnection,
        *,
        catalog: Catalog,
        digests: LateDigests,
        pages: PageCache,
        limits: WireLimits,
        metrics: Metrics,
    ) -> None:
        """Take over an open WebSocket; counts `requests` and their latency."""
        self.open_requests: dict[int, asyncio.Task[None]] = {}
        self._websocket = websocket
        self._catalog = catalog
        self._digests = digests
        self._pages = pages
        self._limits = limits
        self._metrics = metrics
        self._session = ServerSession(limits, server=f"surfw/{__version__}")
        self._outlet = Outlet(websocket, self._session, metrics)
        self._peer = str(websocket.remote_address)

    async def serve(self) -> None:
        """Answer until the client leaves, is closed for what it sent, or the server stops."""
        log.info("%s connected", self._peer)
        try:
            self._outlet.send(self._session.hello())
            async with asyncio.timeout(_HELLO_SECONDS):
                self._session.receive(await self._websocket.recv())
            async for message in self._websocket:
                self._take(self._session.receive(message))
                await self._outlet.keep_up()
            log.info("%s left", self._peer)
        except RemoteProtocolError as exc:
            await self._close(exc.close_code, str(exc))
        except TimeoutError:
            await self._close(1008, f"no hello within {_HELLO_SECONDS} seconds")
        except ConnectionClosed as exc:
            log.info("%s is gone: %s", self._peer, exc)
        finally:
            await self._stop_answering()

    async def _close(self, code: int, reason: str) -> None:
        log.warning("%s is closed: %s", self._peer, reason)
        await self._stop_answering()
        await self._websocket.close(code, reason.encode()[:_REASON_BYTES].decode(errors="ignore"))

    async def _stop_answering(self) -> None:
        tasks = list(self.open_requests.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _take(self, message: Request | Cancel | Credit | None) -> None:
        match message:
            case None:
                return
            case Credit():
                self._outlet.grant()
            case Cancel():
                if task := self.open_requests.get(message.id):
                    task.cancel()
                self._outlet.send(self._session.send(Failed(message.id, "cancelled", "the client gave it up")))
            case _:
                self._metrics.add("requests")
                task = asyncio.create_task(self._answer(message), name=f"surfw {message.type} {message.id}")
                self.open_requests[message.id] = task
                task.add_done_callback(lambda task: self._answered(message, task))

    def _answered(self, request: Request, task: asyncio.Task[None]) -> None:
        del self.open_requests[request.id]
        if not task.cancelled() and (exc := task.exception()):
            log.error("%s: answering %s failed, which is a bug in surfw", self._peer, request, exc_info=exc)
            self._fail(request, "internal", "the server failed; its log says more")

    async def _answer(self, request: Request) -> None:
        started = time.perf_counter()
        try:
            await self._look_up_and_send(request)
        except RefusedError as exc:
            log.info("%s is refused: %s", self._peer, exc)
            self._fail(request, exc.code, str(exc))
        except ChangedObjectError as exc:
            log.error("%s cannot be answered: %s", self._peer, exc)  # noqa: TRY400 - the text says it all
            self._fail(
                request,
                "changed",
                "the checkpoint that the server serves in place was changed since; start the server again, or run "
                "surfw chunk --in-place again; the server's log names the file",
            )
        except SurfwError as exc:
            log.warning("%s cannot be answered: %s", self._peer, exc)
            self._fail(request, "storage", "the server could not read it from its storage; its log says more")
        else:
            self._metrics.latency("requests").observe(time.perf_counter() - started)

    def _fail(self, request: Request, code: str, text: str) -> None:
        if self._session.is_open(request.id):
            self._outlet.send(self._session.send(Failed(request.id, code, printable(text))))

    async def _look_up_and_send(self, request: Request) -> None:
        match request:
            case ListModels():
                names = tuple(await self._catalog.models())
                if sum(len(name) + 3 for name in names) > self._limits.control_bytes // 2:
                    raise RefusedError(f"{len(names)} models are more than one message can list", code="too-many")
                self._outlet.send(self._session.send(Models(request.id, names)))
            case GetManifest():
                entry = await self._catalog.read(request.model)
                self._outlet.send(self._session.send(Begin(request.id, len(entry.public), entry.digest)))
                await self._send_bytes(request.id, iter([HeldPiece(entry.public)]), 0, len(entry.public))
            case GetFile():
                location, digest = await self._catalog.file(request)
                self._outlet.send(self._session.send(Begin(request.id, location.stop, digest)))
                pieces = plan_pieces(self._pages, [location], 0, location.stop)
                await self._send_bytes(request.id, pieces, 0, location.stop)
            case GetDigests():
                data = await self._find_digests(request)
                self._outlet.send(self._session.send(Begin(request.id, len(data), payload_digest(data))))
                await self._send_bytes(request.id, iter([HeldPiece(data)]), 0, len(data))
            case Get():
                locations = await self._catalog.chunk(request)
                pieces = plan_pieces(self._pages, locations, request.start, request.stop)
                await self._send_bytes(request.id, pieces, request.start, request.stop, request.priority)

    async def _find_digests(self, request: GetDigests) -> bytes:
        """The digests of a chunk. While it is read, pings tell the client that something happens."""
        manifest, chunk = await self._catalog.find(request.model, request.chunk)
        finding = asyncio.ensure_future(self._digests.document(manifest, chunk))
        before = self._digests.digested_bytes
        try:
            while not (await asyncio.wait([finding], timeout=_SIGN_SECONDS))[0]:
                if self._digests.digested_bytes != before:
                    before = self._digests.digested_bytes
                    await self._websocket.ping()
            return finding.result()
        finally:
            finding.cancel()

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
                        run = (await piece.view())[sent : sent + self._room()]
                        self._outlet.send_run(self._session.send(Data(request_id, at, at + len(run))), run)
                    sent += len(run)
                    at += len(run)

    def _room(self) -> int:
        """How long a run may be now: whole frames, unless the window has room for less than one."""
        room = min(self._limits.run_bytes, self._session.window)
        return room - room % self._limits.frame_bytes or room
