"""Counters, latency histograms and time spans. `snapshot()` returns plain data; the command line renders it.

Thread-safe. A histogram keeps only the latest observations, so its memory is bounded.
"""

import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType


class Latency:
    """Percentiles over the latest `keep` observations, in seconds."""

    def __init__(self, keep: int = 2048) -> None:
        self._recent: deque[float] = deque(maxlen=keep)
        self._lock = threading.Lock()
        self.count = 0
        self.total_seconds = 0.0

    def observe(self, seconds: float) -> None:
        """Add one observation."""
        with self._lock:
            self._recent.append(seconds)
            self.count += 1
            self.total_seconds += seconds

    def percentiles(self, *ranks: int) -> dict[str, float]:
        """Nearest-rank percentiles, keyed `p50`, `p95`, …; zeros if there are no observations."""
        with self._lock:
            values = sorted(self._recent)
        if not values:
            return {f"p{rank}": 0.0 for rank in ranks}
        return {f"p{rank}": values[max(0, -(-rank * len(values) // 100) - 1)] for rank in ranks}


class _Record:
    """A set of counters, times and latencies."""

    def __init__(self) -> None:
        self.counters: Counter[str] = Counter()
        self.seconds: dict[str, float] = {}
        self.latencies: dict[str, Latency] = {}


_aside: ContextVar[Mapping["Metrics", _Record]] = ContextVar("surfw_aside", default=MappingProxyType({}))
"""The records used by this thread or task inside `off_the_record`."""


class Metrics:
    """Named counters, latencies and time spans of one component."""

    def __init__(self) -> None:
        """Start at zero, with the clock running."""
        self._lock = threading.Lock()
        self._kept = _Record()
        self._open: dict[object, tuple[str, float, _Record]] = {}
        self.started = time.monotonic()

    def _record(self) -> _Record:
        return _aside.get().get(self, self._kept)

    def _seen(self) -> list[_Record]:
        """The records visible to the caller: the kept one, and its own inside `off_the_record`."""
        record = self._record()
        return [self._kept] if record is self._kept else [self._kept, record]

    def add(self, name: str, amount: int = 1) -> None:
        """Increase a counter."""
        record = self._record()
        with self._lock:
            record.counters[name] += amount

    def count(self, name: str) -> int:
        """A counter's value; 0 if it was never increased."""
        with self._lock:
            return sum(record.counters[name] for record in self._seen())

    def add_seconds(self, name: str, seconds: float) -> None:
        """Add to the time spent on something."""
        record = self._record()
        with self._lock:
            record.seconds[name] = record.seconds.get(name, 0.0) + seconds

    def seconds(self, name: str) -> float:
        """Time spent on something so far, including open spans."""
        now, seen = time.perf_counter(), self._seen()
        with self._lock:
            running = sum(now - start for span, start, record in self._open.values() if span == name and record in seen)
            return sum(record.seconds.get(name, 0.0) for record in seen) + running

    def latency(self, name: str) -> Latency:
        """The latency histogram of that name, created on first use."""
        record = self._record()
        with self._lock:
            return record.latencies.setdefault(name, Latency())

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Add the body's duration to `name`."""
        key, start, record = object(), time.perf_counter(), self._record()
        with self._lock:
            self._open[key] = (name, start, record)
        try:
            yield
        finally:
            with self._lock:
                del self._open[key]
                record.seconds[name] = record.seconds.get(name, 0.0) + time.perf_counter() - start

    @contextmanager
    def off_the_record(self) -> Iterator[None]:
        """Discard everything that the body, and tasks started by it, count and time.

        The body itself sees its own counts added to the kept ones, but only its own latencies. Other threads are not
        affected.
        """
        token = _aside.set({**_aside.get(), self: _Record()})
        try:
            yield
        finally:
            _aside.reset(token)

    def snapshot(self) -> dict[str, dict[str, float]]:
        """All kept counters and spans, as plain data."""
        with self._lock:
            return {"counters": dict(self._kept.counters), "seconds": dict(self._kept.seconds)}


def hit_rate(hits: int, misses: int) -> float:
    """`hits ÷ (hits + misses)`; 0 if both are 0."""
    return hits / (hits + misses) if hits + misses else 0.0
