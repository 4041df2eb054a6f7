"""The cache compared with a dictionary that records the order of use."""

from hypothesis import given, settings
from hypothesis import strategies as st

from surfw.server.cache import LruCache, ProvingCache

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
    """A slow LRU cache with a size in bytes: a list of (key, size), most recently used last."""

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


def proving(capacity: int = 8) -> ProvingCache[str, bytes]:
    return ProvingCache(capacity, len)


def test_what_was_hardly_used_goes_first() -> None:
    cache = proving(12)
    cache["good"] = b"1234"
    cache.note_use("good", 2)
    for name in "abcdef":
        cache[name] = b"12"
        cache.note_use(name, 0)
    assert set(cache) == {"good", "c", "d", "e", "f"}
    assert (cache.bytes, cache.evictions) == (12, 2)


def test_what_takes_the_place_of_a_proven_value_is_not_on_trial() -> None:
    cache = proving(12)
    cache["good"] = b"1234"
    cache.note_use("good", 2)
    cache["good"] = b"5678"
    for name in "abcdef":
        cache[name] = b"12"
    assert cache["good"] == b"5678"
    assert cache.bytes == 12


def test_what_is_on_trial_has_a_quarter_of_the_budget() -> None:
    cache = proving()
    for name in "ab":
        cache[name] = b"1234"
        cache.note_use(name, 4)
    cache["c"] = b"12"
    assert set(cache) == {"b", "c"}
    cache["d"] = b"12"
    assert set(cache) == {"b", "c", "d"}
    cache["e"] = b"1"
    assert set(cache) == {"b", "d", "e"}, "no more than a quarter on trial: the least recently used makes room"


def test_where_all_are_used_it_is_the_least_recently_used_that_goes() -> None:
    cache = proving(4)
    for name in "abcd":
        cache[name] = b"1"
        cache.note_use(name, 1)
    assert cache["a"] == b"1"
    cache["e"] = b"1"
    assert set(cache) == {"a", "c", "d", "e"}
    del cache["a"]
    assert "a" not in cache
    assert cache.get("b") is None
    cache["huge"] = b"12345"
    assert set(cache) == {"c", "d", "e"}
    cache.clear()
    assert (len(cache), cache.bytes) == (0, 0)
