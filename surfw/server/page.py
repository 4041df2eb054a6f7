"""`GET /`: a page for people that shows what the server does, and `GET /events`, its data source.

The page is one static file without any data of the server, so it needs no token. It requests `/events` with the token
that the user enters, in a header, never in a URL, and keeps it for the browser's tab. `/events` are server-sent events
(https://html.spec.whatwg.org/multipage/server-sent-events.html): the statistics once a second, until shortly before the
time limit of a plain request; then the browser reconnects. This bounds how long a stream can outlive its token.
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
"""Nothing is loaded from other servers, and no other script runs."""


def page_response() -> Response:
    """Return the page."""
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
    """Send statistics periodically, then hang up; a client that reads slowly misses some.

    Returns:
        A response that the library will not send, because the connection is closed by then.
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
    """Whether the client has hung up, the server is stopping, or the token has expired."""
    return (
        connection.protocol.state is State.CLOSED
        or connection.transport.is_closing()
        or not connection.server.is_serving()
        or connection.grant.has_expired
    )
