"""Chooses the form of a chunk to read: the fastest one, by measurements of the current run. Without torch.

Reading, decoding and computing overlap, but they share the processors, which reading from a fast source also keeps
busy. So decoding is assumed not to overlap with anything, and for each byte of payload a run takes

    stored as it is:  max(1 ÷ reading, computing)
    coded:            max(ratio ÷ reading, computing) + 1 ÷ decoding

where reading and decoding are bytes per second, computing is seconds per byte, and ratio is stored bytes ÷ payload
bytes. Rates are bytes over the time in which at least one transfer was active; the last seconds count most.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from surfw.codec import choose_form
from surfw.config import MIB, CodecChoice
from surfw.manifest import Chunk, Form
from surfw.metrics import Metrics

_SMALL_BYTES = MIB
"""Smaller chunks take too little time to measure or to save."""

_WINDOW_SECONDS = 2.0
_ENOUGH_BYTES = 8 * MIB
_TRY_AGAIN = 50
"""Of this many plain chunks, one is read coded instead, since decoding may have become faster."""

_BETTER, _WORSE = 0.95, 0.97
"""Coded forms are adopted if they take less than the first share of the plain forms' time, and dropped if the plain
forms take at most the second share of theirs. The hysteresis keeps the choice from alternating."""


class Rate:
    """Bytes per second, over the time in which at least one transfer was active; older transfers count less."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        """Begin without measurements."""
        self.bytes = 0.0
        self.seconds = 0.0
        self._clock = clock
        self._active = 0
        self._since = 0.0

    @contextmanager
    def transfer(self, size_bytes: int) -> Iterator[None]:
        """Count the body as a transfer of `size_bytes`, unless it fails."""
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
        """Bytes per second; None until enough were moved."""
        return self.bytes / self.seconds if self.bytes >= _ENOUGH_BYTES and self.seconds else None


class FormChoice:
    """Chooses the form of each chunk that is loaded. Used by one event loop.

    Attributes:
        reading: the rate of stored bytes from the source.
        decoding: the rate of decoded payload bytes.
    """

    def __init__(
        self,
        codec: CodecChoice = "auto",
        *,
        is_far: bool = False,
        metrics: Metrics | None = None,
        near: Callable[[Chunk], Sequence[Form]] = lambda _: (),
    ) -> None:
        """Begin with coded forms for a remote source, and with plain ones for a local source.

        Args:
            codec: the codec to use for every chunk that has such a form; `auto` to choose by measurement.
            is_far: whether the source is another machine.
            metrics: of the model. The spans `forward` and `stall` tell how long it computed; `decoded_bytes` and the
                span `decode` are recorded.
            near: returns the forms of a chunk that are closer than the others; only these are considered.
        """
        self.reading = Rate()
        self.decoding = Rate()
        self._codec = codec
        self._near = near
        self._is_coded = is_far
        self._metrics = metrics or Metrics()
        self._computing = Rate()  # payload bytes loaded, over the seconds of computing in that time
        self._computed_before = 0.0
        self._plain_loads = 0

    def form(self, chunk: Chunk) -> Form:
        """The form of a chunk to read now.

        Raises:
            ManifestError: the chunk has no form that this version can decode.
        """
        if self._codec != "auto":
            return choose_form(chunk, self._codec)
        plain, coded = chunk.form("none"), chunk.form("lossless")
        if plain is None or coded is None:
            return choose_form(chunk)
        near = {form.codec for form in self._near(chunk)} & {"none", "lossless"}
        if len(near) == 1:
            return choose_form(chunk, near.pop())
        is_small = chunk.payload_bytes < _SMALL_BYTES
        pays = self._is_coded if is_small else self._pays(coded.stored_bytes / plain.stored_bytes)
        if pays or (not is_small and self._is_due()):
            return coded
        return plain

    def _is_due(self) -> bool:
        """Whether to try a coded form although the plain one is expected to be faster."""
        self._plain_loads = (self._plain_loads + 1) % _TRY_AGAIN
        return self.decoding.per_second is not None and not self._plain_loads

    @contextmanager
    def decode(self, payload_bytes: int) -> Iterator[None]:
        """Count the body as decoding `payload_bytes`."""
        with self.decoding.transfer(payload_bytes), self._metrics.span("decode"):
            yield
        self._metrics.add("decoded_bytes", payload_bytes)

    def loaded(self, payload_bytes: int) -> None:
        """Note that a chunk has been loaded."""
        computed = self._metrics.seconds("forward") - self._metrics.seconds("stall")
        self._computing.add(payload_bytes, max(0.0, computed - self._computed_before))
        self._computed_before = computed

    def _pays(self, ratio: float) -> bool:
        """Whether coded forms are faster, as far as is known; one coded chunk is read to measure decoding."""
        reading, decoding = self.reading.per_second, self.decoding.per_second
        if reading is None:
            return self._is_coded
        if decoding is None:
            return True  # one chunk is enough to measure it
        computing = self._computing.seconds / max(1.0, self._computing.bytes)
        plain = max(1 / reading, computing)
        coded = max(ratio / reading, computing) + 1 / decoding
        self._is_coded = coded < plain / _WORSE if self._is_coded else coded < plain * _BETTER
        return self._is_coded
