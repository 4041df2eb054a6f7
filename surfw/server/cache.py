"""A cache is a mapping with a budget in bytes. No I/O, no locks; a policy overrides only what is evicted."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, MutableMapping
from typing import Generic, TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


class LruCache(MutableMapping[Key, Value], Generic[Key, Value]):
    """Keeps the most recently used values, as many as fit the budget.

    Reading a value (`cache[key]`, `get`) makes it the most recently used; `in` does not, nor does iterating, which goes
    from the least to the most recent. A value that is larger than the whole budget is not kept.

    Attributes:
        capacity_bytes: the budget.
        bytes: what the values take, at most the budget.
        evictions: how many values had to go.
    """

    policy = "lru"

    def __init__(self, capacity_bytes: int, size_of: Callable[[Value], int]) -> None:
        """Start empty; `size_of` tells what a value takes of the budget."""
        self.capacity_bytes = capacity_bytes
        self.bytes = 0
        self.evictions = 0
        self._size_of = size_of
        self._values: OrderedDict[Key, Value] = OrderedDict()

    def __getitem__(self, key: Key) -> Value:
        value = self._values[key]
        self._values.move_to_end(key)
        return value

    def __setitem__(self, key: Key, value: Value) -> None:
        self.pop(key, None)
        size = self._size_of(value)
        if size > self.capacity_bytes:
            return
        self.trim(self.capacity_bytes - size)
        self._values[key] = value
        self.bytes += size

    def __delitem__(self, key: Key) -> None:
        self.bytes -= self._size_of(self._values.pop(key))

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[Key]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def trim(self, most_bytes: int) -> None:
        """Evict the least recently used values until the rest takes at most `most_bytes`."""
        while self._values and self.bytes > most_bytes:
            del self[next(iter(self._values))]
            self.evictions += 1
