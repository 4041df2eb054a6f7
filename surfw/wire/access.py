"""Access to a server: how a token is sent, and which host names are accepted.

A client sends `Authorization: Bearer TOKEN` with its WebSocket handshake, and with `GET /stats` and `/metrics`. Without
TLS, the token is sent only to this machine. No error and no `repr` shows a token.
"""

import ipaddress
import re
from collections.abc import Collection, Sequence

from surfw.errors import ConfigurationError

_PORT = re.compile(r"(?<=[^:]):[0-9]*$|(?<=\]):[0-9]*$")
_TOKEN = re.compile(r"[!-~]{1,1024}")


def check_token(token: str) -> str:
    """Return the token if it is valid.

    Raises:
        ConfigurationError: it is empty, too long, or has characters that a header cannot carry.
    """
    if not _TOKEN.fullmatch(token):
        raise ConfigurationError(
            f"the token, of {len(token)} characters, cannot be used; "
            "expected 1 to 1024 ASCII letters, digits and signs, without spaces"
        )
    return token


def bearer(token: str) -> dict[str, str]:
    """Return the header that carries the token.

    Raises:
        ConfigurationError: the token is not valid.
    """
    return {"Authorization": f"Bearer {check_token(token)}"}


def shown_token(shown: Sequence[str]) -> str | None:
    """Return the token in a request's `Authorization` headers; None if there is not exactly one valid header."""
    scheme, _, token = shown[0].partition(" ") if len(shown) == 1 else ("", "", "")
    return token.strip() if scheme.lower() == "bearer" else None


EXPIRED = 'Bearer error="invalid_token", error_description="The access token expired"'
"""The challenge (`WWW-Authenticate`) for an expired token, as defined in RFC 6750."""


def is_meant(host: str, names: Collection[str]) -> bool:
    """Whether a `Host` header names this server: by an address, as `localhost`, or by one of its names.

    A server without a token refuses other names, to prevent *DNS rebinding*: a web page whose own name resolves to this
    machine could otherwise make a browser read from the server.
    """
    name = host.strip().rpartition(":")[0] if _PORT.search(host.strip()) else host.strip()
    name = name.lower().removesuffix(".")
    try:
        ipaddress.ip_address(name[1:-1] if name.startswith("[") and name.endswith("]") else name)
    except ValueError:
        return name == "localhost" or (name != "" and name in {known.lower().removesuffix(".") for known in names})
    return True
