"""Which byte ranges make up a read, and how many of them may be under way. Pure: nothing is read here."""

from dataclasses import dataclass
from itertools import pairwise

from surfw.config import BLOCK_BYTES, MIB

_LEAST_BYTES = 8 * MIB
_HELD_WINDOW_BYTES, _MOST_HELD_BYTES = 64 * MIB, 16 * MIB
_STREAMED_WINDOW_BYTES, _MOST_STREAMED_BYTES = 128 * MIB, 32 * MIB


@dataclass(frozen=True, slots=True)
class RangePlan:
    """A read, cut up.

    Attributes:
        ranges: start and stop (end-exclusive) of each, in order; each begins where the one before it ends.
        at_once: how many of them may be under way, at least one.
    """

    ranges: tuple[tuple[int, int], ...]
    at_once: int


def most_range_bytes(connections: int, *, streamed: bool) -> int:
    """How large a range may be, of as many at a time as there are connections: 8 to 32 MiB, whole blocks.

    A request costs both ends some 2 ms of processor time: from a gateway on the same two cores, over 4 connections, 2.2
    GB came at 0.86 GB/s in ranges of 16 MiB, and at 0.92 in 32. With more connections ranges are smaller, so that the
    bytes of a layer or two keep all of them busy; all together are 128 MiB (64 where held) until a range has only 8.

    Args:
        connections: how many ranges are read at a time.
        streamed: whether they are streamed into place; others, which are held in memory first, are at most 16 MiB.
    """
    window, most = (
        (_STREAMED_WINDOW_BYTES, _MOST_STREAMED_BYTES) if streamed else (_HELD_WINDOW_BYTES, _MOST_HELD_BYTES)
    )
    return max(_LEAST_BYTES, min(most, window // connections // BLOCK_BYTES * BLOCK_BYTES))


def plan_ranges(start: int, stop: int, *, most_bytes: int, connections: int) -> RangePlan:
    """Cut bytes `start` to `stop` (end-exclusive) into as few equal ranges as will do.

    Args:
        start: the first byte.
        stop: the one behind the last.
        most_bytes: of a range; where there are several, each has at least half of it.
        connections: how many may be under way.
    """
    length = stop - start
    if length <= 0:
        return RangePlan((), 1)
    count = -(-length // most_bytes)
    cuts = [start + length * index // count for index in range(count + 1)]
    return RangePlan(tuple(pairwise(cuts)), min(count, connections))
