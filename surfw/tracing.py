"""Records the timeline of one run: which thread did what, and when. Off by default; kept in memory until written.

Spans of the main thread may be nested in the code but never overlap in the timeline: an inner span interrupts the outer
one. So they tile the time, and gaps show time that no span covers. Spans of other threads and of tasks may overlap;
each kind has its own tracks.

The file is in Chrome's trace format (JSON), which Perfetto and chrome://tracing open:
https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

import json
import os
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

MOST_SPANS = 500_000
"""The most spans kept of one run, some 100 MB; later spans are only counted."""
KINDS = ("connect", "import", "prepare", "fetch", "verify", "decode", "copy", "stall", "compute", "token")
"""The kinds of spans; a span's category in the file."""
_MAIN, _TOKENS = 1, 2


@dataclass(frozen=True, slots=True)
class Span:
    """A period of time in which a thread did one thing.

    Attributes:
        kind: one of `KINDS`.
        name: what was done, for display.
        start, stop: seconds since the start of the trace.
        about: details, such as the layer's name.
    """

    kind: str
    name: str
    start: float
    stop: float
    about: Mapping[str, Any]

    @property
    def seconds(self) -> float:
        """The duration in seconds."""
        return self.stop - self.start


class Trace:
    """The spans recorded so far. The thread that creates the trace is the main thread.

    Attributes:
        main: the spans of the main thread, which never overlap.
        tokens: one span per token, from the token before it.
        others: the spans of other threads.
        dropped: the number of spans beyond `MOST_SPANS`.
    """

    def __init__(self, started: float | None = None) -> None:
        """Start the trace now, or at `started`, a `time.perf_counter` value."""
        self._zero = time.perf_counter() if started is None else started
        self._thread = threading.get_ident()
        self._lock = threading.Lock()
        self._open: list[tuple[str, str, Mapping[str, Any]]] = []
        self._since = self._zero
        self._token_began: float | None = None
        self._places = MOST_SPANS
        self.main: list[Span] = []
        self.tokens: list[Span] = []
        self.others: list[Span] = []
        self.dropped = 0

    @property
    def seconds(self) -> float:
        """Seconds since the start of the trace."""
        return time.perf_counter() - self._zero

    @property
    def is_here(self) -> bool:
        """Whether this is the main thread."""
        return threading.get_ident() == self._thread

    def add(self, kind: str, name: str, start: float, stop: float, about: Mapping[str, Any]) -> None:
        """Add a span of another thread; times are `time.perf_counter` values."""
        self._keep(self.others, self._span(kind, name, start, stop, about))

    def phase(self, kind: str, name: str) -> None:
        """Start a phase of the main thread, which lasts until the next phase. Ignored inside a span."""
        if len(self._open) <= 1:
            if self._open or self.main:
                self._cut()  # the first phase also covers the time before it
            self._open[:] = [(kind, name, {})]

    @contextmanager
    def span(self, kind: str, name: str, about: Mapping[str, Any]) -> Iterator[None]:
        """Record the body as a span, of the main thread or of the background."""
        if not self.is_here:
            start = time.perf_counter()
            try:
                yield
            finally:
                self.add(kind, name, start, time.perf_counter(), about)
            return
        self._cut()
        self._open.append((kind, name, about))
        try:
            yield
        finally:
            self._cut()
            self._open.pop()

    def token(self) -> None:
        """Record a token. Call `begin_tokens` before the first one."""
        now = time.perf_counter()
        if self._token_began is not None:
            number = len(self.tokens)
            about = {"token": number}
            self._keep(self.tokens, self._span("token", f"token {number}", self._token_began, now, about))
            self._token_began = now

    def begin_tokens(self) -> None:
        """Start the span of the first token."""
        self._token_began = time.perf_counter()

    def end(self) -> None:
        """End all open spans and phases of the main thread."""
        self._cut()
        self._open.clear()

    def _cut(self) -> None:
        """Record a span up to now for the innermost open span or phase of the main thread, if any."""
        now = time.perf_counter()
        if self._open:
            kind, name, about = self._open[-1]
            self._keep(self.main, self._span(kind, name, self._since, now, about))
        self._since = now

    def _span(self, kind: str, name: str, start: float, stop: float, about: Mapping[str, Any]) -> Span:
        return Span(kind, name, start - self._zero, stop - self._zero, about)

    def _keep(self, spans: list[Span], span: Span) -> None:
        with self._lock:
            if not self._places:
                self.dropped += 1
                return
            self._places -= 1
            spans.append(span)

    def write(self, file: TextIO, **facts: str) -> None:
        """Write the trace as JSON, one event per line; `facts` are added to `otherData`."""
        self.end()
        seconds = self.seconds
        other = {**facts, "wall_seconds": round(seconds, 6), "dropped_spans": self.dropped}
        head = json.dumps({"displayTimeUnit": "ms", "otherData": other}, ensure_ascii=True)
        file.write(head[:-1] + ', "traceEvents": [\n')
        file.write(",\n".join(json.dumps(event) for event in self._events()))
        file.write("\n]}\n")

    def _events(self) -> Iterator[dict[str, Any]]:
        yield {"ph": "M", "name": "process_name", "pid": os.getpid(), "tid": 0, "args": {"name": "surfw infer"}}
        yield from _track("main thread", _MAIN, self.main)
        if self.tokens:
            yield from _track("tokens", _TOKENS, self.tokens)
        with self._lock:
            others = list(self.others)
        number = _TOKENS
        for kind in KINDS:
            for place, spans in enumerate(_lanes(span for span in others if span.kind == kind)):
                number += 1
                yield from _track(f"{kind} {place + 1}" if place else kind, number, spans)


def _track(name: str, number: int, spans: Sequence[Span]) -> Iterator[dict[str, Any]]:
    track = {"pid": os.getpid(), "tid": number}
    yield {"ph": "M", "name": "thread_name", **track, "args": {"name": name}}
    yield {"ph": "M", "name": "thread_sort_index", **track, "args": {"sort_index": number}}
    for span in spans:
        times = {"ts": round(span.start * 1e6, 3), "dur": round(span.seconds * 1e6, 3)}
        yield {"ph": "X", "name": span.name, "cat": span.kind, **times, **track, "args": dict(span.about)}


def _lanes(spans: Iterable[Span]) -> list[list[Span]]:
    """Distribute spans over as few lists as possible so that no list has overlapping ones."""
    lanes: list[list[Span]] = []
    for span in sorted(spans, key=lambda one: one.start):
        free = next((lane for lane in lanes if lane[-1].stop <= span.start), None)
        if free is None:
            lanes.append(free := [])
        free.append(span)
    return lanes


_current: Trace | None = None
_NOTHING: AbstractContextManager[None] = nullcontext()


def current() -> Trace | None:
    """The process's current trace, or None."""
    return _current


@contextmanager
def recording(trace: Trace) -> Iterator[Trace]:
    """Record the body into a trace, in all threads."""
    global _current  # noqa: PLW0603 - a process records one run at a time, across all packages
    before, _current = _current, trace
    try:
        yield trace
    finally:
        _current = before


def span(kind: str, name: str, **about: Any) -> AbstractContextManager[None]:
    """Record the body as a span, if a trace is being recorded."""
    return _NOTHING if _current is None else _current.span(kind, name, about)


def token() -> None:
    """Record a token, if a trace is being recorded."""
    if _current is not None:
        _current.token()


def phase(kind: str, name: str) -> None:
    """Start a phase of the main thread, if a trace is being recorded."""
    if _current is not None and _current.is_here:
        _current.phase(kind, name)


def process_began() -> float:
    """The start of this process as a `time.perf_counter` value, to 10 ms; the current time if it is unknown."""
    now = time.perf_counter()
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])  # see proc_pid_stat(5)
        return now - max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, AttributeError, IndexError, ValueError):
        return now


def by_kind(spans: Iterable[Span]) -> dict[str, float]:
    """The total seconds per kind, in the order of `KINDS`."""
    seconds: defaultdict[str, float] = defaultdict(float)
    for one in spans:
        seconds[one.kind] += one.seconds
    return {kind: seconds[kind] for kind in KINDS if kind in seconds}
