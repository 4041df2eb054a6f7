"""Finding a server: connect, exchange hellos, and say plainly why not if there is none."""

import asyncio
import errno
import logging
from http import HTTPStatus
from ssl import SSLCertVerificationError, SSLContext, SSLEOFError, SSLError, SSLZeroReturnError
from typing import Any
from urllib.parse import urldefrag, urljoin, urlsplit

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidMessage, InvalidStatus, InvalidURI, WebSocketException
from websockets.http11 import Response
from websockets.typing import Subprotocol
from websockets.uri import parse_uri

from surfw import __version__
from surfw.client.address import PASSING, plan_headers, refusal
from surfw.client.link import CLOSE_SECONDS, Link
from surfw.config import DEFAULT_CONNECT_SECONDS, MAX_FRAME_BYTES, WireLimits, display_url
from surfw.errors import ConfigurationError, ConnectionFailedError, RefusedError, SurfwError
from surfw.wire import PROTOCOL, is_loopback, printable

_library_log = logging.getLogger("surfw.client.websocket")
_library_log.setLevel(logging.WARNING)  # below that, it shows headers with tokens

_UNREACHABLE = {errno.ENETUNREACH, errno.EHOSTUNREACH}
_NEXT = "start one with 'surfw serve', or name another"
_MOST_REDIRECTS = 4
_SCHEMES = {"http": "ws", "https": "wss", "ws": "ws", "wss": "wss"}
"""Where a redirect may lead, and what is spoken there."""

_REDIRECTS = {
    HTTPStatus.MOVED_PERMANENTLY, HTTPStatus.FOUND, HTTPStatus.SEE_OTHER, HTTPStatus.TEMPORARY_REDIRECT,
    HTTPStatus.PERMANENT_REDIRECT,
}  # fmt: skip
_SHOWN = 200


class _NotFollowed(WebSocketException):
    """A redirect leads where it is not followed to; the text says why."""


class _Connecting(connect):
    """The library's way to a connection, and through a few redirects: also those that HTTP proxies give."""

    def __init__(self, url: str, link: Link, **options: Any) -> None:
        super().__init__(url, create_connection=link.attach, **options)  # type: ignore[arg-type]  # a factory is all it is used as
        self._link = link
        self._named = link.url
        self._redirects = 0

    def process_redirect(self, exc: Exception) -> Exception | str:
        """Where to go on; an exception if that is not where a redirect may lead, or if this is none."""
        if not isinstance(exc, InvalidStatus) or exc.response.status_code not in _REDIRECTS:
            return exc
        locations = exc.response.headers.get_all("Location")
        if len(locations) != 1:
            return exc
        shown = printable(display_url(locations[0]))[:_SHOWN]
        try:
            old, to = parse_uri(self.uri), urldefrag(urljoin(self.uri, locations[0])).url
            scheme, mark, rest = to.partition("://")
            to = f"{_SCHEMES.get(scheme.lower(), 'no')}{mark}{rest}"
            new = parse_uri(to)
        except (ValueError, InvalidURI):
            return _NotFollowed(f"{shown}, which is not the address of a server")
        self._redirects += 1
        why = None
        if new.user_info:
            why = "with a user and a password that are not ours"
        elif old.secure and not new.secure:
            why = "where there is no TLS"
        elif self._redirects > _MOST_REDIRECTS:
            why = f"after {_MOST_REDIRECTS} other redirects"
        if why:
            return _NotFollowed(f"{shown}, {why}")
        if (old.secure, old.host, old.port) != (new.secure, new.host, new.port):
            self.additional_headers = None
            self._link.shows_token = False
        self.proxy = None if is_loopback(new.host) else True
        self._link.url = f"{self._named} (redirected to {printable(display_url(to))[:_SHOWN]})"
        return to


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
            connection = await _Connecting(
                url,
                link,
                additional_headers=plan_headers(url, token, ssl),
                **tls,
                subprotocols=[Subprotocol(PROTOCOL)],
                compression=None,
                user_agent_header=f"surfw/{__version__}",
                proxy=None if is_loopback(urlsplit(url).hostname or "") else True,
                open_timeout=None,
                ping_interval=None,
                close_timeout=CLOSE_SECONDS,
                max_size=max(limits.control_bytes, MAX_FRAME_BYTES),
                logger=_library_log,
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
    url: str,
    timeout_seconds: float = DEFAULT_CONNECT_SECONDS,
    *,
    token: str | None = None,
    ssl: SSLContext | None = None,
) -> bool:
    """Whether a surfw server is at the address: False if nothing listens there, or something else does.

    Raises:
        ConfigurationError: the address is not one, or the token may not be sent there.
        RefusedError: a server is there, and wants a token, or another one.
        ConnectionFailedError: a server is there and does not let us in, or nobody answers within the time.
    """
    try:
        link = await open_link(
            url,
            limits=WireLimits(),
            connect_seconds=timeout_seconds,
            silence_seconds=timeout_seconds,
            token=token,
            ssl=ssl,
        )
    except ConnectionFailedError as exc:
        if exc.absent:
            return False
        raise
    link.abort()
    return True


def _require_surfw(connection: ClientConnection) -> None:
    if connection.subprotocol != PROTOCOL:
        raise ConnectionFailedError(f"it does not speak {PROTOCOL}")


def _explain(link: Link, seconds: float, token: str | None, exc: Exception) -> SurfwError:
    """Why there is no connection, whether trying again may help, and whether a server may be there at all."""
    transient = absent = False
    match exc:
        case OSError():
            return _explain_network(link, seconds, exc)
        case ValueError() | InvalidURI():
            return ConfigurationError(f"{link.url!r} is not the address of a server; expected ws://HOST:PORT")
        case InvalidStatus() if exc.response.headers.get("Server", "").startswith("surfw/"):
            if exc.response.status_code == HTTPStatus.UNAUTHORIZED:
                return refusal(link.url, token) if link.shows_token else _redirected_refusal(link)
            text = _refused(link, exc.response)
            transient = exc.response.status_code == HTTPStatus.SERVICE_UNAVAILABLE
        case InvalidStatus() if exc.response.status_code in PASSING:
            status = f"status {exc.response.status_code}, as proxies do whose server is away"
            text, transient = f"{link.url} answers with {status}; {_NEXT}", True
        case InvalidMessage() if isinstance(exc.__cause__, EOFError) and link.may_be_http:
            text, transient = _hung_up(link), True
        case ConnectionFailedError() if exc.transient:
            text, transient = f"{exc} before it said hello; {_NEXT}", True
        case _NotFollowed():
            text, absent = f"{link.url} redirects to {exc}; name the server's own address", True
        case _:
            why = (link.ended if isinstance(exc, ConnectionFailedError) else None) or exc
            text, absent = f"{link.url} answers, but is not a surfw server: {why}; {_NEXT}", True
    return ConnectionFailedError(printable(text), transient=transient, absent=absent)


def _explain_network(link: Link, seconds: float, exc: OSError) -> ConnectionFailedError:
    """Why there is not even a handshake."""
    transient = absent = False
    match exc:
        case TimeoutError():
            what = (
                f"{link.url} answers, but said no hello" if link.heard else f"no surfw server at {link.url}: no answer"
            )
            text, transient = f"{what} within {seconds:g} seconds; {_NEXT}", True
        case SSLCertVerificationError():
            text = (
                f"the certificate of {link.url} is not trusted: {exc.verify_message}; trust whoever signed it, with "
                "ssl= or SSL_CERT_FILE"
            )
        case SSLEOFError() | SSLZeroReturnError():
            text, transient = _hung_up(link), True
        case SSLError():
            text = (
                f"{link.url} does not speak TLS as it should ({exc.reason or 'handshake failed'}); does it want ws://?"
            )
        case _:
            refused = isinstance(exc, ConnectionRefusedError)
            text = f"no surfw server at {link.url}: {'connection refused' if refused else exc.strerror or exc}; {_NEXT}"
            transient = isinstance(exc, ConnectionError) or exc.errno in _UNREACHABLE
            absent = refused or not isinstance(exc, ConnectionError)
    return ConnectionFailedError(printable(text), transient=transient, absent=absent)


def _redirected_refusal(link: Link) -> RefusedError:
    text = f"the server at {link.url} wants a token, which redirects take nowhere else; name the server's own address"
    return RefusedError(text, code="no-token")


def _hung_up(link: Link) -> str:
    other = " (does it want wss://?)" if link.url.startswith("ws:") else ""
    return f"{link.url} hung up before it said hello{other}; {_NEXT}"


def _refused(link: Link, response: Response) -> str:
    """Why a surfw server does not let us in."""
    status = response.status_code
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        return f"the server at {link.url} takes no more clients; try again later, or {_NEXT}"
    if status == HTTPStatus.NOT_FOUND:
        path = urlsplit(link.url.partition(" ")[0]).path or "/"
        return f"the server at {link.url} refuses the path {path} with status {status}; expected ws://HOST:PORT"
    said = bytes(response.body or b"").decode(errors="replace").partition("\n")[0][:_SHOWN]
    return f"the server at {link.url} refuses the connection with status {status}: {said or response.reason_phrase}"
