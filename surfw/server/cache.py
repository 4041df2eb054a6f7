"""The server's caches and their eviction policies: mappings with a budget in bytes. No I/O, no locks."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, MutableMapping
from typing import TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


class LruCache(MutableMapping[Key, Value]):
    """Keeps as many values as fit the budget; evicts the least recently used. A value above the budget is not kept.

    Reading a value (`cache[key]`, `get`) uses it; `in` and iterating do not. Iteration goes from the least to the most
    recently used.

    Attributes:
        policy: the name of the policy, for people.
        capacity_bytes: the budget.
        bytes: the total size of the values, at most the budget.
        evictions: how many values were evicted.
        on_removed: called with the key of each value that is evicted, replaced or removed.
    """

    policy = "lru"

    def __init__(self, capacity_bytes: int, size_of: Callable[[Value], int]) -> None:
        """Start empty; `size_of` returns the size of a value."""
        self.capacity_bytes = capacity_bytes
        self.bytes = 0
        self.evictions = 0
        self.on_removed: Callable[[Key], object] = lambda _: None
        self._size_of = size_of
        self._values: OrderedDict[Key, Value] = OrderedDict()

    def __getitem__(self, key: Key) -> Value:
        self._values.move_to_end(key)
        return self._values[key]

    def __setitem__(self, key: Key, value: Value) -> None:
        self.pop(key, None)
        size = self._size_of(value)
        if size <= self.capacity_bytes:
            self.trim(self.capacity_bytes - size)
            self._values[key] = value
            self.bytes += size

    def __delitem__(self, key: Key) -> None:
        self.bytes -= self._size_of(self._values.pop(key))
        self.on_removed(key)

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[Key]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def victim(self) -> Key:
        """Return the key of the value to evict next; there is at least one."""
        return next(iter(self._values))

    def trim(self, most_bytes: int) -> None:
        """Evict values until the rest takes at most `most_bytes`."""
        while self._values and self.bytes > most_bytes:
            del self[self.victim()]
            self.evictions += 1


class ProvingCache(LruCache[Key, Value]):
    """Evicts values that were hardly used before those that were, so that unused data cannot flush the cache.

    A new value is on trial until half of its size was used (`note_use`); one that replaces a proven value is proven. If
    values on trial take more than a quarter of the budget, they are evicted first, otherwise the proven ones; of each
    kind, the least recently used first. If all values prove themselves, this is an `LruCache`.
    """

    def __init__(self, capacity_bytes: int, size_of: Callable[[Value], int]) -> None:
        """Start empty; `size_of` returns the size of a value."""
        super().__init__(capacity_bytes, size_of)
        self._trial: OrderedDict[Key, int] = OrderedDict()  # bytes used of each; least recently used first
        self._trial_bytes = 0
        self._proven: OrderedDict[Key, None] = OrderedDict()

    def __getitem__(self, key: Key) -> Value:
        value = super().__getitem__(key)
        (self._trial if key in self._trial else self._proven).move_to_end(key)
        return value

    def __setitem__(self, key: Key, value: Value) -> None:
        was_proven = key in self._proven
        super().__setitem__(key, value)
        if key not in self:
            return
        if was_proven:
            self._proven[key] = None
        else:
            self._trial[key] = 0
            self._trial_bytes += self._size_of(value)

    def __delitem__(self, key: Key) -> None:
        before = self.bytes
        super().__delitem__(key)
        if self._trial.pop(key, None) is None:
            del self._proven[key]
        else:
            self._trial_bytes -= before - self.bytes

    def note_use(self, key: Key, used_bytes: int, *, foreseen: bool = False) -> None:
        """Count the bytes of a value that were used, if it is still cached; half of its size proves it.

        Whether the use was foreseen makes no difference here; see `ScheduledCache`.
        """
        del foreseen
        if key not in self._trial:
            return
        self._trial.move_to_end(key)
        self._trial[key] += used_bytes
        size = self._size_of(self._values[key])
        if 2 * self._trial[key] >= size:
            del self._trial[key]
            self._trial_bytes -= size
            self._proven[key] = None

    def victim(self) -> Key:
        """Return the least recently used value on trial if those take too much or are all; else a proven one."""
        if self._trial and (4 * self._trial_bytes > self.capacity_bytes or not self._proven):
            return next(iter(self._trial))
        return self.proven_victim()

    def proven_victim(self) -> Key:
        """Return the proven value to evict next; there is at least one."""
        return next(iter(self._proven))
