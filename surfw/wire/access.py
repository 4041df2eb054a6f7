"""Who may speak to a server: a secret that both sides share, and the networks on which it may be said.

A client sends `Authorization: Bearer TOKEN` with its WebSocket handshake, and with `GET /stats` and `/metrics`. A token
in clear text never leaves the machine. Nothing here shows a token: not in an error, and not in a `repr`.
"""

import hmac
import ipaddress
import re
from collections.abc import Sequence

from surfw.errors import ConfigurationError

_TOKEN = re.compile(r"[!-~]{1,1024}")


def check_token(token: str) -> str:
    """The token itself, if it can be one.

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
    """The header that shows the token.

    Raises:
        ConfigurationError: the text cannot be a token.
    """
    return {"Authorization": f"Bearer {check_token(token)}"}


def admits(token: str, shown: Sequence[str]) -> bool:
    """Whether the values of a request's `Authorization` headers show the token, found out in constant time."""
    scheme, _, secret = shown[0].partition(" ") if len(shown) == 1 else ("", "", "")
    same = hmac.compare_digest(secret.strip().encode(errors="surrogatepass"), token.encode())
    return same and scheme.lower() == "bearer"


def is_loopback(host: str) -> bool:
    """Whether only this machine can be meant by the host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
