"""The progress of a run is derived from its events."""

from dataclasses import replace

import pytest

from surfw.models.progress import Pace, Progress

START = Progress(layer=0, layers=4, kept_layers=1, fetched_bytes=0, stall_seconds=0.0, run_seconds=0.0)


def test_nothing_is_known_at_the_beginning() -> None:
    found = Pace(8).figures(START, 100.0)
    assert (found.tokens, found.most_tokens, found.layer, found.layers, found.kept_layers) == (0, 8, 0, 4, 1)
    assert found.tokens_per_second is found.bytes_per_second is found.stall_share is found.eta_seconds is None


def test_speed_is_counted_after_the_first_token() -> None:
    pace = Pace(10)
    pace.add_token(60.0)
    assert pace.figures(START, 0.0).tokens_per_second is None
    for seconds in (62.0, 64.0):
        pace.add_token(seconds)
    found = pace.figures(START, 0.0)
    assert (found.tokens, found.tokens_per_second, found.eta_seconds) == (3, 0.5, 14.0)


def test_the_last_layer_stays_while_something_else_runs() -> None:
    pace = Pace(1)
    assert pace.figures(replace(START, layer=3), 0.0).layer == 3
    assert pace.figures(START, 1.0).layer == 3


def test_the_share_of_waiting() -> None:
    run = replace(START, stall_seconds=3.0, run_seconds=4.0)
    assert Pace(1).figures(run, 0.0).stall_share == 0.75
    assert Pace(1).figures(replace(run, stall_seconds=4.1), 0.0).stall_share == 1.0


def test_bytes_are_counted_from_chunk_to_chunk() -> None:
    pace = Pace(1)
    pace.figures(START, 0.0)
    for now in (5.0, 9.9):
        assert pace.figures(START, now).bytes_per_second is None
    assert pace.figures(replace(START, fetched_bytes=100), 10.0).bytes_per_second == 10.0
    assert pace.figures(replace(START, fetched_bytes=100), 14.0).bytes_per_second == 10.0
    assert pace.figures(replace(START, fetched_bytes=300), 20.0).bytes_per_second == 15.0


def test_an_old_rate_is_forgotten() -> None:
    pace = Pace(1)
    for now, count in ((0.0, 0), (1.0, 1000), (50.0, 1010), (60.0, 1020)):
        found = pace.figures(replace(START, fetched_bytes=count), now)
    assert found.bytes_per_second == pytest.approx(20 / 59)
    assert pace.figures(replace(START, fetched_bytes=1020), 200.0).bytes_per_second is None
