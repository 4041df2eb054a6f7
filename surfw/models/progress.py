"""Progress and speed of a run, for a live display. Pure, and does not import torch.

`Progress` is a snapshot of a model. `Pace` combines snapshots into rates.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

_KEPT_SECONDS = 30.0
"""Window of the read rate; if chunks take longer than this, the rate is measured between the last two."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outage:
    """A source that is down.

    Attributes:
        seconds: how long it has been down.
        trying: the address of the next attempt.
        in_seconds: seconds until that attempt; 0 if it is in progress.
        buffered_seconds: how long computing can continue with what was prefetched.
    """

    seconds: float
    trying: str
    in_seconds: float
    buffered_seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """A snapshot of a run.

    Attributes:
        layer: the layer that runs or is waited for, counted from 1; 0 before the first one.
        layers: number of layers.
        kept_layers: number of resident layers; None if nothing is streamed.
        fetched_bytes: stored bytes read so far.
        stall_seconds: time that all runs so far waited for weights.
        run_seconds: total time of all runs so far.
        outage: the outage, if a source is down.
    """

    layer: int
    layers: int
    kept_layers: int | None
    fetched_bytes: int
    stall_seconds: float
    run_seconds: float
    outage: Outage | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFigures:
    """Figures of a run to display; None for what is unknown or not applicable.

    Attributes:
        tokens: number of new tokens so far.
        most_tokens: the most tokens that there will be.
        tokens_per_second: rate after the first token.
        bytes_per_second: recent rate of stored bytes read.
        layer: as in `Progress`; between layers, the last one.
        layers: as in `Progress`.
        stall_share: fraction of the time spent waiting for weights.
        kept_layers: as in `Progress`.
        eta_seconds: estimated time left until `most_tokens`.
        outage: as in `Progress`.
    """

    tokens: int = 0
    most_tokens: int = 0
    tokens_per_second: float | None = None
    bytes_per_second: float | None = None
    layer: int = 0
    layers: int = 0
    stall_share: float | None = None
    kept_layers: int | None = None
    eta_seconds: float | None = None
    outage: Outage | None = None


class Pace:
    """Measures the speed of a run."""

    def __init__(self, most_tokens: int) -> None:
        """Start a run of at most `most_tokens` tokens."""
        self._most_tokens = most_tokens
        self._times: list[float] = []
        self._read: deque[tuple[float, int]] = deque()
        self._layer = 0

    @property
    def times(self) -> Sequence[float]:
        """When each token came, in seconds since the start."""
        return self._times

    def add_token(self, seconds: float) -> None:
        """Record a token that came this many seconds after the start."""
        self._times.append(seconds)

    @property
    def seconds_per_token(self) -> float | None:
        """Mean time per token after the first; None before there are two."""
        times = self._times
        return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None

    def figures(self, progress: Progress, now: float) -> RunFigures:
        """Return the current figures.

        Args:
            progress: the model's current progress.
            now: current time in seconds, from a monotonic clock.
        """
        self._layer = progress.layer or self._layer
        self._note_read(now, progress.fetched_bytes)
        per_token, count = self.seconds_per_token, len(self._times)
        return RunFigures(
            tokens=count,
            most_tokens=self._most_tokens,
            tokens_per_second=1 / per_token if per_token else None,
            bytes_per_second=self._bytes_per_second(now),
            layer=self._layer,
            layers=progress.layers,
            stall_share=min(1.0, progress.stall_seconds / progress.run_seconds) if progress.run_seconds else None,
            kept_layers=progress.kept_layers,
            eta_seconds=per_token * (self._most_tokens - count) if per_token is not None else None,
            outage=progress.outage,
        )

    def _note_read(self, now: float, count: int) -> None:
        """Record the bytes read, only if they changed: they are counted when a whole chunk has arrived."""
        read = self._read
        if not read or read[-1][1] != count:
            read.append((now, count))
        while len(read) > 2 and now - read[1][0] > _KEPT_SECONDS:
            read.popleft()

    def _bytes_per_second(self, now: float) -> float | None:
        (began, before), (ended, after) = self._read[0], self._read[-1]
        span = ended - began
        if span <= 0 or now - ended > max(_KEPT_SECONDS, 2 * span):
            return None
        return (after - before) / span
