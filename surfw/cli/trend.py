"""A server's recent trend: sparklines of its rates, and for each model a strip that shows what is in the cache.

A strip has a cell for each chunk, or for several adjacent ones if there are more chunks than columns. The higher a
cell, the more of it is cached; it is bright if there was a hit since the previous reading.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence

from rich.text import Text

from surfw.cli.status import percent
from surfw.config import format_size, printable
from surfw.wire import ModelHeat, Rates, ServerStats

_LEVELS = "▁▂▃▄▅▆▇█"
_NAMES, _FIGURES, _GAP = 14, 12, 1
_KEPT = 240
_MOST_MODELS = 4


class Trend:
    """The latest readings of a server's statistics."""

    def __init__(self) -> None:
        self._sent: deque[float] = deque(maxlen=_KEPT)
        self._hits: deque[float] = deque(maxlen=_KEPT)
        self._latency: deque[float] = deque(maxlen=_KEPT)
        self._heat: Sequence[ModelHeat] = ()
        self._counted: Mapping[str, Sequence[int]] = {}

    def add(self, stats: ServerStats, rates: Rates | None) -> None:
        """Add a reading, and the rates since the previous one, if known."""
        self._counted = {one["model"]: one["hits"] for one in self._heat}
        self._heat = stats.get("heat", [])
        if rates is not None:
            self._sent.append(rates.sent_bytes)
            self._hits.append(0.0 if rates.hit_rate is None else rates.hit_rate)
            self._latency.append(stats["requests"]["latency_seconds"].get("p95", 0.0))

    def lines(self, width: int) -> Iterator[Text]:
        """Yield lines for this many columns: three sparklines, and a strip for each of the models read last."""
        room = width - _NAMES - _FIGURES - 2 * _GAP
        if room < 8:
            return
        if self._sent:
            shown = (
                ("sent", self._sent, f"{format_size(self._sent[-1])}/s", None),
                ("cache hits", self._hits, percent(self._hits[-1], 1), 1.0),
                ("latency p95", self._latency, f"{self._latency[-1] * 1000:.1f} ms", None),
            )
            for name, values, figure, most in shown:
                line = sparkline(list(values)[-room:], most)
                yield Text(f"{name:<{_NAMES}} {line:<{room}} {figure:>{_FIGURES}}", no_wrap=True)
        for one in self._heat[-_MOST_MODELS:]:
            yield self._strip(one, room)

    def _strip(self, one: ModelHeat, room: int) -> Text:
        name = printable(one["model"].rpartition("/")[2])[:_NAMES]
        before = self._counted.get(one["model"], one["hits"])
        cells = list(zip(one["resident"], _since(before, one["hits"]), strict=False))
        columns = min(room, len(cells))
        text = Text(f"{name:<{_NAMES}} ", no_wrap=True)
        for column in range(columns):
            group = cells[column * len(cells) // columns : (column + 1) * len(cells) // columns]
            share = sum(held for held, _ in group) / len(group)
            was_hit = any(hits for _, hits in group)
            text.append(_level(share) if share else "·", style="bold yellow" if was_hit else "cyan" if share else "dim")
        held = sum(share for share, _ in cells) / max(1, len(cells))
        return text.append(f"{' ' * (room - columns)} {percent(held) + ' cached':>{_FIGURES}}")


def _since(before: Sequence[int], now: Sequence[int]) -> list[int]:
    """Return the hits of each chunk since the previous reading; all hits if the counters were reset."""
    if len(before) != len(now) or any(one > other for one, other in zip(before, now, strict=True)):
        return list(now)
    return [other - one for one, other in zip(before, now, strict=True)]


def sparkline(values: Sequence[float], most: float | None = None) -> str:
    """Draw a character for each value, scaled from 0 to `most`, or to the highest value."""
    top = max([*values, 0.0]) if most is None else most
    return "".join(_level(value / top) if top > 0 else _LEVELS[0] for value in values)


def _level(share: float) -> str:
    return _LEVELS[min(len(_LEVELS) - 1, max(0, int(share * len(_LEVELS))))]
