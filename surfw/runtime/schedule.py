"""Which module runs next: the manifest's order at first, then what was seen.

The successor of a module is learned together with the module before it. Two steps of history tell apart what one
cannot: a T5 enters its encoder and its decoder through the same embedding, and ALBERT runs one layer many times.
"""

from collections.abc import Iterator, Sequence


class Schedule:
    """Predicts the coming modules from those that ran."""

    def __init__(self, order: Sequence[str]) -> None:
        """Start from the order of the manifest, taken as a cycle."""
        self._first = order[0] if order else None
        self._static = dict(zip(order, [*order[1:], *order[:1]], strict=True))
        self._learned: dict[tuple[str | None, str], str] = {}
        self._before: str | None = None
        self._last: str | None = None

    def observe(self, module: str) -> None:
        """Note that a module starts to run."""
        if self._last is not None:
            self._learned[self._before, self._last] = module
        self._before, self._last = self._last, module

    def upcoming(self, count: int) -> Iterator[str]:
        """The next `count` modules, as far as one can tell."""
        before, last = self._before, self._last
        for _ in range(count):
            following = self._first if last is None else self._learned.get((before, last), self._static.get(last))
            if following is None:
                return
            yield following
            before, last = last, following
