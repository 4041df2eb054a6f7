"""`surfw stats`: a server's counters."""

import time
from functools import partial
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


@options.with_settings("connect_timeout", "token_file")
def stats(
    *,
    url: Annotated[
        str | None, typer.Argument(help="The server's address. [default: the server on this machine]")
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Keep showing them, until interrupted.")] = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks with --watch.")] = 1.0,
    configuration: options.Configuration,
    json: options.Json = False,
) -> None:
    """Show a server's counters and its cache."""
    from surfw.cli import render
    from surfw.config import DEFAULT_HOST

    settings = configuration.settings
    address, token = url or f"ws://{DEFAULT_HOST}:{settings.port}", settings.token
    look = partial(read_stats, address, token=token, timeout_seconds=settings.connect_timeout)
    if json:
        while True:
            render.print_json(look())
            if not watch:
                return
            time.sleep(every)
    if not watch:
        render.out.print(render.server_table(look()))
        return
    from rich.live import Live

    with Live(render.server_table(look()), console=render.out, auto_refresh=False) as live:
        while True:
            time.sleep(every)
            live.update(render.server_table(look()), refresh=True)


def read_stats(url: str, *, token: str | None, timeout_seconds: float) -> dict[str, Any]:
    """Ask a server for its statistics.

    Args:
        url: its address.
        token: shown to it; None for none.
        timeout_seconds: how long it may take to answer.

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
    connection = connect(host, port or (443 if secure else DEFAULT_PORT), timeout=timeout_seconds)
    try:
        connection.request("GET", "/stats", headers={"Authorization": f"Bearer {token}"} if token else {})
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
