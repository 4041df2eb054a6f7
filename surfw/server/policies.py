"""What the server's cache evicts where clients announce what they will read: what is needed last. No I/O, no locks."""

import heapq
from collections import OrderedDict
from collections.abc import Callable

from surfw.config import CachePolicy
from surfw.server.cache import Key, ProvingCache, Value

_FEW = 8
"""How many values a decision looks up again at most, of each kind."""


class ScheduledCache(ProvingCache[Key, Value]):
    """Evicts the proven value that is needed last, as far as that is known (see `futures`).

    Where all uses of a value were announced, as its next one is, it goes by that. Otherwise it is taken to be needed
    again as long after its last use as that is ago; so of those, the least recently used goes first, as in `LruCache`.

    A decision looks a few values up, not all: those that were used since the last one, so that a use costs nothing
    while everything fits. The times of next uses are kept in a heap, and what is at its top is looked up again. What is
    needed later than the heap says is found when all are looked up again, whenever half as many decisions were made as
    there are values.
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
            size_of: tells what a value takes of it.
            next_use: when a value is needed next, as far as that was announced; -∞ if it is now, ∞ if it never is.
            clock: the time now, on the same scale.
        """
        super().__init__(capacity_bytes, size_of)
        self._next_use = next_use
        self._clock = clock
        self._unforeseen: OrderedDict[Key, float] = OrderedDict()  # times of last uses, the longest ago first
        self._foreseen: list[tuple[float, int, Key]] = []  # a heap: minus the next use, the entry's number, the key
        self._latest: dict[Key, int] = {}  # the entry of each key that counts
        self._fresh: dict[Key, None] = {}  # foreseen, but not looked up before the next decision, in order of use
        self._entries = 0
        self._until_refresh = 0

    def __setitem__(self, key: Key, value: Value) -> None:
        super().__setitem__(key, value)
        if key in self._proven:  # as the value was that it replaces
            self.note_use(key, 0)

    def __delitem__(self, key: Key) -> None:
        super().__delitem__(key)
        self._latest.pop(key, None)
        self._fresh.pop(key, None)
        self._unforeseen.pop(key, None)

    def note_use(self, key: Key, used_bytes: int, *, foreseen: bool = False) -> None:
        """Count the bytes of a value that were used, and whether by a client that announced its next use, too."""
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
        """Return the value whose last unforeseen use is longest ago, and when it may be needed.

        One that is foreseen to be needed before that goes by what is foreseen from now on.
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
        """Return the top of the heap, without the entries of values that are gone or were used since."""
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
        """Look all next uses up again."""
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
