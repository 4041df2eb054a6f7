"""Predicts which chunk is used next: from the model's structure at first, then from what ran. Pure.

The successor of a module is learned for each pair of that module and the one before it. One step of history would not
be enough: a T5 enters its encoder and its decoder through the same embedding, and ALBERT runs one layer many times. The
history is reset when a run begins, so that a second prompt is not mistaken for the next token of the first.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from surfw.manifest import Use
from surfw.runtime.plan import Needs, next_uses

_State = tuple[str | None, str | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Phases:
    """What is known of a model's schedule before it runs: module paths, in the order in which they run.

    Attributes:
        once: what runs before the cycle begins, such as an encoder.
        cycle: what runs repeatedly after that; it may include modules of `once`.
    """

    once: tuple[str, ...] = ()
    cycle: tuple[str, ...]


class Schedule:
    """Predicts the next modules, and the chunks they use, from the modules that ran.

    Attributes:
        uses: the chunks of each module.
        version: changes whenever the prediction may have changed.
    """

    def __init__(self, order: Sequence[Use], phases: Phases | None = None, *, row_wise: Collection[str] = ()) -> None:
        """Start from what is known before anything runs.

        Args:
            order: the modules, and the chunks of each, see `Manifest.order`.
            phases: in which order they run; default: that order, as a cycle.
            row_wise: modules that can look up rows in tables that are not in memory.
        """
        self.uses = {use.module: use.chunks for use in order}
        self._row_wise = row_wise
        phases = phases or Phases(cycle=tuple(self.uses))
        modules = list(dict.fromkeys([*phases.once, *phases.cycle]))
        self._first = modules[0] if modules else None
        self._static = dict(zip(modules, [*modules[1:], *modules[:1]], strict=True))
        self._learned: dict[_State, str] = {}
        self._state: _State = (None, None)
        self.version = 0
        if phases.once:
            for module in [*phases.once, *phases.cycle, *phases.cycle]:
                self.observe(module)
            self.begin()

    def begin(self) -> None:
        """Note that a run begins, which resets the history."""
        self._state = (None, None)

    def observe(self, module: str) -> None:
        """Note that a module starts to run."""
        if self._following(self._state) != module:
            self.version += 1
        self._learned[self._state] = module
        self._state = (self._state[1], module)

    def upcoming(self, count: int) -> Iterator[str]:
        """The next `count` modules, as far as they can be predicted."""
        state = self._state
        for _ in range(count):
            following = self._following(state)
            if following is None:
                return
            yield following
            state = (state[1], following)

    def upcoming_chunks(self, tables: Collection[str]) -> Iterator[str]:
        """The chunks of the next modules in order, each once, without `tables` that are only looked up by rows."""
        seen: set[str] = set()
        for name in self._chunks(self.upcoming(len(self.uses)), tables):
            if name not in seen:
                seen.add(name)
                yield name

    def next_uses(self, needs: Needs) -> dict[str, int]:
        """How soon each chunk is used again: the lower the number, the sooner."""
        return next_uses(list(self._streamed(self.upcoming(2 * len(self.uses)), needs)))

    def cycle(self) -> tuple[list[str], list[str]]:
        """The modules of a run, in order: those that run once before the cycle, and those of the cycle."""
        state: _State = (None, None)
        seen: dict[_State, int] = {}
        walk: list[str] = []
        while (following := self._following(state)) is not None:
            state = (state[1], following)
            if state in seen:
                before, cycle = walk[: seen[state]], walk[seen[state] :]
                while before and before[-1] == cycle[-1]:  # the cycle began before two steps of history were known
                    cycle.insert(0, cycle.pop())
                    before.pop()
                return before, cycle
            seen[state] = len(walk)
            walk.append(following)
        return walk, []

    def starts_cycle(self, module: str) -> bool:
        """Whether the cycle begins with this module."""
        return self.cycle()[1][:1] == [module]

    def apply_to(self, needs: Needs) -> Needs:
        """The same needs, with the chunks that this schedule uses before and in its cycle."""
        before, cycle = self.cycle()
        return replace(needs, before=tuple(self._streamed(before, needs)), cycle=tuple(self._streamed(cycle, needs)))

    def _streamed(self, modules: Iterable[str], needs: Needs) -> Iterator[str]:
        """The chunks that modules use, in order, without those that every plan pins."""
        return (name for name in self._chunks(modules, needs.tables) if name not in needs.fixed)

    def _chunks(self, modules: Iterable[str], tables: Collection[str]) -> Iterator[str]:
        for module in modules:
            looked_up = tables if module in self._row_wise else ()
            yield from (name for name in self.uses[module] if name not in looked_up)

    def _following(self, state: _State) -> str | None:
        if found := self._learned.get(state):
            return found
        return self._first if state[1] is None else self._static.get(state[1])
