"""The view of a server's statistics in `serve` and `stats`, fitted to the lines and columns of the window.

A view depends on statistics only. Every line fits the width: columns that do not fit are left out, and only unbounded
texts, such as paths, are cut at the end. A full-screen view is never higher than the window; if the tables do not fit,
it shows the same figures in words, as many as fit.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from surfw.cli import render
from surfw.cli.status import age, percent, status_lines
from surfw.cli.trend import Trend
from surfw.config import count, format_size, printable
from surfw.wire import ClientFacts, Rates, RedisState, ServerEvent, ServerStats

_GAP = 2
_NAMES_WIDTH = 12
_FACTS_GAP = _NAMES_WIDTH + _GAP
_SHOWN_EVENTS = 10
_NONE = "–"
_TIME_WIDTH = 8
_LEAST_WIDTH = 44
"""The width that the tables of figures and facts need."""
_LEAST_LISTS = 8
"""The lines reserved for clients and events before a trend is shown."""
_LEAST_TEXT = 20
"""The least width of a text that may be cut, such as a model's name."""
_BAD_EVENTS = {"closed", "refused", "failed", "storage", "redis", "cache"}


@dataclass(frozen=True, kw_only=True)
class ServerView:
    """A server's statistics, as one renderable.

    Attributes:
        stats: the statistics.
        rates: the rates since the previous statistics; None if unknown.
        live: whether the statistics are updated, so that rates get a column.
        where: the server's address.
        remark: a hint in a full screen, such as that Ctrl-C stops.
        away: why there are no newer statistics; empty if these are the latest.
        trend: the recent trend, if it was recorded; shown only if all of it fits.
    """

    stats: ServerStats
    rates: Rates | None = None
    live: bool = False
    where: str = ""
    remark: str = ""
    away: str = ""
    trend: Trend | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width, height = options.max_width, options.height
        head: list[RenderableType] = list(self._head(width, self.remark if height is not None else ""))
        figures: list[RenderableType] = [
            *_warnings(self.stats),
            Text(),
            self._figures(width),
            _facts(self.stats, width),
        ]

        def count_lines(parts: Sequence[RenderableType]) -> int:
            return sum(len(console.render_lines(part, options.update(height=None))) for part in parts)

        if height is not None and (width < _LEAST_WIDTH or count_lines([*head, *figures]) > height):
            since = [] if self.rates else ["since the start"]
            parts = [*_brief_warnings(self.stats), *since, *_brief(self.stats, self.rates)]
            fitting = [part for part in parts if cell_len(part) < width]
            figures = [Text(line) for line in status_lines(fitting, width, most=max(1, height - count_lines(head)))]
        elif self.trend is not None and height is not None:
            lately = list(self.trend.lines(width))
            if lately and count_lines([*head, *figures, Text(), *lately]) + _LEAST_LISTS <= height:
                figures += [Text(), *lately]
        yield from head
        yield from figures
        clients, events = self.stats.get("connections", []), self.stats.get("events", [])
        sent_to = self.rates.sent_to if self.rates else {}
        shown = len(clients), min(len(events), _SHOWN_EVENTS)
        if height is not None:
            shown = share_lines(
                height - count_lines([*head, *figures]), len(clients), len(events), prefers_events=bool(self.away)
            )
        if shown[0]:
            busiest = sorted(clients, key=lambda one: -sent_to.get(one["number"], 0))
            yield from self._clients(busiest[: shown[0]], sent_to, width)
        if shown[1]:
            yield from _events(events[-shown[1] :], width if height is not None else None)

    def _head(self, width: int, remark: str) -> Iterator[RenderableType]:
        server = self.stats["server"]
        parts = [f"surfw {server['version']}", self.where, f"up {age(server['uptime_seconds'])}"]
        last = f" · {remark}" if remark else ""
        line = join_fitting(parts, width - cell_len(last)) + last
        yield Text(line, style="bold", no_wrap=True, overflow="ellipsis")
        if self.away:
            yield Text(self.away, style="bold red")

    def _figures(self, width: int) -> Table:
        """Make the table of counters: current rates, and totals since the start."""
        stats = self.stats
        cache, requests = stats["cache"], stats["requests"]
        read = format_size(stats["bytes_read"]) if "bytes_read" in stats else _NONE
        uses = f"hits {cache['hits']:,}, misses {cache['misses']:,}, coalesced {cache['coalesced']:,}"
        names = ("sent", "from storage", "requests", "cache hits")
        totals = (format_size(stats["bytes_sent"]), read, f"{requests['total']:,}", percent(cache["hit_rate"], 1))
        details = ("", "", f"{requests['in_flight']} in flight", uses)
        columns = [
            Column(least=_NAMES_WIDTH),
            Column(heading="now", right=True),
            Column(heading="since the start", right=True),
            Column(),
        ]
        rows = list(zip(names, _now(self.rates), totals, details, strict=True))
        return fit_table(columns, rows, width, drop=(3,), hide=() if self.live else (1,))

    def _clients(
        self, clients: Sequence[ClientFacts], sent_to: Mapping[int, float], width: int
    ) -> Iterator[RenderableType]:
        """List clients, under a heading."""
        rows = [
            (
                one["model"] or _NONE,
                _per_second(sent_to.get(one["number"])),
                format_size(one["bytes_sent"]),
                one["address"],
                age(one["connected_seconds"]),
                one["name"] or _NONE,
            )
            for one in clients
        ]
        columns = [
            Column(heading="reads", flexible=True),
            Column(heading="now", right=True),
            Column(heading="sent", right=True),
            Column(heading="address"),
            Column(heading="for"),
            Column(heading="says it is"),
        ]
        total = self.stats["clients"]
        yield Text()
        yield Text(
            f"clients ({len(clients)} of {total})" if total > len(clients) else f"clients ({total})", style="bold"
        )
        yield fit_table(columns, rows, width, drop=(5, 4, 3, 2, 1), hide=() if self.live else (1,))


def _now(rates: Rates | None) -> tuple[str, str, str, str]:
    """Format the current rates: sent, read from the storage, requests, cache hits."""
    if rates is None:
        return _NONE, _NONE, _NONE, _NONE
    return (
        _per_second(rates.sent_bytes),
        _per_second(rates.read_bytes),
        f"{rates.requests:,.1f}/s",
        _NONE if rates.hit_rate is None else percent(rates.hit_rate, 1),
    )


def _facts(stats: ServerStats, width: int) -> Table:
    """Make the table of the server's state."""
    cache, storage, resources = stats["cache"], stats["storage"], stats["resources"]
    used = f"{format_size(cache['bytes'])} of {format_size(cache['capacity_bytes'])}"
    latency = stats["requests"]["latency_seconds"]
    rows = [
        ("storage", f"{'healthy' if storage['healthy'] else 'NOT reachable'}, {storage['url']}"),
        ("models", list_fitting(stats["models"], width - _FACTS_GAP) or "none"),
        (
            "cache",
            join_fitting([f"{used}, {cache['policy']}", f"evictions {cache['evictions']:,}"], width - _FACTS_GAP),
        ),
        ("latency", _latencies_fitting(latency, width - _FACTS_GAP)),
        ("memory, CPU", f"{format_size(resources['rss_bytes'])}, {percent(resources['cpu_percent'] / 100)}"),
    ]
    if not stats.get("connections"):
        rows.insert(2, ("clients", str(stats["clients"])))
    if "redis" in stats:
        rows.append(("redis", _redis_state(stats["redis"])))
    return fit_table([Column(least=_NAMES_WIDTH), Column(flexible=True)], rows, width)


def _redis_state(redis: RedisState) -> str:
    """Describe a Redis: its state, address and hit rate."""
    if not redis["reachable"]:
        how = "NOT reachable"
    elif "bypassed" in redis:
        how = f"bypassed, {redis['bypassed']}"
    else:
        how = "healthy"
    state = f"{how}, {redis['url']}"
    hits, misses = redis.get("hits", 0), redis.get("misses", 0)
    return f"{state}, hits {percent(hits / (hits + misses), 1)}" if hits + misses else state


def _latencies_fitting(percentiles: Mapping[str, float], width: int) -> str:
    """Format as many percentiles as fit a line with their names, starting with the first."""
    line = _NONE
    for shown in range(len(percentiles), 0, -1):
        first = dict(islice(percentiles.items(), shown))
        line = f"{render.latencies(first)} · {' / '.join(first)}"
        if cell_len(line) <= width:
            break
    return line


def _warnings(stats: ServerStats) -> Iterator[RenderableType]:
    """Yield warnings that call for action."""
    if "cache_shortage" in stats:
        shortage, size = stats["cache_shortage"], format_size(stats["cache"]["capacity_bytes"])
        what = f"{shortage['model']} ({format_size(shortage['pass_bytes'])})"
        advice = f"--cache-mb {shortage['cache_mb']} would hold it."
        yield Text(f"The cache of {size} is smaller than one pass over {what}: {advice}", style="yellow")


def _events(events: Sequence[ServerEvent], width: int | None) -> Iterator[RenderableType]:
    """List events under a heading; with a width, each is cut to one line."""
    table = Table(box=None, padding=(0, _GAP, 0, 0), show_header=False, pad_edge=False)
    table.add_column(style="dim", width=_TIME_WIDTH)
    if width is None:
        table.add_column(overflow="fold")
    else:
        table.add_column(no_wrap=True, overflow="ellipsis", width=max(1, width - _TIME_WIDTH - _GAP))
    for one in events:
        style = "yellow" if one["kind"] in _BAD_EVENTS else ""
        table.add_row(render.time_of_day(one["time"]), Text(one["text"], style=style))
    yield Text()
    yield Text("events", style="bold")
    yield table


def _per_second(rate: float | None) -> str:
    return _NONE if rate is None else f"{format_size(rate)}/s"


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of a table that fits.

    Attributes:
        heading: the text above it.
        right: whether it is aligned to the right, as numbers are.
        flexible: whether its texts may be cut.
        least: its least width.
    """

    heading: str = ""
    right: bool = False
    flexible: bool = False
    least: int = 0


def fit_table(
    columns: Sequence[Column],
    rows: Sequence[Sequence[str]],
    width: int,
    *,
    drop: Sequence[int] = (),
    hide: Sequence[int] = (),
) -> Table:
    """Make a table that fits the width: the columns in `drop` are left out in that order until the others fit.

    The columns in `hide` are always left out.
    """
    rows = [[printable(cell) for cell in row] for row in rows]  # cleaned before it is measured
    kept = [place for place in range(len(columns)) if place not in hide]
    wide = [
        max(column.least, cell_len(column.heading), *(cell_len(row[place]) for row in rows))
        for place, column in enumerate(columns)
    ]
    needs = [min(_LEAST_TEXT, size) if column.flexible else size for column, size in zip(columns, wide, strict=True)]
    for place in drop:
        if sum(needs[one] + _GAP for one in kept) - _GAP <= width:
            break
        kept = [one for one in kept if one != place]
    left = width - sum(wide[place] + _GAP for place in kept if not columns[place].flexible)
    has_header = any(columns[place].heading for place in kept)
    table = Table(box=None, padding=(0, _GAP, 0, 0), pad_edge=False, show_header=has_header, header_style="dim")
    for place in kept:
        column = columns[place]
        table.add_column(
            column.heading,
            justify="right" if column.right else "left",
            no_wrap=True,
            overflow="ellipsis",
            style="dim" if not column.heading and place == 0 else "",
            width=max(needs[place], min(wide[place], left)) if column.flexible else wide[place],
        )
    for row in rows:
        table.add_row(*(row[place] for place in kept))
    return table


def join_fitting(parts: Sequence[str], width: int) -> str:
    """Join the parts that fit a line; the first is always kept."""
    line, *others = [part for part in parts if part]
    for part in others:
        if cell_len(line) + 3 + cell_len(part) <= width:
            line = f"{line} · {part}"
    return line


def list_fitting(names: Sequence[str], width: int) -> str:
    """List as many names as fit a line, and say how many more there are."""
    for shown in range(min(len(names), width), 1, -1):
        line = render.list_names(names, shown)
        if cell_len(line) <= width:
            return line
    return render.list_names(names, 1)


def share_lines(room: int, clients: int, events: int, *, prefers_events: bool = False) -> tuple[int, int]:
    """Share `room` lines between clients and events; each list also needs a blank line and headings.

    Each gets half, or what the other leaves. If only one of them fits, it is the clients, or the events with
    `prefers_events`.
    """
    client_heads, event_heads = 3 if clients else 0, 2 if events else 0
    room -= client_heads + event_heads
    if room < (clients > 0) + (events > 0):
        if prefers_events:
            return 0, min(events, max(0, room + client_heads))
        return min(clients, max(0, room + event_heads)), 0
    few = min(clients, max(room // 2, room - events))
    return few, min(events, room - few)


def status_line(stats: ServerStats, rates: Rates | None) -> str:
    """Summarise a server in one line, for a log; without rates, by its totals since the start."""
    span = "now" if rates else f"in {age(stats['server']['uptime_seconds'])}"
    return f"{span}: {', '.join(_brief(stats, rates))}"


def _brief(stats: ServerStats, rates: Rates | None) -> list[str]:
    """Summarise a server, the most important figures first; without rates, by its totals since the start."""
    if rates is not None:
        sent, read, requests, hits = _now(rates)
    else:
        sent, requests = format_size(stats["bytes_sent"]), f"{stats['requests']['total']:,}"
        read = format_size(stats["bytes_read"]) if "bytes_read" in stats else _NONE
        hits = percent(stats["cache"]["hit_rate"], 1)
    return [f"sent {sent}", f"read {read}", f"requests {requests}", f"hits {hits}", count(stats["clients"], "client")]


def _brief_warnings(stats: ServerStats) -> Iterator[str]:
    """Yield short warnings that call for action."""
    if not stats["storage"]["healthy"]:
        yield "storage NOT reachable"
    if "redis" in stats and (not stats["redis"]["reachable"] or "bypassed" in stats["redis"]):
        yield f"redis {'bypassed' if stats['redis']['reachable'] else 'NOT reachable'}"
    if "cache_shortage" in stats:
        yield f"--cache-mb {stats['cache_shortage']['cache_mb']} would help"
