"""Which experts stay in memory, and which make way. Pure: what the router has chosen in, decisions out.

Layers run in a cycle, but experts do not: some are chosen often, some hardly ever, and what is popular changes with the
text. So an expert's worth is how often it was chosen, where what was long ago counts less: LRFU (D. Lee et al., «LRFU:
a spectrum of policies that subsumes the least recently used and least frequently used policies», IEEE Transactions on
Computers 50(12), 2001). Each token that an expert computes adds 1, and all halve every `HALF_LIFE` tokens of a module.
The least worthy makes way, of whichever module. What has just come in for the first time is worth least, and goes next,
so that what is asked for once does not push out what is asked for all the time.

Invariants: an expert in use is not evicted; as long as those in use fit, all that have a place take at most the budget;
an expert whose load has not ended keeps its place.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from math import log2

HALF_LIFE = 256
"""Tokens after which having been chosen counts half."""

_STALE = 4
"""The queue of victims is made anew when it is so many times as long as what is in it."""

Key = tuple[str, int]
"""A module, and the number of one of its experts."""


@dataclass(slots=True)
class Decision:
    """What a driver has to do, in this order: experts whose memory goes, and experts to load."""

    evict: list[Key] = field(default_factory=list)
    load: list[Key] = field(default_factory=list)


class ExpertTable:
    """The experts in memory, by a budget over all modules.

    Attributes:
        budget_bytes: what all of them may take.
        held_bytes: what they take.
    """

    def __init__(self, sizes: Mapping[str, int], budget_bytes: int) -> None:
        """Start empty.

        Args:
            sizes: the memory that one expert of each module takes.
            budget_bytes: at least what the experts take that are used at once.
        """
        self._sizes = sizes
        self.budget_bytes = budget_bytes
        self.held_bytes = 0
        self._held: set[Key] = set()
        self._fixed: Counter[Key] = Counter()  # experts in use, or being loaded: how many reasons there are
        self._tokens: Counter[str] = Counter()  # that each module has seen
        self._worth: dict[Key, float] = {}  # its logarithm, as of a module's first token: so it need not be kept up
        self._queue: list[tuple[float, Key]] = []  # a heap, with entries that are out of date

    def __contains__(self, key: Key) -> bool:
        """Whether an expert has a place."""
        return key in self._held

    def __len__(self) -> int:
        """How many experts have a place."""
        return len(self._held)

    def note(self, module: str, counts: Sequence[int]) -> None:
        """Count a forward of a module, in which each expert computes so many tokens."""
        now = self._tokens[module] = self._tokens[module] + max(counts, default=0)
        for index, count in enumerate(counts):
            if count:
                key = module, index
                before = self._worth.get(key)
                worth = count if before is None else count + 2 ** (before - now / HALF_LIFE)
                self._worth[key] = log2(worth) + now / HALF_LIFE
                if key in self._held:
                    self._offer(key)

    def use(self, keys: Sequence[Key]) -> Decision:
        """Have experts in memory, and keep them there until they are let go."""
        decision = self._make_room(keys)
        for key in keys:
            self._fixed[key] += 1
        return decision

    def let_go(self, keys: Iterable[Key]) -> Decision:
        """Undo `use`; whatever is beyond the budget goes."""
        for key in keys:
            self._release(key)
        return self._evict_for(0, Decision())

    def loaded(self, key: Key) -> None:
        """Note that a load has ended, well or not."""
        self._release(key)

    def drop(self, keys: Iterable[Key]) -> None:
        """Note that experts have no memory any more; their worth stays."""
        for key in keys:
            if key in self._held:
                self._held.remove(key)
                self.held_bytes -= self._sizes[key[0]]

    def adopt(self, budget_bytes: int) -> Decision:
        """Keep to another budget; what is in use goes when it is let go."""
        self.budget_bytes = budget_bytes
        return self._evict_for(0, Decision())

    def clear(self) -> Decision:
        """Let all go that is not in use; its worth stays."""
        idle = [key for key in self._held if not self._fixed[key]]
        self.drop(idle)
        return Decision(evict=idle)

    def release_all(self, but: Collection[Key] = ()) -> None:
        """Nothing runs: all but those that are being loaded may go."""
        for key in list(self._fixed):
            self._fixed[key] = int(key in but)
        for key in self._held:
            self._offer(key)

    def counts(self, module: str, number: int) -> list[float]:
        """How many tokens each of a module's experts has computed; earlier ones count less."""
        now = self._tokens[module] / HALF_LIFE
        worths = [self._worth.get((module, index)) for index in range(number)]
        return [0.0 if worth is None else 2.0 ** (worth - now) for worth in worths]

    def remember(self, module: str, counts: Sequence[float]) -> None:
        """Begin with what was known of a module's experts before; see `counts`."""
        for index, count in enumerate(counts):
            if count > 0:
                self._worth[module, index] = log2(count) + self._tokens[module] / HALF_LIFE

    def worthiest(self) -> list[Key]:
        """Experts that are not there, the most worthy first, as many as there is free memory for."""
        free, found = self.budget_bytes - self.held_bytes, []
        for key in sorted(self._worth.keys() - self._held, key=lambda key: -self._worth[key]):
            free -= self._sizes[key[0]]
            if free < 0:
                break
            found.append(key)
        return found

    def admit(self, keys: Sequence[Key]) -> Decision:
        """Have experts in memory that may be used soon; they may make way as any others once they are loaded."""
        return self._make_room(keys)

    def _make_room(self, keys: Sequence[Key]) -> Decision:
        decision = Decision(load=[key for key in dict.fromkeys(keys) if key not in self._held])
        self._fixed.update(keys)  # so that none of them makes way for another
        self._evict_for(sum(self._sizes[module] for module, _ in decision.load), decision)
        self._fixed.subtract(keys)
        for key in decision.load:
            self._held.add(key)
            self._fixed[key] += 1
            self.held_bytes += self._sizes[key[0]]
        return decision

    def _evict_for(self, size_bytes: int, decision: Decision) -> Decision:
        """Evict the least worthy until so much is free, or nothing is left to evict."""
        passed: list[Key] = []
        while self.held_bytes + size_bytes > self.budget_bytes and self._queue:
            worth, key = heappop(self._queue)
            if key not in self._held or worth != self._worth.get(key, 0.0):
                continue
            if self._fixed[key]:
                passed.append(key)
                continue
            decision.evict.append(key)
            self.drop([key])
        for key in passed:
            self._offer(key)
        return decision

    def _release(self, key: Key) -> None:
        self._fixed[key] -= 1
        if self._fixed[key] <= 0:
            del self._fixed[key]
            self._offer(key)

    def _offer(self, key: Key) -> None:
        """Queue an expert to be evicted one day."""
        if len(self._queue) > _STALE * len(self._held) + 64:
            self._queue = [(self._worth.get(one, 0.0), one) for one in self._held]
            heapify(self._queue)
        if key in self._held:
            heappush(self._queue, (self._worth.get(key, 0.0), key))
