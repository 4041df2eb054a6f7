"""The server: serves a store to clients and monitors on one port.

Its process imports neither torch nor transformers. It trusts no client: `wire` refuses malformed messages, `listening`
decides who may connect, `catalog` looks up every name, and `pages` and `sending` bound the memory used.
"""

import asyncio
import ctypes
import heapq
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from ssl import SSLContext
from typing import Any, Self, TypedDict, Unpack

import psutil
from websockets.asyncio.server import Server

from surfw import __version__
from surfw.config import (
    DEFAULT_CACHE_MB,
    DEFAULT_CLIENTS,
    DEFAULT_DRAIN_SECONDS,
    DEFAULT_HOST,
    DEFAULT_PORT,
    DEFAULT_SLOW_SECONDS,
    MB,
    CachePolicy,
    TlsFiles,
    WireLimits,
    check_cache_policy,
    expect,
)
from surfw.errors import ConfigurationError
from surfw.metrics import hit_rate
from surfw.server.access import Access
from surfw.server.connection import Connection
from surfw.server.exposition import Exposition
from surfw.server.fairness import Turns
from surfw.server.heat import heat_of
from surfw.server.http import HttpEndpoints
from surfw.server.journal import ClientLog, Journal
from surfw.server.listening import Listening
from surfw.server.operations import GOODBYE, Drain, Reloads
from surfw.server.pacing import Pacing, check_rate
from surfw.server.reception import FairConnection, Newcomers
from surfw.server.redis_tier import RedisTier
from surfw.server.reloading import FromFiles, Reloading
from surfw.server.served import ServedStore
from surfw.server.tls import ServerTls
from surfw.storage import StorageBackend
from surfw.wire import MOST_CONNECTIONS, ClientFacts, SendingState, ServerHealth, ServerStats

_ADVANCED_CACHE_MB = 1000

_ACCEPT_STEPS = 3
"""More iterations of the event loop than asyncio needs to make a connection of an accepted socket."""


class WeightServer:
    """Serves a store. Use it as an async context manager, or `start` and `stop` it, as often as you like."""

    def __init__(
        self,
        storage_backend: StorageBackend | None = None,
        model_path: str | Path | None = None,
        host: str = DEFAULT_HOST,
        port: int = DEFAULT_PORT,
        cache_size_mb: float = DEFAULT_CACHE_MB,
        *,
        token: str | None = None,
        token_file: str | Path | None = None,
        ssl: SSLContext | TlsFiles | None = None,
        insecure: bool = False,
        clients: int = DEFAULT_CLIENTS,
        allowed_hosts: Sequence[str] = (),
        limits: WireLimits | None = None,
        storage_options: Mapping[str, Any] | None = None,
        cache_policy: CachePolicy = "schedule",
        record: str | Path | None = None,
        max_bytes_per_second: float | None = None,
        max_client_bytes_per_second: float | None = None,
        slow_client_timeout: float = DEFAULT_SLOW_SECONDS,
    ) -> None:
        """Configure the server; nothing is read yet.

        Args:
            storage_backend: the storage of the store. The caller remains responsible for closing it.
            model_path: instead of a backend, the folder or URL of a store, which the server opens and closes; or of
                a plain checkpoint, which is served in place.
            host: address to listen on; other machines reach it only with a token and `ssl`, or `insecure`.
            port: TCP port; 0 lets the system choose.
            cache_size_mb: budget of the cache of stored bytes, in units of 10^6 bytes; at least 16 MiB are used.
            token: the token that clients must send. Without `token` and `token_file`, anyone who reaches the port is
                admitted.
            token_file: a file with one token, or with several, each with the models it may read and its expiry
                time. It is reread when it changes.
            ssl: the certificate for `wss://`: either its files, which are reread when they change, or a context.
            insecure: listen beyond loopback without a token, or with a token in clear text.
            clients: the maximum number of connections at a time.
            allowed_hosts: host names that requests may use for the server, besides addresses, `localhost` and `host`.
                Without a token, requests for other names are refused: a web page could have made them.
            limits: sizes of messages, frames and windows.
            storage_options: options for the storage of `model_path`, such as `{"endpoint_url": "http://…"}`.
            cache_policy: `schedule` keeps what clients will need soonest by their schedules, then what was used most
                recently. `lru` keeps what was used most recently.
            record: a file to record what clients read, for `surfw bench cache --trace`; replaced at each start.
            max_bytes_per_second: the send rate limit for all clients together, at least 1 MB; None for no limit.
            max_client_bytes_per_second: the send rate limit for each client, likewise.
            slow_client_timeout: seconds after which a client that takes none of the data it requested is
                disconnected. It may reconnect.

        Raises:
            ConfigurationError: an argument is invalid.
        """
        check_cache_policy(cache_policy)
        source = _expect_source(storage_backend, model_path, storage_options)
        expect("cache_size_mb", cache_size_mb, int | float, "a number of MB from 0 on")
        if not 0 <= cache_size_mb < math.inf:
            raise ConfigurationError(f"cache_size_mb is {cache_size_mb}; expected a number of MB from 0 on")
        expect("clients", clients, int, "a whole number from 1 on")
        if clients < 1:
            raise ConfigurationError(f"clients is {clients}; expected at least 1 connection")
        expect("limits", limits, WireLimits | None, "WireLimits or None")
        check_rate("max_bytes_per_second", max_bytes_per_second)
        check_rate("max_client_bytes_per_second", max_client_bytes_per_second)
        expect("slow_client_timeout", slow_client_timeout, int | float, "a number of seconds")
        if not slow_client_timeout > 0:
            raise ConfigurationError(f"slow_client_timeout is {slow_client_timeout}; expected more than 0 seconds")
        self._rates = max_bytes_per_second, max_client_bytes_per_second
        self._pacing = Pacing(*self._rates)
        self._slow_seconds = slow_client_timeout
        self._journal = Journal()
        self._client_log = ClientLog(self._journal)
        self._access = Access(token, token_file, self._journal)
        files: list[FromFiles] = [] if self._access.file is None else [self._access.file]
        if isinstance(ssl, TlsFiles):
            files.append(tls := ServerTls(ssl, self._client_log.handshakes))
            ssl = tls.context
        self._reloading = Reloading(files, self._journal)
        self._listening = Listening(
            host=host,
            port=port,
            wants_token=not self._access.is_open,
            tls=ssl,
            insecure=insecure,
            allowed_hosts=allowed_hosts,
            limits=limits or WireLimits(),
        )
        self._clients = clients
        self._connections: set[Connection] = set()
        self._newcomers = Newcomers()
        self._connected = 0
        self._drain, self._reloads = Drain(self._journal), Reloads(self._journal)
        self._process = psutil.Process()
        self._endpoints = HttpEndpoints(self, self._access, self._listening.names, self._journal)
        self._websockets: Server | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._changing = asyncio.Lock()
        self._stopped = asyncio.Event()
        self._served = ServedStore(
            source, dict(storage_options or {}), int(cache_size_mb * MB), self._journal, policy=cache_policy,
            record=None if record is None else Path(record),
        )  # fmt: skip
        self._reloads.add("the models", self._served.reload)

    def _alone(self) -> asyncio.Lock:
        """Return the lock that serializes start and stop; each event loop that uses the server gets its own."""
        if self._loop is not asyncio.get_running_loop():
            self._loop, self._changing = asyncio.get_running_loop(), asyncio.Lock()
        return self._changing

    async def start(self) -> None:
        """Start listening.

        Raises:
            ConfigurationError: the address cannot be used, or the server is already started.
            NotAStoreError: the storage holds no store.
            StorageError: the storage cannot be read.
        """
        async with self._alone():
            if self._websockets is not None:
                raise ConfigurationError(f"the server at {self.url} is started already; stop it before the next start")
            self._stopped = asyncio.Event()
            self._pacing = Pacing(*self._rates)
            try:
                await self._prepare()
                connection = partial(
                    FairConnection,
                    turns=Turns(),
                    newcomers=self._newcomers,
                    most_unsent_bytes=self._listening.limits.run_bytes,
                )
                self._websockets = await self._listening.open(
                    self._serve_client, self._endpoints.process_request, connection
                )
            except BaseException:
                await self._release()
                raise

    async def stop(self) -> None:
        """Close the client connections, stop reading, and free the port. Stopping twice is fine."""
        async with self._alone():
            if self._websockets is None:
                return
            await self._stop_accepting(self._websockets)
            self._websockets.close(code=1001, reason=GOODBYE)
            await self._websockets.wait_closed()
            await self._release()
            self._websockets = None
            self._drain.is_on = False
            self._stopped.set()

    async def drain(self, most_seconds: float = DEFAULT_DRAIN_SECONDS) -> int:
        """Refuse new requests and connections, and answer those in flight; a following `stop` then loses nothing.

        `/readyz` returns 503 meanwhile. Clients stay connected until `stop` tells them to reconnect.

        Args:
            most_seconds: the time limit.

        Returns:
            The number of requests that were not answered in time.
        """
        return await self._drain.run(self._connections, most_seconds)

    async def reload(self) -> bool:
        """Reload what may have changed outside the server: tokens, certificates, and the models of its store.

        Returns:
            Whether everything could be read. What could not is kept as it was, and noted in the journal and the log.
        """
        return await self._reloads.run(after=await self._reloading.look(anyway=True))

    @staticmethod
    async def _stop_accepting(listening: Server) -> None:
        """Stop accepting, and wait for sockets that were just accepted: asyncio would never close them."""
        loop = asyncio.get_running_loop()
        for one in listening.sockets:
            loop.remove_reader(one.fileno())
        for _ in range(_ACCEPT_STEPS):
            await asyncio.sleep(0)

    async def serve_forever(self) -> None:
        """Wait until the server is stopped. Start it first if needed; then stop it if the wait is cancelled.

        Raises:
            SurfwError: the server cannot be started; see `start`.
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

    async def _prepare(self) -> None:
        """Open what the server needs before it listens."""
        await self._reloading.start()
        await self._served.start()
        self._process.cpu_percent()

    async def _release(self) -> None:
        """Close what was opened for this start."""
        await self._reloading.stop()
        await self._endpoints.close()
        self._client_log.flush()
        await self._served.close()

    async def __aenter__(self) -> Self:
        """Start."""
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop."""
        await self.stop()

    @property
    def port(self) -> int:
        """The port that the server listens on; before it listens, the configured one."""
        if self._websockets is None or not self._websockets.sockets:
            return self._listening.port
        return int(self._websockets.sockets[0].getsockname()[1])

    @property
    def url(self) -> str:
        """The address that clients connect to."""
        return self._listening.url(self.port)

    @property
    def is_draining(self) -> bool:
        """Whether new requests and connections are refused because the server is about to stop."""
        return self._drain.is_on

    @property
    def full(self) -> bool:
        """Whether the limit on clients is reached."""
        return len(self._connections) >= self._clients

    async def _serve_client(self, websocket: FairConnection) -> None:
        self._connected += 1
        connection = Connection(
            self._connected,
            websocket,
            self._served,
            self._access,
            limits=self._listening.limits,
            client_log=self._client_log,
            pace=self._pacing.client(),
            slow_seconds=self._slow_seconds,
        )
        self._connections.add(connection)
        if self._drain.is_on:  # it was admitted just before
            connection.take_no_more()
        try:
            await connection.serve()
        finally:
            self._connections.discard(connection)
            if not self._connections:
                await asyncio.to_thread(_give_memory_back)

    async def health(self) -> ServerHealth:
        """Report whether the server listens and can reach its storage now; also checks for new models."""
        live = self._websockets is not None
        ready = live and await self._served.is_ready()
        return {"live": live, "ready": ready, "storage": self._served.url, "models": list(self._served.catalog.names)}

    def stats(self, *, details: bool = False) -> ServerStats:
        """Return the counters since the start, as `surfw stats --json` prints them.

        Args:
            details: include in events where things are stored, which clients must not see.
        """
        served = self._served
        metrics, cache = served.metrics, served.pages.cache
        hits, misses = metrics.count("hits"), metrics.count("misses")
        stats: ServerStats = {
            "server": {"version": __version__, "uptime_seconds": time.monotonic() - metrics.started},
            "models": list(served.catalog.names),
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
            "storage": {"url": served.url, "healthy": served.pages.healthy},
            "resources": {"rss_bytes": self._process.memory_info().rss, "cpu_percent": self._process.cpu_percent()},
            "bytes_read": metrics.count("bytes_read"),
            "connections": self._busiest(),
            "events": self._journal.recent(details=details),
            "heat": heat_of(served.catalog, served.pages),
            "sending": self._sending(),
        }
        if served.cache_shortage:
            stats["cache_shortage"] = served.cache_shortage
        return stats

    def _sending(self) -> SendingState:
        rate, client_rate = self._rates
        state: SendingState = {"slow_clients": self._served.metrics.count("slow_clients")}
        if rate is not None:
            state["max_bytes_per_second"] = int(rate)
        if client_rate is not None:
            state["max_client_bytes_per_second"] = int(client_rate)
        return state

    def metrics(self, stats: ServerStats | None = None) -> bytes:
        """Return all metrics in Prometheus' text format, for the given statistics or the current ones."""
        return Exposition(
            stats=stats or self.stats(), served=self._served, journal=self._journal, reloads=self._reloads,
            newcomers=len(self._newcomers), accepted=self._connected, most_clients=self._clients,
            draining=self._drain.is_on,
        ).text()  # fmt: skip

    def _busiest(self) -> list[ClientFacts]:
        """Return the clients with open requests first, then the others; each group by bytes sent, the most first."""
        everybody = (connection.facts for connection in self._connections)
        return heapq.nlargest(MOST_CONNECTIONS, everybody, lambda one: (one["in_flight"] > 0, one["bytes_sent"]))


class ServerOptions(TypedDict, total=False):
    """Options for access to a server and to its storage; see `WeightServer`."""

    token: str | None
    token_file: str | Path | None
    ssl: SSLContext | TlsFiles | None
    insecure: bool
    clients: int
    allowed_hosts: Sequence[str]
    limits: WireLimits | None
    storage_options: Mapping[str, Any] | None
    cache_policy: CachePolicy
    record: str | Path | None
    max_bytes_per_second: float | None
    max_client_bytes_per_second: float | None
    slow_client_timeout: float


class AdvancedWeightServer(WeightServer):
    """A `WeightServer` with a Redis, through which servers share what they have read from the storage.

    While Redis is unreachable, or slower than the storage, the server works without it.
    """

    def __init__(
        self,
        chunks_dir: str | Path,
        redis_url: str,
        host: str = DEFAULT_HOST,
        port: int = DEFAULT_PORT,
        cache_size_mb: float = _ADVANCED_CACHE_MB,
        **options: Unpack[ServerOptions],
    ) -> None:
        """Configure the server; nothing is read yet.

        Args:
            chunks_dir: the store's folder or URL, opened and closed by the server.
            redis_url: `redis://`, `rediss://` (with TLS) or `unix://`; for a cluster, `redis+cluster://` or
                `rediss+cluster://` with one of its nodes.
            host: address to listen on, as for `WeightServer`.
            port: TCP port; 0 lets the system choose.
            cache_size_mb: budget of the cache in the server's own memory, in units of 10^6 bytes.
            options: `token`, `token_file`, `ssl`, `insecure`, `clients`, `allowed_hosts`, `limits`, `storage_options`,
                `cache_policy`, `record`, `max_bytes_per_second`, `max_client_bytes_per_second` and
                `slow_client_timeout`, as for `WeightServer`.

        Raises:
            ConfigurationError: an argument is invalid, or the `redis` package is missing.
        """
        expect("redis_url", redis_url, str, "redis://…, rediss://…, redis+cluster://… or unix://…")
        self._redis = RedisTier(redis_url)
        super().__init__(None, chunks_dir, host, port, cache_size_mb, **options)
        self._served.put_behind(self._redis)

    async def _prepare(self) -> None:
        await super()._prepare()
        await self._redis.open(self._journal)

    async def _release(self) -> None:
        await self._redis.close()
        await super()._release()

    async def health(self) -> ServerHealth:
        """Report whether the server listens and can reach its storage now; also checks Redis."""
        health, _ = await asyncio.gather(super().health(), self._redis.check())
        if "bypassed" in self._redis.state:
            health["redis"] = "bypassed"
        return health

    def stats(self, *, details: bool = False) -> ServerStats:
        """Return the counters since the start, with `redis`: its URL, its counters, and whether it is bypassed."""
        stats = super().stats(details=details)
        stats["redis"] = self._redis.state
        return stats


def _expect_source(
    backend: StorageBackend | None, place: str | Path | None, options: Mapping[str, Any] | None
) -> StorageBackend | str | Path:
    """Return what to serve; exactly one of the two must be given."""
    if (backend is None) == (place is None):
        which, were = ("neither", "was") if place is None else ("both", "were")
        raise ConfigurationError(f"{which} of storage_backend and model_path {were} given; a server serves one of them")
    expect("storage_options", options, Mapping | None, "a mapping of names to values, or None")
    if backend is None:
        assert place is not None
        expect("model_path", place, str | Path, "a store's folder or URL")
        return place
    if options:
        raise ConfigurationError("storage_options are for model_path; give them to the backend where it is made")
    expect("storage_backend", backend, StorageBackend, "a StorageBackend; name a folder or URL as model_path")
    return backend


def _give_memory_back() -> None:
    """Return the allocator's free memory to the system, where `malloc_trim` exists."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
