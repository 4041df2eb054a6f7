"""Which module runs next: the model's structure at first, then what was seen.

The successor of a module is learned together with the module before it. Two steps of history tell apart what one
cannot: a T5 enters its encoder and its decoder through the same embedding, and ALBERT runs one layer many times. Where
a run begins, history begins anew, so that the second prompt is not taken for the next token of the first.
"""

from collections.abc import Iterator
from dataclasses import dataclass

_State = tuple[str | None, str | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Phases:
    """What is known of a model's schedule before it runs: module paths, in the order in which they run.

    Attributes:
        once: what runs before the cycle begins, as an encoder does.
        cycle: what then runs again and again; it may name modules of `once` too.
    """

    once: tuple[str, ...] = ()
    cycle: tuple[str, ...]


class Schedule:
    """Predicts the coming modules from those that ran.

    Attributes:
        version: another number whenever what is predicted may have changed.
    """

    def __init__(self, phases: Phases) -> None:
        """Start from what is known before anything runs."""
        order = list(dict.fromkeys([*phases.once, *phases.cycle]))
        self._first = order[0] if order else None
        self._static = dict(zip(order, [*order[1:], *order[:1]], strict=True))
        self._learned: dict[_State, str] = {}
        self._state: _State = (None, None)
        self.version = 0
        if phases.once:
            for module in [*phases.once, *phases.cycle, *phases.cycle]:
                self.observe(module)
            self.begin()

    def begin(self) -> None:
        """A run begins: what comes does not follow from what came."""
        self._state = (None, None)

    def observe(self, module: str) -> None:
        """Note that a module starts to run."""
        if self._following(self._state) != module:
            self.version += 1
        self._learned[self._state] = module
        self._state = (self._state[1], module)

    def upcoming(self, count: int) -> Iterator[str]:
        """The next `count` modules, as far as one can tell."""
        state = self._state
        for _ in range(count):
            following = self._following(state)
            if following is None:
                return
            yield following
            state = (state[1], following)

    def cycle(self) -> tuple[list[str], list[str]]:
        """What runs from the beginning of a run on: once before the cycle, and in the cycle."""
        state: _State = (None, None)
        seen: dict[_State, int] = {}
        walk: list[str] = []
        while (following := self._following(state)) is not None:
            state = (state[1], following)
            if state in seen:
                before, cycle = walk[: seen[state]], walk[seen[state] :]
                while before and before[-1] == cycle[-1]:  # it began before history could tell
                    cycle.insert(0, cycle.pop())
                    before.pop()
                return before, cycle
            seen[state] = len(walk)
            walk.append(following)
        return walk, []

    def _following(self, state: _State) -> str | None:
        if found := self._learned.get(state):
            return found
        return self._first if state[1] is None else self._static.get(state[1])
