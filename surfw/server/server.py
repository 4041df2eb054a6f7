"""The server: a store, a cache of its pages, and a port where clients and monitors are answered.

Its process imports neither torch nor transformers. It trusts no client: see `wire` for what is refused, `catalog` for
what can be named, `pages` and `outlet` for what bounds its memory.
"""

import asyncio
import errno
import ipaddress
import logging
import time
from types import TracebackType
from typing import Any, Self

import psutil
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.typing import Subprotocol

from surfw import __version__
from surfw.config import ServerSettings
from surfw.errors import ConfigurationError, SurfwError
from surfw.metrics import Metrics, hit_rate
from surfw.server.catalog import Catalog
from surfw.server.connection import Connection
from surfw.server.http import HttpEndpoints
from surfw.server.pages import PageCache
from surfw.storage import StorageBackend, Store
from surfw.wire import PROTOCOL

log = logging.getLogger("surfw.server")
_library_log = log.getChild("websocket")
_library_log.setLevel(logging.WARNING)  # below that, it says what our own lines say with the client's address

_CHECK_SECONDS = 2
"""Less than `_OPEN_SECONDS`, within which a request must be answered: one whose storage hangs too."""
_PING_SECONDS = 30
_PONG_SECONDS = 90
"""A client may be busy with a layer for a while before it answers a ping."""
_OPEN_SECONDS = 5
_CLOSE_SECONDS = 3


class WeightServer:
    """Serves a store; use it as an async context manager, or `start` and `stop` it. The backend stays the caller's."""

    def __init__(self, backend: StorageBackend, settings: ServerSettings | None = None) -> None:
        """Name the storage; nothing is opened yet."""
        self.settings = settings or ServerSettings()
        self._store = Store(backend)
        self._metrics = Metrics()
        self._catalog = Catalog(self._store)
        self._pages = PageCache(self._store.backend, self.settings.cache_bytes, self._metrics)
        self._connections: set[Connection] = set()
        self._process = psutil.Process()
        self._websockets: Server | None = None

    async def start(self) -> None:
        """Listen.

        Raises:
            ConfigurationError: the address cannot be used.
            NotAStoreError: the storage holds no store.
            StorageError: the storage cannot be read.
        """
        settings = self.settings
        if not settings.insecure and not _is_loopback(settings.host):
            raise ConfigurationError(
                f"{settings.host} may be reached from other machines, and clients are not authenticated; "
                "listen on 127.0.0.1, or add --insecure"
            )
        await self._store.check()
        await self._catalog.models()
        self._process.cpu_percent()
        try:
            self._websockets = await serve(
                self._serve_client,
                settings.host,
                settings.port,
                origins=[None],  # browsers name one: no web page may talk to a server on loopback
                subprotocols=[Subprotocol(PROTOCOL)],
                compression=None,
                process_request=HttpEndpoints(self).process_request,
                server_header=f"surfw/{__version__}",
                ping_interval=_PING_SECONDS,
                ping_timeout=_PONG_SECONDS,
                open_timeout=_OPEN_SECONDS,
                close_timeout=_CLOSE_SECONDS,
                max_size=settings.limits.control_bytes,
                write_limit=settings.limits.frame_bytes,
                logger=_library_log,
            )
        except (OSError, UnicodeError) as exc:  # the latter for a host that cannot be a name
            raise ConfigurationError(_cannot_listen(settings, exc)) from exc

    async def stop(self) -> None:
        """Say goodbye to the clients, stop reading, and free the port. Stopping twice is fine."""
        if self._websockets is not None:
            self._websockets.close(code=1001, reason="the server is stopping")
            await self._websockets.wait_closed()
        await self._pages.close()

    async def serve_forever(self) -> None:
        """Wait until the server is stopped, or the wait is cancelled."""
        if self._websockets is not None:
            await self._websockets.wait_closed()

    async def __aenter__(self) -> Self:
        """Start."""
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        """Stop."""
        await self.stop()

    @property
    def port(self) -> int:
        """The port that is listened on; the one of the settings before the start."""
        if self._websockets is None or not self._websockets.sockets:
            return self.settings.port
        return int(self._websockets.sockets[0].getsockname()[1])

    @property
    def url(self) -> str:
        """Where clients find the server."""
        host = self.settings.host
        return f"ws://[{host}]:{self.port}" if ":" in host else f"ws://{host}:{self.port}"

    @property
    def full(self) -> bool:
        """Whether no more clients are taken."""
        return len(self._connections) >= self.settings.clients

    async def _serve_client(self, websocket: ServerConnection) -> None:
        connection = Connection(
            websocket,
            catalog=self._catalog,
            pages=self._pages,
            limits=self.settings.limits,
            metrics=self._metrics,
        )
        self._connections.add(connection)
        try:
            await connection.serve()
        finally:
            self._connections.discard(connection)

    async def check_storage(self) -> bool:
        """Whether the storage can be reached now, and holds a store; looks for new models too."""
        try:
            async with asyncio.timeout(_CHECK_SECONDS):
                await self._store.check()
                await self._catalog.models()
            self._pages.healthy = True
        except (SurfwError, TimeoutError) as exc:
            log.warning("the storage %s cannot be reached: %s", self._store.url, exc)
            self._pages.healthy = False
        return self._pages.healthy

    def stats(self) -> dict[str, Any]:
        """The counters, as `surfw stats --json` prints them."""
        metrics, cache = self._metrics, self._pages.cache
        hits, misses = metrics.count("hits"), metrics.count("misses")
        return {
            "server": {"version": __version__, "uptime_seconds": time.monotonic() - metrics.started},
            "models": list(self._catalog.names),
            "cache": {
                "hits": hits,
                "misses": misses,
                "coalesced": metrics.count("coalesced"),
                "hit_rate": hit_rate(hits, misses),
                "bytes": cache.bytes,
                "capacity_bytes": cache.capacity_bytes,
                "evictions": cache.evictions,
                "policy": cache.policy,
            },
            "requests": {
                "total": metrics.count("requests"),
                "in_flight": sum(len(connection.open_requests) for connection in self._connections),
                "latency_seconds": metrics.latency("requests").percentiles(50, 95, 99),
            },
            "bytes_sent": metrics.count("bytes_sent"),
            "clients": len(self._connections),
            "storage": {"url": self._store.url, "healthy": self._pages.healthy},
            "resources": {"rss_bytes": self._process.memory_info().rss, "cpu_percent": self._process.cpu_percent()},
        }


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _cannot_listen(settings: ServerSettings, exc: OSError | UnicodeError) -> str:
    if isinstance(exc, UnicodeError):
        return f"{settings.host!a} is not a host to listen on; choose another with --host"
    if exc.errno == errno.EADDRINUSE:
        return (
            f"port {settings.port} on {settings.host} is in use; stop what listens there, or choose another with --port"
            " (0 takes a free one)"
        )
    reason = exc.strerror or exc
    return f"cannot listen on {settings.host} port {settings.port}: {reason}; choose others with --host and --port"
