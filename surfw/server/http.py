"""Plain HTTP on the same port: health, statistics and metrics, at four paths and read-only.

A server with a token wants to see it before it tells anything but its health, and before any WebSocket exists. One
without a token wants to be called by a name of its own. Whoever asks for its health, however often, has the storage
looked at only every few seconds.
"""

import json
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Iterator
from http import HTTPStatus
from typing import Protocol

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector
from websockets.asyncio.server import ServerConnection
from websockets.http11 import Request, Response

from surfw.server.reception import FairConnection
from surfw.server.single_flight import SingleFlight
from surfw.server.sparse_log import SparseLog
from surfw.wire import PROTOCOL, ServerHealth, ServerStats, admits, is_meant

log = logging.getLogger("surfw.server")

_HELP = f"""\
This is a surfw server. It speaks {PROTOCOL} over WebSocket here: surfw infer --source ws://HOST:PORT
Plain HTTP: GET /livez, /readyz, /stats (JSON), /metrics (Prometheus).
"""
KEPT_SECONDS = 3.0
"""How long an answer about the storage's health is given again: that late, one that is back is seen."""

_MISDIRECTED = """\
This server is not known by that name. Call it by its address or as localhost, or start it with --allowed-host NAME.
"""
_OPEN_PATHS = {"/livez", "/readyz"}
"""Where no token is wanted: they tell no more than that there is a server, and whether it works."""


class Source(Protocol):
    """What the answers are made from: the server."""

    @property
    def full(self) -> bool:
        """Whether no more clients are taken."""

    async def health(self) -> ServerHealth:
        """Whether the server and its storage can be reached now."""

    def stats(self) -> ServerStats:
        """The counters."""


class HttpEndpoints:
    """Answers requests that are not for a WebSocket."""

    def __init__(self, source: Source, token: str | None, names: Collection[str] = ()) -> None:
        """Name what is reported on, the token that has to be shown, if any, and what the server may be called."""
        self._source = source
        self._token = token
        self._names = names
        self._looks = SingleFlight(self._look, 1)
        self._ready = False
        self._looked = float("-inf")
        self._refusals = SparseLog(log, level=logging.WARNING)
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_StatsCollector(source))
        self._endpoints: dict[str, Callable[[ServerConnection], Awaitable[Response]]] = {
            "/livez": self._livez,
            "/readyz": self._readyz,
            "/stats": self._stats,
            "/metrics": self._metrics,
        }

    async def process_request(self, connection: FairConnection, request: Request) -> Response | None:
        """The answer to a request; None lets the WebSocket handshake go on."""
        await connection.turn()
        path = request.path.partition("?")[0]
        endpoint = self._endpoints.get(path)
        if (refusal := self._refuse(connection, request, path)) is not None:
            return refusal
        if endpoint is not None:
            return await endpoint(connection)
        if self._source.full:
            return connection.respond(HTTPStatus.SERVICE_UNAVAILABLE, "All its places for clients are taken.\n")
        return None

    def _refuse(self, connection: FairConnection, request: Request, path: str) -> Response | None:
        """The answer to a request that is for another server, for nothing there is, or not allowed."""
        if not self._is_meant(connection, request):
            return connection.respond(HTTPStatus.MISDIRECTED_REQUEST, _MISDIRECTED)
        if path not in self._endpoints and path != "/":
            return connection.respond(HTTPStatus.NOT_FOUND, f"There is nothing at this path.\n{_HELP}")
        if path == "/" and "Upgrade" not in request.headers:
            response = connection.respond(HTTPStatus.UPGRADE_REQUIRED, _HELP)
            response.headers["Upgrade"] = "websocket"
            return response
        if path not in _OPEN_PATHS and not self._admits(connection, request):
            response = connection.respond(HTTPStatus.UNAUTHORIZED, "Show the token: Authorization: Bearer TOKEN\n")
            response.headers["WWW-Authenticate"] = "Bearer"
            return response
        return None

    def _is_meant(self, connection: FairConnection, request: Request) -> bool:
        """Whether the request is for this server, by its `Host`; with a token, that decides alone."""
        if self._token is not None:
            return True
        hosts = request.headers.get_all("Host")
        if len(hosts) == 1 and is_meant(hosts[0], self._names):
            return True
        shown = ", ".join(hosts)[:80]
        self._refusals.write(
            f"{connection.remote_address} is refused: it calls the server {shown!a}; --allowed-host allows a name"
        )
        return False

    def _admits(self, connection: ServerConnection, request: Request) -> bool:
        if self._token is None:
            return True
        shown = request.headers.get_all("Authorization")
        if admits(self._token, shown):
            return True
        self._refusals.write(f"{connection.remote_address} is refused: {'another token' if shown else 'no token'}")
        return False

    async def _livez(self, connection: ServerConnection) -> Response:
        return connection.respond(HTTPStatus.OK, "ok\n")

    async def _readyz(self, connection: ServerConnection) -> Response:
        if await self._is_ready():
            return connection.respond(HTTPStatus.OK, "ok\n")
        return connection.respond(HTTPStatus.SERVICE_UNAVAILABLE, "the storage cannot be reached\n")

    async def _is_ready(self) -> bool:
        """Whether the storage answered when last looked, a few seconds ago at most."""
        if time.monotonic() - self._looked >= KEPT_SECONDS:
            await self._looks.join("health")
        return self._ready

    async def _look(self, *_: object) -> None:
        self._ready = (await self._source.health())["ready"]
        self._looked = time.monotonic()

    async def close(self) -> None:
        """Look no more."""
        await self._looks.close()

    async def _stats(self, connection: ServerConnection) -> Response:
        await self._is_ready()
        return _typed(connection.respond(HTTPStatus.OK, json.dumps(self._source.stats()) + "\n"), "application/json")

    async def _metrics(self, connection: ServerConnection) -> Response:
        text = generate_latest(self._registry).decode()
        return _typed(connection.respond(HTTPStatus.OK, text), CONTENT_TYPE_LATEST)


def _typed(response: Response, content_type: str) -> Response:
    del response.headers["Content-Type"]
    response.headers["Content-Type"] = content_type
    return response


class _StatsCollector(Collector):
    """The server's statistics as Prometheus metrics, made when they are asked for."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def collect(self) -> Iterator[Metric]:
        stats = self._source.stats()
        cache, requests = stats["cache"], stats["requests"]
        counters: dict[str, tuple[str, float]] = {
            "cache_hits": ("Uses of cached pages", cache["hits"]),
            "cache_misses": ("Uses of pages that had to be read", cache["misses"]),
            "cache_coalesced": ("Uses that joined another use's read", cache["coalesced"]),
            "cache_evictions": ("Pages that had to make room", cache["evictions"]),
            "requests": ("Requests received", requests["total"]),
            "sent_bytes": ("Bytes of models sent", stats["bytes_sent"]),
        }
        gauges: dict[str, tuple[str, float]] = {
            "cache_bytes": ("Bytes in the cache", cache["bytes"]),
            "cache_capacity_bytes": ("Budget of the cache", cache["capacity_bytes"]),
            "requests_in_flight": ("Requests being answered", requests["in_flight"]),
            "clients": ("Open connections", stats["clients"]),
            "models": ("Models in the store", len(stats["models"])),
            "storage_healthy": ("1 if the storage answered when last asked", int(stats["storage"]["healthy"])),
            "resident_bytes": ("Memory of the process", stats["resources"]["rss_bytes"]),
            "cpu_percent": ("CPU of the process since the last look", stats["resources"]["cpu_percent"]),
            "uptime_seconds": ("Time since the start", stats["server"]["uptime_seconds"]),
        }
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(f"surfw_{name}", text, value=value)
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"surfw_{name}", text, value=value)
        latency = GaugeMetricFamily("surfw_request_latency_seconds", "Latency of recent requests", labels=["quantile"])
        for rank, seconds in requests["latency_seconds"].items():
            latency.add_metric([f"0.{rank.removeprefix('p')}"], seconds)
        yield latency
