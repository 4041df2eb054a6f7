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


class ProvingCache(MutableMapping[Key, Value], Generic[Key, Value]):
    """A cache in which values that were hardly used go before those that were, whoever fills it with them.

    A new value is on trial until half of its size was used (`note_use`); one that takes the place of another has proved
    itself if that one had. While those on trial take more than a quarter of the budget, they make room; otherwise the
    values that have proved themselves do, and of each kind the least recently used. Where all values prove themselves,
    this is an `LruCache`.

    Attributes:
        capacity_bytes: the budget.
    """

    policy = "lru"

    def __init__(self, capacity_bytes: int, size_of: Callable[[Value], int]) -> None:
        """Start empty; `size_of` tells what a value takes of the budget."""
        self.capacity_bytes = capacity_bytes
        self._size_of = size_of
        self._trial: LruCache[Key, Value] = LruCache(capacity_bytes, size_of)
        self._proven: LruCache[Key, Value] = LruCache(capacity_bytes, size_of)
        self._used: dict[Key, int] = {}

    @property
    def bytes(self) -> int:
        """What the values take, at most the budget."""
        return self._trial.bytes + self._proven.bytes

    @property
    def evictions(self) -> int:
        """How many values had to go."""
        return self._trial.evictions + self._proven.evictions

    def note_use(self, key: Key, used_bytes: int) -> None:
        """So many bytes of a value were used, if it is there."""
        if key in self._trial:
            self._used[key] += used_bytes
            if 2 * self._used[key] >= self._size_of(self._trial[key]):
                del self._used[key]
                self._proven[key] = self._trial.pop(key)

    def __getitem__(self, key: Key) -> Value:
        return self._trial[key] if key in self._trial else self._proven[key]

    def __setitem__(self, key: Key, value: Value) -> None:
        has_proved_itself = key in self._proven
        self.pop(key, None)
        size = self._size_of(value)
        if size > self.capacity_bytes:
            return
        self.trim(self.capacity_bytes - size)
        if has_proved_itself:
            self._proven[key] = value
        else:
            self._trial[key], self._used[key] = value, 0

    def __delitem__(self, key: Key) -> None:
        if self._used.pop(key, None) is None:
            del self._proven[key]
        else:
            del self._trial[key]

    def __contains__(self, key: object) -> bool:
        return key in self._trial or key in self._proven

    def __iter__(self) -> Iterator[Key]:
        yield from self._trial
        yield from self._proven

    def __len__(self) -> int:
        return len(self._trial) + len(self._proven)

    def trim(self, most_bytes: int) -> None:
        """Evict values until the rest takes at most `most_bytes`."""
        while self.bytes > most_bytes:
            if self._trial and (4 * self._trial.bytes > self.capacity_bytes or not self._proven):
                del self._used[next(iter(self._trial))]
                self._trial.trim(self._trial.bytes - 1)
            else:
                self._proven.trim(self._proven.bytes - 1)
