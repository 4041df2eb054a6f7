"""Which form of a chunk is read: the one that a run is faster with, by what this very run has measured. Without torch.

Reading, decoding and computing overlap, but they share the processors, so nobody knows how much they do. For each byte
of payload a run takes

    stored as it is:   max(1 ÷ reading, computing)
    coded, at best:    max(ratio ÷ reading, computing, 1 ÷ decoding)
    coded, at worst:   max(ratio ÷ reading, computing) + 1 ÷ decoding

where reading and decoding are bytes per second, computing is seconds per byte, and ratio is stored bytes ÷ payload
bytes. Each is measured as bytes over the time in which at least one such thing went on; the last seconds count most.
Where coded forms are faster at worst, or slower at best, that decides. In between, both are tried; see `trials`.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from surfw.codec import choose_form
from surfw.config import MIB, CodecChoice
from surfw.manifest import Chunk, Form
from surfw.metrics import Metrics
from surfw.runtime.trials import Trials

_SMALL_BYTES = MIB
"""What is smaller takes no time worth measuring, or saving."""

_WINDOW_SECONDS = 2.0
_ENOUGH_BYTES = 8 * MIB
_CLEARLY = 0.95
"""Coded forms are taken without a trial where they take at most this part of the time at worst."""


class Rate:
    """Bytes per second, in the time in which at least one transfer went on; older ones count less and less."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        """Nothing was measured yet."""
        self.bytes = 0.0
        self.seconds = 0.0
        self._clock = clock
        self._active = 0
        self._since = 0.0

    @contextmanager
    def transfer(self, size_bytes: int) -> Iterator[None]:
        """The body moves so many bytes, unless it fails."""
        self._active += 1
        if self._active == 1:
            self._since = self._clock()
        moved = 0
        try:
            yield
            moved = size_bytes
        finally:
            self._active -= 1
            now = self._clock()
            self.add(moved, now - self._since)
            self._since = now

    def add(self, size_bytes: float, seconds: float) -> None:
        """Count bytes, and the time they took."""
        self.bytes += size_bytes
        self.seconds += seconds
        if self.seconds > _WINDOW_SECONDS:
            self.bytes, self.seconds = self.bytes / 2, self.seconds / 2

    @property
    def per_second(self) -> float | None:
        """Bytes per second; None before enough of them were moved."""
        return self.bytes / self.seconds if self.bytes >= _ENOUGH_BYTES and self.seconds else None


class FormChoice:
    """Chooses the form of each chunk that is loaded. Used by one event loop.

    Attributes:
        reading: stored bytes, from the source.
        decoding: payload bytes, out of coded ones.
    """

    def __init__(
        self,
        codec: CodecChoice = "auto",
        *,
        is_far: bool = False,
        metrics: Metrics | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Begin with coded forms where the source is far away, and with others where it is not.

        Args:
            codec: the only codec to use where a chunk has a form of it; `auto` to go by measurement.
            is_far: whether the source is another machine.
            metrics: of the model: its spans `forward` and `stall` say how long it computed. `decoded_bytes` are counted
                here, and the span `decode`.
            clock: in seconds.
        """
        self.reading = Rate(clock)
        self.decoding = Rate(clock)
        self._clock = clock
        self._codec = codec
        self._metrics = metrics or Metrics()
        self._trials = Trials(kept=is_far)
        self._wanted = _WantedTime(self._metrics, clock)
        self._computing = Rate()  # payload bytes that were loaded, over the seconds of computing meanwhile
        self._computed_before = 0.0

    def form(self, chunk: Chunk) -> Form:
        """The form of a chunk that is faster, so far as is known.

        Raises:
            ManifestError: the chunk has no form that this surfw can decode.
        """
        if self._codec != "auto":
            return choose_form(chunk, self._codec)
        ratio = self._ratio(chunk)
        known = None if ratio is None else self._known(ratio)
        return _form(chunk, is_coded=self._trials.kept if known is None else known)

    @contextmanager
    def loading(self, chunk: Chunk) -> Iterator[Form]:
        """The body loads a chunk in the form that it gets, which may be one that is tried.

        Raises:
            ManifestError: the chunk has no form that this surfw can decode.
        """
        ratio = self._ratio(chunk)
        now = self._wanted.begin()
        is_coded = self._trials.kept if ratio is None else self._choose(ratio, now)
        if ratio is not None:
            self._trials.begun(is_coded)
        loaded_bytes = 0
        try:
            yield self.form(chunk) if ratio is None else _form(chunk, is_coded=is_coded)
            loaded_bytes = chunk.payload_bytes
            self._count_computing(loaded_bytes)
        finally:
            now = self._wanted.end()
            if ratio is not None:
                self._trials.ended(is_coded, loaded_bytes, now)

    @contextmanager
    def decode(self, payload_bytes: int) -> Iterator[None]:
        """The body decodes so many bytes of payload."""
        with self.decoding.transfer(payload_bytes), self._metrics.span("decode"):
            yield
        self._metrics.add("decoded_bytes", payload_bytes)

    def _ratio(self, chunk: Chunk) -> float | None:
        """Coded bytes ÷ plain ones; None where there is no choice that would be worth measuring."""
        plain, coded = chunk.form("none"), chunk.form("lossless")
        if self._codec != "auto" or plain is None or coded is None or chunk.payload_bytes < _SMALL_BYTES:
            return None
        return coded.stored_bytes / plain.stored_bytes

    def _choose(self, ratio: float, now: float) -> bool:
        """Whether to load a chunk in its coded form now."""
        trials, known = self._trials, self._known(ratio)
        goes_on = trials.is_trying
        if known and not trials.kept:
            trials.keep(True, now)
        elif known is False and (trials.kept or goes_on):
            trials.keep(False, now)
        elif not known and trials.choose(now) and not trials.kept:
            if not goes_on:  # how fast decoding is now
                self.decoding = Rate(self._clock)
            return self.decoding.per_second is not None or not trials.loads(True)  # until then, one at a time
        return trials.way

    def _known(self, ratio: float) -> bool | None:
        """Whether coded forms are faster; None if the rates do not tell, or are not known."""
        reading, decoding = self.reading.per_second, self.decoding.per_second
        if reading is None or decoding is None:
            return None
        computing = self._computing.seconds / max(1.0, self._computing.bytes)
        plain, coded = max(1 / reading, computing), max(ratio / reading, computing)
        if coded + 1 / decoding < plain * _CLEARLY:
            return True
        return False if max(coded, 1 / decoding) >= plain else None

    def _count_computing(self, payload_bytes: int) -> None:
        """Note what was computed while a chunk has been loaded."""
        computed = self._metrics.seconds("forward") - self._metrics.seconds("stall")
        self._computing.add(payload_bytes, max(0.0, computed - self._computed_before))
        self._computed_before = computed


class _WantedTime:
    """The time in which the model ran, or something was loaded."""

    def __init__(self, metrics: Metrics, clock: Callable[[], float]) -> None:
        self._metrics = metrics
        self._clock = clock
        self._loads = 0
        self._seconds = 0.0
        self._last = clock()
        self._ran = metrics.seconds("forward")

    def begin(self) -> float:
        """A load begins; the time in seconds."""
        seconds = self._count()
        self._loads += 1
        return seconds

    def end(self) -> float:
        """A load ends; the time in seconds."""
        seconds = self._count()
        self._loads -= 1
        return seconds

    def _count(self) -> float:
        now, ran = self._clock(), self._metrics.seconds("forward")
        passed = now - self._last
        self._seconds += passed if self._loads else max(0.0, min(passed, ran - self._ran))
        self._last, self._ran = now, ran
        return self._seconds


def _form(chunk: Chunk, *, is_coded: bool) -> Form:
    return choose_form(chunk, "lossless" if is_coded else "none")
