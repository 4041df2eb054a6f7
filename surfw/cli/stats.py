"""`surfw stats`: show a server's counters, once or repeatedly."""

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from surfw.cli import options, signals
from surfw.cli.addresses import Mistake, read_server
from surfw.cli.streams import can_draw
from surfw.config import DEFAULT_HOST, display_url

if TYPE_CHECKING:
    from surfw.wire import Rates, ServerStats

EXAMPLES = """\b
Examples:
  surfw stats
  surfw stats ws://127.0.0.1:8765 --watch
  surfw stats --watch --every 10 >> server.log
  surfw stats wss://gpu.example.org:8765 --token-file token --ssl-ca-certs ca.pem
  surfw stats --run run.json
  surfw stats --store s3://bucket/models
  surfw stats --json
"""

_EVERY_SECONDS = 1.0


@options.with_settings("connect_timeout", "token_file", *options.TLS_SETTINGS, "storage_options")
def stats(
    *,
    url: Annotated[
        str | None,
        typer.Argument(
            metavar="ADDRESS",
            help="The server's address: HOST:PORT, ws:// or http://. [default: the server on this machine]",
        ),
    ] = None,
    watch: Annotated[
        bool,
        typer.Option("--watch", help="Keep updating until Ctrl-C: full screen, or one line per reading in a pipe."),
    ] = False,
    every: Annotated[
        float | None, typer.Option(min=0.1, help="Seconds between readings with --watch. [default: 1]")
    ] = None,
    store: Annotated[
        str | None, typer.Option(metavar="URL", help="Show a store's contents instead, with forms and shared bytes.")
    ] = None,
    run: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Show a run instead, as written by 'surfw infer --trace FILE'.")
    ] = None,
    configuration: options.Configuration,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Show a server's counters, cache, clients and recent events."""
    from surfw.cli import render

    other = {"--store": store, "--run": run, "ADDRESS": url, "--watch": watch, "--every": every}
    if store is not None or run is not None:
        _show_other(configuration, other, json=json, quiet=quiet)
        return
    if every is not None and not watch:
        raise Mistake("--every needs --watch; add it, or leave --every out")
    settings = configuration.settings
    address = read_server(url) if url is not None else f"ws://{DEFAULT_HOST}:{settings.port}"
    where, tls = display_url(address), options.tls_for(configuration, address)

    def look() -> "ServerStats":
        from surfw.client import read_stats  # slow to import; the spinner is shown by then

        return read_stats(address, token=settings.token, ssl=tls, timeout_seconds=settings.connect_timeout)

    if not watch and json:
        render.print_json(look())
    elif not watch:
        with render.busy(f"asking {where}", quiet=json or quiet):
            found = look()
        from surfw.cli.server_view import ServerView

        render.out.print(ServerView(stats=found, where=where))
    else:
        try:
            with render.busy(f"asking {where}", quiet=json or quiet):
                first = Watch(look, where)
            _watch(first, every or _EVERY_SECONDS, json=json)
        except KeyboardInterrupt:
            if signals.exit_code() != signals.INTERRUPTED:
                raise


def _show_other(configuration: options.Configuration, given: Mapping[str, Any], *, json: bool, quiet: bool) -> None:
    """Show a store or a run instead of a server.

    Raises:
        Mistake: another option is given that does not go with it.
    """
    (what, place), *others = [(name, value) for name, value in given.items() if value not in {None, False}]
    if others:
        raise Mistake(f"{what} does not go with {others[0][0]}; give one of them")
    if what == "--run":
        from surfw.cli.run_view import show_run

        show_run(place, json=json)
        return
    from surfw.cli.store_stats import show_store

    show_store(replace(configuration.settings, store=place), json=json, quiet=quiet)


class Watch:
    """A server's statistics, read repeatedly, even after the server was unreachable.

    Attributes:
        where: the server's address, for display.
        stats: the latest statistics.
        rates: the rates since the previous statistics; None if unknown.
        away: since when and why the server does not answer; empty if it does.
        trend: the recent trend.
    """

    def __init__(self, look: "Callable[[], ServerStats]", where: str) -> None:
        """Read the statistics for the first time.

        Raises:
            SurfwError: they cannot be read.
        """
        self.where = where
        self.stats = look()
        self.rates: Rates | None = None
        self.away = ""
        self._look = look
        from surfw.cli.trend import Trend

        self.trend = Trend()
        self.trend.add(self.stats, None)

    def read(self) -> None:
        """Read the statistics again. A failed connection is noted in `away`; the server may be back next time.

        Raises:
            RefusedError: the server requires a token, or another one.
        """
        from surfw.cli import render
        from surfw.errors import ConnectionFailedError
        from surfw.wire import rates_between

        try:
            stats = self._look()
        except ConnectionFailedError as exc:
            why = str(exc).partition(";")[0]
            self.rates = None
            self.away = self.away or f"not reachable since {render.time_of_day(time.time())}, trying again ({why})"
            return
        self.rates = None if self.away else rates_between(self.stats, stats)
        self.stats, self.away = stats, ""
        self.trend.add(stats, self.rates)


def _watch(watch: Watch, every: float, *, json: bool) -> None:
    from surfw.cli import render

    if json:
        _print_each(watch, every, lambda: render.print_json(watch.stats))
    elif can_draw(sys.stdout):
        _watch_on_screen(watch, every)
    else:
        from surfw.cli.server_view import status_line

        _print_each(
            watch,
            every,
            lambda: render.say(f"{render.time_of_day(time.time())} {status_line(watch.stats, watch.rates)}"),
        )


def _print_each(watch: Watch, every: float, show: Callable[[], None]) -> None:
    """Show each reading; report each outage once on stderr."""
    was_away = False
    while True:
        if not watch.away:
            show()
        elif not was_away:
            print(f"surfw: {watch.where} is {watch.away}", file=sys.stderr, flush=True)
        was_away = bool(watch.away)
        time.sleep(every)
        watch.read()


def _watch_on_screen(watch: Watch, every: float) -> None:
    from surfw.cli import render
    from surfw.cli.full_screen import LOOK_SECONDS, FullScreen
    from surfw.cli.server_view import ServerView

    with FullScreen(render.out) as screen:
        while True:
            screen.show(
                ServerView(
                    stats=watch.stats,
                    rates=watch.rates,
                    live=True,
                    where=watch.where,
                    remark="Ctrl-C ends",
                    away=watch.away,
                    trend=watch.trend,
                )
            )
            due = time.monotonic() + every
            while (left := due - time.monotonic()) > 0:
                time.sleep(min(left, LOOK_SECONDS))
                screen.redraw()
            watch.read()
