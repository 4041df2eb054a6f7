"""`surfw serve`: serve a store over a WebSocket."""

import contextlib
import logging
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from surfw.cli import logs, options
from surfw.cli.addresses import is_here, read_address
from surfw.cli.streams import can_draw, one_line
from surfw.config import CachePolicy, default_store, display_url, parse_size
from surfw.errors import NotAStoreError
from surfw.settings import Settings

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Iterator

    from surfw.server import WeightServer
    from surfw.server.server import ServerOptions

EXAMPLES = """\b
Examples:
  surfw serve
  surfw serve --store ./store --cache-mb 1000
  surfw serve ./my-model
  surfw serve s3://bucket/my-model
  surfw serve --store s3://bucket/store --redis-url redis://cache:6379/0
  surfw serve --host 0.0.0.0 --token-file tokens.toml --ssl-certfile server.pem
  surfw serve --host 0.0.0.0 --port 9000 --insecure
"""

logger = logging.getLogger("surfw.server")

_READ_SECONDS = 1.0


@options.with_settings(
    "store",
    "storage_options",
    "host",
    "port",
    "cache_mb",
    "redis_url",
    "max_bytes_per_second",
    "max_client_bytes_per_second",
    "slow_client_timeout",
    "insecure",
    "clients",
    "allowed_host",
    "token_file",
    "ssl_certfile",
    "ssl_keyfile",
    "ssl_ca_certs",
    "log_format",
    "drain_seconds",
    "live",
)
def serve(
    *,
    place: Annotated[
        str | None,
        typer.Argument(
            metavar="PATH_OR_URL",
            help="A store, or a checkpoint to serve in place, without a copy. [default: the store of --store]",
        ),
    ] = None,
    configuration: options.Configuration,
    policy: Annotated[
        CachePolicy,
        typer.Option(help="What the cache keeps: what clients announce they need soonest, or the most recently used."),
    ] = "schedule",
    record: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Record what clients read in this file, for 'surfw bench cache --trace'."),
    ] = None,
    announce: Annotated[
        bool, typer.Option("--announce", help="Print the address as JSON on stdout when ready.")
    ] = False,
    quiet: options.Quiet = False,
    exit_with_stdin: Annotated[bool, typer.Option("--exit-with-stdin", hidden=True)] = False,
) -> None:
    """Serve a store or a plain checkpoint to clients, through a cache.

    The same port answers GET /livez, /readyz, /stats (JSON) and /metrics (Prometheus). SIGTERM and Ctrl-C let requests
    in flight finish first; SIGHUP looks for new models.
    """
    settings = configuration.settings
    if place is not None and configuration.origins["store"].kind == "argument":
        raise typer.BadParameter("does not go with PATH_OR_URL; give one of them", param_hint="--store")
    is_json = settings.log_format == "json"
    show = not quiet and not is_json and settings.live is not False and can_draw(sys.stderr)
    place = settings.store if place is None else read_address(place).url
    if show:
        print(f"surfw: opening {one_line(display_url(place))}", file=sys.stderr, flush=True)
    else:
        logs.set_up(settings.log_format, logging.WARNING if quiet else logging.INFO)
    import asyncio

    serving = _serve(settings, place, policy, record, show=show, announce=announce, exit_with_stdin=exit_with_stdin)
    with logs.reporting(settings.log_format):
        if not asyncio.run(serving):
            raise KeyboardInterrupt


async def _serve(
    settings: Settings,
    place: str,
    policy: CachePolicy,
    record: Path | None,
    *,
    show: bool,
    announce: bool,
    exit_with_stdin: bool,
) -> bool:
    """Serve until a signal ends it; return False if the signal came before the server was up."""
    import asyncio

    from surfw.cli import render
    from surfw.cli.service import Service, tell_manager

    async with contextlib.AsyncExitStack() as stack:
        server = _make_server(settings, place, policy, record)
        starting = asyncio.ensure_future(stack.enter_async_context(server))
        service = Service(starting.cancel)  # cancelling has no effect once the server has started
        if exit_with_stdin:
            asyncio.get_running_loop().add_reader(sys.stdin.fileno(), service.end)
        with render.busy("starting", quiet=not show):
            await asyncio.wait([starting])
        if service.stop.is_set():
            return False
        with _naming_the_store(place):
            await starting
        service.reload_by_signal(server.reload)
        if announce:
            render.print_json({"url": server.url, "store": display_url(place)})
        logger.info("%s serves %s", server.url, display_url(place), extra={"kind": "serving"})
        tell_manager("READY=1")
        if show:
            await _show(server, service.stop)
        else:
            await service.stop.wait()
        tell_manager("STOPPING=1")
        if service.is_ended_by_signal:
            await _drain(server, settings.drain_seconds, show=show)
    return True


async def _drain(server: "WeightServer", most_seconds: float, *, show: bool) -> None:
    """Finish what is in flight; if the screen was shown, say so."""
    if show and server.stats()["requests"]["in_flight"]:
        print(f"surfw: finishing what is in flight, for {most_seconds:g} s at most", file=sys.stderr, flush=True)
    await server.drain(most_seconds)


@contextlib.contextmanager
def _naming_the_store(place: str) -> "Iterator[None]":
    """If `place` does not exist, add to the error how to serve the store: a model's name may have been meant.

    If it is the default store, nothing was chunked yet.
    """
    try:
        yield
    except NotAStoreError as exc:
        if is_here(place):
            raise
        if place == default_store():
            raise NotAStoreError(
                f"there is no store to serve yet: no folder {place}; make one with 'surfw chunk MODEL', or name "
                "another (surfw serve PATH_OR_URL)"
            ) from exc
        raise NotAStoreError(f"{exc}; all models of the store are served by 'surfw serve' alone") from exc


def _make_server(settings: Settings, place: str, policy: CachePolicy, record: Path | None) -> "WeightServer":
    from surfw.server import AdvancedWeightServer, WeightServer

    where = settings.host, settings.port, settings.cache_mb
    options: ServerOptions = {
        "storage_options": settings.storage_options,
        "token": settings.token if settings.token_file is None else None,
        "token_file": settings.token_file,
        "ssl": settings.tls,
        "insecure": settings.insecure,
        "clients": settings.clients,
        "cache_policy": policy,
        "record": record,
        "max_bytes_per_second": _rate(settings.max_bytes_per_second),
        "max_client_bytes_per_second": _rate(settings.max_client_bytes_per_second),
        "slow_client_timeout": settings.slow_client_timeout,
        "allowed_hosts": [name.strip() for name in (settings.allowed_host or "").split(",") if name.strip()],
    }
    if settings.redis_url is None:
        return WeightServer(None, place, *where, **options)
    return AdvancedWeightServer(place, settings.redis_url, *where, **options)


def _rate(size: str | None) -> int | None:
    return None if size is None else parse_size(size)


async def _show(server: "WeightServer", stop: "asyncio.Event") -> None:
    """Show what the server does, full screen, until `stop` is set."""
    import asyncio

    from surfw.cli import render
    from surfw.cli.full_screen import LOOK_SECONDS, FullScreen
    from surfw.cli.server_view import ServerView
    from surfw.wire import rates_between

    stats, rates, read = server.stats(details=True), None, time.monotonic()
    async with FullScreen(render.err) as screen:  # a terminal that is not read must not block the server
        while True:
            view = ServerView(stats=stats, rates=rates, live=True, where=server.url, remark="Ctrl-C stops")
            await asyncio.to_thread(screen.show, view)
            while time.monotonic() < read + _READ_SECONDS:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), LOOK_SECONDS)
                    return
                await asyncio.to_thread(screen.redraw)
            before, stats, read = stats, server.stats(details=True), time.monotonic()
            rates = rates_between(before, stats)
