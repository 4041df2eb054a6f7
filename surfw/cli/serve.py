"""`surfw serve`: a store behind a WebSocket."""

import asyncio
import contextlib
import logging
import signal
import sys
from typing import Annotated, Any

import typer

from surfw.cli import options

EXAMPLES = """\b
Examples:
  surfw serve
  surfw serve --store ./store --cache-mb 1000
  surfw serve --host 0.0.0.0 --port 9000 --insecure
"""

logger = logging.getLogger("surfw.server")


def serve(
    store: options.Store = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="TCP port; 0 lets the system choose.")] = 8765,
    cache_mb: Annotated[int, typer.Option("--cache-mb", min=0, help="Size of the cache in MB.")] = 200,
    insecure: Annotated[
        bool,
        typer.Option("--insecure", help="Allow listening beyond loopback, although clients are not authenticated."),
    ] = False,
    live: Annotated[
        bool | None, typer.Option("--live/--no-live", help="A live table. [default: in a terminal]")
    ] = None,
    announce: Annotated[
        bool, typer.Option("--announce", help="Print the address as JSON on stdout when ready.")
    ] = False,
    exit_with_stdin: Annotated[bool, typer.Option("--exit-with-stdin", hidden=True)] = False,
) -> None:
    """Serve a store to clients, through a cache.

    GET /livez, /readyz, /stats (JSON) and /metrics (Prometheus) answer on the same port.
    """
    from surfw.config import default_store

    settings = {"host": host, "port": port, "insecure": insecure, "cache_size_mb": cache_mb}
    show = sys.stderr.isatty() if live is None else live
    if not show:
        _log_lines()
    asyncio.run(
        _serve(store or default_store(), settings, show=show, announce=announce, exit_with_stdin=exit_with_stdin)
    )


def _log_lines() -> None:
    """One line per event on stderr, in place of the table."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


async def _serve(place: str, settings: dict[str, Any], *, show: bool, announce: bool, exit_with_stdin: bool) -> None:
    from surfw.cli import render
    from surfw.config import display_url
    from surfw.server import WeightServer

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    if exit_with_stdin:
        loop.add_reader(sys.stdin.fileno(), stop.set)
    async with WeightServer(model_path=place, **settings) as server:
        if announce:
            render.print_json({"url": server.url, "store": display_url(place)})
        if show:
            await _live_table(server, stop)
        else:
            await stop.wait()


async def _live_table(server: Any, stop: asyncio.Event) -> None:
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    from surfw.cli import render

    def view() -> Group:
        return Group(Text(f"{server.url}   (Ctrl-C stops)", style="bold"), render.server_table(server.stats()))

    with Live(view(), console=render.err, auto_refresh=False) as live:
        while not stop.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), 0.5)
            live.update(view(), refresh=True)
