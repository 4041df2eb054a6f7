"""Reads of local files into the caller's memory; each piece is verified while the next one is read.

Large reads bypass the page cache (O_DIRECT): streamed weights are bigger than memory, so caching them would only evict
useful pages. Ranges that do not begin at a page boundary, such as those of a checkpoint's shards, are extended to whole
pages, read into a buffer of the reading thread, and copied. On file systems that refuse O_DIRECT, files are read
through the page cache. The revision of a pinned file is checked before and after the read.

Two threads read pieces in the order of the requests, so that the device always has the next one queued; a third thread
verifies. Next to a decoding model on two cores they read at 96 to 98 % of the idle device's rate; a single reader at 88
to 94 %. Urgent reads have a thread of their own, and overtake prefetches.
"""

import asyncio
import ctypes
import errno
import mmap
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from surfw.config import MIB, PIECE_BYTES
from surfw.errors import StorageError
from surfw.files import open_regular
from surfw.storage.filesystem import expect_file_revision, read_exactly
from surfw.storage.fsspec_backend import translate_errors
from surfw.storage.ranges import Check
from surfw.threads import to_its_end

_READERS = 2
_SMALL_BYTES = 256 * 1024
_HUGE_BYTES = 2 * MIB
_BOUNCE_BYTES = PIECE_BYTES + _HUGE_BYTES
BOUNCES_BYTES = (_READERS + 1) * _BOUNCE_BYTES
"""The most memory that the buffers for unaligned ranges take."""
_NO_DIRECT = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS}

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class FileRange:
    """A byte range (end-exclusive) of a file; if the file is pinned, also the revision that it must have."""

    path: Path
    start: int
    stop: int
    revision: str | None = None


class LocalReader:
    """Reads and verifies in its own threads, which run from the first read until `close`."""

    def __init__(self) -> None:
        self._ahead = ThreadPoolExecutor(_READERS, thread_name_prefix="surfw-read-ahead")
        self._urgent = ThreadPoolExecutor(1, thread_name_prefix="surfw-read")
        self._checks = ThreadPoolExecutor(1, thread_name_prefix="surfw-verify")
        self._bounces = _Bounces()

    async def read(
        self, ranges: Sequence[FileRange], destination: memoryview, check: Check | None, *, urgent: bool
    ) -> None:
        """Fill the destination with consecutive ranges of files; with `check`, verify it piece by piece.

        Once this has ended, even by a failure or cancellation, nothing more is written to the destination.

        Raises:
            ChangedObjectError: a file does not have its pinned revision.
            StorageError: a file could not be read.
            Exception: any error of `check`.
        """
        stop = threading.Event()
        files = {(one.path, one.revision): _File(one.path, one.revision, self._bounces) for one in ranges}
        pieces = list(_pieces(ranges))

        def read_piece(at: int, parts: Sequence[FileRange]) -> Future[None] | None:
            if stop.is_set():
                return None
            piece, done = destination[at : at + PIECE_BYTES], 0
            try:
                for part in parts:
                    length = part.stop - part.start
                    in_place = (at + done) % mmap.PAGESIZE == 0
                    into = piece[done : done + length]
                    files[part.path, part.revision].read_into(part.start, into, in_place=in_place)
                    done += length
            except BaseException:
                stop.set()
                raise
            return None if check is None else self._checks.submit(check, at, piece)

        readers = self._urgent if urgent else self._ahead
        jobs = [_submit(readers, read_piece, index * PIECE_BYTES, parts) for index, parts in enumerate(pieces)]

        def give_up() -> None:
            stop.set()
            for job in jobs:
                job.cancel()

        try:
            checks = await _results(jobs, on_cancel=give_up)
            for file in files.values():
                file.expect_revision()
        finally:
            for file in files.values():
                file.close()
        await _results([check for check in checks if check is not None])

    async def check(self, view: memoryview, check: Check) -> None:
        """Verify bytes that are already in memory.

        Raises:
            Exception: any error of `check`.
        """
        starts = range(0, len(view), PIECE_BYTES)
        jobs = [_submit(self._checks, check, at, view[at : at + PIECE_BYTES]) for at in starts]
        await _results(jobs, on_cancel=lambda: [job.cancel() for job in jobs])

    def close(self) -> None:
        """Stop the threads; queued reads are cancelled."""
        for threads in (self._ahead, self._urgent, self._checks):
            threads.shutdown(cancel_futures=True)


def _pieces(ranges: Sequence[FileRange]) -> Iterator[list[FileRange]]:
    """Cut ranges into pieces of `PIECE_BYTES`, each a list of parts in order; the last piece may be shorter."""
    parts: list[FileRange] = []
    room = PIECE_BYTES
    for one in ranges:
        at = one.start
        while at < one.stop:
            end = min(one.stop, at + room)
            parts.append(replace(one, start=at, stop=end))
            room -= end - at
            at = end
            if not room:
                yield parts
                parts, room = [], PIECE_BYTES
    if parts:
        yield parts


class _Bounces(threading.local):
    """One reusable buffer per reading thread, made at its first use: huge pages, aligned for O_DIRECT."""

    _buffer: memoryview | None = None

    def get(self) -> memoryview:
        if self._buffer is None:
            mapped = mmap.mmap(-1, _BOUNCE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with suppress(OSError):  # the kernel has no huge pages
                mapped.madvise(mmap.MADV_HUGEPAGE)
            self._buffer = memoryview(mapped)
        return self._buffer


def _submit(threads: ThreadPoolExecutor, work: Callable[..., T], *arguments: Any) -> Future[T]:
    """`submit`, but return a cancelled future once the threads are closed: the caller still awaits its other jobs."""
    try:
        return threads.submit(work, *arguments)
    except RuntimeError:
        refused: Future[T] = Future()
        refused.cancel()
        return refused


async def _results(jobs: Sequence[Future[T]], on_cancel: Callable[[], object] = lambda: None) -> list[T]:
    """Return the results of all jobs once all have ended, or raise the first failure."""
    found = await to_its_end(
        asyncio.gather(*map(asyncio.wrap_future, jobs), return_exceptions=True), on_cancel=on_cancel
    )
    for one in found:
        if isinstance(one, asyncio.CancelledError):
            raise StorageError("the storage was closed while it was read")
        if isinstance(one, BaseException):
            raise one
    return [one for one in found if not isinstance(one, BaseException)]


class MappedFile:
    """A private mapping of a range of a file. It shares pages with the page cache; writes do not reach the file.

    Attributes:
        memory: the bytes. They stay valid as long as anything refers to them, unless the file is truncated.
    """

    def __init__(self, file: FileRange) -> None:
        """Map the range.

        Args:
            file: the range; its start must be a multiple of the page size.

        Raises:
            NotFoundError: the file does not exist.
            StorageError: the file ends early, is not a regular file, or cannot be mapped.
        """
        self._file = file
        self._fd = -1
        with translate_errors(f"mapping {file.path}"):
            self._fd = open_regular(file.path)
            found = os.fstat(self._fd)
            self._seen = _traces(found)
            expect_file_revision(file.path, self._fd, file.revision)
            if found.st_size < file.stop:
                raise StorageError(f"{file.path} ends at byte {found.st_size}, expected {file.stop} bytes")
            begin = file.start - file.start % _HUGE_BYTES  # aligned, so that the mapping can use huge pages of the file
            self.memory = _map(self._fd, begin, file.stop - begin)[file.start - begin :]

    def expect_unchanged(self, check: Check) -> None:
        """Verify the whole range again if the file was written to, truncated or touched.

        Raises:
            StorageError: the file was truncated: reading the missing pages would kill the process (SIGBUS).
            Exception: any error of `check`.
        """
        found = os.fstat(self._fd)
        if _traces(found) == self._seen:
            return
        path, size = self._file.path, self._file.stop - self._file.start
        if found.st_size < self._file.stop:
            raise StorageError(
                f"{path} was cut off while it was in use: it has {found.st_size} bytes, expected {self._file.stop}; "
                "chunk the model again, and open it again"
            )
        buffer = memoryview(bytearray(min(size, PIECE_BYTES)))
        for at in range(0, size, PIECE_BYTES):
            piece = buffer[: min(PIECE_BYTES, size - at)]
            with translate_errors(f"reading {path}"):
                read_exactly(path, self._fd, self._file.start + at, piece)
            check(at, piece)
        self._seen = _traces(found)

    def __del__(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def _map(descriptor: int, start: int, length: int) -> memoryview:
    """Map private pages of a file; they are unmapped when nothing refers to them any more.

    Python's own `mmap` keeps a second descriptor of the file open for each mapping (until 3.13: `trackfd`), and a model
    has thousands of chunks.

    Raises:
        OSError: the file cannot be mapped.
    """
    address = _libc.mmap(None, length, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE, descriptor, start)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    _libc.madvise(address, length, mmap.MADV_HUGEPAGE)  # not every file system supports it
    pages = (ctypes.c_char * length).from_address(address)
    weakref.finalize(pages, _libc.munmap, address, length).atexit = False
    return memoryview(pages).cast("B")


def _traces(found: os.stat_result) -> tuple[int, int, int]:
    """What a writer changes; ctime changes even if the writer sets the modification time back."""
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


class _File:
    """A file that threads read, past the page cache if possible."""

    def __init__(self, path: Path, revision: str | None, bounces: _Bounces) -> None:
        """Set the file; it is opened at the first read."""
        self._path = path
        self._revision = revision
        self._bounces = bounces
        self._descriptors: dict[int, int] = {}
        self._direct = getattr(os, "O_DIRECT", 0)
        self._lock = threading.Lock()

    def close(self) -> None:
        """Close the file. No read may be in flight."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)

    def expect_revision(self) -> None:
        """Check after a read that the file still has its revision.

        Raises:
            ChangedObjectError: it has another.
        """
        for descriptor in self._descriptors.values():
            expect_file_revision(self._path, descriptor, self._revision)

    def read_into(self, start: int, destination: memoryview, *, in_place: bool) -> None:
        """Fill the destination from byte `start` on: whole pages directly, the rest through the page cache.

        Args:
            start: the first byte.
            destination: the memory to fill.
            in_place: whether the destination begins at a page boundary; if `start` does too, no buffer is needed.

        Raises:
            NotFoundError: the file does not exist.
            StorageError: the file ends early, has another revision, or cannot be read.
        """
        with translate_errors(f"reading {self._path}"):
            done = 0
            if self._direct and len(destination) >= _SMALL_BYTES:
                try:
                    if in_place and start % mmap.PAGESIZE == 0:
                        whole_pages = len(destination) - len(destination) % mmap.PAGESIZE
                        done = self._fill(self._direct, start, destination[:whole_pages])
                    else:
                        done = self._bounce(start, destination)
                except OSError as exc:
                    if exc.errno not in _NO_DIRECT:
                        raise
                    self._direct = 0
            done += self._fill(0, start + done, destination[done:])
            if done < len(destination):
                raise StorageError(
                    f"{self._path} ends at byte {start + done}, expected {start + len(destination)} bytes"
                )

    def _bounce(self, start: int, destination: memoryview) -> int:
        """Read the pages around the range into this thread's buffer, copy the range, and return its byte count."""
        first = start - start % mmap.PAGESIZE
        last = -(-(start + len(destination)) // mmap.PAGESIZE) * mmap.PAGESIZE
        buffer = self._bounces.get()[: last - first]
        got = self._fill(self._direct, first, buffer) - (start - first)
        done = max(0, min(got, len(destination)))
        destination[:done] = buffer[start - first : start - first + done]
        return done

    def _fill(self, flag: int, start: int, destination: memoryview) -> int:
        """Read until the destination is full or the file ends, and return the number of bytes read."""
        done = 0
        while done < len(destination):
            count = os.preadv(self._open(flag), [destination[done:]], start + done)
            done += count
            if count == 0 or (flag and count % mmap.PAGESIZE):
                break
        return done

    def _open(self, flag: int) -> int:
        with self._lock:
            if flag not in self._descriptors:
                self._descriptors[flag] = open_regular(self._path, flag)
                expect_file_revision(self._path, self._descriptors[flag], self._revision)
            return self._descriptors[flag]
