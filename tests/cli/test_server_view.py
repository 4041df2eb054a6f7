"""The view of a server fits every window, with and without the figures that older servers do not report."""

import io
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from surfw.cli import render
from surfw.cli.server_view import Column, ServerView, fit_table, join_fitting, list_fitting, share_lines, status_line
from surfw.cli.status import age
from surfw.wire import Rates, RedisState, ServerStats
from tests.wire.test_reports import STATS, WITH_MORE

RATES = Rates(
    seconds=1, sent_bytes=41_234_000, read_bytes=38_100_000, requests=1234.5, hit_rate=0.5, sent_to={3: 41_000_000}
)
BUSY: ServerStats = WITH_MORE | {
    "server": {"version": "0.9.0", "uptime_seconds": 192},
    "models": [f"org/model-{number}" for number in range(12)],
    "clients": 25,
    "connections": [
        WITH_MORE["connections"][0] | {"number": number, "model": "some-organisation/a-model-with-a-long-name"}
        for number in range(20)
    ],
    "events": [
        {"time": 1e9 + number, "kind": "joined", "text": f"event {number} " + 9 * "long "} for number in range(50)
    ],
    "cache": STATS["cache"] | {"bytes": 199_999_999, "capacity_bytes": 200_000_000, "evictions": 2484, "misses": 2484},
    "cache_shortage": {"model": "org/model-1", "pass_bytes": 2_200_000_000, "cache_mb": 2220},
}


def screen(view: Any, width: int, height: int | None = None) -> list[str]:
    """The lines of a view; on a full screen if a height is given."""
    console = Console(file=io.StringIO(), width=width, height=height or 25, color_system=None)
    options = console.options.update(height=height) if height else console.options
    lines = console.render_lines(view, options, pad=False)
    return ["".join(piece.text for piece in line).rstrip() for line in lines]


def test_a_window_of_the_usual_size() -> None:
    lines = screen(ServerView(stats=BUSY, rates=RATES, live=True, where="ws://h:1", remark="Ctrl-C stops"), 80, 24)
    assert lines[:8] == [
        "surfw 0.9.0 · ws://h:1 · up 3 min 12 s · Ctrl-C stops",
        "The cache of 200.0 MB is smaller than one pass over org/model-1 (2.2 GB):",
        "--cache-mb 2220 would hold it.",
        "",
        "                    now  since the start",
        "sent          41.2 MB/s              9 B",
        "from storage  38.1 MB/s             12 B",
        "requests      1,234.5/s                7  8 in flight",
    ]
    assert "clients (2 of 25)" in lines
    assert "events" in lines
    assert len(lines) == 24


@pytest.mark.parametrize(
    ("width", "height"),
    [(46, 24), (80, 24), (200, 50), (30, 24), (30, 10), (30, 8), (80, 8), (20, 3), (5, 2)],
)
@pytest.mark.parametrize("stats", [STATS, WITH_MORE, BUSY], ids=["older", "newer", "busy"])
def test_every_window_is_enough(width: int, height: int, stats: ServerStats) -> None:
    view = ServerView(stats=stats, rates=RATES, live=True, where="ws://127.0.0.1:8765", remark="Ctrl-C ends")
    lines = screen(view, width, height)
    assert max(map(len, lines)) <= width
    if width >= 46 and height >= 24:
        assert len(lines) <= height
        assert any(line.startswith("memory, CPU") for line in lines)


def test_a_window_that_is_too_small_for_tables_has_words() -> None:
    view = ServerView(stats=BUSY, rates=RATES, live=True, where="ws://127.0.0.1:8765", remark="Ctrl-C ends")
    assert [line for line in screen(view, 30, 8) if line] == [
        "surfw 0.9.0 · Ctrl-C ends",
        "--cache-mb 2220 would help",
        "sent 41.2 MB/s",
        "read 38.1 MB/s",
        "requests 1,234.5/s",
        "hits 50.0 % · 25 clients",
    ]
    alone = replace(view, stats=BUSY | {"redis": {"url": "redis://h", "reachable": False}})
    assert "redis NOT reachable" in screen(alone, 30, 8)
    slow: RedisState = {"url": "redis://h", "reachable": True, "bypassed": "too slow", "hits": 1, "misses": 2}
    alone = replace(view, stats=BUSY | {"redis": slow})
    assert "redis bypassed" in screen(alone, 30, 8)
    assert any("bypassed, too slow, redis://h, hits 33.3 %" in line for line in screen(alone, 80, 40))
    away = replace(view, stats=STATS | {"storage": {"url": "/store", "healthy": False}}, rates=None)
    assert screen(away, 80, 8)[1:3] == [
        "storage NOT reachable · since the start · sent 9 B · read – · requests 7",
        "hits 50.0 % · 10 clients",
    ]


def test_a_narrow_window_leaves_columns_out_and_cuts_no_number() -> None:
    view = ServerView(stats=BUSY, rates=RATES, live=True)
    narrow, wide = ("\n".join(screen(view, width, 40)) for width in (46, 200))
    for text in (
        "some-organisation/a-model-with-a-long-name",
        "127.0.0.1:50412",
        "13 s",
        "surfw/1",
        "41.0 MB/s",
        "14 B",
    ):
        assert text in wide
    assert "127.0.0.1" not in narrow
    assert "some-organisation" in narrow
    for text in ("41.0 MB/s", "14 B", "1,234.5/s", "200.0 MB of 200.0 MB, lru"):
        assert text in narrow


def test_a_single_reading_has_no_rates_and_all_that_is_listed() -> None:
    lines = screen(ServerView(stats=BUSY), 80)
    assert not any("now" in line.split() for line in lines)
    assert sum("127.0.0.1:50412" in line for line in lines) == 20
    assert sum(line.split(maxsplit=1)[-1].startswith("event 4") for line in lines if "event " in line) == 10


def test_a_server_that_is_away() -> None:
    lines = screen(ServerView(stats=STATS, live=True, away="not reachable since 20:14:03, trying again"), 80, 24)
    assert lines[1] == "not reachable since 20:14:03, trying again"


@pytest.mark.parametrize(
    ("room", "clients", "events", "shared"),
    [
        (20, 5, 50, (5, 10)),
        (20, 20, 50, (7, 8)),
        (20, 20, 2, (13, 2)),
        (20, 0, 50, (0, 18)),
        (20, 4, 0, (4, 0)),
        (7, 4, 9, (1, 1)),
        (6, 4, 9, (3, 0)),
        (2, 4, 9, (0, 0)),
        (-3, 4, 9, (0, 0)),
        (20, 0, 0, (0, 0)),
    ],
)
def test_lines_are_shared(room: int, clients: int, events: int, shared: tuple[int, int]) -> None:
    assert share_lines(room, clients, events) == shared


def test_where_only_one_list_has_room_it_can_be_the_events() -> None:
    assert share_lines(6, 4, 9, prefers_events=True) == (0, 4)
    assert share_lines(6, 4, 0, prefers_events=True) == (3, 0)
    assert share_lines(20, 5, 50, prefers_events=True) == (5, 10)


def test_a_narrow_window_names_the_latencies_that_it_shows_and_says_how_to_stop() -> None:
    stats = BUSY | {"requests": BUSY["requests"] | {"latency_seconds": {"p50": 0.0123, "p95": 0.187, "p99": 1.04}}}
    view = ServerView(stats=stats, where="ws://127.0.0.1:8765", remark="Ctrl-C stops")
    lines = screen(view, 46, 24)
    assert lines[0] == "surfw 0.9.0 · up 3 min 12 s · Ctrl-C stops"
    assert "latency       12.3 ms / 187.0 ms · p50 / p95" in lines


def test_columns_are_left_out_in_order() -> None:
    columns = [Column(heading="name", flexible=True), Column(heading="a"), Column(heading="bbbb", right=True)]
    rows = [("x" * 40, "1", "2")]
    made = {width: fit_table(columns, rows, width, drop=(1, 2)).columns for width in (60, 28, 26, 20)}
    assert {width: [str(one.header) for one in columns] for width, columns in made.items()} == {
        60: ["name", "a", "bbbb"], 28: ["name", "bbbb"], 26: ["name", "bbbb"], 20: ["name"]
    }  # fmt: skip
    assert screen(fit_table(columns, rows, 26, drop=(1, 2)), 26) == [
        "name                  bbbb",
        "xxxxxxxxxxxxxxxxxxx…     2",
    ]


def test_lines_of_parts_and_of_names() -> None:
    assert join_fitting(["one", "two", "three"], 15) == "one · two"
    assert join_fitting(["one", "", "a longer one", "two"], 9) == "one · two"
    assert join_fitting(["longer than that"], 3) == "longer than that"
    assert list_fitting(["aaaa", "bbbb", "cccc"], 16) == "aaaa, bbbb, cccc"
    assert list_fitting(["aaaa", "bbbb", "cccc"], 15) == "aaaa and 2 more"
    assert list_fitting([], 15) == ""


def test_a_line_for_a_log() -> None:
    assert status_line(WITH_MORE, RATES) == (
        "now: sent 41.2 MB/s, read 38.1 MB/s, requests 1,234.5/s, hits 50.0 %, 10 clients"
    )
    assert status_line(STATS, None) == "in 2 s: sent 9 B, read –, requests 7, hits 50.0 %, 10 clients"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (45.9, "45 s"),
        (60, "1 min"),
        (192, "3 min 12 s"),
        (7200, "2 h"),
        (7512, "2 h 5 min"),
        (86400 * 3 + 3600 * 4 + 99, "3 d 4 h"),
        (86400 + 60, "1 d"),
        (-5, "0 s"),
    ],
)
def test_ages(seconds: float, text: str) -> None:
    assert age(seconds) == text


def test_the_latest_time_that_a_server_can_name() -> None:
    assert len(render.time_of_day(2.0**53)) == 8
