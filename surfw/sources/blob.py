"""One file of a disk cache: the stored bytes of a form, then one byte per block, which is 1 if the block is present.

Blocks are locked while they are fetched, so that several processes do not fetch the same ones.
"""

import contextlib
import errno
import fcntl
import mmap
import os
import struct
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Self

from surfw.config import BLOCK_BYTES
from surfw.manifest import Form, count_blocks

_TRY_LOCK = getattr(fcntl, "F_OFD_SETLK", None)
"""Linux's open file description locks: released when the file is closed, even if the process is killed."""

_FLOCK = struct.Struct("hhqqi4x")
_TAKEN = {errno.EAGAIN, errno.EACCES}


class Blob:
    """An open file with the cached blocks of one form."""

    def __init__(self, path: Path, form: Form, fd: int) -> None:
        """Take ownership of an open file descriptor."""
        self.path = path
        self._form = form
        self._fd = fd
        self._direct: int | None = None  # the same file opened with O_DIRECT; -1 if that is not possible
        self._takes_direct = True
        self._lock = threading.Lock()
        self.count = count_blocks(form.stored_bytes)

    @classmethod
    def open(cls, path: Path, form: Form) -> Self | None:
        """Open a blob, read-only if it cannot be written; None if there is none, or one that was never finished."""
        size = form.stored_bytes + count_blocks(form.stored_bytes)
        for mode in (os.O_RDWR, os.O_RDONLY):
            try:
                fd = os.open(path, mode | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            except FileNotFoundError:
                return None
            except OSError as exc:
                if exc.errno in {errno.EACCES, errno.EPERM, errno.EROFS} and mode == os.O_RDWR:
                    continue
                raise
            if os.fstat(fd).st_size == size:
                return cls(path, form, fd)
            os.close(fd)
            return None
        return None

    def present(self, first: int = 0, stop: int | None = None) -> bytes:
        """Return one byte per block from `first` to `stop` (end-exclusive): 1 if the block is present."""
        stop = self.count if stop is None else stop
        flags = os.pread(self._fd, stop - first, self._form.stored_bytes + first)
        return flags.ljust(stop - first, b"\0")

    def write(self, first: int, data: memoryview, *, is_mapped_next: bool) -> None:
        """Write whole blocks, starting at block `first`, and mark them present.

        Whole pages bypass the page cache, for writes as for reads: copying them there took 2 s of processor time per
        GiB. If the file system or the alignment of the data does not allow that, they go through the page cache.

        Args:
            first: the first block.
            data: the blocks.
            is_mapped_next: whether the file will be mapped, so that the blocks should be in the page cache.

        Raises:
            OSError: the blocks cannot be written; they are not marked.
        """
        self._expect_writable()
        start, whole = first * BLOCK_BYTES, len(data) - len(data) % mmap.PAGESIZE
        done = 0 if is_mapped_next else self._write_direct(data[:whole], start)
        while done < len(data):
            done += os.pwrite(self._fd, data[done:], start + done)
        os.pwrite(self._fd, b"\1" * count_blocks(len(data)), self._form.stored_bytes + first)
        if not is_mapped_next:
            os.posix_fadvise(self._fd, 0, start + done, os.POSIX_FADV_DONTNEED)  # starts writeback of dirty pages

    def _write_direct(self, data: memoryview, start: int) -> int:
        """Write past the page cache, and return how many bytes were written before it was refused, if it was."""
        with self._lock:
            if self._direct is None:
                self._direct = _open_direct(self._fd)
        done = 0
        while self._direct >= 0 and self._takes_direct and done < len(data):
            try:
                written = os.pwrite(self._direct, data[done:], start + done)
            except OSError:  # a real error will recur in the ordinary write
                written = 0
            self._takes_direct = written > 0
            done += written
        return done

    def forget(self, blocks: Iterable[int]) -> None:
        """Mark blocks as missing.

        Raises:
            OSError: the marks cannot be written.
        """
        self._expect_writable()
        for block in blocks:
            os.pwrite(self._fd, b"\0", self._form.stored_bytes + block)

    def _expect_writable(self) -> None:
        if fcntl.fcntl(self._fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EROFS, "it may only be read", str(self.path))

    def lock(self, first: int, stop: int) -> bool:
        """Try to lock blocks until `unlock` or `close`. Returns False if somebody else holds them."""
        if _TRY_LOCK is None:
            return True
        try:
            fcntl.fcntl(self._fd, _TRY_LOCK, self._range(fcntl.F_WRLCK, first, stop))
        except OSError as exc:
            if exc.errno in _TAKEN:
                return False
            if exc.errno in {errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}:
                return True  # the file system has no such locks: blocks may be fetched twice
            raise
        return True

    def unlock(self, first: int, stop: int) -> None:
        """Release the lock on blocks."""
        if _TRY_LOCK is not None:
            with contextlib.suppress(OSError):
                fcntl.fcntl(self._fd, _TRY_LOCK, self._range(fcntl.F_UNLCK, first, stop))

    def _range(self, kind: int, first: int, stop: int) -> bytes:
        return _FLOCK.pack(kind, os.SEEK_SET, first * BLOCK_BYTES, (stop - first) * BLOCK_BYTES, 0)

    def close(self) -> None:
        """Close the file and release its locks."""
        for fd in (self._fd, self._direct):
            if fd is not None and fd >= 0:
                os.close(fd)
        self._fd = self._direct = -1

    def __del__(self) -> None:
        """Close the file: the task that opened it in a thread may have been cancelled."""
        self.close()


def block_bytes(form: Form, block: int) -> int:
    """Return the size of a block in bytes; the last one of a form may be shorter."""
    return min(BLOCK_BYTES, form.stored_bytes - block * BLOCK_BYTES)


def _open_direct(fd: int) -> int:
    """Open an open file again with O_DIRECT, for writing past the page cache; -1 if that is not possible."""
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
    except (OSError, AttributeError):  # the file system or platform does not support it
        return -1
