"""A storage behind a cache of pages: what was read stays as long as the budget allows.

A page is a byte range of a stored object, of at most `PAGE_BYTES`. Invariants:

- Uses of a page that is being read join that read; a read that nobody waits for any more is dropped while it is queued.
- Each use is counted once: as a hit (the page was there), as coalesced (another use was reading it), or as a miss (it
  had to be read for this use).
- Cached pages and pages being read never take more than the budget, which is at least `MIN_CACHE_BYTES`.
- A read that fails leaves nothing in the cache; its error goes to every use that waits for it.
"""

from dataclasses import dataclass

from surfw.config import MIB
from surfw.errors import NotFoundError, StorageError
from surfw.metrics import Metrics
from surfw.server.cache import LruCache
from surfw.server.single_flight import SingleFlight
from surfw.storage import StorageBackend

PAGE_BYTES = 4 * MIB
MIN_CACHE_BYTES = 4 * PAGE_BYTES
"""What a server needs to work with, even if it is told to keep nothing."""

_READS = 8
"""The most reads of the storage at a time."""


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
    """Bytes `start` to `stop` (end-exclusive) of a stored object."""

    object: str
    start: int
    stop: int


class PageCache:
    """Pages of a storage, as read-only views.

    Attributes:
        cache: the pages there are.
        healthy: whether the storage answered when it was last asked.
        read_ahead: what may be read ahead of its turn: several pages of a storage that is far away, within half of the
            budget, so that they are still there when their turn comes.
        most_ahead: how many of them one answer may have.
    """

    def __init__(self, backend: StorageBackend, capacity_bytes: int, metrics: Metrics) -> None:
        """Start empty; counts `hits`, `misses` and `coalesced` in the metrics."""
        capacity_bytes = max(capacity_bytes, MIN_CACHE_BYTES)
        self.cache: LruCache[Page, memoryview] = LruCache(capacity_bytes, len)
        self.healthy = True
        self._backend = backend
        self._metrics = metrics
        self._reads = SingleFlight(self._read, slots=min(_READS, capacity_bytes // (2 * PAGE_BYTES)))
        self._reading_bytes = 0
        self.read_ahead = ReadAhead(capacity_bytes // (2 * PAGE_BYTES))

    @property
    def most_ahead(self) -> int:
        """How many of them one answer may have: one where the storage is near."""
        return min(_READS, self._backend.parallel_reads)

    async def use(self, page: Page) -> None:
        """Have the page read, and count the use.

        Raises:
            StorageError: it cannot be read.
        """
        if page in self.cache:
            self._metrics.add("hits")
        else:
            self._metrics.add("coalesced" if page in self._reads else "misses")
        await self.view(page)

    async def view(self, page: Page) -> memoryview:
        """The page's bytes, for use until the next `await`: holding on to them would keep them beyond the budget.

        Raises:
            StorageError: they cannot be read.
        """
        cached = self.cache.get(page)
        if cached is not None:
            return cached
        return await self._reads.join(page)

    async def _read(self, page: Page) -> memoryview:
        size = page.stop - page.start
        self._reading_bytes += size
        try:
            self.cache.trim(max(0, self.cache.capacity_bytes - self._reading_bytes))
            buffer = bytearray(size)
            await self._backend.read_into(page.object, page.start, memoryview(buffer))
            self.healthy = True
        except StorageError as exc:
            self.healthy = isinstance(exc, NotFoundError)
            raise
        finally:
            self._reading_bytes -= size
        view = memoryview(buffer).toreadonly()
        self.cache[page] = view
        return view

    async def close(self) -> None:
        """Stop reading, and forget everything."""
        await self._reads.close()
        self.cache.clear()
