"""Connecting to a server: the handshake, redirects, hellos, and clear errors if one of them fails.

A token is never sent to another machine in clear text, nor to another server by a redirect.
"""

import asyncio
import errno
import logging
import re
from dataclasses import dataclass, field
from http import HTTPStatus
from http.client import RemoteDisconnected
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
from surfw.config import (
    DEFAULT_CONNECT_SECONDS,
    MAX_FRAME_BYTES,
    TlsFiles,
    WireLimits,
    display_url,
    is_loopback,
    printable,
)
from surfw.errors import ConfigurationError, ConnectionFailedError, RefusedError, SurfwError
from surfw.retry import HAS_TLS, MOST_REDIRECTS, REDIRECT_STATUSES, TRANSIENT_STATUSES, parse_redirect
from surfw.tls import client_context
from surfw.wire import EXPIRED, PROTOCOL, bearer

_library_log = logging.getLogger("surfw.client.websocket")
_library_log.setLevel(logging.WARNING)  # below that, it logs headers, which have the token

_UNREACHABLE = {errno.ENETUNREACH, errno.EHOSTUNREACH}
START_ONE = "start one with 'surfw serve', or name another"
_NOT_LET_IN = {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.PROXY_AUTHENTICATION_REQUIRED}
"""A proxy in front of a surfw server may answer with these."""

_SHOWN = 200
_NO_TLS, _TLS = " (does it want ws://?)", " (does it want wss://?)"
_CERTIFICATE_ALERT = re.compile(r"ALERT_(.*CERTIFICATE.*|UNKNOWN_CA)")
"""TLS alerts for a client certificate that is missing or not trusted."""

_WHERE = "token_file, --token-file, SURFW_TOKEN"
"""Where a token is given: in Python, as an option, in the environment."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server's address, the token for it, and the certificates to trust.

    Attributes:
        url: `ws://` or `wss://`, host and port.
        token: the server's secret, if it has one. Without TLS it is sent only to this machine.
        ssl: for a `wss://` server: the certificates to trust, and the client certificate to send; None for the system's
            trusted certificates and no client certificate.
    """

    url: str
    token: str | None = field(default=None, repr=False)
    ssl: SSLContext | TlsFiles | None = None

    @property
    def shown(self) -> str:
        """The address without credentials."""
        return display_url(self.url)

    def context(self) -> SSLContext | None:
        """Return the TLS context; reads its files.

        Raises:
            ConfigurationError: one of them cannot be used.
        """
        return client_context(self.ssl) if isinstance(self.ssl, TlsFiles) else self.ssl

    def headers(self) -> dict[str, str]:
        """Return the headers of a request: the token, if there is one.

        Raises:
            ConfigurationError: the token may not be sent there or is not a token, or `ssl` is given without TLS.
            ValueError: the address is malformed.
        """
        parts = urlsplit(self.url)
        plain = HAS_TLS.get(parts.scheme) is False
        if plain and self.ssl is not None:
            raise ConfigurationError(
                f"{self.shown} is an address without TLS, but certificates were given (ssl=); expected wss://HOST:PORT"
            )
        if self.token is None:
            return {}
        if plain and not is_loopback(parts.hostname or ""):
            raise ConfigurationError(
                f"a token is not sent to {self.shown} in clear text, where others could read it; "
                "use wss:// with a server that has TLS"
            )
        if "@" in parts.netloc:
            raise ConfigurationError(
                f"{self.shown} has a user and a token was given too; a server takes the token alone"
            )
        return bearer(self.token)

    def refusal(self, where: str, challenge: str) -> RefusedError:
        """Return the error for the server at `where`, which answered 401 with this `WWW-Authenticate`."""
        if challenge == EXPIRED:
            text = f"the server at {where} refuses the token, which has expired; give one that is valid ({_WHERE})"
            return RefusedError(text, code="expired-token")
        why, code = ("wants a token", "no-token") if self.token is None else ("refuses the token", "another-token")
        text = f"the server at {where} {why}; give the one it was started with ({_WHERE})"
        return RefusedError(text, code=code)


class _NotFollowed(WebSocketException):
    """A redirect is not followed; the text says where it leads, and why it was rejected."""


class _Connecting(connect):
    """The library's connection attempt, with our rules for redirects; HTTP proxies send redirects too."""

    def __init__(self, url: str, link: Link, **options: Any) -> None:
        super().__init__(url, create_connection=link.attach, **options)  # type: ignore[arg-type]  # a factory is all it is used as
        self._link = link
        self._named = link.url
        self._redirects = 0

    def process_redirect(self, exc: Exception) -> Exception | str:
        """Return the address of a redirect, or an exception if the error is no redirect or must not be followed."""
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


async def open_link(endpoint: Endpoint, *, limits: WireLimits, connect_seconds: float, silence_seconds: float) -> Link:
    """Connect to a surfw server and exchange hellos.

    Raises:
        ConfigurationError: the address is malformed, or the token may not be sent there.
        RefusedError: the server requires a token, or rejects this one.
        ConnectionFailedError: nothing answers there, or something that is not a surfw server.
    """
    link = Link(endpoint.shown, limits, silence_seconds)
    is_open = False
    try:
        headers, context = endpoint.headers(), endpoint.context()
        tls: dict[str, Any] = {} if context is None else {"ssl": context}
        async with asyncio.timeout(connect_seconds):
            connection = await _Connecting(
                endpoint.url,
                link,
                additional_headers=headers,
                **tls,
                subprotocols=[Subprotocol(PROTOCOL)],
                compression=None,
                user_agent_header=f"surfw/{__version__}",
                proxy=None if is_loopback(urlsplit(endpoint.url).hostname or "") else True,
                open_timeout=None,
                ping_interval=None,
                close_timeout=CLOSE_SECONDS,
                max_size=max(limits.control_bytes, MAX_FRAME_BYTES),
                logger=_library_log,
            )
            _require_protocol(connection)
            await link.greeted
            is_open = True
    except TimeoutError as exc:
        what = f"{link.url} answers, but said no hello" if link.heard else f"no surfw server at {link.url}: no answer"
        raise _failed(f"{what} within {connect_seconds:g} seconds; {START_ONE}", transient=True) from exc
    except OSError as exc:
        raise explain_network(exc, link.url) from exc
    except (ValueError, LookupError, WebSocketException, ConnectionFailedError) as exc:
        failure = link.tls_failure
        raise (explain_network(failure, link.url) if failure else _explain(link, endpoint, exc)) from exc
    finally:
        if not is_open:  # also if this is cancelled just as the hello arrives
            link.abort()
    return link


async def probe(
    url: str,
    timeout_seconds: float = DEFAULT_CONNECT_SECONDS,
    *,
    token: str | None = None,
    ssl: SSLContext | TlsFiles | None = None,
) -> bool:
    """Return whether a surfw server is at the address: False if nothing listens there, or something else does.

    Raises:
        ConfigurationError: the address is malformed, or the token may not be sent there.
        RefusedError: the server requires a token, or rejects this one.
        ConnectionFailedError: the server refuses the connection, or nothing answers in time.
    """
    endpoint = Endpoint(url, token, ssl)
    try:
        link = await open_link(
            endpoint, limits=WireLimits(), connect_seconds=timeout_seconds, silence_seconds=timeout_seconds
        )
    except ConnectionFailedError as exc:
        if exc.absent:
            return False
        raise
    link.abort()
    return True


def _require_protocol(connection: ClientConnection) -> None:
    if connection.subprotocol != PROTOCOL:
        raise ConnectionFailedError(f"it does not speak {PROTOCOL}")


def _failed(text: str, *, transient: bool = False, absent: bool = False) -> ConnectionFailedError:
    return ConnectionFailedError(printable(text), transient=transient, absent=absent)


def _explain(link: Link, endpoint: Endpoint, exc: Exception) -> SurfwError:
    """Return the error for a connection that did not become a session."""
    match exc:
        case ValueError() | InvalidURI():
            return ConfigurationError(
                f"{link.url!r} is not the address of a server; expected ws://HOST:PORT, a port up to 65535"
            )
        case InvalidStatus():
            return _explain_status(link, endpoint, exc.response)
        case InvalidMessage() if isinstance(exc.__cause__, EOFError) and link.may_be_http:
            return _hung_up(link.url, _TLS if endpoint.url.startswith("ws:") else "")
        case ConnectionFailedError() if exc.transient:
            return _failed(f"{exc} before it said hello; {START_ONE}", transient=True)
        case _NotFollowed():
            return _failed(f"{link.url} redirects to {exc}; name the server's own address", absent=True)
    ended = link.ended if isinstance(exc, ConnectionFailedError) else None
    return _not_surfw(link, ended or str(exc))


def _explain_status(link: Link, endpoint: Endpoint, response: Response) -> SurfwError:
    """Return the error for an HTTP response that rejects the handshake."""
    status = response.status_code
    if link.is_surfw:
        return _explain_refusal(link, endpoint, response)
    if status in TRANSIENT_STATUSES:
        return explain_away(status, link.url)
    if status in _NOT_LET_IN:
        return _failed(
            f"{link.url} refuses the connection with status {status}, as proxies do; name an address that lets you in"
        )
    return _not_surfw(link, f"it answers with status {status}")


def _explain_refusal(link: Link, endpoint: Endpoint, response: Response) -> SurfwError:
    """Return the error for a surfw server that refuses the handshake."""
    status, server = response.status_code, f"the server at {link.url}"
    said = bytes(response.body or b"").decode(errors="replace").partition("\n")[0][:_SHOWN]
    match status:
        case HTTPStatus.UNAUTHORIZED if link.shows_token:
            return endpoint.refusal(link.url, response.headers.get("WWW-Authenticate", ""))
        case HTTPStatus.UNAUTHORIZED:
            text = f"{server} wants a token, which redirects take nowhere else; name the server's own address"
            return RefusedError(text, code="no-token")
        case HTTPStatus.SERVICE_UNAVAILABLE:
            why = f": {said}" if said else ""
            return _failed(f"{server} takes no more clients{why}; try again later, or {START_ONE}", transient=True)
        case HTTPStatus.NOT_FOUND:
            path = urlsplit(endpoint.shown).path or "/"
            return _failed(f"{server} refuses the path {path} with status {status}; expected ws://HOST:PORT")
    return _failed(f"{server} refuses the connection with status {status}: {said or response.reason_phrase}")


def explain_away(status: int, where: str) -> ConnectionFailedError:
    """Return the error for one of `TRANSIENT_STATUSES` that did not come from a surfw server."""
    text = f"{where} answers with status {status}, as proxies do whose server is away; {START_ONE}"
    return _failed(text, transient=True)


def explain_network(exc: Exception, where: str) -> ConnectionFailedError:
    """Return the error for a connection that failed for another reason than a timeout."""
    nobody = f"no surfw server at {where}"
    match exc:
        case SSLEOFError() | SSLZeroReturnError():
            return _hung_up(where, _NO_TLS)
        case SSLError():
            return _failed(_explain_tls(exc, where))
        case ConnectionRefusedError():
            return _failed(f"{nobody}: connection refused; {START_ONE}", transient=True, absent=True)
        case ConnectionResetError() if where.startswith(("wss:", "https:")):
            return _hung_up(where, _NO_TLS)
        case RemoteDisconnected():
            return _hung_up(where, _TLS)
    lost = isinstance(exc, ConnectionError)
    unreachable = isinstance(exc, OSError) and exc.errno in _UNREACHABLE
    why = (isinstance(exc, OSError) and exc.strerror) or str(exc) or type(exc).__name__
    return _failed(f"{nobody}: {why}; {START_ONE}", transient=lost or unreachable, absent=not lost)


def _explain_tls(exc: SSLError, where: str) -> str:
    if isinstance(exc, SSLCertVerificationError):
        return (
            f"the certificate of {where} is not trusted: {exc.verify_message}; trust the one who signed it, with "
            "--ssl-ca-certs (ssl=) or SSL_CERT_FILE"
        )
    alert = _CERTIFICATE_ALERT.search(exc.reason or "")
    if alert is None:
        return f"{where} does not speak TLS as it should ({exc.reason or 'handshake failed'}); does it want ws://?"
    why = alert[1].lower().replace("_", " ")
    if why == "certificate required":
        return f"{where} wants a certificate of its clients; show one with --ssl-certfile (ssl=)"
    return f"{where} refuses the certificate of this client: {why}; show another with --ssl-certfile (ssl=)"


def _hung_up(where: str, hint: str = "") -> ConnectionFailedError:
    return _failed(f"{where} hung up before it said hello{hint}; {START_ONE}", transient=True)


def _not_surfw(link: Link, why: str) -> ConnectionFailedError:
    """Return the error for a peer that is not a surfw server, or has another protocol version."""
    if link.is_surfw:
        return _failed(f"the server at {link.url} cannot be used: {why}; run the same version of surfw on both sides")
    return _failed(f"{link.url} answers, but is not a surfw server: {why}; {START_ONE}", absent=True)
