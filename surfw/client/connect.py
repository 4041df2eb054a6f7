"""Finding a server: connect, exchange hellos, and say plainly why not if there is none.

A token in clear text never leaves this machine, and a redirect takes it nowhere else.
"""

import asyncio
import errno
import logging
from http import HTTPStatus
from ssl import SSLCertVerificationError, SSLContext, SSLEOFError, SSLError, SSLZeroReturnError
from typing import Any
from urllib.parse import urlsplit

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidMessage, InvalidStatus, InvalidURI, WebSocketException
from websockets.http11 import Response
from websockets.typing import Subprotocol
from websockets.uri import parse_uri

from surfw import __version__
from surfw.client.link import CLOSE_SECONDS, Link
from surfw.config import DEFAULT_CONNECT_SECONDS, MAX_FRAME_BYTES, WireLimits, display_url
from surfw.errors import ConfigurationError, ConnectionFailedError, RefusedError, SurfwError
from surfw.retry import MOST_REDIRECTS, REDIRECT_STATUSES, TRANSIENT_STATUSES, parse_redirect
from surfw.wire import PROTOCOL, bearer, is_loopback, printable

_library_log = logging.getLogger("surfw.client.websocket")
_library_log.setLevel(logging.WARNING)  # below that, it shows headers with tokens

_PLAIN = {"ws", "http"}
_UNREACHABLE = {errno.ENETUNREACH, errno.EHOSTUNREACH}
_NEXT = "start one with 'surfw serve', or name another"
_NOT_LET_IN = {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.PROXY_AUTHENTICATION_REQUIRED}
"""With these somebody says no who may well stand before a surfw server."""

_SHOWN = 200


def plan_headers(url: str, token: str | None, ssl: SSLContext | None) -> dict[str, str]:
    """The headers of a request to the address: the token, if there is one and it may be said there.

    Raises:
        ConfigurationError: it may not, it cannot be a token, or the TLS context fits no address without TLS.
        ValueError: the address is not one.
    """
    parts = urlsplit(url)
    plain = parts.scheme in _PLAIN
    if plain and ssl is not None:
        raise ConfigurationError(
            f"{display_url(url)} is an address without TLS, but an SSL context was given; expected wss://HOST:PORT"
        )
    if token is None:
        return {}
    if plain and not is_loopback(parts.hostname or ""):
        raise ConfigurationError(
            f"a token is not sent to {display_url(url)} in clear text, where others could read it; "
            "use wss:// with a server that has TLS"
        )
    if "@" in parts.netloc:
        raise ConfigurationError(
            f"{display_url(url)} has a user and a token was given too; a server takes the token alone"
        )
    return bearer(token)


def refusal(url: str, token: str | None) -> RefusedError:
    """Why a server that answered 401 lets nobody in."""
    if token is None:
        return RefusedError(f"the server at {url} wants a token; give the one it was started with", code="no-token")
    return RefusedError(
        f"the server at {url} refuses the token; give the one it was started with", code="another-token"
    )


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
        if not isinstance(exc, InvalidStatus) or exc.response.status_code not in REDIRECT_STATUSES:
            return exc
        locations = exc.response.headers.get_all("Location")
        if len(locations) != 1:
            return exc
        shown = printable(display_url(locations[0]))[:_SHOWN]
        try:
            redirect = parse_redirect(self.uri, locations[0])
            to = f"{'wss' if redirect.has_tls else 'ws'}:{redirect.url.partition(':')[2]}"
            host = parse_uri(to).host
        except (ValueError, InvalidURI):
            return _NotFollowed(f"{shown}, which is not the address of a server")
        self._redirects += 1
        why = None
        if redirect.names_user:
            why = "with a user and a password that are not ours"
        elif redirect.loses_tls:
            why = "where there is no TLS"
        elif self._redirects > MOST_REDIRECTS:
            why = f"after {MOST_REDIRECTS} other redirects"
        if why:
            return _NotFollowed(f"{shown}, {why}")
        if redirect.leaves_origin:
            self.additional_headers = None
            self._link.shows_token = False
        self.proxy = None if is_loopback(host) else True
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
    except (OSError, ValueError, LookupError, WebSocketException, ConnectionFailedError) as exc:
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
        case InvalidStatus():
            return _explain_status(link, token, exc.response)
        case InvalidMessage() if isinstance(exc.__cause__, EOFError) and link.may_be_http:
            text, transient = _hung_up(link), True
        case ConnectionFailedError() if exc.transient:
            text, transient = f"{exc} before it said hello; {_NEXT}", True
        case _NotFollowed():
            text, absent = f"{link.url} redirects to {exc}; name the server's own address", True
        case _:
            return _not_surfw(link, (link.ended if isinstance(exc, ConnectionFailedError) else None) or str(exc))
    return ConnectionFailedError(printable(text), transient=transient, absent=absent)


def _explain_status(link: Link, token: str | None, response: Response) -> SurfwError:
    """Why there is only an HTTP answer."""
    status, transient = response.status_code, False
    if link.is_surfw:
        if status == HTTPStatus.UNAUTHORIZED:
            return refusal(link.url, token) if link.shows_token else _redirected_refusal(link)
        text, transient = _refused(link, response), status == HTTPStatus.SERVICE_UNAVAILABLE
    elif status in TRANSIENT_STATUSES:
        text, transient = f"{link.url} answers with status {status}, as proxies do whose server is away; {_NEXT}", True
    elif status in _NOT_LET_IN:
        text = (
            f"{link.url} refuses the connection with status {status}, as proxies do; name an address that lets you in"
        )
    else:
        return _not_surfw(link, f"it answers with status {status}")
    return ConnectionFailedError(printable(text), transient=transient)


def _not_surfw(link: Link, why: str) -> ConnectionFailedError:
    """Something else is there, or a surfw server that speaks otherwise."""
    if link.is_surfw:
        text = f"the server at {link.url} cannot be used: {why}; run the same version of surfw on both sides"
    else:
        text = f"{link.url} answers, but is not a surfw server: {why}; {_NEXT}"
    return ConnectionFailedError(printable(text), absent=not link.is_surfw)


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
