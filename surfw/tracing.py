"""The timeline of one run: what each thread did when, in memory until it is written. Off unless somebody began one.

The spans of the main thread may be nested in the code, and never overlap in the timeline: a span that begins inside of
another one interrupts it. So they tile the time, and what no span covers is missing from it, and seen to be. Spans of
other threads, and of tasks, may overlap; each kind has tracks of its own.

The file is Chrome's trace format (JSON), which Perfetto and chrome://tracing open:
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
"""What is kept of one run, some 100 MB; later spans are counted only."""
KINDS = ("connect", "import", "prepare", "fetch", "verify", "decode", "copy", "stall", "compute", "token")
"""What a span can be, as its category in the file."""
_MAIN, _TOKENS = 1, 2


@dataclass(frozen=True, slots=True)
class Span:
    """Something that took time.

    Attributes:
        kind: one of `KINDS`.
        name: what it was, for people.
        start, stop: seconds since the trace's beginning.
        about: facts, such as the layer's name.
    """

    kind: str
    name: str
    start: float
    stop: float
    about: Mapping[str, Any]

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.stop - self.start


class Trace:
    """What happened so far. The thread that makes it is the main one.

    Attributes:
        main: the spans of the main thread, one after another.
        tokens: the time from each token to the next.
        others: the spans of other threads.
        dropped: how many spans there were no places for.
    """

    def __init__(self, started: float | None = None) -> None:
        """Begin; `started` is when, as `time.perf_counter` has it, if not now."""
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
        """The time since its beginning."""
        return time.perf_counter() - self._zero

    @property
    def is_here(self) -> bool:
        """Whether this is the main thread."""
        return threading.get_ident() == self._thread

    def add(self, kind: str, name: str, start: float, stop: float, about: Mapping[str, Any]) -> None:
        """Add a span of another thread, by `time.perf_counter`."""
        self._keep(self.others, self._span(kind, name, start, stop, about))

    def phase(self, kind: str, name: str) -> None:
        """The main thread begins something else, until the next phase; within a span, nothing changes."""
        if len(self._open) <= 1:
            if self._open or self.main:
                self._cut()  # else all of the time so far belongs to the first phase
            self._open[:] = [(kind, name, {})]

    @contextmanager
    def span(self, kind: str, name: str, about: Mapping[str, Any]) -> Iterator[None]:
        """The body is a span: of the main thread, or else of the background."""
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
        """A token has come; before the first one, call `begin_tokens`."""
        now = time.perf_counter()
        if self._token_began is not None:
            number = len(self.tokens)
            about = {"token": number}
            self._keep(self.tokens, self._span("token", f"token {number}", self._token_began, now, about))
            self._token_began = now

    def begin_tokens(self) -> None:
        """From here on, the first token is waited for."""
        self._token_began = time.perf_counter()

    def end(self) -> None:
        """End what is open in the main thread."""
        self._cut()
        self._open.clear()

    def _cut(self) -> None:
        """What is open in the main thread, if anything, has a span until now."""
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
        """Write it as JSON, an event a line; `facts` are for `otherData`."""
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
    """The spans in as few lists as have no two that overlap."""
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
    """The trace of this process, if there is one."""
    return _current


@contextmanager
def recording(trace: Trace) -> Iterator[Trace]:
    """Collect what happens during the body, in all threads."""
    global _current  # noqa: PLW0603 - one run of a process is looked at, through all rooms
    before, _current = _current, trace
    try:
        yield trace
    finally:
        _current = before


def span(kind: str, name: str, **about: Any) -> AbstractContextManager[None]:
    """A span for the body, where there is a trace."""
    return _NOTHING if _current is None else _current.span(kind, name, about)


def token() -> None:
    """A token has come, where there is a trace."""
    if _current is not None:
        _current.token()


def phase(kind: str, name: str) -> None:
    """The main thread begins something else, where there is a trace."""
    if _current is not None and _current.is_here:
        _current.phase(kind, name)


def process_began() -> float:
    """When this process was started, as `time.perf_counter` has it, to 10 ms; now where the system does not say."""
    now = time.perf_counter()
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])  # see proc_pid_stat(5)
        return now - max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, AttributeError, IndexError, ValueError):
        return now


def by_kind(spans: Iterable[Span]) -> dict[str, float]:
    """The seconds of each kind, in the order of `KINDS`."""
    seconds: defaultdict[str, float] = defaultdict(float)
    for one in spans:
        seconds[one.kind] += one.seconds
    return {kind: seconds[kind] for kind in KINDS if kind in seconds}
