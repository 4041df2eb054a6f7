"""A storage behind a cache of pages: what was read stays as long as the budget allows.

A page is a byte range of a stored object, of at most `PAGE_BYTES`. Invariants:

- Uses of a page that is being read join that read; a read that nobody waits for any more is dropped while it is queued.
- A page that is read anew stays as it was for all others, until the new one has arrived in its place.
- Reads take turns by what each reader's account has paid: for a whole page, and more where little of it is wanted.
- Each use is counted once: as a hit (the page was there), as coalesced (another use was reading it), or as a miss (it
  had to be read for this use).
- Cached pages and pages being read never take more than the budget, which is at least `MIN_CACHE_BYTES`. That holds as
  long as nobody keeps a view across an `await`.
- A read that fails leaves nothing in the cache; its error goes to every use that waits for it.
"""

import asyncio
import mmap
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace

from surfw.config import BLOCK_BYTES, MIB, PAGE_BYTES
from surfw.errors import NotFoundError, StorageError
from surfw.metrics import Metrics
from surfw.server.cache import ProvingCache
from surfw.server.single_flight import Reader, SingleFlight
from surfw.storage import StorageBackend

MIN_CACHE_BYTES = 4 * PAGE_BYTES
"""What a server needs to work with, even if it is told to keep nothing."""

PROGRESS_SECONDS = 1.0
"""How often a client that waits hears how far the storage has got, if it has: well within any patience of its own."""

_READS = 8
"""The most reads of the storage at a time; of one that is near, `_NEAR_READS`: they are work for this machine."""
_NEAR_READS = 2

_MOST_PRICE = 64
"""How many times its size a page costs, at most, where little of it is wanted."""

_LITTLE = 16
"""As this share of a page is little, a near storage rests after reading it for so long as three such reads take."""


class ReadAhead:
    """How many pages all answers together may have read ahead of their turn, beyond the one that each of them may."""

    def __init__(self, pages: int) -> None:
        """Start with all of them free."""
        self._free = pages

    def take(self) -> bool:
        """Take one, if one is free."""
        if self._free <= 0:
            return False
        self._free -= 1
        return True

    def give(self) -> None:
        """Give one back."""
        self._free += 1


@dataclass(frozen=True, slots=True)
class Page:
    """Bytes `start` to `stop` (end-exclusive) of a stored object.

    `anew` if they are read although they are there; `for_little` if hardly any of them are wanted.
    """

    object: str
    start: int
    stop: int
    anew: bool = False
    for_little: bool = field(default=False, compare=False)

    @property
    def size(self) -> int:
        """How many bytes."""
        return self.stop - self.start


class PageCache:
    """Pages of a storage, as read-only views.

    Attributes:
        cache: the pages there are.
        healthy: whether the storage answered when it was last asked.
        reads: the pages that are being read, or queued for that.
        read_ahead: what may be read ahead of its turn: several pages of a storage that is far away, within a quarter
            of the budget, so that they are still there when their turn comes.
        most_ahead: how many of them one answer may have.
    """

    def __init__(self, backend: StorageBackend, capacity_bytes: int, metrics: Metrics) -> None:
        """Start empty; counts `hits`, `misses` and `coalesced` in the metrics."""
        capacity_bytes = max(capacity_bytes, MIN_CACHE_BYTES)
        self.cache: ProvingCache[Page, memoryview] = ProvingCache(capacity_bytes, len)
        self.healthy = True
        self._backend = backend
        self._metrics = metrics
        self._is_near = backend.parallel_reads == 1
        most = _NEAR_READS if self._is_near else _READS
        self.reads = SingleFlight(self._read, slots=min(most, capacity_bytes // (2 * PAGE_BYTES)))
        self._is_slow = False
        self.read_ahead = ReadAhead(capacity_bytes // (4 * PAGE_BYTES))

    @property
    def most_ahead(self) -> int:
        """How many of them one answer may have: one where the storage is near."""
        return min(_READS, self._backend.parallel_reads)

    async def use(self, page: Page, reader: Reader | None = None, wanted_bytes: int = PAGE_BYTES) -> None:
        """Have the page read, and count the use.

        Args:
            page: what to read.
            reader: for whom; None for the server itself.
            wanted_bytes: how much of the page is wanted.

        Raises:
            StorageError: it cannot be read.
        """
        if reader is not None and reader.fresh:
            page = replace(page, anew=True)
        if self.cache.get(page) is not None:
            self._metrics.add("hits")
        else:
            self._metrics.add("coalesced" if page in self.reads else "misses")
            await self._join(page, reader, wanted_bytes)

    async def view(self, page: Page, reader: Reader | None = None, wanted_bytes: int = PAGE_BYTES) -> memoryview:
        """The page's bytes, for use until the next `await`: holding on to them would keep them beyond the budget.

        Args:
            page: what to look at; it is read again if it had to go.
            reader: for whom, as in `use`.
            wanted_bytes: how many bytes are used now.

        Raises:
            StorageError: they cannot be read.
        """
        view = self.cache.get(page)
        if view is None:
            view = await self._join(page, reader, wanted_bytes)
        self.cache.note_use(page, wanted_bytes)
        return view

    async def _join(self, page: Page, reader: Reader | None, wanted_bytes: int) -> memoryview:
        """Read the page, together with whoever else wants it."""
        waste = page.size // max(1, wanted_bytes)
        page = replace(page, for_little=waste >= _LITTLE)
        price = page.size * min(_MOST_PRICE, max(1, waste))
        return await self.reads.join(page, reader, price)

    async def _read(self, page: Page, reader: Reader) -> memoryview:
        reading_bytes = sum(other.size for other, _ in self.reads.running())
        self.cache.trim(max(0, self.cache.capacity_bytes - reading_bytes))
        buffer = _allocate(page.size)
        try:
            took = await self._fill(page, buffer, reader)
            self.healthy = True
            if page.for_little and self._is_near:  # reading is this machine's own work, and others need it more
                await asyncio.sleep(3 * took)
        except StorageError as exc:
            self.healthy = isinstance(exc, NotFoundError)
            raise
        view = buffer.toreadonly()
        place = replace(page, anew=False)
        if page.anew or place not in self.cache:  # one that was read anew meanwhile stays
            self.cache[place] = view
        return view

    async def _fill(self, page: Page, buffer: memoryview, reader: Reader) -> float:
        """Read a page, in one go, or by blocks where the storage is so slow that clients have to hear between them.

        Returns:
            The seconds that it took.
        """
        step = BLOCK_BYTES if self._is_slow else page.size
        started = time.monotonic()
        for at in range(0, page.size, step):
            stop = min(at + step, page.size)
            await self._backend.read_into(page.object, page.start + at, buffer[at:stop])
            reader.read_bytes = stop
            self.reads.read_bytes += stop - at
        took = time.monotonic() - started
        self._is_slow = took > PROGRESS_SECONDS
        return took

    async def close(self) -> None:
        """Stop reading, and forget everything."""
        await self.reads.close()
        self.cache.clear()


def _allocate(size: int) -> memoryview:
    """Memory for a page. A large one is mapped, so that it goes back to the system, whole, when it is dropped.

    An allocator keeps what it was given back, and scatters other things over it. Huge pages make up for what mapping
    costs: 4 MiB were mapped and read in 1.1 ms, in ordinary pages in 5.3.
    """
    if size < MIB:
        return memoryview(bytearray(size))
    try:
        mapped = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:  # no more mappings are to be had; the allocator has room of its own
        return memoryview(bytearray(size))
    with suppress(OSError, AttributeError):  # a system without huge pages
        mapped.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(mapped)
