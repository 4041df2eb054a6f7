"""The planner of ranges, by properties."""

from hypothesis import example, given
from hypothesis import strategies as st

from surfw.config import MIB
from surfw.storage.ranges import LEAST_RANGE_BYTES, MOST_RANGE_BYTES, RangePlan, plan_ranges

LENGTHS = st.one_of(st.integers(1, 40 * MIB), st.integers(1, 5 << 30))


@given(st.integers(0, 1 << 40), LENGTHS, st.integers(1, 1 << 30))
@example(0, 8 * MIB, 64 * MIB)
@example(0, 16 * MIB, 64 * MIB)
@example(7, 16 * MIB - 1, 64 * MIB)
@example(0, 24 * MIB - 1, 1)
def test_every_byte_is_in_one_range_of_a_good_size_and_the_window_is_kept(start: int, length: int, window: int) -> None:
    plan = plan_ranges(start, start + length, window_bytes=window)
    assert plan.ranges[0][0] == start
    assert plan.ranges[-1][1] == start + length
    assert all(one[1] == other[0] for one, other in zip(plan.ranges, plan.ranges[1:], strict=False))
    sizes = [stop - begin for begin, stop in plan.ranges]
    assert max(sizes) <= MOST_RANGE_BYTES
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= LEAST_RANGE_BYTES or sizes == [length]
    assert len(sizes) == 1 or (len(sizes) - 1) * MOST_RANGE_BYTES < length
    assert 1 <= plan.at_once <= len(sizes)
    assert plan.at_once == 1 or plan.at_once * max(sizes) <= window
    assert plan.at_once == len(sizes) or (plan.at_once + 1) * max(sizes) > window


def test_nothing_is_no_range() -> None:
    assert plan_ranges(5, 5) == RangePlan((), 1)
