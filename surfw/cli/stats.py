"""`surfw stats`: a server's counters."""

import time
from functools import partial
from typing import Annotated

import typer

from surfw.cli import options

EXAMPLES = """\b
Examples:
  surfw stats
  surfw stats ws://127.0.0.1:8765 --watch
  surfw stats --json
"""


@options.with_settings("connect_timeout", "token_file")
def stats(
    *,
    url: Annotated[
        str | None,
        typer.Argument(
            metavar="ADDRESS", help="The server's: HOST:PORT, ws:// or http://. [default: the server on this machine]"
        ),
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Keep showing them until interrupted.")] = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two readings with --watch.")] = 1.0,
    configuration: options.Configuration,
    json: options.Json = False,
    quiet: options.Quiet = False,  # noqa: ARG001 - as all commands have it
) -> None:
    """Show a server's counters and its cache."""
    from surfw.cli import render
    from surfw.cli.addresses import read_server
    from surfw.client import read_stats
    from surfw.config import DEFAULT_HOST

    settings = configuration.settings
    address = read_server(url) if url else f"ws://{DEFAULT_HOST}:{settings.port}"
    look = partial(read_stats, address, token=settings.token, timeout_seconds=settings.connect_timeout)
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
