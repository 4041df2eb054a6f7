"""Memory for chunks: buffers of private anonymous pages, and the layout of a chunk's tensors in them. Without torch.

Buffers use huge pages if the kernel has them. Every tensor in a buffer begins at a multiple of 64 bytes. Stored
payloads have no gaps: their tensors are ordered so that the aligned ones come first and need not move; the few others
are moved to aligned places within the same buffer, from the last to the first, once the payload is verified. Alignment
matters not only for speed: some kernels give other bits for unaligned weights.
"""

import mmap
from collections.abc import Sequence
from contextlib import suppress

from surfw.config import aligned
from surfw.errors import SurfwError

_HUGE = 2 << 20


def plan_layout(sizes_bytes: Sequence[int]) -> tuple[list[int], int]:
    """The offsets of tensors of these sizes, each a multiple of 64, and the bytes that they take together."""
    offsets, end = [], 0
    for size in sizes_bytes:
        offsets.append(aligned(end))
        end = offsets[-1] + size
    return offsets, end


def spread(payload: memoryview, sizes_bytes: Sequence[int]) -> None:
    """Move the tensors of a payload without gaps to their places, within the same memory.

    Every place is at or after the tensor's stored offset, so moving from the last to the first overwrites nothing.
    """
    stored = sum(sizes_bytes)
    for size, place in zip(reversed(sizes_bytes), reversed(plan_layout(sizes_bytes)[0]), strict=True):
        stored -= size
        if place != stored and size:
            payload[place : place + size] = payload[stored : stored + size]


def buffer_capacity(size_bytes: int) -> int:
    """The size of a buffer for `size_bytes`: whole pages, at least one."""
    return max(mmap.PAGESIZE, -(-size_bytes // mmap.PAGESIZE) * mmap.PAGESIZE)


class Buffer:
    """Page-aligned memory, in huge pages as far as it fills them, since devices write to those faster.

    Attributes:
        is_locked: whether its pages are locked, so that a device can read them directly.
        is_shared: whether several models may hold it, so that it must not be written again.
    """

    def __init__(self, size_bytes: int) -> None:
        """Map at least `size_bytes`."""
        self.capacity_bytes = buffer_capacity(size_bytes)
        self.is_locked = self.is_shared = False
        huge_bytes = size_bytes // _HUGE * _HUGE
        mapped_bytes = -(-size_bytes // _HUGE) * _HUGE if huge_bytes else self.capacity_bytes  # whole, to be aligned
        try:
            self._map = mmap.mmap(-1, mapped_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as exc:
            raise SurfwError(f"there is no memory for a chunk of {size_bytes} bytes: {exc.strerror}") from exc
        if huge_bytes:
            with suppress(OSError):  # a kernel without huge pages uses ordinary ones
                self._map.madvise(mmap.MADV_HUGEPAGE, 0, huge_bytes)
                if mapped_bytes > huge_bytes:
                    self._map.madvise(mmap.MADV_NOHUGEPAGE, huge_bytes, mapped_bytes - huge_bytes)
        self.view = memoryview(self._map)[: self.capacity_bytes]

    @classmethod
    def over(cls, view: memoryview) -> "Buffer":
        """A buffer over memory that another object maps, which must be page-aligned and consist of whole pages."""
        buffer = cls.__new__(cls)
        buffer.capacity_bytes, buffer.view = view.nbytes, view
        buffer.is_locked = buffer.is_shared = False
        return buffer
