"""`GET /`: a page for people that shows what the server does, and `GET /events`, where it comes from.

The page is one file, the same for everybody, and says nothing of the server: it needs no token. It asks `/events` with
the token that a person types, in a header, never in a URL, and keeps it for the browser's tab. `/events` are
server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html): the statistics once a second, until
shortly before a plain request has to be answered; then the browser asks again. So no stream outlives its token by more.
"""

import asyncio
import base64
import hashlib
import json
import re
import time
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path

from websockets.datastructures import Headers
from websockets.http11 import Response
from websockets.protocol import State

from surfw.server.listening import OPEN_SECONDS
from surfw.server.reception import FairConnection
from surfw.wire import ServerStats

_EVERY_SECONDS, _LOOK_SECONDS = 1.0, 0.2
_LONGEST_SECONDS = OPEN_SECONDS - 1.0

PAGE = (Path(__file__).parent / "page.html").read_bytes()


def _hashes(tag: str) -> str:
    inside = re.findall(rb"<%b>(.*?)</%b>" % (tag.encode(), tag.encode()), PAGE, re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(one).digest()).decode()}'" for one in inside)


_POLICY = (
    f"default-src 'none'; script-src {_hashes('script')}; style-src {_hashes('style')}; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Nothing is loaded or asked but from this server, and no other script runs."""


def page_response() -> Response:
    """The page."""
    headers = Headers()
    headers["Content-Type"] = "text/html; charset=utf-8"
    headers["Content-Length"] = str(len(PAGE))
    headers["Content-Security-Policy"] = _POLICY
    headers["Referrer-Policy"] = "no-referrer"
    headers["X-Content-Type-Options"] = "nosniff"
    headers["Cache-Control"] = "no-store"
    headers["Connection"] = "close"
    return Response(HTTPStatus.OK, HTTPStatus.OK.phrase, headers, PAGE)


async def send_events(connection: FairConnection, look: Callable[[], ServerStats]) -> Response:
    """Send statistics as they come, and hang up; a client that is slow to take them misses some.

    Returns:
        A response that the library will not send, since the connection is closed by then.
    """
    transport = connection.transport
    transport.write(
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-store\r\nConnection: close\r\n"
        b"X-Content-Type-Options: nosniff\r\n\r\nretry: 500\n\n"
    )
    until, due = time.monotonic() + _LONGEST_SECONDS, 0.0
    while time.monotonic() < until and not _is_over(connection):
        if time.monotonic() >= due and not transport.get_write_buffer_size():
            await connection.turn()
            transport.write(b"data: " + json.dumps(look()).encode() + b"\n\n")
            due = time.monotonic() + _EVERY_SECONDS
        await asyncio.sleep(_LOOK_SECONDS)
    transport.close()
    await connection.wait_closed()
    return Response(HTTPStatus.OK, HTTPStatus.OK.phrase, Headers(), b"")


def _is_over(connection: FairConnection) -> bool:
    """Whether the client has hung up, the server stops, or the token has expired."""
    return (
        connection.protocol.state is State.CLOSED
        or connection.transport.is_closing()
        or not connection.server.is_serving()
        or connection.grant.has_expired
    )
