"""Futures: requests come first, then the next chunks of each client's cycle, with one clock for all clients."""

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from surfw.server.futures import Future, Futures, Part

CYCLE = ("a", "b", "c", "d", "e", "f", "g", "h", "i", "j")


def whole(chunk: str) -> Part:
    return Part(chunk, 0.0, 1.0)


def read(futures: Futures, future: Future, chunks: str, *, cost: float = 1.0) -> None:
    """Read chunks one after another."""
    for chunk in chunks:
        with future.reading(whole(chunk), futures.now):
            pass
        futures.now += cost


def order(futures: Futures, chunks: str) -> str:
    """The chunks by when they are needed, soonest first, without those that are never needed."""
    when = {chunk: futures.next_use(whole(chunk)) for chunk in chunks}
    return "".join(sorted((one for one in chunks if when[one] < math.inf), key=when.__getitem__))


def test_what_comes_next_in_the_cycle_is_needed_first() -> None:
    futures = Futures()
    assert futures.next_use(whole("a")) == futures.next_use(None) == math.inf
    future = futures.add(CYCLE, ())
    assert order(futures, "jihgfedcbax") == "abcdefghij"
    read(futures, future, "abc")
    assert order(futures, "abcdefghij") == "defghijabc"
    read(futures, future, "defghija")
    assert order(futures, "abcdefghij") == "bcdefghija"
    futures.remove(future)
    assert order(futures, "abcdefghij") == ""


def test_what_is_kept_is_needed_in_the_first_pass_only() -> None:
    futures = Futures()
    future = futures.add(CYCLE, ("b", "d", "j"))
    read(futures, future, "abc")
    assert order(futures, "abcdefghij") == "defghijabc", "b might still be asked for"
    read(futures, future, "defghij")
    assert order(futures, "abcdefghij") == "acefghi"
    assert abs(futures.next_use(whole("a")) - futures.now) < 1, "and not a chunk of those that are kept later"
    read(futures, future, "ac")
    assert order(futures, "abcdefghij") == "efghiac"
    assert not future.knows("b")


def test_the_first_pass_is_over_where_the_next_begins_without_its_end() -> None:
    futures = Futures()
    future = futures.add(CYCLE, ("i", "j"))
    read(futures, future, "abcdefghac")
    assert order(futures, "abcdefghij") == "defghabc"


def test_what_is_asked_for_is_needed_now_until_it_was_sent() -> None:
    futures = Futures()
    future = futures.add(CYCLE, ())
    with future.reading(whole("a"), 0) as asked:
        assert futures.next_use(Part("a", 0.0, 0.5)) == futures.next_use(Part("a", 0.5, 1.0)) == -math.inf
        asked.start = 0.5
        assert futures.next_use(Part("a", 0.0, 0.5)) > futures.next_use(whole("j"))
        assert futures.next_use(Part("a", 0.5, 1.0)) == -math.inf
        with future.reading(whole("b"), 0):
            assert futures.next_use(whole("b")) == -math.inf
    assert order(futures, "abcdefghij") == "cdefghijab"


def test_parts_of_a_chunk_follow_each_other() -> None:
    futures = Futures()
    future = futures.add(CYCLE, ())
    thirds = [Part("a", index / 3, (index + 1) / 3) for index in range(3)]
    for third in thirds[:2]:
        with future.reading(third, futures.now):
            pass
        futures.now += 1
    assert futures.next_use(thirds[2]) < futures.next_use(whole("b")) < futures.next_use(whole("j"))
    assert futures.next_use(whole("j")) < futures.next_use(thirds[0]) < futures.next_use(thirds[1])


def test_a_late_request_leaves_the_place_where_it_was_and_a_jump_does_not() -> None:
    futures = Futures()
    future = futures.add(CYCLE, ())
    read(futures, future, "abcdefcd")
    assert order(futures, "abcdefghij") == "ghijabcdef"
    read(futures, future, "a")
    assert order(futures, "abcdefghij") == "bcdefghija", "another prompt"


def test_a_chunk_that_recurs_is_needed_at_the_nearest_of_its_places() -> None:
    futures = Futures()
    future = futures.add(("a", "s", "b", "s", "c"), ())
    read(futures, future, "as")
    assert order(futures, "abcs") == "bsca"
    read(futures, future, "bs")
    assert order(futures, "abcs") == "casb"


def test_a_slow_client_needs_what_is_near_later_than_a_fast_one_what_is_far() -> None:
    futures = Futures()
    slow, fast = futures.add(("a", "b", "c", "d"), ()), futures.add(("w", "x", "y", "z"), ())
    for chunk in "abcd":
        read(futures, slow, chunk)
        read(futures, fast, "wxyz" * 2)
    assert order(futures, "bcdwxyz") == "wxyzbcd"


def test_a_client_that_fell_silent_is_expected_back_later_and_later() -> None:
    futures = Futures()
    idle, busy = futures.add(("a", "b", "c", "d"), ()), futures.add(("w", "x", "y", "z"), ())
    for pair in ("aw", "bx", "cy", "dz") * 2:
        read(futures, idle, pair[0])
        read(futures, busy, pair[1])
    assert order(futures, "adwz") == "awdz"
    read(futures, busy, "wxyz" * 3)
    assert order(futures, "adwz") == "wzad"
    read(futures, idle, "ab")
    assert order(futures, "adwz")[0] != "a"


@settings(deadline=None)
@given(
    st.lists(st.sampled_from("abc"), max_size=6),
    st.lists(st.sampled_from("abcd"), max_size=3),
    st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 3), st.integers(1, 4), st.floats(0, 10)), max_size=30),
)
def test_whatever_is_announced_and_asked_for_times_are_numbers(
    cycle: list[str], kept: list[str], steps: list[tuple[str, int, int, float]]
) -> None:
    futures = Futures()
    future = futures.add(cycle, kept)
    for chunk, start, stop, took in steps:
        part = Part(chunk, min(start, stop) / 4, max(start, stop) / 4)
        with future.reading(part, futures.now):
            pass
        futures.now += took
        for one in "abcd":
            when = futures.next_use(whole(one))
            assert not math.isnan(when)
            assert (when < math.inf) == future.knows(one)
        assert not future.knows("d")
