"""Where a run is, and how fast it goes: what a view follows while it lasts. Pure, and without torch.

`Progress` is what a model says of itself at a moment. `Pace` puts moments together.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

_KEPT_SECONDS = 30.0
"""How far back the rate of reading looks; chunks that take longer than that count from the last one on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outage:
    """A source is away, and everything waits for it.

    Attributes:
        seconds: for how long.
        trying: the address that is tried next.
        in_seconds: when; 0 where that goes on now.
        buffered_seconds: how long computing can go on with what was read ahead.
    """

    seconds: float
    trying: str
    in_seconds: float
    buffered_seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """Where a run is.

    Attributes:
        layer: the layer that runs, or is waited for, counted from 1; 0 before the first one.
        layers: how many there are.
        kept_layers: how many of them stay in memory; None if all of them do.
        fetched_bytes: stored bytes that were read so far.
        stall_seconds: how long all runs so far have waited for weights.
        run_seconds: how long all runs so far took.
        outage: what everything waits for, if a source is away.
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
    """How a run goes; None for what is not known, or not worth a word.

    Attributes:
        tokens: how many new ones there are.
        most_tokens: how many there will be at most.
        tokens_per_second: after the first one.
        bytes_per_second: stored bytes read, lately.
        layer: as in `Progress`; the last one, where something else runs.
        layers: as in `Progress`.
        stall_share: the part of the time that was spent waiting for weights.
        kept_layers: as in `Progress`.
        eta_seconds: the time that is left for `most_tokens`.
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
    """How fast a run goes."""

    def __init__(self, most_tokens: int) -> None:
        """Begin a run that makes so many tokens at most."""
        self._most_tokens = most_tokens
        self._times: list[float] = []
        self._read: deque[tuple[float, int]] = deque()
        self._layer = 0

    @property
    def times(self) -> Sequence[float]:
        """When each token came, in seconds."""
        return self._times

    def add_token(self, seconds: float) -> None:
        """Note a token that came so many seconds after the start."""
        self._times.append(seconds)

    @property
    def seconds_per_token(self) -> float | None:
        """The mean time of every token after the first; None before there are two."""
        times = self._times
        return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None

    def figures(self, progress: Progress, now: float) -> RunFigures:
        """Return the figures at a moment.

        Args:
            progress: of the model at this moment.
            now: in seconds, by a clock that never goes back.
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
        """Bytes are counted when a whole chunk has arrived: moments at which nothing has do not matter."""
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
