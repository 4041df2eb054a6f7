"""The server's cache policy for announced reads: evict what is needed last. No I/O, no locks."""

import heapq
from collections import OrderedDict
from collections.abc import Callable

from surfw.config import CachePolicy
from surfw.server.cache import Key, ProvingCache, Value

_FEW = 8
"""The most values that a decision looks up again, of each kind."""


class ScheduledCache(ProvingCache[Key, Value]):
    """Evicts the proven value that is needed last, as far as that is known (see `futures`).

    If all uses of a value were announced, including its next one, the announcement counts. Otherwise a value is
    expected to be needed again after as much time as has passed since its last use; so of those, the least recently
    used is evicted first, as in `LruCache`.

    A decision looks up only a few values: those used since the last decision, so that a use costs nothing while
    everything fits. The next uses are kept in a heap, whose top is looked up again. Values that are needed later than
    the heap says are found when all are looked up again: for n values, after every n/2 decisions.
    """

    policy = "schedule"

    def __init__(
        self,
        capacity_bytes: int,
        size_of: Callable[[Value], int],
        next_use: Callable[[Key], float],
        clock: Callable[[], float],
    ) -> None:
        """Start empty.

        Args:
            capacity_bytes: the budget.
            size_of: returns the size of a value.
            next_use: returns when a value is needed next, as announced; -∞ for now, ∞ for never.
            clock: returns the current time, on the same scale.
        """
        super().__init__(capacity_bytes, size_of)
        self._next_use = next_use
        self._clock = clock
        self._unforeseen: OrderedDict[Key, float] = OrderedDict()  # times of last uses, the oldest first
        self._foreseen: list[tuple[float, int, Key]] = []  # a heap of: minus the next use, the entry's number, the key
        self._latest: dict[Key, int] = {}  # the valid entry of each key
        self._fresh: dict[Key, None] = {}  # foreseen, to be looked up at the next decision, in order of use
        self._entries = 0
        self._until_refresh = 0

    def __setitem__(self, key: Key, value: Value) -> None:
        super().__setitem__(key, value)
        if key in self._proven:  # like the value that it replaces
            self.note_use(key, 0)

    def __delitem__(self, key: Key) -> None:
        super().__delitem__(key)
        self._latest.pop(key, None)
        self._fresh.pop(key, None)
        self._unforeseen.pop(key, None)

    def note_use(self, key: Key, used_bytes: int, *, foreseen: bool = False) -> None:
        """Count the bytes of a value that were used; `foreseen` if the client announced its next use, too."""
        super().note_use(key, used_bytes, foreseen=foreseen)
        if key not in self._proven:
            return
        self._fresh.pop(key, None)
        if not foreseen:
            self._unforeseen[key] = self._clock()
            self._unforeseen.move_to_end(key)
            self._latest.pop(key, None)
        elif key not in self._unforeseen:
            self._fresh[key] = None

    def proven_victim(self) -> Key:
        """Return the proven value that is needed last, as far as that is known; there is at least one."""
        for key in self._fresh:
            self._foresee(key)
        self._fresh.clear()
        self._until_refresh -= 1
        if self._until_refresh < 0:
            self._refresh()
        expected, unforeseen = self._find_least_recent()
        when, foreseen = self._find_last_needed()
        if foreseen is not None and (unforeseen is None or when >= expected):
            return foreseen
        return super().proven_victim() if unforeseen is None else unforeseen

    def _find_least_recent(self) -> tuple[float, Key | None]:
        """Return the value whose last unforeseen use is oldest, and when it is expected to be needed.

        A value with an earlier announced use is treated as foreseen from now on.
        """
        for _ in range(min(_FEW, len(self._unforeseen))):
            key, used = next(iter(self._unforeseen.items()))
            expected = 2 * self._clock() - used
            if expected <= self._next_use(key):
                return expected, key
            del self._unforeseen[key]
            self._foresee(key)
        return 0.0, None

    def _find_last_needed(self) -> tuple[float, Key | None]:
        """Return the foreseen value that is needed last, and when."""
        for _ in range(_FEW):
            minus_then, entry, key = self._first_foreseen()
            if key is None or (minus_now := -self._next_use(key)) <= minus_then:
                break
            heapq.heapreplace(self._foreseen, (minus_now, entry, key))  # it is needed sooner than the heap says
        minus_when, _, key = self._first_foreseen()
        return -minus_when, key

    def _first_foreseen(self) -> tuple[float, int, Key | None]:
        """Return the top of the heap, after removing entries of values that are gone or were used since."""
        while self._foreseen:
            if self._latest.get(self._foreseen[0][2]) == self._foreseen[0][1]:
                return self._foreseen[0]
            heapq.heappop(self._foreseen)
        return 0.0, 0, None

    def _foresee(self, key: Key) -> None:
        self._entries += 1
        self._latest[key] = self._entries
        heapq.heappush(self._foreseen, (-self._next_use(key), self._entries, key))
        if len(self._foreseen) > _FEW * (len(self._latest) + _FEW):
            self._refresh()

    def _refresh(self) -> None:
        """Look up all next uses again."""
        self._foreseen = [(-self._next_use(key), entry, key) for key, entry in self._latest.items()]
        heapq.heapify(self._foreseen)
        self._until_refresh = len(self._latest) // 2


def make_cache(
    policy: CachePolicy,
    capacity_bytes: int,
    size_of: Callable[[Value], int],
    next_use: Callable[[Key], float],
    clock: Callable[[], float],
) -> ProvingCache[Key, Value]:
    """Return an empty cache with this policy; see `ScheduledCache` for the rest."""
    if policy == "lru":
        return ProvingCache(capacity_bytes, size_of)
    return ScheduledCache(capacity_bytes, size_of, next_use, clock)
