"""Which form of a chunk is read: the one that a run is faster with, by what this very run has measured. Without torch.

Reading, decoding and computing overlap, but they share the processors, which reading from a fast source keeps busy as
well. So decoding is taken to overlap with nothing, and for each byte of payload a run takes

    stored as it is:  max(1 ÷ reading, computing)
    coded:            max(ratio ÷ reading, computing) + 1 ÷ decoding

where reading and decoding are bytes per second, computing is seconds per byte, and ratio is stored bytes ÷ payload
bytes. Each is measured as bytes over the time in which at least one such thing went on; the last seconds count most.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from surfw.codec import choose_form
from surfw.config import MIB, CodecChoice
from surfw.manifest import Chunk, Form
from surfw.metrics import Metrics

_SMALL_BYTES = MIB
"""What is smaller takes no time worth measuring, or saving."""

_WINDOW_SECONDS = 2.0
_ENOUGH_BYTES = 8 * MIB
_TRY_AGAIN = 50
"""Of so many chunks that are loaded as they are, one is taken coded: decoding may have become faster."""

_BETTER, _WORSE = 0.95, 0.97
"""Coded forms are taken up where they take at most this part of the time, and given up where the others do; the
difference keeps them from alternating."""


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
        near: Callable[[Chunk], Sequence[Form]] = lambda _: (),
    ) -> None:
        """Begin with coded forms where the source is far away, and with others where it is not.

        Args:
            codec: the only codec to use where a chunk has a form of it; `auto` to go by measurement.
            is_far: whether the source is another machine.
            metrics: of the model: its spans `forward` and `stall` say how long it computed. `decoded_bytes` are counted
                here, and the span `decode`.
            near: says which forms of a chunk are nearer than its others: only these are considered.
        """
        self.reading = Rate()
        self.decoding = Rate()
        self._codec = codec
        self._near = near
        self._is_coded = is_far
        self._metrics = metrics or Metrics()
        self._computing = Rate()  # payload bytes that were loaded, over the seconds of computing meanwhile
        self._computed_before = 0.0
        self._plain_loads = 0

    def form(self, chunk: Chunk) -> Form:
        """The form of a chunk to read now.

        Raises:
            ManifestError: the chunk has no form that this surfw can decode.
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
        """Whether to try a coded form, although the plain one is thought to be faster."""
        self._plain_loads = (self._plain_loads + 1) % _TRY_AGAIN
        return self.decoding.per_second is not None and not self._plain_loads

    @contextmanager
    def decode(self, payload_bytes: int) -> Iterator[None]:
        """The body decodes so many bytes of payload."""
        with self.decoding.transfer(payload_bytes), self._metrics.span("decode"):
            yield
        self._metrics.add("decoded_bytes", payload_bytes)

    def loaded(self, payload_bytes: int) -> None:
        """Note that a chunk has been loaded."""
        computed = self._metrics.seconds("forward") - self._metrics.seconds("stall")
        self._computing.add(payload_bytes, max(0.0, computed - self._computed_before))
        self._computed_before = computed

    def _pays(self, ratio: float) -> bool:
        """Whether coded forms are faster, so far as is known; each kind is tried once."""
        reading, decoding = self.reading.per_second, self.decoding.per_second
        if reading is None:
            return self._is_coded
        if decoding is None:
            return True  # one chunk shows how fast it is
        computing = self._computing.seconds / max(1.0, self._computing.bytes)
        plain = max(1 / reading, computing)
        coded = max(ratio / reading, computing) + 1 / decoding
        self._is_coded = coded < plain / _WORSE if self._is_coded else coded < plain * _BETTER
        return self._is_coded
