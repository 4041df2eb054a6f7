"""Plain HTTP on the same port: a page for people, health, statistics and metrics, all read-only.

A server with tokens requires one for everything but its health, and before any WebSocket is opened. A server without
tokens only answers requests for one of its own names. However often its health is requested, the storage is checked
only every few seconds.
"""

import json
import logging
import time
from collections.abc import Collection
from http import HTTPStatus
from typing import Protocol

from prometheus_client.exposition import CONTENT_TYPE_LATEST
from websockets.http11 import Request, Response

from surfw.server.access import Access
from surfw.server.fairness import SingleFlight
from surfw.server.journal import Journal, Sparse
from surfw.server.operations import GOODBYE
from surfw.server.page import page_response, send_events
from surfw.server.reception import FairConnection
from surfw.wire import EXPIRED, PROTOCOL, ServerHealth, ServerStats, is_meant

_HELP = f"""\
This is a surfw server. It speaks {PROTOCOL} over WebSocket here: surfw infer --source ws://HOST:PORT
Plain HTTP: GET / (a page), /livez, /readyz, /stats (JSON), /metrics (Prometheus).
"""
KEPT_SECONDS = 3.0
"""How long the result of a storage check is reused; recovery is noticed with at most this delay."""

_MISDIRECTED = """\
This server is not known by that name. Call it by its address or as localhost, or start it with --allowed-host NAME.
"""
_FULL = "all places for clients are taken"
_PATHS = {"/livez", "/readyz", "/stats", "/metrics", "/events"}
_OPEN_PATHS = {"/livez", "/readyz"}
"""Paths that need no token: they only reveal that there is a server, and whether it works."""


class _Server(Protocol):
    """What the endpoints need of the server."""

    @property
    def full(self) -> bool: ...

    @property
    def is_draining(self) -> bool: ...

    async def health(self) -> ServerHealth: ...

    def stats(self) -> ServerStats: ...

    def metrics(self, stats: ServerStats) -> bytes: ...


class HttpEndpoints:
    """Answers requests that are not for a WebSocket."""

    def __init__(self, server: _Server, access: Access, names: Collection[str] | None, journal: Journal) -> None:
        """Report on a server with this access and these names; None for any name."""
        self._server = server
        self._access = access
        self._names = names
        self._looks = SingleFlight(self._look, 1)
        self._ready = False
        self._health = "ok\n"
        self._looked = float("-inf")
        self._refusals = Sparse(journal, "refused", logging.WARNING)
        self._full = Sparse(journal, "refused", logging.WARNING)

    async def process_request(self, connection: FairConnection, request: Request) -> Response | None:
        """Return the answer to a request; None lets the WebSocket handshake proceed.

        A client that sent something other than a WebSocket frame after its request gets no answer: the library has
        already treated it as the end of the input, and would fail to answer.
        """
        answer = await self._choose(connection, request)
        if connection.protocol.eof_sent:
            connection.abort()
            await connection.wait_closed()
        return answer

    async def _choose(self, connection: FairConnection, request: Request) -> Response | None:
        await connection.turn()
        path = request.path.partition("?")[0]
        if (refusal := self._refuse(connection, request, path)) is not None:
            return refusal
        if path in _PATHS:
            return await self._answer(connection, path)
        if self._server.is_draining:
            self._full.note(f"{connection.shown_address} is refused: {GOODBYE}", code="stopping")
            return connection.respond(HTTPStatus.SERVICE_UNAVAILABLE, f"{GOODBYE}\n")
        if self._server.full:
            self._full.note(f"{connection.shown_address} is refused: {_FULL}", code="full")
            return connection.respond(HTTPStatus.SERVICE_UNAVAILABLE, f"{_FULL}\n")
        return None

    def _refuse(self, connection: FairConnection, request: Request, path: str) -> Response | None:
        """Return the answer to a request that is for another server or an unknown path, or is not allowed."""
        if not self._is_meant(connection, request):
            return connection.respond(HTTPStatus.MISDIRECTED_REQUEST, _MISDIRECTED)
        if path not in _PATHS and path != "/":
            return connection.respond(HTTPStatus.NOT_FOUND, f"There is nothing at this path.\n{_HELP}")
        if path == "/" and "Upgrade" not in request.headers:
            return page_response()
        if path not in _OPEN_PATHS and (challenge := self._challenge(connection, request)):
            response = connection.respond(HTTPStatus.UNAUTHORIZED, "Show the token: Authorization: Bearer TOKEN\n")
            response.headers["WWW-Authenticate"] = challenge
            return response
        return None

    def _is_meant(self, connection: FairConnection, request: Request) -> bool:
        """Whether the request's `Host` names this server; not checked if the server has tokens."""
        if self._names is None or not self._access.is_open:
            return True
        hosts = request.headers.get_all("Host")
        if len(hosts) == 1 and is_meant(hosts[0], self._names):
            return True
        shown = ", ".join(hosts)[:80]
        self._refusals.note(
            f"{connection.shown_address} is refused: it calls the server {shown!a}; --allowed-host allows a name",
            code="host",
        )
        return False

    def _challenge(self, connection: FairConnection, request: Request) -> str | None:
        """Admit a request with a valid token and return None; otherwise return the challenge."""
        shown = request.headers.get_all("Authorization")
        grant = self._access.find(shown)
        if grant is not None and not grant.has_expired:
            connection.grant = grant
            return None
        code = "expired" if grant is not None else "another-token" if shown else "no-token"
        why = code.replace("-", " ") if grant is None else f"{grant.shown} has expired"
        self._refusals.note(f"{connection.shown_address} is refused: {why}", code=code)
        return "Bearer" if grant is None else EXPIRED

    async def _answer(self, connection: FairConnection, path: str) -> Response:
        match path:
            case "/livez":
                return connection.respond(HTTPStatus.OK, "ok\n")
            case "/readyz" if self._server.is_draining:
                return connection.respond(HTTPStatus.SERVICE_UNAVAILABLE, f"{GOODBYE}\n")
            case "/readyz":
                if await self._is_ready():
                    return connection.respond(HTTPStatus.OK, self._health)
                return connection.respond(HTTPStatus.SERVICE_UNAVAILABLE, "the storage cannot be reached\n")
            case "/events":
                await self._is_ready()
                return await send_events(connection, lambda: connection.grant.limit(self._server.stats()))
            case "/stats":
                await self._is_ready()
                kind, text = "application/json", json.dumps(connection.grant.limit(self._server.stats())) + "\n"
            case _:
                stats = connection.grant.limit(self._server.stats())
                kind, text = CONTENT_TYPE_LATEST, self._server.metrics(stats).decode()
        response = connection.respond(HTTPStatus.OK, text)
        del response.headers["Content-Type"]
        response.headers["Content-Type"] = kind
        return response

    async def _is_ready(self) -> bool:
        """Whether the storage answered the last check, which was at most a few seconds ago."""
        if time.monotonic() - self._looked >= KEPT_SECONDS:
            await self._looks.join("health")
        return self._ready

    async def _look(self, *_: object) -> None:
        health = await self._server.health()
        self._ready = health["ready"]
        self._health = f"ok\nredis: {health['redis']}\n" if "redis" in health else "ok\n"
        self._looked = time.monotonic()

    async def close(self) -> None:
        """Stop checking the storage, report pending journal entries, and forget the last check."""
        await self._looks.close()
        self._refusals.flush()
        self._full.flush()
        self._looked = float("-inf")
