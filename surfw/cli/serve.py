"""`surfw serve`: a store behind a WebSocket."""

import contextlib
import logging
import signal
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from surfw.cli import options, signals
from surfw.cli.streams import OneLine
from surfw.settings import Settings

if TYPE_CHECKING:
    import asyncio

    from surfw.server import WeightServer

EXAMPLES = """\b
Examples:
  surfw serve
  surfw serve --store ./store --cache-mb 1000
  surfw serve ./my-model
  surfw serve s3://bucket/my-model
  surfw serve --host 0.0.0.0 --port 9000 --insecure
"""

logger = logging.getLogger("surfw.server")


@options.with_settings(
    "store", "storage_options", "host", "port", "cache_mb", "insecure", "clients", "allowed_host", "token_file", "live"
)
def serve(
    *,
    place: Annotated[
        str | None,
        typer.Argument(
            metavar="PATH_OR_URL",
            help="A store, or a checkpoint that is served from where it is, without a copy. [default: that of --store]",
        ),
    ] = None,
    configuration: options.Configuration,
    announce: Annotated[
        bool, typer.Option("--announce", help="Print the address as JSON on stdout when ready.")
    ] = False,
    exit_with_stdin: Annotated[bool, typer.Option("--exit-with-stdin", hidden=True)] = False,
) -> None:
    """Serve a store, or a plain checkpoint, to clients, through a cache.

    GET /livez, /readyz, /stats (JSON) and /metrics (Prometheus) answer on the same port.
    """
    settings = configuration.settings
    if place is not None and configuration.origins["store"].kind == "argument":
        raise typer.BadParameter("give it or PATH_OR_URL, not both", param_hint="--store")
    show = sys.stderr.isatty() if settings.live is None else bool(settings.live)
    if not show:
        _log_lines()
    import asyncio

    place = place or settings.store
    if not asyncio.run(_serve(settings, place, show=show, announce=announce, exit_with_stdin=exit_with_stdin)):
        raise KeyboardInterrupt


def _log_lines() -> None:
    """Log one line per event on stderr, instead of the table."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(OneLine("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


async def _serve(settings: Settings, place: str, *, show: bool, announce: bool, exit_with_stdin: bool) -> bool:
    """Serve until a signal ends it; return False if the signal came before the server was up."""
    import asyncio

    from surfw.cli import render
    from surfw.config import display_url
    from surfw.server import WeightServer

    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    async with contextlib.AsyncExitStack() as stack:
        server = WeightServer(
            model_path=place,
            storage_options=settings.storage_options,
            host=settings.host,
            port=settings.port,
            cache_size_mb=settings.cache_mb,
            token=settings.token,
            insecure=settings.insecure,
            clients=settings.clients,
            allowed_hosts=[name.strip() for name in (settings.allowed_host or "").split(",") if name.strip()],
        )
        starting = asyncio.ensure_future(stack.enter_async_context(server))

        def end() -> None:
            stop.set()
            starting.cancel()  # does nothing once it has started

        def end_by(number: int) -> None:
            end()
            for other in signals.ENDING:
                loop.remove_signal_handler(other)
            signals.note(number)

        for number in signals.ENDING:
            if signal.getsignal(number) is not signal.SIG_IGN:
                loop.add_signal_handler(number, end_by, number)
        if exit_with_stdin:
            loop.add_reader(sys.stdin.fileno(), end)
        await asyncio.wait([starting])
        if stop.is_set():
            return False
        await starting  # raises what kept it from starting
        if announce:
            render.print_json({"url": server.url, "store": display_url(place)})
        logger.info("%s serves %s", server.url, display_url(place))
        if show:
            await _live_table(server, stop)
        else:
            await stop.wait()
    return True


async def _live_table(server: "WeightServer", stop: "asyncio.Event") -> None:
    import asyncio

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
