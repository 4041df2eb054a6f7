"""A page cache in front of a storage. Pages are kept as long as the budget allows.

A page is a byte range of a stored object, of at most `PAGE_BYTES`. Invariants:

- A use of a page that is being read joins that read. A queued read is dropped once nobody waits for it.
- While a page is reread, everyone else keeps using the old one until the new one replaces it.
- Reads are scheduled by what each account has paid. A page costs its size, or more if little of it is wanted.
- Each use is counted once: as a hit (the page was cached), as coalesced (it was being read for another use), or as a
  miss (it had to be read for this use).
- Cached pages and pages being read never exceed the budget, which is at least `MIN_CACHE_BYTES`. This holds as long as
  nobody keeps a view across an `await`.
- A failed read leaves nothing in the cache; its error is raised in every use that waits for it.
- Pages of a chunk's form are also segments of a Redis, if there is one. Redis is asked before the storage, and is
  given what it lacks.
"""

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import AbstractContextManager, aclosing, contextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

from surfw.config import BLOCK_BYTES, PAGE_BYTES, CachePolicy, format_size
from surfw.errors import NotFoundError, StorageError
from surfw.manifest import Form, Location
from surfw.metrics import Metrics
from surfw.server.cache import ProvingCache
from surfw.server.fairness import Flights, Reader, Run
from surfw.server.futures import Future, Futures, Part
from surfw.server.journal import Journal, Sparse
from surfw.server.memory import PageMemory
from surfw.server.policies import make_cache
from surfw.server.redis_tier import RedisTier, Segment
from surfw.server.streams import RunStream
from surfw.storage.base import RangedBackend
from surfw.storage.origins import Objects
from surfw.threads import cancel_all

MIN_CACHE_BYTES = 4 * PAGE_BYTES
"""The smallest cache: a server needs this much to work, even if it is told to cache nothing."""

PROGRESS_SECONDS = 1.0
"""Interval of progress reports to a waiting client while the storage advances; well below any client's timeout."""

_READS = 8
"""The most reads at a time from a remote storage."""
_NEAR_READS = 2
"""The most reads at a time from a local storage, whose work takes time of this processor."""

_NEAR_AHEAD = 3
"""How many pages of a local storage are read ahead for an answer; for a remote one, the budget decides."""

_LEAD_BYTES = 8 * PAGE_BYTES
"""Urgent reads go before prefetches unless their account has paid this much more than the others'; see `FairQueue`."""

_MOST_PRICE = 64
"""The highest price of a page of which little is wanted, as a multiple of its size."""

_MOST_COUNTED = 1 << 16

_LITTLE = 16
"""If at most one in this many bytes of a page is wanted, a local storage pauses for three times the read's duration."""


@dataclass(frozen=True, slots=True)
class Page:
    """Bytes `start` to `stop` (end-exclusive) of a stored object.

    Attributes:
        anew: whether to read them even if they are cached.
        for_little: whether only a small part of them is wanted.
        segment: the segment that Redis may hold them as.
        part: the part of a chunk that they are, if they were requested as one.
    """

    object: str
    start: int
    stop: int
    anew: bool = False
    for_little: bool = field(default=False, compare=False)
    segment: Segment | None = field(default=None, compare=False, repr=False)
    part: Part | None = field(default=None, compare=False)

    @property
    def size(self) -> int:
        """The number of bytes."""
        return self.stop - self.start


class PageCache:
    """Pages of a storage, as read-only views. Reading a page raises `StorageError` on failure.

    Attributes:
        cache: the cached pages.
        futures: the reads that clients announced; its clock counts the bytes used.
        healthy: whether the storage answered the last read.
        reads: the pages being read or queued.
        hits: hits per page, by its object and start; cleared when there are too many entries.
        redis: the Redis to ask before the storage.
    """

    def __init__(
        self,
        backend: RangedBackend | Objects,
        capacity_bytes: int,
        metrics: Metrics,
        journal: Journal | None = None,
        *,
        policy: CachePolicy = "schedule",
    ) -> None:
        """Start empty; slow reads are noted in the journal.

        Counts `hits`, `misses`, `coalesced`, and the `bytes_read` from the storage.
        """
        capacity_bytes = max(capacity_bytes, MIN_CACHE_BYTES)
        self.futures = Futures()
        self.cache: ProvingCache[Page, memoryview] = make_cache(
            policy, capacity_bytes, len, lambda page: self.futures.next_use(page.part), lambda: self.futures.now
        )
        self.hits: Counter[tuple[str, int]] = Counter()
        self.healthy = True
        self._backend = backend
        self._metrics = metrics
        self._is_near = backend.parallel_reads == 1
        # Within a quarter of the budget, so that prefetched pages are still cached when they are used.
        ahead = capacity_bytes // (4 * PAGE_BYTES)
        slots = min(_NEAR_READS if self._is_near else min(_READS, backend.parallel_reads), 2 * ahead)
        self._most_ahead = _NEAR_AHEAD if self._is_near else ahead
        self._run_bytes = max(1, ahead // slots) * PAGE_BYTES
        self._read_ahead = Permits(ahead)
        self._memory = PageMemory(capacity_bytes)
        self._holders: dict[Page, list[Holder]] = {}
        self.cache.on_removed = self._evicted
        self.reads = _Reads(self, slots)
        self.redis: RedisTier | None = None
        self._is_slow = False
        self._slow = Sparse(journal or Journal(), "storage", logging.INFO)

    def read(
        self, locations: Sequence[Location], start: int, stop: int, reader: Reader, *, form: Form | None = None
    ) -> AsyncGenerator["StoredPiece", None]:
        """Read bytes `start` to `stop` of the concatenated locations, and yield them as pieces, in order.

        From a remote storage, several pieces are prefetched. Close the generator to cancel their reads. `form` is the
        form whose stored bytes they are.
        """
        pieces = plan_pieces(self, locations, start, stop, reader, form=form)
        return use_ahead(pieces, self._read_ahead, self._most_ahead)

    async def read_foreseen(
        self,
        locations: Sequence[Location],
        start: int,
        stop: int,
        reader: Reader,
        *,
        future: Future,
        form: Form | None = None,
    ) -> AsyncGenerator["StoredPiece", None]:
        """Like `read`, for a client that announced reading the chunk. Meanwhile, the rest of it counts as needed."""
        size = sum(location.stop - location.start for location in locations) or 1
        with future.reading(Part(reader.chunk, start / size, stop / size), self.futures.now) as reader.asked:
            async with aclosing(self.read(locations, start, stop, reader, form=form)) as pieces:
                async for piece in pieces:
                    yield piece

    def use_cached(self, page: Page, reader: Reader | None = None, wanted_bytes: int = PAGE_BYTES) -> bool:
        """If the page is cached and need not be reread, count the use as a hit and return True."""
        is_hit = (reader is None or not reader.fresh) and self.cache.get(page) is not None
        if is_hit:
            self._metrics.add("hits")
            self._note_hit(page)
            self._metrics.add("bytes_hit", wanted_bytes)
        return is_hit

    async def use(self, page: Page, reader: Reader | None = None, wanted_bytes: int = PAGE_BYTES) -> None:
        """Read the page unless it is cached, and count the use, of which `wanted_bytes` are wanted."""
        if reader is not None and reader.fresh:
            page = replace(page, anew=True)
        if not self.use_cached(page, reader, wanted_bytes):
            self._metrics.add("coalesced" if page in self.reads else "misses")
            await self._join(page, reader, wanted_bytes)

    def _note_hit(self, page: Page) -> None:
        if len(self.hits) >= _MOST_COUNTED:
            self.hits.clear()
        self.hits[page.object, page.start] += 1

    async def view(self, page: Page, reader: Reader | None = None, wanted_bytes: int = PAGE_BYTES) -> memoryview:
        """Return the page's bytes, valid until the next `await`: keeping them longer would exceed the budget.

        The page is read again if it was evicted since its `use`.
        """
        view = self.cache.get(page)
        if view is None:
            view = await self._join(page, reader, wanted_bytes)
        self.futures.now += wanted_bytes
        self.cache.note_use(page, wanted_bytes, foreseen=reader is not None and reader.asked is not None)
        return view

    async def _join(self, page: Page, reader: Reader | None, wanted_bytes: int) -> memoryview:
        """Read the page, or join the read that is under way."""
        waste = page.size // max(1, wanted_bytes)
        page = replace(page, for_little=waste >= _LITTLE)
        return await self.reads.join(page, reader, page.size * min(_MOST_PRICE, max(1, waste)))

    def belongs(self, run: Run[Page, memoryview], page: Page) -> bool:
        """Whether to read a page in the same request as a run, which it has to follow.

        A slow storage is read page by page, and so is Redis.
        """
        first, last = run[0].key, run[-1].key
        if (last.object, last.stop, last.anew) != (page.object, page.start, page.anew) or self._is_slow:
            return False
        if page.segment is not None and self.redis is not None and "bypassed" not in self.redis.state:
            return False
        most = min(self._run_bytes, self._backend.run_bytes(page.object))
        return page.stop - first.start <= most

    async def read_run(self, run: Run[Page, memoryview]) -> None:
        """Read the pages of a run; each can be used as soon as it has arrived."""
        self._make_room()
        try:
            if len(run) == 1:
                page, reader = run[0].key, run[0].reader
                memory = self._memory.take(page.size)
                took = await self._fill(page, memory, reader)
                if page.for_little and self._is_near:  # local reads take CPU time, and others need it more
                    await asyncio.sleep(3 * took)
                self._land(run, memory)
            else:
                await self._stream(run)
        except StorageError as exc:
            self.healthy = isinstance(exc, NotFoundError)
            raise

    def _make_room(self) -> None:
        """Evict pages until everything being read fits, including what has just begun."""
        reading_bytes = sum(page.size for page, _ in self.reads.running())
        self.cache.trim(self.cache.capacity_bytes - reading_bytes)

    def _land(self, run: Run[Page, memoryview], memory: memoryview) -> None:
        """Complete the first page of a run."""
        page, view = run[0].key, memory.toreadonly()
        place = replace(page, anew=False)
        if page.anew or place not in self.cache:  # a page reread meanwhile is newer
            self.cache[place] = view
        run.pop(0).land(view)

    async def _stream(self, run: Run[Page, memoryview]) -> None:
        """Read a run with one request."""
        first, pages, started = run[0].key, len(run), time.monotonic()

        def count(new: int, of_page: int) -> None:
            self._metrics.add("bytes_read", new)
            self.reads.read_bytes += new
            if run:
                run[0].reader.read_bytes = of_page

        def land(memory: memoryview) -> None:
            run[0].reader.read_bytes = len(memory)
            self._land(run, memory)

        memory = deque(self._memory.take(flight.key.size) for flight in run)
        stream = RunStream(memory, count, land, patience_seconds=PROGRESS_SECONDS)
        del memory
        try:
            await self._backend.read_pieces(first.object, first.start, stream.take(), stream.note)
        finally:
            stream.end()
        self.healthy = True
        self._note_pace(stream.size, time.monotonic() - started, pages)

    def _note_pace(self, size: int, took: float, pages: int = 1) -> None:
        self._is_slow = took > pages * PROGRESS_SECONDS
        if self._is_slow:
            self._slow.note(f"the storage is slow: reading {format_size(size)} took {took:.1f} s")

    async def _fill(self, page: Page, buffer: memoryview, reader: Reader) -> float:
        """Fill a page from Redis or the storage; return the seconds that the storage took."""
        if self.redis is None or page.segment is None or page.anew:
            return await self._load(page, buffer, reader)
        took = 0.0

        async def load() -> None:
            nonlocal took
            took = await self._load(page, buffer, reader)

        if await self.redis.read(page.segment, buffer, load):
            reader.read_bytes = page.size
            self.reads.read_bytes += page.size
        return took

    async def _load(self, page: Page, buffer: memoryview, reader: Reader) -> float:
        """Read a page from the storage; return the seconds it took.

        A slow storage is read block by block, so that clients see progress.
        """
        step = BLOCK_BYTES if self._is_slow else page.size
        started = time.monotonic()
        for at in range(0, page.size, step):
            stop = min(at + step, page.size)
            await self._backend.read_into(page.object, page.start + at, buffer[at:stop])
            reader.read_bytes = stop
            self.reads.read_bytes += stop - at
            self._metrics.add("bytes_read", stop - at)
        self.healthy = True
        took = time.monotonic() - started
        self._note_pace(page.size, took)
        return took

    @contextmanager
    def held(self, page: Page, holder: "Holder") -> Iterator[None]:
        """Register a holder of views of the page during the body; `let_go` is called if the page is evicted, or was."""
        if page not in self.cache:
            holder.let_go()
        holders = self._holders.setdefault(page, [])
        holders.append(holder)
        try:
            yield
        finally:
            holder.let_go()
            holders.remove(holder)
            if not holders:
                del self._holders[page]

    def _evicted(self, page: Page) -> None:
        for holder in self._holders.get(page, ()):
            holder.let_go()

    async def close(self) -> None:
        """Stop reading, report pending journal entries, and drop everything."""
        await self.reads.close()
        self._slow.flush()
        self.cache.clear()
        self._memory.close()


class _Reads(Flights[Page, memoryview]):
    """Reads of pages; adjacent pages of a remote storage are read with one request."""

    def __init__(self, pages: PageCache, slots: int) -> None:
        super().__init__(slots, lead=_LEAD_BYTES)
        self._pages = pages

    def belongs(self, run: Run[Page, memoryview], key: Page) -> bool:
        return self._pages.belongs(run, key)

    async def do(self, run: Run[Page, memoryview]) -> None:
        await self._pages.read_run(run)


class Holder(Protocol):
    """Someone who keeps views of a page past the next `await`."""

    def let_go(self) -> None:
        """Copy what is still needed, and drop the views."""


@dataclass(frozen=True, slots=True)
class StoredPiece:
    """Bytes `start` to `stop` (end-exclusive) of a page."""

    pages: PageCache
    page: Page
    start: int
    stop: int
    reader: Reader

    @property
    def size(self) -> int:
        """The number of bytes."""
        return self.stop - self.start

    def use_cached(self) -> bool:
        """Count the use as a hit if the page is cached; return whether it is."""
        return self.pages.use_cached(self.page, self.reader, self.size)

    async def use(self) -> None:
        """Read the page unless it is cached, and count the use."""
        await self.pages.use(self.page, self.reader, self.size)

    async def view(self, start: int, stop: int) -> memoryview:
        """Return bytes `start` to `stop` of the piece, valid until the next `await`."""
        if self.reader.asked is not None and (part := self.page.part) is not None:  # counts as used from now on
            self.reader.asked.start = part.start + (self.start + stop) / self.page.size * (part.stop - part.start)
        page = await self.pages.view(self.page, self.reader, stop - start)
        return page[self.start + start : self.start + stop]

    def held(self, holder: "Holder") -> AbstractContextManager[None]:
        """Register a holder of views during the body; see `PageCache.held`."""
        return self.pages.held(self.page, holder)


def plan_pieces(
    pages: PageCache,
    locations: Sequence[Location],
    start: int,
    stop: int,
    reader: Reader,
    *,
    form: Form | None = None,
) -> Iterator[StoredPiece]:
    """Yield the pieces that make up bytes `start` to `stop` of the concatenated locations.

    Pages are cut from the start of each location, so that all requests for its bytes share the same pages. The pages of
    a form stored in one piece consist of whole blocks with known digests, and so are segments.
    """
    size = sum(location.stop - location.start for location in locations)
    base = 0
    if form is not None and (not form.is_known or len(locations) > 1):
        form = None
    for location in locations:
        length = location.stop - location.start
        low, high = max(start - base, 0), min(stop - base, length)
        before, base = base, base + length
        if low >= high:
            continue
        for first in range(low - low % PAGE_BYTES, high, PAGE_BYTES):
            last = min(first + PAGE_BYTES, length)
            part = Part(reader.chunk, (before + first) / size, (before + last) / size) if reader.chunk else None
            segment = None if form is None else _segment(form, first // PAGE_BYTES)
            page = Page(location.object, location.start + first, location.start + last, part=part, segment=segment)
            yield StoredPiece(pages, page, max(low - first, 0), min(high, last) - first, reader)


def _segment(form: Form, number: int) -> Segment:
    """Return page `number` of a form's stored bytes as a Redis segment."""
    each = 32 * PAGE_BYTES // BLOCK_BYTES
    return Segment(form.digest, number, form.blocks[each * number : each * (number + 1)])


@dataclass
class Permits:
    """Permits for prefetched pages, shared by all answers. The next page of each answer needs none."""

    free: int

    def take(self) -> bool:
        """Take a permit if one is free; return whether it was."""
        if self.free <= 0:
            return False
        self.free -= 1
        return True


class _Usable(Protocol):
    def use_cached(self) -> bool: ...

    async def use(self) -> None: ...


Piece = TypeVar("Piece", bound=_Usable)


async def use_ahead(pieces: Iterator[Piece], ahead: Permits, most: int) -> AsyncGenerator[Piece, None]:
    """Yield the pieces in order, each after its use. By then, the uses of at most `most` others have begun.

    All but the first of those need a permit of `ahead`. Close the generator to cancel the uses that have begun.
    """
    begun: deque[tuple[Piece, asyncio.Task[None] | None]] = deque()

    def begin() -> None:
        # The first needs no permit, so that every answer makes progress.
        while len(begun) < most and (not begun or ahead.take()):
            piece = next(pieces, None)
            if piece is None:
                if begun:
                    ahead.free += 1
                return
            begun.append((piece, None if piece.use_cached() else asyncio.create_task(piece.use())))

    def drop() -> tuple[Piece, asyncio.Task[None] | None]:
        dropped = begun.popleft()
        if begun:
            ahead.free += 1  # the permit of the piece that is now first
        return dropped

    try:
        begin()
        while begun:
            if (using := begun[0][1]) is not None:
                await using
            piece, _ = drop()
            begin()
            yield piece
    finally:
        dropped = [drop()[1] for _ in range(len(begun))]
        await cancel_all([using for using in dropped if using is not None])
