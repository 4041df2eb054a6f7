"""Sparklines and heat strips: every line fits, and shows the data."""

from dataclasses import replace

import pytest
from rich.cells import cell_len

from surfw.cli.server_view import ServerView
from surfw.cli.trend import Trend, sparkline
from surfw.wire import Rates, ServerStats
from tests.cli.test_server_view import RATES, screen
from tests.wire.test_reports import WITH_MORE


def stats(resident: list[float], hits: list[int], model: str = "org/model") -> ServerStats:
    heat = {"model": model, "chunks": len(hits), "resident": resident, "hits": hits}
    return {**WITH_MORE, "heat": [heat]}  # type: ignore[list-item]


def rates(sent: float) -> Rates:
    return replace(RATES, sent_bytes=sent)


def test_a_sparkline_has_a_step_for_each_value() -> None:
    assert sparkline([0, 1, 2, 4, 8]) == "▁▂▃▅█"
    assert sparkline([0, 0]) == "▁▁"
    assert sparkline([0.5, 1], 1.0) == "▅█"


def test_a_strip_shows_what_is_cached_and_what_was_hit_since() -> None:
    trend = Trend()
    trend.add(stats([1, 0.5, 0, 1], [5, 5, 0, 5]), None)
    trend.add(stats([1, 0.5, 0, 1], [5, 7, 0, 5]), rates(10))
    *lines, strip = trend.lines(60)
    assert [line.plain.split()[0] for line in lines] == ["sent", "cache", "latency"]
    assert strip.plain.split() == ["model", "█▅·█", "62", "%", "cached"]
    assert [str(span.style) for span in strip.spans] == ["cyan", "bold yellow", "dim", "cyan"]


def test_more_chunks_than_columns_share_cells() -> None:
    trend = Trend()
    trend.add(stats([1.0] * 100 + [0.0] * 100, [0] * 200), None)
    (strip,) = trend.lines(60)
    assert strip.plain.split()[1] == "█" * 16 + "·" * 16
    assert cell_len(strip.plain) == 60


@pytest.mark.parametrize("width", [10, 36, 80, 200])
def test_every_line_fits(width: int) -> None:
    trend = Trend()
    for number in range(300):
        trend.add(stats([0.3] * 7, [number] * 7, "org/\x1b[2Jwith-a-very-long-name"), rates(1e12 * number))
    for line in trend.lines(width):
        assert cell_len(line.plain) <= width
        assert "\x1b" not in line.plain


def test_a_screen_with_room_shows_it_and_a_small_one_does_not() -> None:
    trend = Trend()
    trend.add(stats([1], [1]), None)
    trend.add(stats([1], [2]), rates(7))
    view = ServerView(stats=WITH_MORE, rates=RATES, live=True, trend=trend)
    assert any("latency p95" in line for line in screen(view, 100, 45))
    small = screen(view, 80, 20)
    assert not any("latency p95" in line for line in small)
    assert len(small) <= 20
