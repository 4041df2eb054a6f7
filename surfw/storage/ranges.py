"""Which byte ranges make up a read, and how many of them may be under way. Pure: nothing is read here."""

from dataclasses import dataclass
from itertools import pairwise

from surfw.config import MIB

LEAST_RANGE_BYTES, MOST_RANGE_BYTES = 8 * MIB, 16 * MIB
"""A range of this size keeps a connection busy for longer than it takes to ask for the next one."""

WINDOW_BYTES = 64 * MIB
"""What may be asked for, and not have arrived, at a time."""


@dataclass(frozen=True, slots=True)
class RangePlan:
    """A read, cut up.

    Attributes:
        ranges: start and stop (end-exclusive) of each, in order; each begins where the one before it ends.
        at_once: how many of them may be under way, at least one.
    """

    ranges: tuple[tuple[int, int], ...]
    at_once: int


def plan_ranges(start: int, stop: int, *, window_bytes: int = WINDOW_BYTES) -> RangePlan:
    """Cut bytes `start` to `stop` (end-exclusive) into as few equal ranges of 8 to 16 MiB as will do.

    A read of up to 16 MiB is one range.

    Args:
        start: the first byte.
        stop: the one behind the last.
        window_bytes: what may be under way in all; one range may be, however large.
    """
    length = stop - start
    if length <= 0:
        return RangePlan((), 1)
    count = -(-length // MOST_RANGE_BYTES)
    cuts = [start + length * index // count for index in range(count + 1)]
    largest = -(-length // count)
    return RangePlan(tuple(pairwise(cuts)), max(1, min(count, window_bytes // largest)))
