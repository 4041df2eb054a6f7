"""The planner of ranges, by properties."""

from hypothesis import example, given
from hypothesis import strategies as st

from surfw.config import BLOCK_BYTES, MIB
from surfw.storage.ranges import RangePlan, most_range_bytes, plan_ranges

LENGTHS = st.one_of(st.integers(1, 40 * MIB), st.integers(1, 5 << 30))


@given(st.integers(0, 1 << 40), LENGTHS, st.integers(MIB, 64 * MIB), st.integers(1, 40))
@example(0, 8 * MIB, 16 * MIB, 4)
@example(0, 16 * MIB, 16 * MIB, 4)
@example(7, 16 * MIB - 1, 16 * MIB, 4)
@example(0, 24 * MIB - 1, 16 * MIB, 1)
def test_every_byte_is_in_one_range_of_a_good_size(start: int, length: int, most: int, connections: int) -> None:
    plan = plan_ranges(start, start + length, most_bytes=most, connections=connections)
    assert plan.ranges[0][0] == start
    assert plan.ranges[-1][1] == start + length
    assert all(one[1] == other[0] for one, other in zip(plan.ranges, plan.ranges[1:], strict=False))
    sizes = [stop - begin for begin, stop in plan.ranges]
    assert max(sizes) <= most
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= most // 2 or sizes == [length]
    assert len(sizes) == 1 or (len(sizes) - 1) * most < length
    assert plan.at_once == min(len(sizes), connections)


def test_nothing_is_no_range() -> None:
    assert plan_ranges(5, 5, most_bytes=9, connections=4) == RangePlan((), 1)


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
