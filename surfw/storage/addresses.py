"""What an address is: that of a folder, or a URL; and what was meant by one that is mistyped.

Schemes of URLs are read in any case (RFC 3986). An address without `://` is a folder, unless it looks like a URL or a
server and no such folder is there; `./` before it makes it one in any case. Nothing is shown that may be a password.
"""

import os
import re

from surfw.config import display_url, is_server_url
from surfw.errors import ConfigurationError

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+-]*")
"""Dotted ones are paths of Python, where capitals matter."""

_ALMOST = re.compile(r"([A-Za-z][A-Za-z0-9+-]*)(:/?)(?!/)(.+)")
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+):[0-9]{1,5}(/.*)?")
_USUAL = {"file", "hf", "http", "https", "s3", "ws", "wss"}


def read_address(text: str) -> str:
    """The address with its scheme in small letters.

    Raises:
        ConfigurationError: it was meant to be a URL or a server, and is none.
    """
    scheme, mark, rest = text.partition("://")
    if mark:
        return f"{scheme.lower()}://{rest}" if _SCHEME.fullmatch(scheme) else text
    if (meant := _meant(text)) and not os.path.lexists(text):
        shown = display_url(meant)
        what = ", the address of a server, where one may be named" if is_server_url(meant) else ""
        if shown != meant:
            raise ConfigurationError(f"the address is that of no folder here; did you mean {shown}{what}?")
        raise ConfigurationError(f"{text} is no folder here; did you mean {shown}{what}? For a folder write ./{text}")
    return text


def _meant(text: str) -> str | None:
    """The URL that a text looks like."""
    if _HOST.fullmatch(text):
        return f"ws://{text}"
    if (almost := _ALMOST.fullmatch(text)) and (almost[2] == ":/" or almost[1].lower() in _USUAL):
        return f"{almost[1].lower()}://{almost[3]}"
    return None


def scheme_of(url: str) -> str:
    """The scheme in small letters; empty for a folder."""
    scheme, mark, _ = url.partition("://")
    return scheme.lower() if mark else ""
