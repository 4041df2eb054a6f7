"""The cache against a dictionary that remembers the order of use."""

from hypothesis import given, settings
from hypothesis import strategies as st

from surfw.server.cache import LruCache

KEYS = st.integers(0, 5)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), KEYS, st.integers(0, 12)),
        st.tuples(st.just("get"), KEYS, st.just(0)),
        st.tuples(st.just("peek"), KEYS, st.just(0)),
        st.tuples(st.just("delete"), KEYS, st.just(0)),
        st.tuples(st.just("trim"), st.just(0), st.integers(0, 12)),
    ),
    max_size=60,
)


class Model:
    """What an LRU in bytes is, said slowly: a list of (key, size), most recently used last."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.items: list[tuple[int, int]] = []
        self.evictions = 0

    def drop(self, key: int) -> None:
        self.items = [item for item in self.items if item[0] != key]

    def trim(self, most: int) -> None:
        while sum(size for _, size in self.items) > most:
            self.items.pop(0)
            self.evictions += 1

    def put(self, key: int, size: int) -> None:
        self.drop(key)
        if size <= self.capacity:
            self.trim(self.capacity - size)
            self.items.append((key, size))

    def get(self, key: int) -> int | None:
        sizes = dict(self.items)
        if key in sizes:
            self.drop(key)
            self.items.append((key, sizes[key]))
        return sizes.get(key)


@settings(deadline=None)
@given(st.integers(0, 16), STEPS)
def test_behaves_like_the_model(capacity: int, steps: list[tuple[str, int, int]]) -> None:
    cache: LruCache[int, bytes] = LruCache(capacity, len)
    model = Model(capacity)
    for step, key, size in steps:
        match step:
            case "put":
                cache[key] = bytes(size)
                model.put(key, size)
            case "get":
                found = cache.get(key)
                assert (None if found is None else len(found)) == model.get(key)
            case "peek":
                assert (key in cache) == (key in dict(model.items))
            case "delete":
                assert (cache.pop(key, None) is None) == (key not in dict(model.items))
                model.drop(key)
            case "trim":
                cache.trim(size)
                model.trim(size)
        assert list(cache) == [key for key, _ in model.items]
        assert cache.bytes == sum(size for _, size in model.items) <= capacity
        assert cache.evictions == model.evictions
