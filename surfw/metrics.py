"""Counters, latency histograms and spans. `snapshot()` returns plain data; rendering is the command line's.

Safe to use from several threads. A histogram keeps the latest observations only, so its memory is bounded.
"""

import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager


class Latency:
    """Percentiles over the latest `keep` observations, in seconds."""

    def __init__(self, keep: int = 2048) -> None:
        """Start empty."""
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
        """Nearest-rank percentiles, keyed `p50`, `p95`, …; zeros while there is nothing to rank."""
        with self._lock:
            values = sorted(self._recent)
        if not values:
            return {f"p{rank}": 0.0 for rank in ranks}
        return {f"p{rank}": values[max(0, -(-rank * len(values) // 100) - 1)] for rank in ranks}


class Metrics:
    """Named counters, latencies and time spans of one component."""

    def __init__(self) -> None:
        """Start at zero, with the clock running."""
        self._lock = threading.Lock()
        self._counters: Counter[str] = Counter()
        self._seconds: dict[str, float] = {}
        self._open: dict[object, tuple[str, float]] = {}
        self._latencies: dict[str, Latency] = {}
        self.started = time.monotonic()

    def add(self, name: str, amount: int = 1) -> None:
        """Increase a counter."""
        with self._lock:
            self._counters[name] += amount

    def count(self, name: str) -> int:
        """A counter's value; 0 if it was never increased."""
        with self._lock:
            return self._counters[name]

    def add_seconds(self, name: str, seconds: float) -> None:
        """Add to the time spent on something."""
        with self._lock:
            self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def seconds(self, name: str) -> float:
        """Time spent on something so far, spans that are still open included."""
        now = time.perf_counter()
        with self._lock:
            running = sum(now - start for span, start in self._open.values() if span == name)
            return self._seconds.get(name, 0.0) + running

    def latency(self, name: str) -> Latency:
        """The latency histogram of that name, made on first use."""
        with self._lock:
            return self._latencies.setdefault(name, Latency())

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Add the time the body takes to `name`."""
        key, start = object(), time.perf_counter()
        with self._lock:
            self._open[key] = (name, start)
        try:
            yield
        finally:
            with self._lock:
                del self._open[key]
                self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    @contextmanager
    def off_the_record(self) -> Iterator[None]:
        """Take back, in the end, whatever was counted and timed meanwhile; until then it can be read as always."""
        with self._lock:
            before = self._counters.copy(), dict(self._seconds), self._latencies
            self._latencies = {}
        try:
            yield
        finally:
            with self._lock:
                self._counters, self._seconds, self._latencies = before

    def snapshot(self) -> dict[str, dict[str, float]]:
        """All counters and spans, as plain data."""
        with self._lock:
            return {"counters": dict(self._counters), "seconds": dict(self._seconds)}


def hit_rate(hits: int, misses: int) -> float:
    """`hits ÷ (hits + misses)`; 0 while nothing was asked for."""
    return hits / (hits + misses) if hits + misses else 0.0
