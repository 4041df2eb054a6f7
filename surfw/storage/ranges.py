"""Reads of stored bytes, and how they are cut into ranges. Pure: nothing is read here.

`most_range_bytes` sets the size of a range when a chunker or a model reads a remote store. A server reads smaller
pages (`config.PAGE_BYTES`). A storage that takes one read at a time is read in pieces (`config.PIECE_BYTES`).
`RangedBackend.read_all` cuts a read and keeps several ranges in flight; `read_range` of a backend reads one range.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from surfw.config import BLOCK_BYTES, MIB

Check = Callable[[int, memoryview], None]
"""Verifies bytes, given their offset in the read and the bytes; raises, or records the damage."""

_LEAST_BYTES = 8 * MIB
_MOST_HELD_BYTES, _ALL_HELD_BYTES = 16 * MIB, 64 * MIB
_MOST_STREAMED_BYTES, _ALL_STREAMED_BYTES = 32 * MIB, 128 * MIB


class Pin:
    """The one revision that all ranges of a read must have. Usable from any thread."""

    def __init__(self, revision: str | None = None) -> None:
        """Set the revision; None takes that of the first response."""
        self.revision = revision
        self._lock = threading.Lock()

    def settle(self, seen: str | None) -> str | None:
        """Return the required revision; if none is set yet, `seen` becomes it."""
        with self._lock:
            if self.revision is None:
                self.revision = seen
            return self.revision


@dataclass(frozen=True, slots=True)
class ObjectRange:
    """`length` bytes of an object from `start` on, at the pinned revision."""

    key: str
    start: int
    length: int
    pin: Pin = field(default_factory=Pin)


@dataclass(frozen=True, slots=True)
class ObjectRead:
    """Stored bytes to read: one or several ranges of objects, consecutive in memory.

    Attributes:
        parts: the ranges; their total length is that of the destination.
        destination: writable memory.
        check: verifies whole blocks, counted from the beginning of the destination; None if the bytes are not verified.
            Without a check, all ranges of an object must have one revision.
    """

    parts: Sequence[ObjectRange]
    destination: memoryview
    check: Check | None = None

    def piece(self, start: int, stop: int) -> "ObjectRead":
        """Return the part of the read that fills bytes `start` to `stop` (end-exclusive) of the destination."""
        parts, at = list[ObjectRange](), 0
        for part in self.parts:
            low, high = max(start, at), min(stop, at + part.length)
            if low < high:
                pin = part.pin if self.check is None else Pin(part.pin.revision)
                parts.append(ObjectRange(part.key, part.start + low - at, high - low, pin))
            at += part.length
        check = self.check and shifted(self.check, start)
        return ObjectRead(parts, self.destination[start:stop], check)


def shifted(check: Check, begin: int) -> Check:
    """Return a check whose offsets are relative to `begin`."""
    return lambda at, piece: check(begin + at, piece)


def cut(read: ObjectRead, most_bytes: int) -> Iterator[ObjectRead]:
    """Cut a read into as few pieces as possible, of nearly equal size.

    Args:
        read: the read.
        most_bytes: the largest size of a piece, a multiple of the block size. Cuts are at blocks of the destination.
    """
    length = read.destination.nbytes
    blocks, count = -(-length // BLOCK_BYTES), -(-length // most_bytes)
    cuts = (min(length, blocks * index // count * BLOCK_BYTES) for index in range(count + 1)) if count else ()
    for start, stop in pairwise(cuts):
        yield read.piece(start, stop)


def most_range_bytes(connections: int, *, streamed: bool) -> int:
    """Return the largest range size for a number of connections, a multiple of the block size.

    All ranges in flight share 128 MiB (64 if buffered), so that the bytes of a layer or two keep all connections busy.
    Each is at least 8 MiB, because a request costs both ends some 2 ms of processor time, and at most 32 MiB (16 if
    buffered). Measured from a gateway on the same two cores, over 4 connections: 0.86 GB/s with ranges of 16 MiB, 0.92
    with 32 MiB.

    Args:
        connections: how many ranges are read at a time.
        streamed: whether they are streamed into place, and not buffered in memory first.
    """
    most, all_bytes = (_MOST_STREAMED_BYTES, _ALL_STREAMED_BYTES) if streamed else (_MOST_HELD_BYTES, _ALL_HELD_BYTES)
    return max(_LEAST_BYTES, min(most, all_bytes // connections // BLOCK_BYTES * BLOCK_BYTES))
