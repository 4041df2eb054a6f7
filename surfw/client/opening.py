"""Finding a server: connect, exchange hellos, and say plainly why not if there is none."""

import asyncio
import errno
import logging
from http import HTTPStatus
from ssl import SSLCertVerificationError, SSLContext, SSLError
from typing import Any
from urllib.parse import urlsplit

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidStatus, InvalidURI, WebSocketException
from websockets.typing import Subprotocol

from surfw import __version__
from surfw.client.address import plan_headers, refusal
from surfw.client.link import Link
from surfw.config import MAX_FRAME_BYTES, WireLimits, display_url
from surfw.errors import ConfigurationError, ConnectionFailedError, SurfwError
from surfw.wire import PROTOCOL, is_loopback, printable

_library_log = logging.getLogger("surfw.client.websocket")
_library_log.setLevel(logging.WARNING)  # below that, it shows headers with tokens

_CLOSE_SECONDS = 2
_UNREACHABLE = {errno.ENETUNREACH, errno.EHOSTUNREACH}
_NEXT = "start one with 'surfw serve', or name another"


async def open_link(
    url: str,
    *,
    limits: WireLimits,
    connect_seconds: float,
    silence_seconds: float,
    token: str | None = None,
    ssl: SSLContext | None = None,
) -> Link:
    """Connect to a surfw server, and exchange hellos. The link's `url` is the address as it may be shown.

    Raises:
        ConfigurationError: the address is not one, or the token may not be sent there.
        RefusedError: the server wants a token, or another one.
        ConnectionFailedError: nothing answers there, or something else does.
    """
    link = Link(display_url(url), limits, silence_seconds)
    tls: dict[str, Any] = {} if ssl is None else {"ssl": ssl}
    try:
        async with asyncio.timeout(connect_seconds):
            connection = await connect(
                url,
                additional_headers=plan_headers(url, token, ssl),
                **tls,
                subprotocols=[Subprotocol(PROTOCOL)],
                compression=None,
                user_agent_header=f"surfw/{__version__}",
                proxy=None if is_loopback(urlsplit(url).hostname or "") else True,
                open_timeout=None,
                ping_interval=None,
                close_timeout=_CLOSE_SECONDS,
                max_size=max(limits.control_bytes, MAX_FRAME_BYTES),
                logger=_library_log,
                create_connection=link.attach,  # type: ignore[arg-type]  # a factory is all it is used as
            )
            _require_surfw(connection)
            await link.greeted
    except (OSError, ValueError, WebSocketException, ConnectionFailedError) as exc:
        raise _explain(link, connect_seconds, token, exc) from exc
    finally:
        if not link.greeted.done() or link.greeted.cancelled() or link.greeted.exception():
            link.abort()
    return link


async def probe(
    url: str, timeout_seconds: float = 1.0, *, token: str | None = None, ssl: SSLContext | None = None
) -> bool:
    """Whether a surfw server answers at the address and lets us in, found out within the time."""
    try:
        link = await open_link(
            url,
            limits=WireLimits(),
            connect_seconds=timeout_seconds,
            silence_seconds=timeout_seconds,
            token=token,
            ssl=ssl,
        )
    except SurfwError:
        return False
    link.abort()
    return True


def _require_surfw(connection: ClientConnection) -> None:
    if connection.subprotocol != PROTOCOL:
        raise ConnectionFailedError(f"it does not speak {PROTOCOL}")


def _explain(link: Link, seconds: float, token: str | None, exc: Exception) -> SurfwError:
    """Why there is no connection, and whether trying again may help."""
    transient = False
    match exc:
        case TimeoutError():
            silent = link.heard is None
            waited = f"within {seconds:g} seconds; {_NEXT}"
            text = (
                f"no surfw server at {link.url}: no answer {waited}" if silent else _foreign(link, f"no hello {waited}")
            )
        case SSLCertVerificationError():
            text = (
                f"the certificate of {link.url} is not trusted: {exc.verify_message}; trust whoever signed it, with "
                "ssl= or SSL_CERT_FILE"
            )
        case SSLError():
            text = (
                f"{link.url} does not speak TLS as it should ({exc.reason or 'handshake failed'}); does it want ws://?"
            )
        case OSError():
            reason = "connection refused" if isinstance(exc, ConnectionRefusedError) else exc.strerror or exc
            text = f"no surfw server at {link.url}: {reason}; {_NEXT}"
            transient = isinstance(exc, ConnectionError) or exc.errno in _UNREACHABLE
        case ValueError() | InvalidURI():
            return ConfigurationError(f"{link.url!r} is not the address of a server; expected ws://HOST:PORT")
        case InvalidStatus() if exc.response.headers.get("Server", "").startswith("surfw/"):
            if exc.response.status_code == HTTPStatus.UNAUTHORIZED:
                return refusal(link.url, token)
            text = _refused(link, exc.response.status_code)
            transient = exc.response.status_code == HTTPStatus.SERVICE_UNAVAILABLE
        case _:
            text = _foreign(link, f"{link.ended or exc}; {_NEXT}")
    return ConnectionFailedError(printable(text), transient=transient)


def _refused(link: Link, status: int) -> str:
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        return f"the server at {link.url} takes no more clients; try again later, or {_NEXT}"
    path = urlsplit(link.url).path or "/"
    return f"the server at {link.url} refuses the path {path} with status {status}; expected ws://HOST:PORT"


def _foreign(link: Link, why: str) -> str:
    return f"{link.url} answers, but is not a surfw server: {why}"
