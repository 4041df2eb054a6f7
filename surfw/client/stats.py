"""A server's statistics and health, asked for over plain HTTP at the address of its WebSocket. These calls block."""

import http.client
from http import HTTPStatus
from ssl import SSLContext
from urllib.parse import urlsplit

from surfw.client.address import plan_headers, refusal
from surfw.config import DEFAULT_CONNECT_SECONDS, DEFAULT_PORT, display_url
from surfw.errors import ConfigurationError, ConnectionFailedError, RemoteProtocolError
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
        timeout_seconds: how long to wait for each part of the answer.

    Raises:
        ConnectionFailedError: no surfw server answers there.
        RefusedError: it wants a token, or another one.
        ConfigurationError: the address is not one, or the token cannot be sent there.
    """
    status, _, body = _get(url, "/stats", token, ssl, timeout_seconds)
    shown = display_url(url)
    if status == HTTPStatus.UNAUTHORIZED:
        raise refusal(shown, token)
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
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        return response.status, response.headers.get("Server", ""), response.read(_MAX_BYTES)
    except (OSError, UnicodeError, http.client.HTTPException) as exc:
        raise ConnectionFailedError(
            f"no surfw server at {display_url(url)}: {printable(str(exc)) or type(exc).__name__}; "
            "start one with 'surfw serve' or name another address"
        ) from exc
    finally:
        connection.close()
