"""Properties of how reads are cut into ranges."""

from itertools import pairwise

from hypothesis import example, given
from hypothesis import strategies as st

from surfw.config import BLOCK_BYTES, MIB
from surfw.storage.ranges import ObjectRange, ObjectRead, Pin, cut, most_range_bytes

LENGTHS = st.one_of(st.integers(1, 40 * MIB), st.integers(1, 5 << 30))
MOST = st.integers(8, 64).map(lambda blocks: blocks * MIB)


class Memory:
    """An object whose size and parts are requested."""

    def __init__(self, start: int, stop: int) -> None:
        self.start, self.stop = start, stop
        self.nbytes = stop - start

    def __getitem__(self, part: slice) -> "Memory":
        assert 0 <= part.start <= part.stop <= self.nbytes
        return Memory(self.start + part.start, self.start + part.stop)


def make_read(start: int, length: int, **options: object) -> ObjectRead:
    return ObjectRead([ObjectRange("x", start, length)], Memory(0, length), **options)  # type: ignore[arg-type]


@given(st.integers(0, 1 << 40), LENGTHS, MOST)
@example(0, 8 * MIB, 16 * MIB)
@example(0, 16 * MIB, 16 * MIB)
@example(7, 16 * MIB - 1, 16 * MIB)
@example(7, 16 * MIB + 1, 16 * MIB)
@example(0, 24 * MIB - 1, 16 * MIB)
def test_every_byte_is_in_one_range_of_a_good_size(start: int, length: int, most: int) -> None:
    pieces = list(cut(make_read(start, length), most))
    (found,) = zip(*(piece.parts for piece in pieces), strict=True)
    ranges = [(part.start, part.start + part.length) for part in found]
    assert ranges[0][0] == start
    assert ranges[-1][1] == start + length
    assert all(one[1] == other[0] for one, other in pairwise(ranges))
    sizes = [stop - begin for begin, stop in ranges]
    assert max(sizes) <= most
    blocks = [-(-size // BLOCK_BYTES) for size in sizes]
    assert max(blocks) - min(blocks) <= 1
    assert not any(size % BLOCK_BYTES for size in sizes[:-1]), "blocks are verified whole"
    assert min(sizes) >= most // 2 // BLOCK_BYTES * BLOCK_BYTES or sizes == [length]
    assert len(sizes) == 1 or (len(sizes) - 1) * most < length
    assert [(piece.destination.start, piece.destination.stop) for piece in pieces] == [  # type: ignore[attr-defined]
        (begin - start, stop - start) for begin, stop in ranges
    ]


def test_nothing_is_no_range() -> None:
    assert list(cut(make_read(5, 0), 8 * MIB)) == []


@given(st.lists(st.integers(1, 9 * MIB), min_size=1, max_size=12), MOST)
def test_a_read_of_many_parts_is_cut_across_them(lengths: list[int], most: int) -> None:
    parts = [ObjectRange(f"x{index}", 3, length) for index, length in enumerate(lengths)]
    pieces = list(cut(ObjectRead(parts, Memory(0, sum(lengths))), most))  # type: ignore[arg-type]
    joined: dict[str, int] = {}
    for piece in pieces:
        assert sum(part.length for part in piece.parts) == piece.destination.nbytes <= most
        for part in piece.parts:
            assert part.start == 3 + joined.get(part.key, 0)
            joined[part.key] = joined.get(part.key, 0) + part.length
    assert joined == {part.key: part.length for part in parts}
    assert list(joined) == [part.key for part in parts]


def test_offsets_of_checks_count_from_the_beginning_of_the_read() -> None:
    seen: list[int] = []
    for piece in cut(make_read(9, 20 * MIB + 1, check=lambda at, data: seen.append(at)), 8 * MIB):
        assert piece.check is not None
        piece.check(0, memoryview(b""))
        piece.check(MIB, memoryview(b""))
    assert seen == [0, MIB, 7 * MIB, 8 * MIB, 14 * MIB, 15 * MIB]


def test_only_what_is_not_verified_has_to_be_of_one_revision() -> None:
    pinned = [piece.parts[0].pin for piece in cut(make_read(0, 20 * MIB), 8 * MIB)]
    assert pinned[0] is pinned[1] is pinned[2]
    verified = [piece.parts[0].pin for piece in cut(make_read(0, 20 * MIB, check=lambda at, data: None), 8 * MIB)]
    assert len({id(pin) for pin in verified}) == 3


def test_the_first_revision_that_is_seen_is_the_one_for_all() -> None:
    pin = Pin()
    assert [pin.settle(None), pin.settle("a"), pin.settle("b"), pin.settle(None)] == [None, "a", "a", "a"]
    assert Pin("x").settle("a") == "x"


@given(st.integers(1, 1000), st.booleans())
def test_more_connections_have_smaller_ranges_and_what_is_held_is_bounded(connections: int, streamed: bool) -> None:
    most = most_range_bytes(connections, streamed=streamed)
    assert 8 * MIB <= most <= (32 * MIB if streamed else 16 * MIB)
    assert most % BLOCK_BYTES == 0, "blocks are verified whole"
    assert most * connections <= (128 * MIB if streamed else 64 * MIB) or most == 8 * MIB
    assert most_range_bytes(connections + 1, streamed=streamed) <= most


def test_the_usual_number_of_connections() -> None:
    assert (most_range_bytes(4, streamed=True), most_range_bytes(4, streamed=False)) == (32 * MIB, 16 * MIB)
    assert most_range_bytes(16, streamed=True) == 8 * MIB
