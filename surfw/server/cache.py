"""A cache is a mapping with a budget in bytes. No I/O, no locks; a policy decides only what is evicted.

A policy is a subclass of `Cache`: it is told what is added, read and removed, and names what is evicted next.
"""

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, MutableMapping
from typing import ClassVar, Generic, TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


class Cache(MutableMapping[Key, Value], ABC, Generic[Key, Value]):
    """Keeps as many values as fit the budget. A value that is larger than the whole budget is not kept.

    Reading a value (`cache[key]`, `get`) is a use of it; `in` is not, nor is iterating.

    Attributes:
        policy: the name of the policy, for people.
        capacity_bytes: the budget.
        bytes: what the values take, at most the budget.
        evictions: how many values were evicted.
    """

    policy: ClassVar[str]

    def __init__(self, capacity_bytes: int, size_of: Callable[[Value], int]) -> None:
        """Start empty; `size_of` tells what a value takes of the budget."""
        self.capacity_bytes = capacity_bytes
        self.bytes = 0
        self.evictions = 0
        self._size_of = size_of
        self._values: OrderedDict[Key, Value] = OrderedDict()

    @abstractmethod
    def victim(self) -> Key:
        """Return the key of the value to evict next; there is at least one."""

    def _added(self, key: Key, size: int) -> None:
        """Note that a value of so many bytes was added."""

    def _read(self, key: Key) -> None:
        """Note that a value was read."""

    def _removed(self, key: Key, size: int) -> None:
        """Note that a value of so many bytes was removed."""

    def __getitem__(self, key: Key) -> Value:
        value = self._values[key]
        self._read(key)
        return value

    def __setitem__(self, key: Key, value: Value) -> None:
        self.pop(key, None)
        size = self._size_of(value)
        if size > self.capacity_bytes:
            return
        self.trim(self.capacity_bytes - size)
        self._values[key] = value
        self.bytes += size
        self._added(key, size)

    def __delitem__(self, key: Key) -> None:
        size = self._size_of(self._values.pop(key))
        self.bytes -= size
        self._removed(key, size)

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[Key]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def trim(self, most_bytes: int) -> None:
        """Evict values until the rest takes at most `most_bytes`."""
        while self._values and self.bytes > most_bytes:
            del self[self.victim()]
            self.evictions += 1


class LruCache(Cache[Key, Value]):
    """Evicts the least recently used value. Iterating goes from the least to the most recently used."""

    policy = "lru"

    def _read(self, key: Key) -> None:
        self._values.move_to_end(key)

    def victim(self) -> Key:
        """Return the least recently used."""
        return next(iter(self._values))


class ProvingCache(Cache[Key, Value]):
    """Evicts values that were hardly used before those that were, so that nobody can flush it with what is not used.

    A new value is on trial until half of its size was used (`note_use`); one that replaces a proven value is proven.
    While those on trial take more than a quarter of the budget, they make room; otherwise the proven values do, and of
    each kind the least recently used. Where all values prove themselves, this is an `LruCache`.
    """

    policy = "lru"

    def __init__(self, capacity_bytes: int, size_of: Callable[[Value], int]) -> None:
        """Start empty; `size_of` tells what a value takes of the budget."""
        super().__init__(capacity_bytes, size_of)
        self._trial: OrderedDict[Key, int] = OrderedDict()  # how much was used of each; least recently used first
        self._trial_bytes = 0
        self._proven: OrderedDict[Key, None] = OrderedDict()

    def note_use(self, key: Key, used_bytes: int) -> None:
        """Note that so many bytes of a value were used, if it is still there."""
        if key not in self._trial:
            return
        self._read(key)
        self._trial[key] += used_bytes
        size = self._size_of(self._values[key])
        if 2 * self._trial[key] >= size:
            self._prove(key, size)

    def _prove(self, key: Key, size: int) -> None:
        del self._trial[key]
        self._trial_bytes -= size
        self._proven[key] = None

    def __setitem__(self, key: Key, value: Value) -> None:
        was_proven = key in self._proven
        super().__setitem__(key, value)
        if was_proven and key in self._trial:
            self._prove(key, self._size_of(value))

    def _added(self, key: Key, size: int) -> None:
        self._trial[key] = 0
        self._trial_bytes += size

    def _read(self, key: Key) -> None:
        (self._trial if key in self._trial else self._proven).move_to_end(key)

    def _removed(self, key: Key, size: int) -> None:
        if self._trial.pop(key, None) is None:
            del self._proven[key]
        else:
            self._trial_bytes -= size

    def victim(self) -> Key:
        """Return the least recently used value on trial if those take too much, or all are; else of the proven ones."""
        is_trial = self._trial and (4 * self._trial_bytes > self.capacity_bytes or not self._proven)
        return next(iter(self._trial if is_trial else self._proven))
