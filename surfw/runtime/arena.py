"""Address space for all experts of a module, in which only resident experts take memory.

A kernel that computes with a stack of experts finds each at its place, although most are absent. The pages of absent
experts are anonymous memory that was never written, or was given back to the kernel: they take no memory and read as
zeros.
"""

import mmap
from contextlib import suppress

from surfw.config import format_size
from surfw.errors import SurfwError
from surfw.runtime.buffers import Buffer, buffer_capacity

_HUGE = 2 << 20
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Linux's; Python names it from 3.13 on


class Arena:
    """Places for the experts of one module, all of one size.

    Attributes:
        stride: bytes from one place to the next.
        size_bytes: memory of a resident expert.
        view: the whole arena.
    """

    def __init__(self, count: int, size_bytes: int) -> None:
        """Reserve addresses for `count` experts of `size_bytes`.

        Raises:
            SurfwError: the process may not have that much address space.
        """
        self.size_bytes = buffer_capacity(size_bytes)
        huge_bytes = size_bytes // _HUGE * _HUGE
        self.stride = arena_stride(size_bytes)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
        try:
            self._map = mmap.mmap(-1, count * self.stride, flags=flags)
        except OSError as exc:
            raise SurfwError(
                f"there is no address space for {count} experts of {format_size(size_bytes)}: {exc.strerror}; raise "
                "the limit of this process (ulimit -v)"
            ) from exc
        self.view = memoryview(self._map)
        for start in range(0, count * self.stride if huge_bytes else 0, self.stride):
            with suppress(OSError):  # a kernel without huge pages uses ordinary ones
                self._map.madvise(mmap.MADV_HUGEPAGE, start, huge_bytes)
                if self.stride > huge_bytes:
                    self._map.madvise(mmap.MADV_NOHUGEPAGE, start + huge_bytes, self.stride - huge_bytes)

    def place(self, index: int) -> Buffer:
        """The memory of one expert, to be filled."""
        return Buffer.over(self.view[index * self.stride :][: self.size_bytes])

    def give_back(self, index: int) -> None:
        """Give the memory of one expert back to the kernel."""
        self._map.madvise(mmap.MADV_DONTNEED, index * self.stride, self.size_bytes)


def arena_stride(size_bytes: int) -> int:
    """The distance between places for experts of this size: whole pages, huge ones if an expert fills one."""
    page_bytes = _HUGE if size_bytes >= _HUGE else buffer_capacity(1)
    return -(-size_bytes // page_bytes) * page_bytes
