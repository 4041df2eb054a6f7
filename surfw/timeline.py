"""Summarises a trace: where the time of a run and of a token went, and per layer. Pure, except for reading the file."""

import json
import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surfw.errors import ConfigurationError
from surfw.files import read_regular
from surfw.tracing import KINDS, Span, by_kind

_MOST_BYTES = 512_000_000
_MAIN, _TOKEN_KIND, _RUNNING = 1, "token", ("compute", "stall")


@dataclass(frozen=True, slots=True)
class Phase:
    """An activity of the main thread other than computing and stalling."""

    name: str
    kind: str
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenTime:
    """The main thread's time for a token, split into layers, transformers' code between layers, and stalls."""

    seconds: float
    layers_seconds: float
    between_seconds: float
    stall_seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerTime:
    """A layer's mean seconds and bytes per pass; compute and stall are the main thread's, the others the background's.

    Attributes:
        layer: the path of its module.
        passes: how often it was computed.
    """

    layer: str
    passes: int
    compute_seconds: float
    stall_seconds: float
    fetch_seconds: float
    decode_seconds: float
    copy_seconds: float
    fetched_bytes: float


@dataclass(frozen=True, kw_only=True, slots=True)
class RunTimes:
    """The summary of a trace.

    Attributes:
        wall_seconds: from the start of the process until the trace was written.
        covered_share: the share of the wall time that the main thread's spans cover.
        dropped_spans: spans beyond the trace's limit, which all figures lack.
        tokens: the number of tokens.
        phases: in the order they began.
        first_token: the time of the first token; None without tokens.
        later_token: the mean of all later tokens; None with fewer than two tokens.
        layers: in the order they first ran.
        background_seconds: the time of other threads, by kind; threads may overlap.
    """

    wall_seconds: float
    covered_share: float
    dropped_spans: int
    tokens: int
    phases: tuple[Phase, ...]
    first_token: TokenTime | None
    later_token: TokenTime | None
    layers: tuple[LayerTime, ...]
    background_seconds: dict[str, float]


def read_run(path: Path) -> RunTimes:
    """Read a trace that `surfw infer --trace` wrote.

    Raises:
        ConfigurationError: the file cannot be read, or is not such a trace.
    """
    try:
        document = json.loads(read_regular(path, _MOST_BYTES))
    except OSError as exc:
        raise ConfigurationError(f"{path} cannot be read: {exc.strerror or exc}; name a trace of a run") from exc
    except (ValueError, RecursionError) as exc:
        raise _no_trace(path, "it is not JSON") from exc
    try:
        other = document["otherData"]
        events = [(event["tid"], _span(event)) for event in document["traceEvents"] if event["ph"] == "X"]
        wall, dropped = float(other["wall_seconds"]), int(other["dropped_spans"])
        if not math.isfinite(wall) or wall <= 0:
            raise _no_trace(path, "its time is no time")
        return summarise(events, wall_seconds=wall, dropped_spans=dropped)
    except (KeyError, TypeError, ValueError, OverflowError) as exc:
        raise _no_trace(path, "it has another shape") from exc


def _no_trace(path: Path, why: str) -> ConfigurationError:
    return ConfigurationError(f"{path} is no trace of a run: {why}; write one with 'surfw infer --trace FILE'")


def _span(event: Mapping[str, Any]) -> Span:
    start, seconds, about = float(event["ts"]) / 1e6, float(event["dur"]) / 1e6, event.get("args") or {}
    if event["cat"] not in KINDS or not (math.isfinite(start) and math.isfinite(seconds)) or seconds < 0:
        raise ValueError
    return Span(event["cat"], str(event["name"]), start, start + seconds, dict(about))


def summarise(events: Iterable[tuple[int, Span]], *, wall_seconds: float, dropped_spans: int = 0) -> RunTimes:
    """Summarise spans, each with the number of its track."""
    main: list[Span] = []
    tokens: list[Span] = []
    others: list[Span] = []
    for track, span in events:
        (main if track == _MAIN else tokens if span.kind == _TOKEN_KIND else others).append(span)
    phases: dict[tuple[str, str], float] = defaultdict(float)
    for span in main:
        if span.kind not in _RUNNING:
            phases[span.name, span.kind] += span.seconds
    main.sort(key=lambda span: span.start)
    starts = [span.start for span in main]
    times = [_token_time(token, main, starts) for token in tokens]
    return RunTimes(
        wall_seconds=wall_seconds,
        covered_share=sum(span.seconds for span in main) / wall_seconds,
        dropped_spans=dropped_spans,
        tokens=len(tokens),
        phases=tuple(Phase(name, kind, seconds) for (name, kind), seconds in phases.items()),
        first_token=times[0] if times else None,
        later_token=_mean(times[1:]) if times[1:] else None,
        layers=_layers([*main, *others]),
        background_seconds=by_kind(others),
    )


def _token_time(token: Span, main: Sequence[Span], starts: Sequence[float]) -> TokenTime:
    """The main thread's time for one token; a span belongs to the token during which it began."""
    seconds = {"layers": 0.0, "between": 0.0, "stall": 0.0}
    for span in main[bisect_left(starts, token.start) : bisect_left(starts, token.stop)]:
        if span.kind in _RUNNING:
            what = "stall" if span.kind == "stall" else "layers" if "layer" in span.about else "between"
            seconds[what] += span.seconds
    return TokenTime(seconds=token.seconds, **{f"{what}_seconds": taken for what, taken in seconds.items()})


def _mean(times: list[TokenTime]) -> TokenTime:
    names = TokenTime.__dataclass_fields__
    return TokenTime(**{name: sum(getattr(one, name) for one in times) / len(times) for name in names})


def _layers(spans: Iterable[Span]) -> tuple[LayerTime, ...]:
    """Average the spans of each layer, including those of its chunks, over its passes."""
    spans = list(spans)
    passes: dict[str, int] = defaultdict(int)
    home: dict[str, str] = {}
    for span in spans:
        if span.kind == "compute" and "layer" in span.about:
            layer = str(span.about["layer"])
            passes[layer] += 1
            home |= dict.fromkeys(map(str, span.about.get("chunks", ())), layer)
    sums: dict[str, dict[str, float]] = {layer: defaultdict(float) for layer in passes}
    for span in spans:
        named = span.about.get("layer")
        first = named[0] if isinstance(named, list) and named else named
        layer = str(first) if span.kind == "compute" else home.get(str(first), str(first))
        if layer in sums:
            sums[layer][span.kind] += span.seconds
            if span.kind == "fetch":
                sums[layer]["bytes"] += float(span.about.get("bytes", 0))
    return tuple(
        LayerTime(
            layer=layer,
            passes=count,
            compute_seconds=sums[layer]["compute"] / count,
            stall_seconds=sums[layer]["stall"] / count,
            fetch_seconds=sums[layer]["fetch"] / count,
            decode_seconds=sums[layer]["decode"] / count,
            copy_seconds=sums[layer]["copy"] / count,
            fetched_bytes=sums[layer]["bytes"] / count,
        )
        for layer, count in passes.items()
    )
