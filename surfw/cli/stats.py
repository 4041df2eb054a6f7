"""`surfw stats`: a server's counters."""

import time
from typing import Annotated

import typer

from surfw.cli import options

EXAMPLES = """\b
Examples:
  surfw stats
  surfw stats ws://127.0.0.1:8765 --watch
  surfw stats --json
"""


def stats(
    url: Annotated[str, typer.Argument(help="The server's address.")] = "ws://127.0.0.1:8765",
    watch: Annotated[bool, typer.Option("--watch", help="Keep showing them, until interrupted.")] = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks with --watch.")] = 1.0,
    json: options.Json = False,
) -> None:
    """Show a server's counters and its cache."""
    from surfw.cli import render
    from surfw.client import read_stats

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
