"""Where a server listens: the address, TLS and the names it accepts; and errors if it cannot listen there."""

import errno
import logging
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from websockets.asyncio.server import Server, serve
from websockets.http11 import Request, Response
from websockets.typing import Subprotocol

from surfw import __version__
from surfw.config import WireLimits, expect, is_loopback
from surfw.errors import ConfigurationError
from surfw.server.reception import show_address
from surfw.wire import PROTOCOL

_library_log = logging.getLogger("surfw.server.websocket")
_library_log.setLevel(logging.WARNING)  # below that, it repeats our own lines and logs headers with tokens

_PING_SECONDS = 30
_PONG_SECONDS = 90
"""Pings detect clients that vanished without closing; nothing else depends on them."""
OPEN_SECONDS = 5
"""The time limit for a plain request to be answered, and for a WebSocket to be opened."""
_CLOSE_SECONDS = 3
_MAX_PORT = 65535
_NUMBERS = re.compile(r"[0-9]+(\.[0-9]+)+")
_HOST = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,252}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Listening:
    """An address to listen on; `tls` is the `ssl` of `WeightServer`, which documents all of these."""

    host: str
    port: int
    wants_token: bool
    tls: ssl.SSLContext | None
    insecure: bool
    allowed_hosts: Sequence[str]
    limits: WireLimits

    def __post_init__(self) -> None:
        """Reject arguments that no machine could use.

        Raises:
            ConfigurationError: an argument is invalid, such as a TLS context for clients.
        """
        expect("host", self.host, str, "a name or an address")
        expect("port", self.port, int, f"a whole number from 0 to {_MAX_PORT}")
        expect("ssl", self.tls, ssl.SSLContext | None, "an ssl.SSLContext, TlsFiles or None")
        for name in [self.allowed_hosts] if isinstance(self.allowed_hosts, str) else self.allowed_hosts:
            if name is self.allowed_hosts or not isinstance(name, str) or not _HOST.fullmatch(name):
                raise ConfigurationError(
                    f"allowed_hosts has {name!a:.80}, expected a list of names such as gpu.example.org"
                )
        if not 0 <= self.port <= _MAX_PORT:
            raise ConfigurationError(f"port is {self.port}; expected 0 (a free one) to {_MAX_PORT}")
        if self.tls is not None and self.tls.protocol is ssl.PROTOCOL_TLS_CLIENT:
            raise ConfigurationError(
                "the SSL context is for clients; make one with ssl.create_default_context(ssl.Purpose.CLIENT_AUTH) "
                "and load_cert_chain"
            )

    @property
    def wants_certificate(self) -> bool:
        """Whether clients must present a certificate."""
        return self.tls is not None and self.tls.verify_mode is ssl.CERT_REQUIRED

    @property
    def names(self) -> Sequence[str] | None:
        """Host names accepted besides addresses and `localhost`; None for any.

        If client certificates are required, web pages cannot connect under any name.
        """
        return None if self.wants_certificate else (self.host, *self.allowed_hosts)

    def url(self, port: int) -> str:
        """Return the URL that clients use if the server listens on this port."""
        scheme = "ws" if self.tls is None else "wss"
        return f"{scheme}://[{self.host}]:{port}" if ":" in self.host else f"{scheme}://{self.host}:{port}"

    async def open(
        self,
        serve_client: Callable[[Any], Awaitable[None]],
        process_request: Callable[[Any, Request], Awaitable[Response | None]],
        create_connection: Any,
    ) -> Server:
        """Start listening.

        Raises:
            ConfigurationError: the address cannot be used, or only with a token and TLS.
        """
        self._check_exposure()
        tls: dict[str, Any] = {}
        if self.tls is not None:
            tls = {"ssl": self.tls, "ssl_handshake_timeout": OPEN_SECONDS, "ssl_shutdown_timeout": _CLOSE_SECONDS}
        try:
            return await serve(
                serve_client,
                self.host,
                self.port,
                origins=[None],  # browsers send an origin: no web page may connect to a server on loopback
                subprotocols=[Subprotocol(PROTOCOL)],
                compression=None,
                process_request=process_request,
                server_header=f"surfw/{__version__}",
                ping_interval=_PING_SECONDS,
                ping_timeout=_PONG_SECONDS,
                open_timeout=OPEN_SECONDS,
                close_timeout=_CLOSE_SECONDS,
                max_size=self.limits.control_bytes,
                write_limit=self.limits.frame_bytes,
                create_connection=create_connection,
                logger=_library_log,
                **tls,
            )
        except (OSError, UnicodeError) as exc:  # UnicodeError: a host that cannot be a name
            raise ConfigurationError(self._cannot_listen(exc)) from exc

    def _check_exposure(self) -> None:
        """Refuse to listen for other machines without protection, unless `insecure` is set."""
        if self.insecure or is_loopback(self.host) or (self.wants_token and self.tls) or self.wants_certificate:
            return
        if _NUMBERS.fullmatch(self.host):
            try:
                socket.inet_aton(self.host)
            except OSError:
                raise ConfigurationError(f"{self.host} is no IP address; listen on one of this machine's") from None
        if not self.wants_token:
            reason = "clients are not authenticated"
        else:
            reason = "without TLS anybody on the way reads the token, and the weights, in clear text"
        raise ConfigurationError(
            f"{self.host} may be reached from other machines, and {reason}; listen on 127.0.0.1 behind a proxy with "
            "TLS, set a token and a certificate with --token-file and --ssl-certfile (token=, ssl=), or allow it with "
            "--insecure (insecure=True)"
        )

    def _cannot_listen(self, exc: OSError | UnicodeError) -> str:
        if isinstance(exc, UnicodeError):
            return f"{self.host!a} is not a host to listen on; choose another"
        if exc.errno == errno.EADDRINUSE:
            there = show_address((self.host, self.port))
            return (
                f"port {self.port} on {self.host} is in use; 'surfw stats {there}' tells whether a surfw server "
                "listens there: use that, stop it, or choose another with --port (port=); 0 takes a free one"
            )
        reason = exc.strerror or exc
        return f"cannot listen on {self.host} port {self.port}: {reason}; choose others"
