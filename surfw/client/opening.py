"""Finding a server: connect, exchange hellos, and say plainly why not if there is none."""

import asyncio
import ipaddress
from http import HTTPStatus
from urllib.parse import urlsplit

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidStatus, InvalidURI, WebSocketException
from websockets.typing import Subprotocol

from surfw import __version__
from surfw.client.link import Link
from surfw.config import MAX_FRAME_BYTES, WireLimits
from surfw.errors import ConfigurationError, ConnectionFailedError, SurfwError
from surfw.wire import PROTOCOL, printable

_CLOSE_SECONDS = 2
_NEXT = "start one with 'surfw serve' or name another with --source"


async def open_link(url: str, *, limits: WireLimits, connect_seconds: float, silence_seconds: float) -> Link:
    """Connect to a surfw server, and exchange hellos.

    Raises:
        ConfigurationError: the address is not one.
        ConnectionFailedError: nothing answers there, or something else does.
    """
    link = Link(url, limits, silence_seconds)
    try:
        async with asyncio.timeout(connect_seconds):
            connection = await connect(
                url,
                subprotocols=[Subprotocol(PROTOCOL)],
                compression=None,
                user_agent_header=f"surfw/{__version__}",
                proxy=None if _is_loopback(url) else True,
                open_timeout=None,
                ping_interval=None,
                close_timeout=_CLOSE_SECONDS,
                max_size=max(limits.control_bytes, MAX_FRAME_BYTES),
                create_connection=link.attach,  # type: ignore[arg-type]  # a factory is all it is used as
            )
            _require_surfw(connection)
            await link.greeted
    except (OSError, ValueError, WebSocketException, ConnectionFailedError) as exc:
        raise _explain(link, connect_seconds, exc) from exc
    finally:
        if not link.greeted.done() or link.greeted.cancelled() or link.greeted.exception():
            link.abort()
    return link


async def probe(url: str, timeout_seconds: float = 1.0) -> bool:
    """Whether a surfw server answers at the address, found out within the time."""
    try:
        link = await open_link(
            url, limits=WireLimits(), connect_seconds=timeout_seconds, silence_seconds=timeout_seconds
        )
    except SurfwError:
        return False
    link.abort()
    return True


def _require_surfw(connection: ClientConnection) -> None:
    if connection.subprotocol != PROTOCOL:
        raise ConnectionFailedError(f"it does not speak {PROTOCOL}")


def _explain(link: Link, seconds: float, exc: Exception) -> SurfwError:
    """Why there is no connection."""
    match exc:
        case TimeoutError():
            silent = link.heard is None
            waited = f"within {seconds:g} seconds; {_NEXT}"
            text = (
                f"no surfw server at {link.url}: no answer {waited}" if silent else _foreign(link, f"no hello {waited}")
            )
        case OSError():
            reason = "connection refused" if isinstance(exc, ConnectionRefusedError) else exc.strerror or exc
            text = f"no surfw server at {link.url}: {reason}; {_NEXT}"
        case ValueError() | InvalidURI():
            return ConfigurationError(f"{link.url!r} is not the address of a server; expected ws://HOST:PORT")
        case InvalidStatus() if exc.response.headers.get("Server", "").startswith("surfw/"):
            text = _refused(link, exc.response.status_code)
        case _:
            text = _foreign(link, f"{link.ended or exc}; {_NEXT}")
    return ConnectionFailedError(printable(text))


def _refused(link: Link, status: int) -> str:
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        return f"the server at {link.url} takes no more clients; try again later, or {_NEXT}"
    path = urlsplit(link.url).path or "/"
    return f"the server at {link.url} refuses the path {path} with status {status}; expected ws://HOST:PORT"


def _foreign(link: Link, why: str) -> str:
    return f"{link.url} answers, but is not a surfw server: {why}"


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
