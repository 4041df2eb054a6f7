"""Which experts are kept in memory, and which are evicted. Pure: the router's choices in, decisions out.

Layers run in a cycle, but experts do not: some are chosen often, some hardly ever, and their popularity changes with
the text. So an expert's worth is how often it was chosen, with older uses counting less: LRFU (D. Lee et al., «LRFU: a
spectrum of policies that subsumes the least recently used and least frequently used policies», IEEE Transactions on
Computers 50(12), 2001). Each token that an expert computes adds 1, and every worth halves every `HALF_LIFE` tokens of
the module. The expert with the least worth is evicted, whatever its module. One that was just used for the first time
has the least worth and is evicted next, so that rare experts do not evict those that are used all the time.

Invariants: an expert in use is not evicted; the resident experts fit the budget whenever those in use do; an expert
whose load has not finished keeps its place.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from math import log2

HALF_LIFE = 256
"""Tokens after which a use counts half."""

_STALE = 4
"""The queue of victims is rebuilt when it is this many times as long as the number of experts in memory."""

Key = tuple[str, int]
"""A module's path, and the index of one of its experts."""


@dataclass(slots=True)
class Decision:
    """What a driver has to do, in this order: free the memory of some experts, and load others."""

    evict: list[Key] = field(default_factory=list)
    load: list[Key] = field(default_factory=list)


class ExpertTable:
    """The experts in memory, under one budget for all modules.

    Attributes:
        budget_bytes: the memory that all of them may take.
        held_bytes: the memory that they take.
    """

    def __init__(self, sizes: Mapping[str, int], budget_bytes: int) -> None:
        """Start empty.

        Args:
            sizes: the memory that one expert of each module takes.
            budget_bytes: at least the memory of all experts that may be used at once.
        """
        self._sizes = sizes
        self.budget_bytes = budget_bytes
        self.held_bytes = 0
        self._held: set[Key] = set()
        self._fixed: Counter[Key] = Counter()  # experts in use or being loaded, with the number of reasons
        self._tokens: Counter[str] = Counter()  # tokens that each module has seen
        self._worth: dict[Key, float] = {}  # log2, scaled to the module's first token so that decay needs no updates
        self._queue: list[tuple[float, Key]] = []  # a heap, which may contain stale entries

    def __contains__(self, key: Key) -> bool:
        """Whether an expert has a place."""
        return key in self._held

    def __len__(self) -> int:
        """How many experts have a place."""
        return len(self._held)

    def note(self, module: str, counts: Sequence[int]) -> None:
        """Count a forward of a module: `counts` has the number of tokens that each expert computes."""
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
        """Give experts a place in memory, and hold them until `let_go`."""
        decision = self._make_room(keys)
        for key in keys:
            self._fixed[key] += 1
        return decision

    def let_go(self, keys: Iterable[Key]) -> Decision:
        """Undo `use`, and evict what exceeds the budget."""
        for key in keys:
            self._release(key)
        return self._evict_for(0, Decision())

    def loaded(self, key: Key) -> None:
        """Note that a load has ended, successfully or not."""
        self._release(key)

    def drop(self, keys: Iterable[Key]) -> None:
        """Note that experts have no memory any more; their worth is kept."""
        for key in keys:
            if key in self._held:
                self._held.remove(key)
                self.held_bytes -= self._sizes[key[0]]

    def adopt(self, budget_bytes: int) -> Decision:
        """Adopt another budget; experts in use are evicted once they are released."""
        self.budget_bytes = budget_bytes
        return self._evict_for(0, Decision())

    def clear(self) -> Decision:
        """Evict all idle experts; their worth is kept."""
        idle = [key for key in self._held if not self._fixed[key]]
        self.drop(idle)
        return Decision(evict=idle)

    def release_all(self, but: Collection[Key] = ()) -> None:
        """Release all experts except those being loaded; nothing runs any more."""
        for key in list(self._fixed):
            self._fixed[key] = int(key in but)
        for key in self._held:
            self._offer(key)

    def counts(self, module: str, number: int) -> list[float]:
        """How many tokens each of a module's experts has computed; earlier tokens count less."""
        now = self._tokens[module] / HALF_LIFE
        worths = [self._worth.get((module, index)) for index in range(number)]
        return [0.0 if worth is None else 2.0 ** (worth - now) for worth in worths]

    def remember(self, module: str, counts: Sequence[float]) -> None:
        """Start from the `counts` of an earlier run."""
        for index, count in enumerate(counts):
            if count > 0:
                self._worth[module, index] = log2(count) + self._tokens[module] / HALF_LIFE

    def worthiest(self) -> list[Key]:
        """The absent experts with the most worth, in that order, as many as fit into free memory."""
        free, found = self.budget_bytes - self.held_bytes, []
        for key in sorted(self._worth.keys() - self._held, key=lambda key: -self._worth[key]):
            free -= self._sizes[key[0]]
            if free < 0:
                break
            found.append(key)
        return found

    def admit(self, keys: Sequence[Key]) -> Decision:
        """Give a place to experts that may be used soon; they can be evicted as any other once they are loaded."""
        return self._make_room(keys)

    def _make_room(self, keys: Sequence[Key]) -> Decision:
        decision = Decision(load=[key for key in dict.fromkeys(keys) if key not in self._held])
        self._fixed.update(keys)  # so that none of them is evicted for another
        self._evict_for(sum(self._sizes[module] for module, _ in decision.load), decision)
        self._fixed.subtract(keys)
        for key in decision.load:
            self._held.add(key)
            self._fixed[key] += 1
            self.held_bytes += self._sizes[key[0]]
        return decision

    def _evict_for(self, size_bytes: int, decision: Decision) -> Decision:
        """Evict the experts with the least worth until this much is free, or none is left to evict."""
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
        """Queue an expert as a candidate for eviction."""
        if len(self._queue) > _STALE * len(self._held) + 64:
            self._queue = [(self._worth.get(one, 0.0), one) for one in self._held]
            heapify(self._queue)
        if key in self._held:
            heappush(self._queue, (self._worth.get(key, 0.0), key))
