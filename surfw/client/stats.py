"""A server's statistics, over plain HTTP on the port of its WebSocket. This call blocks."""

import contextlib
import http.client
import socket
import threading
from concurrent.futures import Future
from http import HTTPStatus
from ssl import SSLContext
from urllib.parse import urlsplit

from surfw.client.connect import START_ONE, Endpoint, explain_away, explain_network
from surfw.config import DEFAULT_CONNECT_SECONDS, DEFAULT_PORT, TlsFiles
from surfw.errors import ConfigurationError, ConnectionFailedError, RemoteProtocolError
from surfw.retry import HAS_TLS, TRANSIENT_STATUSES
from surfw.wire import ServerStats, parse_stats

_MAX_BYTES = 1 << 20


def read_stats(
    url: str,
    *,
    token: str | None = None,
    ssl: SSLContext | TlsFiles | None = None,
    timeout_seconds: float = DEFAULT_CONNECT_SECONDS,
) -> ServerStats:
    """Request a server's statistics.

    Args:
        url: `ws://` or `wss://`, host and port; `host:port` means `ws://host:port`.
        token: the server's secret, if it has one. Without TLS it is sent only to this machine.
        ssl: for a `wss://` server: the certificates to trust, and the client certificate to send.
        timeout_seconds: the time limit for the whole answer.

    Raises:
        ConnectionFailedError: no surfw server answers there.
        RefusedError: the server requires a token, or rejects this one.
        ConfigurationError: the address is malformed, or the token may not be sent there.
    """
    endpoint = Endpoint(url if "://" in url else f"ws://{url}", token, ssl)
    try:
        status, challenge, is_surfw, body = _get_stats(endpoint, timeout_seconds)
    except TimeoutError as exc:
        raise ConnectionFailedError(
            f"no surfw server at {endpoint.shown}: no complete answer within {timeout_seconds:g} seconds; {START_ONE}",
            transient=True,
        ) from exc
    except (OSError, UnicodeError, http.client.HTTPException) as exc:
        raise explain_network(exc, endpoint.shown) from exc
    if status == HTTPStatus.UNAUTHORIZED and is_surfw:
        raise endpoint.refusal(endpoint.shown, challenge)
    if status in TRANSIENT_STATUSES and not is_surfw:
        raise explain_away(status, endpoint.shown)
    why = f"status {status} for GET /stats"
    if status == HTTPStatus.OK:
        try:
            return parse_stats(body)
        except RemoteProtocolError as exc:
            why = str(exc)
    raise ConnectionFailedError(f"{endpoint.shown} answers, but is not a surfw server ({why})")


def _get_stats(endpoint: Endpoint, seconds: float) -> tuple[int, str, bool, bytes]:
    """Return the status, the `WWW-Authenticate` challenge, whether a surfw server answered, and the body.

    A thread sends the request: a socket's own timeout would restart with every byte.

    Raises:
        TimeoutError: it took longer. The thread ends soon after, or with the process.
    """
    connection, headers = _connection(endpoint, seconds), endpoint.headers()
    answer: Future[tuple[int, str, bool, bytes]] = Future()
    sockets: list[socket.socket] = []  # kept here: the connection hands its socket to the response
    given_up = threading.Event()

    def ask() -> None:
        try:
            with contextlib.closing(connection):
                connection.connect()
                sockets.append(connection.sock)
                if given_up.is_set():
                    return
                connection.request("GET", "/stats", headers=headers)
                with connection.getresponse() as response:
                    is_surfw = response.headers.get("Server", "").startswith("surfw/")
                    challenge = response.headers.get("WWW-Authenticate", "")
                    answer.set_result((response.status, challenge, is_surfw, response.read(_MAX_BYTES)))
        except BaseException as exc:  # noqa: BLE001 - raised in the waiting thread
            answer.set_exception(exc)

    threading.Thread(target=ask, name="surfw-ask", daemon=True).start()
    try:
        return answer.result(seconds)
    finally:
        given_up.set()
        for open_socket in sockets:
            with contextlib.suppress(OSError):
                open_socket.shutdown(socket.SHUT_RDWR)


def _connection(endpoint: Endpoint, seconds: float) -> http.client.HTTPConnection:
    try:
        parts = urlsplit(endpoint.url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if host is None or parts.scheme not in HAS_TLS:
        raise ConfigurationError(
            f"{endpoint.shown!r} is not the address of a server; expected something like ws://127.0.0.1:8765"
        )
    if HAS_TLS[parts.scheme]:
        return http.client.HTTPSConnection(host, port, timeout=seconds, context=endpoint.context())
    return http.client.HTTPConnection(host, port or DEFAULT_PORT, timeout=seconds)
