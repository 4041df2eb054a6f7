"""Memory for streamed chunks: private anonymous pages, huge ones where there are such, reused by the next chunk."""

import mmap
from collections.abc import Callable
from contextlib import suppress

from surfw.errors import SurfwError

_HUGE = 2 << 20


def buffer_capacity(size_bytes: int) -> int:
    """What a buffer of this size really takes: whole pages."""
    return max(mmap.PAGESIZE, -(-size_bytes // mmap.PAGESIZE) * mmap.PAGESIZE)


class Buffer:
    """A piece of page-aligned memory; huge pages, as far as it fills them, because devices write faster into those."""

    def __init__(self, size_bytes: int) -> None:
        """Map at least `size_bytes`."""
        self.capacity_bytes = buffer_capacity(size_bytes)
        huge_bytes = size_bytes // _HUGE * _HUGE
        mapped_bytes = -(-size_bytes // _HUGE) * _HUGE if huge_bytes else self.capacity_bytes  # whole, to be aligned
        try:
            self._map = mmap.mmap(-1, mapped_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as exc:
            raise SurfwError(f"there is no memory for a chunk of {size_bytes} bytes: {exc.strerror}") from exc
        if huge_bytes:
            with suppress(OSError):  # a kernel without huge pages: ordinary ones do
                self._map.madvise(mmap.MADV_HUGEPAGE, 0, huge_bytes)
                if mapped_bytes > huge_bytes:
                    self._map.madvise(mmap.MADV_NOHUGEPAGE, huge_bytes, mapped_bytes - huge_bytes)
        self.view = memoryview(self._map)[: self.capacity_bytes]


class MappedBuffer:
    """Memory that is a file's: filled already, and shared with whoever maps the file."""

    def __init__(self, view: memoryview, expect_unchanged: Callable[[], None] = lambda: None) -> None:
        """Take a page-aligned view, which may be written to, and what looks whether the file changed since."""
        self.view = view
        self.expect_unchanged = expect_unchanged


class BufferPool:
    """Buffers between uses. Taking one never makes more than the caller gave back or had room for."""

    def __init__(self) -> None:
        """Start with none."""
        self._free: list[Buffer] = []

    def take(self, size_bytes: int) -> Buffer:
        """A buffer of at least this size: the smallest free one that fits, else a new one in place of a free one."""
        fitting = [buffer for buffer in self._free if buffer.capacity_bytes >= size_bytes]
        if fitting:
            chosen = min(fitting, key=lambda buffer: buffer.capacity_bytes)
            self._free.remove(chosen)
            return chosen
        if self._free:
            self._free.remove(min(self._free, key=lambda buffer: buffer.capacity_bytes))
        return Buffer(size_bytes)

    def give_back(self, buffer: Buffer) -> None:
        """Keep a buffer for the next that needs one."""
        self._free.append(buffer)

    def clear(self) -> None:
        """Let go of all free buffers."""
        self._free.clear()
