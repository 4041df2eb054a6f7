"""A storage behind a cache of pages: what was read stays as long as the budget allows.

A page is a byte range of a stored object, of at most `PAGE_BYTES`. Invariants:

- Uses of a page that is being read join that read (*single-flight*). Giving up a use does not stop it for the others.
- Each use is counted once: as a hit (the page was there), as coalesced (another use was reading it), or as a miss (it
  had to be read for this use, perhaps ahead of it).
- Cached pages and pages being read never take more than the budget, which is at least `MIN_CACHE_BYTES`.
- A read that fails leaves nothing in the cache; its error goes to every use that waits for it.
"""

import asyncio
from dataclasses import dataclass

from surfw.config import MIB
from surfw.errors import NotFoundError, StorageError
from surfw.metrics import Metrics
from surfw.server.cache import LruCache
from surfw.storage import StorageBackend

PAGE_BYTES = 4 * MIB
MIN_CACHE_BYTES = 4 * PAGE_BYTES
"""What a server needs to work with, even if it is told to keep nothing."""

_READS = 8
"""The most reads of the storage at a time."""


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
    """

    def __init__(self, backend: StorageBackend, capacity_bytes: int, metrics: Metrics) -> None:
        """Start empty; counts `hits`, `misses` and `coalesced` in the metrics."""
        capacity_bytes = max(capacity_bytes, MIN_CACHE_BYTES)
        self.cache: LruCache[Page, memoryview] = LruCache(capacity_bytes, len)
        self.healthy = True
        self._backend = backend
        self._metrics = metrics
        self._reads: dict[Page, asyncio.Task[memoryview]] = {}
        self._read_ahead: set[Page] = set()
        self._reading_bytes = 0
        self._slots = asyncio.Semaphore(min(_READS, capacity_bytes // (2 * PAGE_BYTES)))

    async def use(self, page: Page) -> None:
        """Have the page read, and count the use.

        Raises:
            StorageError: it cannot be read.
        """
        ahead = page in self._read_ahead
        self._read_ahead.discard(page)
        if ahead or (page not in self.cache and page not in self._reads):
            self._metrics.add("misses")
        else:
            self._metrics.add("hits" if page in self.cache else "coalesced")
        await self.view(page)

    async def view(self, page: Page) -> memoryview:
        """The page's bytes, for use until the next `await`: holding on to them would keep them beyond the budget.

        Raises:
            StorageError: they cannot be read.
        """
        cached = self.cache.get(page)
        if cached is not None:
            return cached
        return await asyncio.shield(self._reads.get(page) or self._start(page))

    def read_ahead(self, page: Page) -> None:
        """Start reading a page that will be used soon."""
        if page not in self.cache and page not in self._reads:
            self._read_ahead.add(page)
            self._start(page)

    def _start(self, page: Page) -> asyncio.Task[memoryview]:
        task = asyncio.create_task(self._read(page), name=f"surfw read {page.object}")
        self._reads[page] = task
        task.add_done_callback(lambda task: self._finished(page, task))
        return task

    def _finished(self, page: Page, task: asyncio.Task[memoryview]) -> None:
        del self._reads[page]
        if task.cancelled() or task.exception():  # looked at here, for a read ahead that nobody waits for any more
            self._read_ahead.discard(page)

    async def _read(self, page: Page) -> memoryview:
        size = page.stop - page.start
        async with self._slots:
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
        reads = list(self._reads.values())
        for read in reads:
            read.cancel()
        await asyncio.gather(*reads, return_exceptions=True)
        self.cache.clear()
