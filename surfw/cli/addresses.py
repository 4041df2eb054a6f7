"""Interpret an address given on the command line: a server, a folder, a storage, or a model of the hub.

    localhost:8765, ws://host:8765, wss://host     a surfw server
    http://host:8765, https://host                 a surfw server, if one answers there; else a web server's files
    ./folder, /folder, ~/folder, folder            a folder
    s3://bucket/prefix, hf://org/name, …           a storage
    org/name                                       a model of the hub, if no such folder is here

Every command reads addresses with `read_address`, so an address that works for one works for all.
"""

import os
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

import typer

from surfw.config import TlsFiles, display_url, is_loopback, is_server_url
from surfw.errors import ConnectionFailedError, RefusedError

Kind = Literal["server", "web", "folder", "storage", "hub"]

_HOST_AND_PORT = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+):[0-9]{1,5}/?")
_HOST = re.compile(r"[A-Za-z0-9.-]+")
_HOST_ALONE = re.compile(r"localhost|[0-9]{1,3}(?:\.[0-9]{1,3}){3}")
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_WEB = {"http": "ws", "https": "wss"}


class Mistake(typer.BadParameter):
    """A mistake on the command line, with a message that already names the input. Exit code 2."""

    def format_message(self) -> str:
        """Return the message unchanged."""
        return self.message


@dataclass(frozen=True, slots=True)
class Address:
    """An interpreted address.

    Attributes:
        kind: what it names; `web` is a web server that may be a surfw server.
        url: the form that the rest of surfw accepts: the URL of a server or a storage, or a folder.
    """

    kind: Kind
    url: str

    @property
    def is_server(self) -> bool:
        """Whether it is the address of a surfw server."""
        return self.kind == "server"

    @property
    def as_server(self) -> str:
        """The URL of a surfw server at this address."""
        scheme, mark, rest = self.url.partition("://")
        return f"{_WEB.get(scheme, scheme)}{mark}{rest.rstrip('/')}" if mark else self.url


def read_address(text: str, *, exists: Callable[[str], bool] = os.path.lexists) -> Address:
    """Interpret an address. Nothing is contacted.

    Args:
        text: the address as it was typed.
        exists: returns whether there is a file or folder of that name.
    """
    if "://" in text:
        return _read_url(text)
    if exists(text):
        return Address("folder", text)
    if _HOST_AND_PORT.fullmatch(text):
        return Address("server", f"ws://{text.rstrip('/')}")
    if not is_path(text) and _HUB_ID.fullmatch(text):
        return Address("hub", f"hf://{text}")
    return Address("folder", text)


def _read_url(text: str) -> Address:
    scheme, _, rest = text.partition("://")
    url = text if "." in scheme else f"{scheme.lower()}://{rest}"  # a scheme with dots is a Python path
    if is_server_url(url):
        return Address("server", url)
    return Address("web" if scheme.lower() in _WEB and not _has_path(url) else "storage", url)


def is_path(text: str) -> bool:
    """Whether a text can only be the path of a file or folder."""
    return text.startswith(("/", "./", "../", "~")) or text in {".", ".."} or text.endswith("/")


def is_host(text: str) -> bool:
    """Whether a text can only be a host without a port."""
    return _HOST_ALONE.fullmatch(text) is not None


def read_source(text: str, *, seconds: float, tls: TlsFiles | None = None) -> str:
    """Return the URL of a source of weights; a web server is probed, for up to `seconds`, for a surfw server."""
    address = read_address(text)
    return address.as_server if address.kind == "web" and _is_surfw(address, seconds, tls) else address.url


def read_server(text: str) -> str:
    """Return the URL of a server.

    Raises:
        Mistake: it is not the address of a server.
    """
    address = read_address(text)
    if address.kind in {"server", "web"}:
        return address.as_server
    if address.kind == "folder" and _HOST.fullmatch(text):
        return f"ws://{text}"
    raise Mistake(f"{display_url(text)!r} is not the address of a server; expected HOST:PORT or ws://HOST:PORT")


def _is_surfw(address: Address, seconds: float, tls: TlsFiles | None) -> bool:
    """Whether a surfw server answers at the address of a web server; it may require a token, which is not sent."""
    import asyncio

    from surfw.client import probe

    try:
        return asyncio.run(probe(address.as_server, seconds, ssl=tls if address.url.startswith("https:") else None))
    except RefusedError:
        return True
    except ConnectionFailedError:
        return False


def is_on_this_machine(url: str) -> bool:
    """Whether a server's address belongs to this machine. No name is resolved, and nothing is contacted."""
    try:
        host = urlsplit(url).hostname or ""
    except ValueError:
        return False
    if is_loopback(host) or host == socket.gethostname().lower():
        return True
    try:
        ((family, *_, address), *_) = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM, flags=socket.AI_NUMERICHOST)
        with socket.socket(family, socket.SOCK_DGRAM) as one:
            one.bind(address)  # the system allows this for its own addresses only
    except (OSError, UnicodeError):
        return False
    return True


def is_here(text: str) -> bool:
    """Whether there is a file or folder of that name."""
    return os.path.exists(os.path.expanduser(text))  # noqa: PTH110, PTH111 - it is False for an impossible path


def _has_path(url: str) -> bool:
    try:
        parts = urlsplit(url)
    except ValueError:
        return True
    return parts.path not in {"", "/"} or bool(parts.query)
