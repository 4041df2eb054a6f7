"""The status of a run fits the window, shows the most important figures first, and cuts none."""

from dataclasses import replace

import pytest
from rich.cells import cell_len

from surfw.cli.status import clock, duration, rate, run_parts, spinner, status_lines
from surfw.models.progress import Outage, RunFigures

RUN = RunFigures(
    tokens=34, most_tokens=128, tokens_per_second=1.083, bytes_per_second=41.2e6, layer=17, layers=22, stall_share=0.55,
    kept_layers=4, eta_seconds=87.1,
)  # fmt: skip
FIRST = "34/128 tokens · 1.08 tok/s · 41 MB/s · layer 17/22 · waits for link 55 %"
LAST = "4 of 22 layers kept · ETA 1:27"


@pytest.mark.parametrize(
    ("width", "lines"),
    [
        (200, [f"{FIRST} · {LAST}"]),
        (80, [FIRST, LAST]),
        (
            46,
            [
                "34/128 tokens · 1.08 tok/s · 41 MB/s",
                "layer 17/22 · waits for link 55 %",
                LAST,
            ],
        ),
        (20, ["34/128 tokens", "1.08 tok/s", "41 MB/s"]),
        (14, ["34/128 tokens", "1.08 tok/s", "41 MB/s"]),
        (13, []),
    ],
)
def test_what_a_window_shows(width: int, lines: list[str]) -> None:
    assert status_lines(run_parts(RUN, "link"), width) == lines
    assert all(cell_len(line) < width for line in lines)


def test_fewer_lines_keep_what_is_most_important() -> None:
    assert status_lines(run_parts(RUN, "link"), 46, most=1) == ["34/128 tokens · 1.08 tok/s · 41 MB/s"]


def test_a_source_that_is_away_is_said_first() -> None:
    def first(**changed: float) -> str:
        facts = {"seconds": 12.4, "in_seconds": 3.2, "buffered_seconds": 4.9} | changed
        return run_parts(replace(RUN, outage=Outage(trying="ws://10.0.0.2:8765", **facts)), "link")[0]

    assert first() == "link lost 12 s ago, trying 10.0.0.2:8765 in 3 s, 4 s of work buffered"
    assert first(in_seconds=0.1, buffered_seconds=0.5) == "link lost 12 s ago, trying 10.0.0.2:8765"


def test_what_is_not_known_is_not_said() -> None:
    assert run_parts(RunFigures(), "disk") == []
    assert run_parts(RunFigures(layer=3, layers=22, stall_share=0.0), "disk") == ["layer 3/22", "waits for disk 0 %"]


def test_wide_letters_count_as_two_cells() -> None:
    assert status_lines(["語語語", "b"], 7) == ["語語語", "b"]
    assert status_lines(["語語語", "b"], 6) == []


def test_numbers_as_people_read_them() -> None:
    assert [rate(one) for one in (0.123, 1.083, 23.46, 117.4)] == ["0.12", "1.08", "23.5", "117"]
    assert [clock(one) for one in (0, 8.6, 87.1, 3725)] == ["0:00", "0:09", "1:27", "1:02:05"]
    assert [duration(one) for one in (0.354, 2.14, 9.96, 33.2, 59.7, 125, 3725)] == [
        "0.35 s", "2.1 s", "10 s", "33 s", "1 min", "2 min 5 s", "1 h 2 min",
    ]  # fmt: skip
    assert len({spinner(tenths / 10) for tenths in range(10)}) == 10
