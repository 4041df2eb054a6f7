"""`surfw stats`: a server's counters."""

import time
from typing import Annotated, Any

import typer

from surfw.cli import options

EXAMPLES = """\b
Examples:
  surfw stats
  surfw stats ws://127.0.0.1:8765 --watch
  surfw stats --json
"""
_MAX_BYTES = 1 << 20


def stats(
    url: Annotated[str, typer.Argument(help="The server's address.")] = "ws://127.0.0.1:8765",
    watch: Annotated[bool, typer.Option("--watch", help="Keep showing them, until interrupted.")] = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks with --watch.")] = 1.0,
    json: options.Json = False,
) -> None:
    """Show a server's counters and its cache."""
    from surfw.cli import render

    if json:
        while True:
            render.print_json(read_stats(url))
            if not watch:
                return
            time.sleep(every)
    if not watch:
        render.out.print(render.server_table(read_stats(url)))
        return
    from rich.live import Live

    with Live(render.server_table(read_stats(url)), console=render.out, auto_refresh=False) as live:
        while True:
            time.sleep(every)
            live.update(render.server_table(read_stats(url)), refresh=True)


def read_stats(url: str) -> dict[str, Any]:
    """Ask a server for its statistics.

    Raises:
        ConnectionFailedError: no surfw server answers there.
        ConfigurationError: the address is not one.
    """
    import http.client
    import json
    from urllib.parse import urlsplit

    from surfw.cli import render
    from surfw.config import DEFAULT_PORT
    from surfw.errors import ConfigurationError, ConnectionFailedError

    try:
        parts = urlsplit(url if "://" in url else f"ws://{url}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if host is None or parts.scheme not in {"ws", "wss", "http", "https"}:
        raise ConfigurationError(f"{url!r} is not the address of a server; expected something like ws://127.0.0.1:8765")
    secure = parts.scheme in {"wss", "https"}
    connect = http.client.HTTPSConnection if secure else http.client.HTTPConnection
    connection = connect(host, port or (443 if secure else DEFAULT_PORT), timeout=5)
    try:
        connection.request("GET", "/stats")
        response = connection.getresponse()
        body = response.read(_MAX_BYTES)
    except (OSError, UnicodeError, http.client.HTTPException) as exc:
        raise ConnectionFailedError(
            f"no surfw server at {url}: {exc or type(exc).__name__}; "
            "start one with 'surfw serve' or name another address"
        ) from exc
    finally:
        connection.close()
    try:
        found = json.loads(body)
        if response.status == 200:
            render.server_table(found)  # raises where anything that a surfw server tells is missing
            return dict(found)
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise ConnectionFailedError(f"{url} answers, but is not a surfw server (status {response.status} for GET /stats)")
