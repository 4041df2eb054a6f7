"""What a client says to an address, and what it keeps to itself: a token in clear text never leaves the machine."""

from http import HTTPStatus
from ssl import SSLContext
from urllib.parse import urlsplit

from surfw.config import display_url
from surfw.errors import ConfigurationError, RefusedError
from surfw.wire import bearer, is_loopback

_PLAIN = {"ws", "http"}

PASSING = {
    HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.INTERNAL_SERVER_ERROR,
    HTTPStatus.BAD_GATEWAY, HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.GATEWAY_TIMEOUT,
}  # fmt: skip
"""What a proxy answers while the server behind it is away, or one of them is busy: trying again may help."""


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
