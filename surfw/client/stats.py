"""A server's statistics and health, asked for over plain HTTP at the address of its WebSocket. These calls block."""

import contextlib
import http.client
import os
import socket
import threading
from concurrent.futures import Future
from http import HTTPStatus
from ssl import SSLCertVerificationError, SSLContext, SSLError
from urllib.parse import urlsplit

from surfw.client.connect import plan_headers, refusal
from surfw.config import DEFAULT_CONNECT_SECONDS, DEFAULT_PORT, display_url
from surfw.errors import ConfigurationError, ConnectionFailedError, RemoteProtocolError
from surfw.retry import TRANSIENT_STATUSES
from surfw.wire import ServerStats, parse_stats, printable

_MAX_BYTES = 1 << 20
_SCHEMES = {"ws": False, "http": False, "wss": True, "https": True}
"""Whether there is TLS behind the scheme."""


def read_stats(
    url: str,
    *,
    token: str | None = None,
    ssl: SSLContext | None = None,
    timeout_seconds: float = DEFAULT_CONNECT_SECONDS,
) -> ServerStats:
    """Ask a server for its statistics.

    Args:
        url: `ws://` or `wss://` and the server's host and port; `host:port` is taken for `ws://`.
        token: what the server wants to be shown, if anything. It is not sent beyond this machine without TLS.
        ssl: with which certificates to trust a `wss://` server; None for those that the system trusts.
        timeout_seconds: how long to wait for the whole answer.

    Raises:
        ConnectionFailedError: no surfw server answers there.
        RefusedError: it wants a token, or another one.
        ConfigurationError: the address is not one, or the token cannot be sent there.
    """
    status, server, body = _get(url, "/stats", token, ssl, timeout_seconds)
    shown = display_url(url)
    is_surfw = server.startswith("surfw/")
    if status == HTTPStatus.UNAUTHORIZED and is_surfw:
        raise refusal(shown, token)
    if status in TRANSIENT_STATUSES and not is_surfw:
        raise ConnectionFailedError(
            f"{shown} answers with status {status}, as proxies do whose server is away; try again, or name another",
            transient=True,
        )
    why = f"status {status} for GET /stats"
    if status == HTTPStatus.OK:
        try:
            return parse_stats(body)
        except RemoteProtocolError as exc:
            why = str(exc)
    raise ConnectionFailedError(f"{shown} answers, but is not a surfw server ({why})")


def is_ready(url: str, *, ssl: SSLContext | None = None, timeout_seconds: float = DEFAULT_CONNECT_SECONDS) -> bool:
    """Whether a server's storage answers too, so that it can serve. No token is needed for that.

    Raises:
        ConnectionFailedError: no surfw server answers there.
        ConfigurationError: the address is not one.
    """
    status, server, _ = _get(url, "/readyz", None, ssl, timeout_seconds)
    if server.startswith("surfw/") and status in {HTTPStatus.OK, HTTPStatus.SERVICE_UNAVAILABLE}:
        return status == HTTPStatus.OK
    raise ConnectionFailedError(
        f"{display_url(url)} answers, but is not a surfw server (status {status} for GET /readyz)"
    )


def _get(
    url: str, path: str, token: str | None, ssl: SSLContext | None, timeout_seconds: float
) -> tuple[int, str, bytes]:
    """Status, server and body."""
    full = url if "://" in url else f"ws://{url}"
    try:
        parts = urlsplit(full)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if host is None or parts.scheme not in _SCHEMES:
        raise ConfigurationError(
            f"{display_url(url)!r} is not the address of a server; expected something like ws://127.0.0.1:8765"
        )
    headers = plan_headers(full, token, ssl)
    connection = (
        http.client.HTTPSConnection(host, port, timeout=timeout_seconds, context=ssl)
        if _SCHEMES[parts.scheme]
        else http.client.HTTPConnection(host, port or DEFAULT_PORT, timeout=timeout_seconds)
    )
    try:
        return _within(timeout_seconds, connection, path, headers)
    except (OSError, UnicodeError, http.client.HTTPException) as exc:
        why = printable(str(exc)) or type(exc).__name__
        if isinstance(exc, SSLError) and not isinstance(exc, SSLCertVerificationError):
            why = f"it does not speak TLS as it should ({exc.reason or 'handshake failed'}); does it want ws://?"
            raise ConnectionFailedError(f"no surfw server at {display_url(url)}: {why}") from exc
        if isinstance(exc, TimeoutError):
            why = f"no complete answer within {timeout_seconds:g} seconds"
        raise ConnectionFailedError(
            f"no surfw server at {display_url(url)}: {why}; start one with 'surfw serve' or name another address",
            transient=isinstance(exc, TimeoutError | ConnectionError),
        ) from exc


def _within(
    seconds: float, connection: http.client.HTTPConnection, path: str, headers: dict[str, str]
) -> tuple[int, str, bytes]:
    """Status, server and body, all within the time; a timeout of a socket begins anew with every byte.

    Raises:
        TimeoutError: it took longer. The thread that asks ends soon after, or with the process.
    """
    answer: Future[tuple[int, str, bytes]] = Future()
    sockets: list[socket.socket] = []
    given_up = threading.Event()

    def ask() -> None:
        try:
            connection.connect()
            sockets.append(connection.sock)
            if given_up.is_set():
                return
            connection.request("GET", path, headers=headers)
            response = connection.getresponse()
            answer.set_result((response.status, response.headers.get("Server", ""), response.read(_MAX_BYTES)))
        except BaseException as exc:  # noqa: BLE001 - whoever waits gets it
            answer.set_exception(exc)
        finally:
            connection.close()
            for connected in sockets:  # an answer that broke off leaves a file of it open
                if (descriptor := connected.detach()) >= 0:
                    os.close(descriptor)

    threading.Thread(target=ask, name="surfw-ask", daemon=True).start()
    try:
        return answer.result(seconds)
    finally:
        given_up.set()
        for open_socket in sockets:
            with contextlib.suppress(OSError):
                open_socket.shutdown(socket.SHUT_RDWR)
