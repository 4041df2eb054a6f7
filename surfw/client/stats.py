"""A server's statistics and health, over plain HTTP at the address of its WebSocket. These calls block."""

import contextlib
import http.client
import os
import socket
import threading
from concurrent.futures import Future
from http import HTTPStatus
from ssl import SSLCertVerificationError, SSLContext, SSLError
from urllib.parse import urlsplit

from surfw.client.connect import Endpoint
from surfw.config import DEFAULT_CONNECT_SECONDS, DEFAULT_PORT, printable
from surfw.errors import ConfigurationError, ConnectionFailedError, RemoteProtocolError
from surfw.retry import TRANSIENT_STATUSES
from surfw.wire import ServerStats, parse_stats

_MAX_BYTES = 1 << 20
_SCHEMES = {"ws": False, "http": False, "wss": True, "https": True}
"""The schemes, and whether they have TLS."""


def read_stats(
    url: str,
    *,
    token: str | None = None,
    ssl: SSLContext | None = None,
    timeout_seconds: float = DEFAULT_CONNECT_SECONDS,
) -> ServerStats:
    """Ask a server for its statistics.

    Args:
        url: `ws://` or `wss://`, host and port; `host:port` means `ws://host:port`.
        token: the secret that the server was started with, if any. Without TLS it is sent to this machine only.
        ssl: trusts the certificates of a `wss://` server; None for those that the system trusts.
        timeout_seconds: how long to wait for the whole answer.

    Raises:
        ConnectionFailedError: no surfw server answers there.
        RefusedError: it wants a token, or another one.
        ConfigurationError: the address is malformed, or the token may not be sent there.
    """
    endpoint = _endpoint(url, token, ssl)
    status, is_surfw, body = _get(endpoint, "/stats", timeout_seconds)
    if status == HTTPStatus.UNAUTHORIZED and is_surfw:
        raise endpoint.refusal(endpoint.shown)
    if status in TRANSIENT_STATUSES and not is_surfw:
        raise ConnectionFailedError(
            f"{endpoint.shown} answers with status {status}, as proxies do whose server is away; "
            "try again, or name another",
            transient=True,
        )
    why = f"status {status} for GET /stats"
    if status == HTTPStatus.OK:
        try:
            return parse_stats(body)
        except RemoteProtocolError as exc:
            why = str(exc)
    raise ConnectionFailedError(f"{endpoint.shown} answers, but is not a surfw server ({why})")


def is_ready(url: str, *, ssl: SSLContext | None = None, timeout_seconds: float = DEFAULT_CONNECT_SECONDS) -> bool:
    """Whether a server and its storage answer, so that it can serve. This needs no token.

    Raises:
        ConnectionFailedError: no surfw server answers there.
        ConfigurationError: the address is malformed.
    """
    endpoint = _endpoint(url, None, ssl)
    status, is_surfw, _ = _get(endpoint, "/readyz", timeout_seconds)
    if is_surfw and status in {HTTPStatus.OK, HTTPStatus.SERVICE_UNAVAILABLE}:
        return status == HTTPStatus.OK
    raise ConnectionFailedError(
        f"{endpoint.shown} answers, but is not a surfw server (status {status} for GET /readyz)"
    )


def _endpoint(url: str, token: str | None, ssl: SSLContext | None) -> Endpoint:
    return Endpoint(url if "://" in url else f"ws://{url}", token, ssl)


def _get(endpoint: Endpoint, path: str, seconds: float) -> tuple[int, bool, bytes]:
    """GET a path: the status, whether a surfw server answered, and the body."""
    try:
        parts = urlsplit(endpoint.url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if host is None or parts.scheme not in _SCHEMES:
        raise ConfigurationError(
            f"{endpoint.shown!r} is not the address of a server; expected something like ws://127.0.0.1:8765"
        )
    headers = endpoint.headers()
    connection = (
        http.client.HTTPSConnection(host, port, timeout=seconds, context=endpoint.ssl)
        if _SCHEMES[parts.scheme]
        else http.client.HTTPConnection(host, port or DEFAULT_PORT, timeout=seconds)
    )
    try:
        return _within(seconds, connection, path, headers)
    except (OSError, UnicodeError, http.client.HTTPException) as exc:
        why = f"{printable(str(exc)) or type(exc).__name__}; start one with 'surfw serve' or name another address"
        if isinstance(exc, TimeoutError):
            why = f"no complete answer within {seconds:g} seconds; start one with 'surfw serve' or name another address"
        elif isinstance(exc, SSLError) and not isinstance(exc, SSLCertVerificationError):
            why = f"it does not speak TLS as it should ({exc.reason or 'handshake failed'}); does it want ws://?"
        raise ConnectionFailedError(
            f"no surfw server at {endpoint.shown}: {why}",
            transient=isinstance(exc, TimeoutError | ConnectionError),
        ) from exc


def _within(
    seconds: float, connection: http.client.HTTPConnection, path: str, headers: dict[str, str]
) -> tuple[int, bool, bytes]:
    """As `_get`, within the time. A thread asks: a socket's own timeout would begin anew with every byte.

    Raises:
        TimeoutError: it took longer. The thread ends soon after, or with the process.
    """
    answer: Future[tuple[int, bool, bytes]] = Future()
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
            is_surfw = response.headers.get("Server", "").startswith("surfw/")
            answer.set_result((response.status, is_surfw, response.read(_MAX_BYTES)))
        except BaseException as exc:  # noqa: BLE001 - raised where it is waited for
            answer.set_exception(exc)
        finally:
            connection.close()
            for connected in sockets:  # the response has it open still, if it broke off
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
