"""Ranges over HTTP: read-only, streamed into place, and of one revision.

The revision comes from the response headers: a strong ETag, which is also sent with requests (`If-Match`), or else a
weak ETag, or modification time and size. Only responses to range requests are compared with each other. A server must
answer range requests with 206, unless the range is the whole object.
"""

import asyncio
import errno
import re
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import aiohttp
from yarl import URL

from surfw.config import MIB, display_text, display_url
from surfw.errors import StorageError
from surfw.retry import MOST_REDIRECTS, REDIRECT_STATUSES, TRANSIENT_STATUSES, parse_redirect
from surfw.storage.base import refuse_size
from surfw.storage.far_reads import Destination, PinLostError, RangeReader, RangeResponse, TransientError
from surfw.threads import in_thread

_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)")
_LENGTH = re.compile(r"[0-9]{1,18}")
_BUFFER_BYTES = MIB
_CONNECT_SECONDS = 5
_LISTING_BYTES = 16 * MIB
"""The largest accepted page of a folder listing."""


class HttpRanges(RangeReader):
    """Ranges of objects under a URL."""

    read_only = True

    def __init__(self, fs: Any, connections: int, silence_timeout: float) -> None:
        """Set the file system; nothing is contacted."""
        super().__init__(connections, silence_timeout)
        self._fs = fs
        fs.kwargs.pop("max_concurrency", None)  # fsspec would pass it on to each request
        tells_headers = any(
            given.get(name) for given in (fs.kwargs, fs.client_kwargs) for name in ("headers", "cookies", "auth")
        )
        half = silence_timeout / 2
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=min(_CONNECT_SECONDS, half), sock_read=half)
        whole = aiohttp.ClientTimeout(total=None, sock_connect=silence_timeout, sock_read=silence_timeout)
        fs.client_kwargs = {"timeout": whole} | fs.client_kwargs  # for fsspec's own requests: listings
        fs.client_kwargs["response_class"] = _KeptResponse if tells_headers else _Response
        self.loop = fs.loop
        self._slots = asyncio.Semaphore(connections)

    async def get(self, path: str, into: Destination) -> None:
        """Read the range into place."""
        start, pinned = into.start, into.pin.revision
        asked = {"Range": f"bytes={start}-{into.stop - 1}"}
        if pinned is not None and pinned.startswith('"'):
            asked["If-Match"] = pinned
        async with self._slots:
            into.patience.begin()
            async with self._request(path, asked) as found:
                if found.status == 416:
                    into.accept(RangeResponse(None, start, 0, None if start else 0))  # empty, or too short
                    return
                await _read(found.content, into.accept(_response(found)), into)

    async def facts(self, path: str) -> RangeResponse | None:
        """Return size and revision, from the headers of a response whose body is not read.

        This requests a range, like all other reads: for the whole object, a server may send another revision or none.
        """
        async with self._request(path, {"Range": "bytes=0-0"}) as found:
            part = None if found.status == 416 else _response(found)
        if part is not None and part.size is not None:
            return part
        async with self._request(path, {}) as found:  # an empty object, or a server that does not send its size
            whole = _response(found)
        return whole if part is None else replace(whole, revision=part.revision)

    @asynccontextmanager
    async def _request(self, path: str, asked: dict[str, str]) -> AsyncIterator[aiohttp.ClientResponse]:
        """A successful response, or a 416, which means that the range is beyond the end.

        Raises:
            TransientError: from a failure that a retry may fix.
            PinLostError: the object has another revision now.
            OSError: any other failure.
        """
        session = await self._fs.set_session()
        options = {
            "timeout": self._timeout,
            "read_bufsize": _BUFFER_BYTES,
            "max_redirects": MOST_REDIRECTS,
        } | self._fs.kwargs
        options["headers"] = {"Accept-Encoding": "identity"} | options.get("headers", {}) | asked
        try:
            async with session.get(self._fs.encode_url(path), **options) as found:
                _judge(found)
                yield found
        except aiohttp.TooManyRedirects as exc:
            raise OSError(errno.ELOOP, f"the server sends elsewhere more than {MOST_REDIRECTS} times") from exc
        except aiohttp.InvalidURL as exc:
            raise OSError(errno.EINVAL, "this is no URL") from exc
        except (aiohttp.ClientError, TimeoutError) as exc:
            lost = OSError(errno.EIO, f"the server cannot be reached ({_why(exc)})")
            lost.__cause__ = exc
            raise TransientError from lost


def _why(exc: Exception) -> str:
    """Why there is no connection, and what the user can do."""
    match exc:
        case aiohttp.ClientConnectorError(os_error=ConnectionRefusedError()):
            return "connection refused; check the address; a surfw server is started with 'surfw serve'"
        case aiohttp.ClientConnectorError(os_error=socket.gaierror()):
            return "its name is not known; check the address and the network"
        case TimeoutError():
            return "it does not answer in time; check the address and the network"
    return f"{type(exc).__name__}; check the address and the network"


class _Response(aiohttp.ClientResponse):
    """A response that refuses unsafe redirects, and limits the length of its text.

    aiohttp creates every response as this class before it follows a redirect, also for fsspec's own requests.
    """

    tells_headers = False
    """Whether the requests carry headers that may be secret."""

    async def start(self, connection: Any) -> aiohttp.ClientResponse:
        """Read the headers.

        Raises:
            StorageError: it redirects to an unsafe address.
        """
        await super().start(connection)
        if self.status in REDIRECT_STATUSES:
            self._judge_redirect()
        return self

    def _judge_redirect(self) -> None:
        source, locations = self.url, self.headers.getall("Location", [])
        if len(locations) != 1 or not locations[0]:  # aiohttp would follow the first one, or a header `URI`
            raise StorageError(f"{source.host} sends elsewhere with {len(locations)} headers Location, expected one")
        try:
            target = source.join(URL(locations[0]))  # where aiohttp would go
            redirect = parse_redirect(str(source), str(target))
        except ValueError as exc:
            raise StorageError(f"{source.host} sends to {display_text(locations[0])[:80]!a}, which is no URL") from exc
        said = f"{source.host} sends to {display_url(str(target.origin()))}"
        if redirect.loses_tls:
            raise StorageError(f"{said}, which is not encrypted; name an address that is")
        if self.tells_headers and redirect.leaves_origin:
            raise StorageError(f"{said}, which must not see the headers for {source.host}; name that address yourself")

    async def text(self, encoding: str | None = None, errors: str = "strict") -> str:
        """Return the body as text; fsspec reads listings this way.

        Raises:
            StorageError: it is too long.
        """
        data = bytearray()
        async for piece in self.content.iter_any():
            data += piece
            refuse_size(len(data), _LISTING_BYTES, f"the listing of {self.url.path}")
        return data.decode(encoding or "utf-8", errors)


class _KeptResponse(_Response):
    """A response to a request whose headers must not reach another server."""

    tells_headers = True


async def _read(content: aiohttp.StreamReader, memory: memoryview, into: Destination) -> None:
    done = 0
    try:
        while done < len(memory):
            piece = await content.read(min(_BUFFER_BYTES, len(memory) - done))
            if not piece:
                raise aiohttp.ClientPayloadError(f"it ends after {done} of {len(memory)} bytes")
            into.patience.arrived(len(piece))
            left = memoryview(piece)
            while left:
                place = memory[done : done + len(left)]
                place[:] = left[: len(place)]
                done, left = done + len(place), left[len(place) :]
                del place
                into.filled(done)
    except (aiohttp.ClientError, TimeoutError):
        await in_thread(into.check_first, done)  # verified blocks are not requested again
        raise


def _judge(found: aiohttp.ClientResponse) -> None:
    """Raise the error for a bad status."""
    said = f"the server answered {found.status} {found.reason or ''}".rstrip()
    if found.status in {404, 410} or (
        found.status in {200, 206} and found.url.path.endswith("/")
    ):  # a folder's listing
        raise FileNotFoundError(errno.ENOENT, said)
    if found.status == 412:
        raise PinLostError
    if found.status in TRANSIENT_STATUSES:
        raise TransientError from OSError(errno.EIO, f"{said}; look at its log, and try again later")
    if found.status in {401, 403, 407}:
        raise PermissionError(errno.EACCES, said)
    if found.status not in {200, 206, 416}:
        raise OSError(errno.EIO, f"{said}, expected 200 or 206")


def _response(found: aiohttp.ClientResponse) -> RangeResponse:
    length, size, start = found.headers.get("Content-Length", ""), None, 0
    if not _LENGTH.fullmatch(length) or found.headers.get("Content-Encoding", "identity") != "identity":
        raise StorageError(
            f"{found.url.path} comes without its length, or compressed; surfw needs a server of plain files"
        )
    if found.status == 206:
        match = _CONTENT_RANGE.fullmatch(found.headers.get("Content-Range", ""))
        if match is None:
            raise StorageError(f"{found.url.path} comes as a range that does not say which; expected 'bytes 0-9/10'")
        start, size = int(match[1]), None if match[3] == "*" else int(match[3])
    else:
        size = int(length)
    return RangeResponse(_revision(found, size), start, int(length), size)


def _revision(found: aiohttp.ClientResponse, size: int | None) -> str | None:
    if tag := found.headers.get("ETag"):
        return tag
    modified = found.headers.get("Last-Modified")
    return f"{modified}, {size} bytes" if modified else None
