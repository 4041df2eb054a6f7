"""The server: a store, a cache of its pages, and a port where clients and monitors are answered.

Its process imports neither torch nor transformers. It trusts no client: see `wire` for what is refused, `listening` for
who may come, `catalog` for what can be named, `pages` and `sending` for what bounds its memory.
"""

import asyncio
import ctypes
import logging
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from ssl import SSLContext
from types import TracebackType
from typing import Any, Self

import psutil
from websockets.asyncio.server import Server

from surfw import __version__
from surfw.config import (
    DEFAULT_CACHE_MB,
    DEFAULT_CLIENTS,
    DEFAULT_HOST,
    DEFAULT_PORT,
    MB,
    WireLimits,
    display_url,
    expect,
)
from surfw.errors import ConfigurationError, SurfwError
from surfw.metrics import Metrics, hit_rate
from surfw.server.catalog import Catalog
from surfw.server.connection import Connection
from surfw.server.fairness import Turns
from surfw.server.http import HttpEndpoints
from surfw.server.late_digests import LateDigests
from surfw.server.listening import Listening, check_hosts
from surfw.server.pages import PageCache
from surfw.server.private_store import make_private_store
from surfw.server.reception import Opening, Reception
from surfw.server.sparse_log import ClientLog
from surfw.storage import StorageBackend, Store, open_backend
from surfw.storage.origins import PlacedOptions
from surfw.storage.places import is_checkpoint
from surfw.wire import ServerHealth, ServerStats

log = logging.getLogger("surfw.server")

_CHECK_SECONDS = 2
"""Less than what a plain request may take: it is answered also where the storage hangs."""


class WeightServer:
    """Serves a store; use it as an async context manager, or `start` and `stop` it, also again and again."""

    def __init__(
        self,
        storage_backend: StorageBackend | None = None,
        model_path: str | Path | None = None,
        host: str = DEFAULT_HOST,
        port: int = DEFAULT_PORT,
        cache_size_mb: float = DEFAULT_CACHE_MB,
        *,
        token: str | None = None,
        ssl: SSLContext | None = None,
        insecure: bool = False,
        clients: int = DEFAULT_CLIENTS,
        allowed_hosts: Sequence[str] = (),
        limits: WireLimits | None = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        """Say what to serve, and where; nothing is read yet.

        Args:
            storage_backend: the storage of the store. It stays the caller's, who closes it.
            model_path: in its place, the store's folder or URL, opened and closed by the server; or that of a plain
                checkpoint, which is then served from where it is.
            host: address to listen on; other machines reach it only with `token` and `ssl`, or `insecure`.
            port: TCP port; 0 lets the system choose.
            cache_size_mb: budget of the cache of stored bytes, in units of 10^6 bytes; at least 16 MiB are used.
            token: what clients have to show; None lets everybody in who reaches the port.
            ssl: a server's context with its certificates, for `wss://`.
            insecure: listen beyond loopback without a token, or with a token in clear text.
            clients: the most connections at a time.
            allowed_hosts: names that the server may be called by, beside addresses, `localhost` and its `host`. Where
                there is no token, requests for others are refused: a web page could have made them.
            limits: sizes of messages, frames and windows.
            storage_options: for the storage that `model_path` names, such as `{"endpoint_url": "http://…"}`.

        Raises:
            ConfigurationError: one of them cannot be used.
        """
        if (storage_backend is None) == (model_path is None):
            raise ConfigurationError(
                f"{'neither' if model_path is None else 'both'} of storage_backend and model_path "
                f"{'was' if model_path is None else 'were'} given; a server serves one of them"
            )
        expect("cache_size_mb", cache_size_mb, int | float, "a number of MB from 0 on")
        expect("clients", clients, int, "a whole number from 1 on")
        check_hosts(allowed_hosts)
        expect("limits", limits, WireLimits | None, "WireLimits or None")
        expect("storage_options", storage_options, Mapping | None, "a mapping of names to values, or None")
        if storage_options and model_path is None:
            raise ConfigurationError("storage_options are for model_path; give them to the backend where it is made")
        if model_path is not None:
            expect("model_path", model_path, str | Path, "a store's folder or URL")
        if not (cache_size_mb >= 0 and math.isfinite(cache_size_mb)):
            raise ConfigurationError(f"cache_size_mb is {cache_size_mb}; expected a number of MB from 0 on")
        if clients < 1:
            raise ConfigurationError(f"clients is {clients}; expected at least 1 connection")
        self._listening = Listening(host=host, port=port, token=token, tls=ssl, insecure=insecure)
        self._model_path = model_path
        self._storage_options = dict(storage_options or {})
        self._cache_bytes = int(cache_size_mb * MB)
        self._clients = clients
        self._limits = limits or WireLimits()
        self._connections: set[Connection] = set()
        self._opening = Opening()
        self._client_log = ClientLog(log)
        self._process = psutil.Process()
        self._names = (host, *allowed_hosts)
        self._endpoints: HttpEndpoints | None = None
        self._websockets: Server | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._changing = asyncio.Lock()
        self._stopped = asyncio.Event()
        self._lay_out(self._open_own() if storage_backend is None else storage_backend)

    def _open_own(self) -> StorageBackend:
        assert self._model_path is not None, "without one there is the caller's backend"
        return open_backend(self._model_path, self._storage_options)

    def _lay_out(self, backend: StorageBackend) -> None:
        """Everything that lives from a start to the stop after it."""
        self._backend = backend
        self._store = Store(backend, PlacedOptions(str(self._model_path or backend.url), self._storage_options))
        self._shown = self._store.url
        self._metrics = Metrics()
        self._catalog = Catalog(self._store)
        self._pages = PageCache(self._store.objects, self._cache_bytes, self._metrics)
        self._digests = LateDigests(self._store, self._pages, self._catalog)
        self._released = False

    def _alone(self) -> asyncio.Lock:
        """Held while the server starts or stops; another one in each event loop that it is used in."""
        if self._loop is not asyncio.get_running_loop():
            self._loop, self._changing = asyncio.get_running_loop(), asyncio.Lock()
        return self._changing

    async def start(self) -> None:
        """Listen.

        Raises:
            ConfigurationError: the address cannot be used, or the server is started already.
            NotAStoreError: the storage holds no store.
            StorageError: the storage cannot be read.
        """
        async with self._alone():
            if self._websockets is not None:
                raise ConfigurationError(f"the server at {self.url} is started already; stop it before the next start")
            if self._released:
                self._lay_out(self._backend if self._model_path is None else self._open_own())
            self._stopped = asyncio.Event()
            try:
                await self._find_store()
                await self._prepare()
                self._endpoints = HttpEndpoints(self, self._listening.token, self._names)
                self._websockets = await self._listening.open(
                    self._serve_client,
                    self._endpoints.process_request,
                    partial(Reception, turns=Turns(), opening=self._opening, most_unsent_bytes=self._limits.run_bytes),
                    self._limits,
                )
            except BaseException:
                await self._release()
                raise

    async def stop(self) -> None:
        """Say goodbye to the clients, stop reading, and free the port. Stopping twice is fine."""
        async with self._alone():
            if self._websockets is None:
                return
            self._websockets.close(code=1001, reason="the server is stopping")
            await self._websockets.wait_closed()
            await self._release()
            self._websockets = None
            self._stopped.set()

    async def serve_forever(self) -> None:
        """Wait until the server is stopped. One that is not started is started, and stopped if the wait is cancelled.

        Raises:
            SurfwError: it cannot be started; see `start`.
        """
        starting = self._websockets is None
        if starting:
            await self.start()
        try:
            await self._stopped.wait()
        except asyncio.CancelledError:
            if starting:
                await self.stop()
            raise

    async def _find_store(self) -> None:
        """If a plain checkpoint lies at the place, have a private store made for it, and serve that."""
        if self._model_path is None or not await is_checkpoint(self._backend):
            return
        place = str(self._model_path)
        store = await make_private_store(place, self._storage_options)
        await self._store.backend.close()
        self._lay_out(open_backend(store))
        self._shown = display_url(place)
        log.info("%s is a plain checkpoint, and is served from where it is", self._shown)

    async def _prepare(self) -> None:
        """Make sure of what the server lives on, before it listens."""
        await self._store.check()
        await self._catalog.models()
        self._process.cpu_percent()

    async def _release(self) -> None:
        """Let go of everything that was laid out."""
        if self._endpoints is not None:
            await self._endpoints.close()
        self._client_log.flush()
        await self._catalog.close()
        await self._digests.close()
        await self._pages.close()
        await self._store.objects.close()
        if self._model_path is not None:
            await self._store.backend.close()
        else:
            await self._store.let_go()
        self._released = True

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
        """The port that is listened on; while nothing is, the one that was asked for."""
        if self._websockets is None or not self._websockets.sockets:
            return self._listening.port
        return int(self._websockets.sockets[0].getsockname()[1])

    @property
    def url(self) -> str:
        """Where clients find the server."""
        return self._listening.url(self.port)

    @property
    def full(self) -> bool:
        """Whether no more clients are taken."""
        return len(self._connections) >= self._clients

    async def _serve_client(self, websocket: Reception) -> None:
        connection = Connection(
            websocket,
            catalog=self._catalog,
            digests=self._digests,
            pages=self._pages,
            limits=self._limits,
            metrics=self._metrics,
            client_log=self._client_log,
        )
        self._connections.add(connection)
        try:
            await connection.serve()
        finally:
            self._connections.discard(connection)
            if not self._connections:
                await asyncio.to_thread(_give_memory_back)

    async def health(self) -> ServerHealth:
        """Whether the server listens, and whether its storage can be reached now; looks for new models too."""
        live = self._websockets is not None
        ready = live and await self._check_storage()
        return {"live": live, "ready": ready, "storage": self._shown, "models": list(self._catalog.names)}

    async def _check_storage(self) -> bool:
        try:
            async with asyncio.timeout(_CHECK_SECONDS):
                await self._store.check()
                await self._catalog.models()
            self._pages.healthy = True
        except (SurfwError, TimeoutError) as exc:
            reason = str(exc) or f"no answer within {_CHECK_SECONDS} seconds"
            log.warning("the storage %s cannot be reached: %s", self._shown, reason)
            self._pages.healthy = False
        return self._pages.healthy

    def stats(self) -> ServerStats:
        """The counters since the start, as `surfw stats --json` prints them."""
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
            "storage": {"url": self._shown, "healthy": self._pages.healthy},
            "resources": {"rss_bytes": self._process.memory_info().rss, "cpu_percent": self._process.cpu_percent()},
        }


def _give_memory_back() -> None:
    """Give the system what the allocator keeps of what clients took, where there is a way to ask for it."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
