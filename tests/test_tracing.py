"""Traces: what the main thread did in turn, what other threads did at the same time, and a file's contents."""

import io
import json
import threading
from pathlib import Path
from typing import Any

import pytest

from surfw import timeline, tracing
from surfw.errors import ConfigurationError
from surfw.tracing import Span, Trace, recording, span


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which the test advances."""
    now = [100.0]
    monkeypatch.setattr(tracing.time, "perf_counter", lambda: now[0])
    return now


def written(trace: Trace) -> dict[str, Any]:
    """The JSON document of a trace."""
    file = io.StringIO()
    trace.write(file, version="1")
    document: dict[str, Any] = json.loads(file.getvalue())
    return document


def flat(spans: list[Span]) -> list[tuple[str, float, float]]:
    return [(one.name, one.start, one.stop) for one in spans]


def test_nested_spans_of_the_main_thread_lie_one_after_another(clock: list[float]) -> None:
    trace = Trace(started=99.0)
    with recording(trace):
        tracing.phase("import", "starting")
        clock[0] += 1
        tracing.phase("prepare", "generating")
        with span("compute", "layer", layer="0"):
            clock[0] += 2
            with span("stall", "stall"):
                clock[0] += 3
            clock[0] += 4
        clock[0] += 5
        trace.end()
    assert flat(trace.main) == [
        ("starting", 0, 2), ("generating", 2, 2), ("layer", 2, 4), ("stall", 4, 7), ("layer", 7, 11),
        ("generating", 11, 16),
    ]  # fmt: skip


def test_what_no_span_covers_is_missing(clock: list[float]) -> None:
    trace = Trace()
    with recording(trace):
        with span("compute", "a"):
            clock[0] += 1
        clock[0] += 1
        with span("compute", "b"):
            clock[0] += 2
    assert flat(trace.main) == [("a", 0, 1), ("b", 2, 4)]
    run = timeline.summarise([(1, one) for one in trace.main], wall_seconds=4)
    assert run.covered_share == 0.75


def test_a_span_ends_with_its_exception(clock: list[float]) -> None:
    trace = Trace()

    def fail() -> None:
        with span("compute", "a"):
            clock[0] += 1
            raise ZeroDivisionError

    with recording(trace), pytest.raises(ZeroDivisionError):
        fail()
    assert flat(trace.main) == [("a", 0, 1)]


def test_without_a_trace_nothing_is_kept() -> None:
    trace = Trace()
    with span("compute", "a"):
        pass
    tracing.phase("prepare", "b")
    tracing.token()
    assert (trace.main, trace.others, trace.tokens) == ([], [], [])


def test_spans_of_the_background_that_overlap_have_tracks_of_their_own(clock: list[float]) -> None:
    trace = Trace()
    for start, stop in ((1, 3), (2, 4), (3, 5)):
        trace.add("fetch", f"{start}", 100 + start, 100 + stop, {"layer": "x", "bytes": 7})
    trace.add("decode", "d", 101, 102, {})
    events = written(trace)["traceEvents"]
    names = {one["tid"]: one["args"]["name"] for one in events if one["name"] == "thread_name"}
    found = [(names[one["tid"]], one["name"], one["ts"], one["dur"]) for one in events if one["ph"] == "X"]
    assert found == [
        ("fetch", "1", 1e6, 2e6), ("fetch", "3", 3e6, 2e6), ("fetch 2", "2", 2e6, 2e6), ("decode", "d", 1e6, 1e6)
    ]  # fmt: skip


def test_other_threads_are_the_background() -> None:
    with recording(Trace()) as trace:

        def work() -> None:
            with span("verify", "verify", bytes=5):
                tracing.phase("prepare", "not the main thread's")

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert [(one.kind, one.about) for one in trace.others] == [("verify", {"bytes": 5})]
    assert trace.main == []


def test_a_trace_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "MOST_SPANS", 3)
    trace = Trace()
    for _ in range(5):
        trace.add("fetch", "f", 0, 1, {})
    assert len(trace.others) == 3
    assert written(trace)["otherData"]["dropped_spans"] == 2


def test_a_token_is_the_time_since_the_one_before(clock: list[float]) -> None:
    with recording(Trace()) as trace:
        tracing.token()
        clock[0] += 1
        trace.begin_tokens()
        for seconds in (3, 2):
            clock[0] += seconds
            tracing.token()
    assert [(one.about["token"], one.start, one.stop) for one in trace.tokens] == [(0, 1, 4), (1, 4, 6)]


def test_a_run_is_summed_up_per_token_and_layer(clock: list[float], tmp_path: Path) -> None:
    with recording(Trace()) as trace:
        tracing.phase("prepare", "generating")
        clock[0] += 1
        with span("compute", "between layers"):
            trace.begin_tokens()
            for stall in (4, 1, 1):
                with span("stall", "stall", layer=("chunk",)):
                    clock[0] += stall
                with span("compute", "model.layers.0", layer="model.layers.0", chunks=("chunk",)):
                    clock[0] += 2
                clock[0] += 0.5
                tracing.token()
        trace.add("fetch", "fetch", 101, 107, {"layer": "chunk", "bytes": 30})
    path = tmp_path / "run.json"
    path.write_text(json.dumps(written(trace)))
    run = timeline.read_run(path)
    assert (run.wall_seconds, run.covered_share, run.tokens) == (14.5, pytest.approx(1), 3)
    assert run.first_token == timeline.TokenTime(seconds=6.5, layers_seconds=2, between_seconds=0.5, stall_seconds=4)
    assert run.later_token == timeline.TokenTime(seconds=3.5, layers_seconds=2, between_seconds=0.5, stall_seconds=1)
    (layer,) = run.layers
    assert (layer.layer, layer.passes, layer.compute_seconds, layer.stall_seconds) == ("model.layers.0", 3, 2, 2)
    assert (layer.fetch_seconds, layer.fetched_bytes) == (2, 10)
    assert [(one.name, one.seconds) for one in run.phases] == [("generating", 1)]
    assert run.background_seconds == {"fetch": 6}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "it is not JSON"),
        ("[" * 100_000, "it is not JSON"),
        ("[]", "it has another shape"),
        ('{"traceEvents": [], "otherData": {}}', "it has another shape"),
        ('{"traceEvents": [], "otherData": {"wall_seconds": 0, "dropped_spans": 0}}', "its time is no time"),
        (
            (
                '{"traceEvents": [{"ph": "X", "tid": 1, "cat": "x", "name": "", "ts": 0, "dur": 1}],'
                ' "otherData": {"wall_seconds": 1, "dropped_spans": 0}}'
            ),
            "it has another shape",
        ),
        *(
            (
                (
                    f'{{"traceEvents": [{{"ph": "X", "tid": 1, "cat": "{kind}", "name": "", "ts": 0, "dur": 1, "args": '
                    f'{about}}}, {{"ph": "X", "tid": 1, "cat": "compute", "name": "", "ts": 2, "dur": 1, '
                    '"args": {"layer": "a"}}], "otherData": {"wall_seconds": 1, "dropped_spans": 0}}'
                ),
                "it has another shape",
            )
            for kind, about in (("compute", '{"layer": "a", "chunks": 5}'), ("fetch", '{"layer": "a", "bytes": "b"}'))
        ),
    ],
)
def test_other_files_are_refused(text: str, why: str, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=why):
        timeline.read_run(path)


def test_a_process_began_before_now() -> None:
    assert 0 <= tracing.time.perf_counter() - tracing.process_began() < 24 * 3600
