"""Address space for all experts of a module, of which only those in memory take any.

A kernel that computes with a stack of experts finds each at its place, although most are not there: their pages are
anonymous memory that was never written to, or that was given back. It takes nothing, and would read as zeros.
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
        size_bytes: what an expert that is there takes.
        view: all of it.
    """

    def __init__(self, count: int, size_bytes: int) -> None:
        """Reserve addresses for `count` experts of `size_bytes`.

        Raises:
            SurfwError: the process may not have so many.
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
            with suppress(OSError):  # a kernel without huge pages: ordinary ones do
                self._map.madvise(mmap.MADV_HUGEPAGE, start, huge_bytes)
                if self.stride > huge_bytes:
                    self._map.madvise(mmap.MADV_NOHUGEPAGE, start + huge_bytes, self.stride - huge_bytes)

    def place(self, index: int) -> Buffer:
        """The memory of one expert, to be filled."""
        return Buffer.over(self.view[index * self.stride :][: self.size_bytes])

    def give_back(self, index: int) -> None:
        """Let the memory of one expert go."""
        self._map.madvise(mmap.MADV_DONTNEED, index * self.stride, self.size_bytes)


def arena_stride(size_bytes: int) -> int:
    """How far places for experts of this size lie apart: whole pages, huge ones for experts that fill one."""
    page_bytes = _HUGE if size_bytes >= _HUGE else buffer_capacity(1)
    return -(-size_bytes // page_bytes) * page_bytes
