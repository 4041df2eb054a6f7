"""A Redis shared by servers, between their caches and their storage. It holds stored bytes in segments of up to 4 MiB.

A segment is a page of a chunk's stored bytes, named by their digest and the page number, so it never goes stale. A
segment that Redis lacks is read from the storage and written by one of the servers; the others wait for it briefly.
Invariants:

- Bytes from Redis are used only if all their blocks match the digests of the manifest. Others are deleted and counted.
- Only bytes that match these digests are written.
- Nothing depends on Redis: if anything goes wrong with it, the storage is read. While it is unreachable, or slower than
  the storage, it is *bypassed*, and retried from time to time.
- Readers never wait for writes.
- At most 120 MiB are used on top of the cache's budget: the cache reads eight pages at a time, and reading a segment
  takes twice its size; up to `_WRITES` are being written, at three times their size, and `_WAITING` more are queued.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from blake3 import blake3

from surfw.config import BLOCK_BYTES, PAGE_BYTES, display_url
from surfw.metrics import Metrics
from surfw.server.journal import Journal, Sparse
from surfw.server.redis_link import AwayError, DeniedError, RedisLink
from surfw.threads import cancel_all, in_thread
from surfw.wire import RedisState

_WRITES, _WAITING = 2, 8
"""The most segments that are being written to Redis, and that are queued for it."""
_KEPT_SECONDS = 24 * 3600
"""How long Redis keeps a segment, if it has enough memory."""
_LOCK_SECONDS = 5.0
"""How long a server holds the lock on a segment that it is to write."""
_WAIT_SECONDS = 1.0
"""How long the other servers wait for the segment."""
_DENIED_SECONDS = 30.0
"""How long writes pause after Redis refused one: it may be full."""
_FIRST_PAUSE, _MOST_PAUSE = 0.5, 60.0
"""How long Redis is bypassed before it is retried; the pause doubles if it is bypassed again soon."""
_FEWEST_SAMPLES, _SLOWER = 8, 1.25
"""How many waits are measured, and by which factor they must be longer, before Redis counts as slower."""

_PREFIX = "surfw:1:"
_NONE = f"{_PREFIX}none"
"""A key without a value, to find out whether Redis answers."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Page `number` of a chunk's stored bytes, whose BLAKE3 is `digest`; `blocks` joins the digests of its blocks."""

    digest: str
    number: int
    blocks: bytes

    @property
    def key(self) -> str:
        """Its name in Redis."""
        return f"{_PREFIX}{self.digest}:{self.number}"

    @property
    def lock(self) -> str:
        """The name of its lock."""
        return f"{self.key}:lock"

    def take(self, blocks: Sequence[bytes], destination: memoryview) -> bool:
        """Copy its blocks to their destination; return False if one is wrong."""
        for index, block in enumerate(blocks):
            place = destination[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES]
            if len(block) != len(place) or not self._has(index, block):
                return False
            place[:] = block
        return True

    def fits(self, data: memoryview) -> bool:
        """Whether the data matches the digests."""
        starts = range(0, len(data), BLOCK_BYTES)
        return all(self._has(index, data[start : start + BLOCK_BYTES]) for index, start in enumerate(starts))

    def _has(self, index: int, block: bytes | memoryview) -> bool:
        return blake3(block).digest() == self.blocks[32 * index : 32 * index + 32]


class Pace:
    """How long readers wait for a full segment, as a moving average; waits for other readers are included.

    Attributes:
        seconds: the average for a full segment; 0 before the first sample.
        samples: the number of samples.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.samples = 0

    def note(self, seconds: float, size: int) -> None:
        """Add a sample: a wait for `size` bytes. Small sizes are ignored because they say nothing."""
        if size >= BLOCK_BYTES:
            full = seconds * PAGE_BYTES / size
            self.seconds = 0.7 * self.seconds + 0.3 * full if self.samples else full
            self.samples += 1

    def __str__(self) -> str:
        return f"{self.seconds * 1000:.0f} ms"


class RedisTier:
    """A Redis that several servers share. `open` and `close` it in the event loop in which it is used."""

    def __init__(self, url: str) -> None:
        """Use the Redis at this URL, without connecting yet.

        Raises:
            ConfigurationError: the URL is not a Redis URL, or the `redis` package is missing.
        """
        self.url = display_url(url)
        self._secret_url = url
        self._link: RedisLink | None = None  # None while Redis is bypassed, or this is closed
        self._tasks: set[asyncio.Task[None]] = set()
        self._reset(Journal())

    def _reset(self, journal: Journal) -> None:
        self._known = RedisLink(self._secret_url)  # only a template for links
        self._journal = journal
        self._metrics = Metrics()
        self._reachable: bool | None = None  # None: unknown until it is asked
        self._bypassed, self._since = "", time.monotonic()  # the reason, or ""; and the time of the last change
        self._pause = _FIRST_PAUSE
        self._denied_until = float("-inf")
        self._last: Segment | None = None  # the last one that was read or written
        self._redis, self._storage = Pace(), Pace()
        self._writes, self._waiting = asyncio.Semaphore(_WRITES), 0
        self._checking = asyncio.Lock()
        self._poisonings = Sparse(journal, "redis", logging.WARNING)
        self._denials = Sparse(journal, "redis", logging.WARNING)

    @property
    def state(self) -> RedisState:
        """The URL, whether Redis answered the last time, its counters, and the reason if it is bypassed."""
        count = self._metrics.count
        state: RedisState = {
            "url": self.url,
            "reachable": bool(self._reachable),
            "hits": count("hits"),
            "misses": count("misses"),
            "bytes_read": count("bytes_read"),
            "bytes_written": count("bytes_written"),
            "poisoned": count("poisoned"),
        }
        if self._bypassed:
            state["bypassed"], state["bypassed_seconds"] = self._bypassed, time.monotonic() - self._since
        return state

    @property
    def bypasses(self) -> int:
        """How often it was bypassed after being in use."""
        return self._metrics.count("bypasses")

    @property
    def waits(self) -> Mapping[str, float]:
        """The average wait for a full segment from `redis` and the `storage`, in seconds; 0 if not measured."""
        return {"redis": self._redis.seconds, "storage": self._storage.seconds}

    async def open(self, journal: Journal) -> None:
        """Connect. If Redis is unreachable, continue without it; the journal notes this, and any change."""
        self._reset(journal)
        self._bypass("not reached yet")
        await self.check()

    async def close(self) -> None:
        """Disconnect. Closing twice is fine."""
        await cancel_all(self._tasks)
        async with self._checking:
            self._link, self._reachable, self._bypassed = None, None, ""
        await self._known.close()  # all links share its client; this also closes one whose own closing was cancelled
        self._poisonings.flush()
        self._denials.flush()

    async def read(
        self, segment: Segment, destination: memoryview, load: Callable[[], Coroutine[Any, Any, None]]
    ) -> bool:
        """Fill `destination` with the whole segment; return whether it came from Redis.

        Otherwise `load` filled it from the storage; exceptions of `load` are raised.
        """
        link, token = self._link, ""
        if link is not None:
            try:
                if await self._fetch(link, segment, destination):
                    return True
                if time.monotonic() >= self._denied_until:
                    token = await self._lock(link, segment)
                    is_there = await self._appears(link, segment, len(destination), 0 if token else _WAIT_SECONDS)
                    if is_there and await self._fetch(link, segment, destination):
                        if token:
                            await link.unlock(segment.lock, token)
                        return True
            except AwayError as exc:
                self._leave(link, str(exc))
        data, started = None, time.monotonic()
        try:
            await load()
            self._storage.note(time.monotonic() - started, len(destination))
            data = destination if self._waiting < _WAITING else None
        finally:
            if token and link is not None and link is self._link:
                self._waiting += data is not None
                self._spawn(self._write(link, segment, data, token))
        return False

    async def _fetch(self, link: RedisLink, segment: Segment, destination: memoryview) -> bool:
        """Fill `destination` from Redis; return whether Redis had the segment."""
        started = time.monotonic()
        blocks = await link.read(segment.key, len(destination))
        is_hit = bool(blocks) and await in_thread(segment.take, blocks, destination)
        self._metrics.add("hits" if is_hit else "misses")
        if is_hit:
            self._last = segment
            self._metrics.add("bytes_read", len(destination))
        elif blocks:
            self._metrics.add("poisoned")
            self._poisonings.note(f"Redis at {self.url} had a wrong value, which is deleted; the storage is read")
            await link.delete(segment.key)
        # A miss says nothing about speed, unless even that answer took longer than the storage takes.
        seconds = time.monotonic() - started
        if is_hit or seconds > self._storage.seconds > 0:
            self._note_wait(link, seconds, len(destination))
        return is_hit

    async def _lock(self, link: RedisLink, segment: Segment) -> str:
        """Lock a segment for writing; return the lock's token, or "" if another server holds the lock."""
        token = secrets.token_hex(8)
        try:
            return token if await link.lock(segment.lock, token, _LOCK_SECONDS) else ""
        except DeniedError as exc:
            self._note_denial(exc)
            return ""

    async def _appears(self, link: RedisLink, segment: Segment, size: int, seconds: float) -> bool:
        """Whether another server has written a segment in the meantime, or does so within these seconds.

        A wait in vain is counted as slow: locks that are never released must not keep delaying readers.
        """
        pause, deadline = 0.02, time.monotonic() + seconds
        while link is self._link:
            if await link.has(segment.key):
                return True
            if self._denied_until >= deadline:
                break
            if time.monotonic() >= deadline:
                if seconds:
                    self._note_wait(link, seconds, size)
                break
            await asyncio.sleep(pause)
            pause = min(2 * pause, 0.1)
        return False

    async def _write(self, link: RedisLink, segment: Segment, data: memoryview | None, token: str) -> None:
        """Write a segment if there is data that matches its digests, and release its lock."""
        try:
            if data is not None:
                async with self._writes:
                    self._waiting -= 1
                    if link is self._link and await in_thread(segment.fits, data):
                        await link.write(segment.key, data, _KEPT_SECONDS)
                        self._last = segment
                        self._metrics.add("bytes_written", len(data))
            await link.unlock(segment.lock, token)
        except DeniedError as exc:
            self._note_denial(exc)
        except AwayError as exc:
            self._leave(link, str(exc))

    def _note_denial(self, exc: DeniedError) -> None:
        """Pause writing for a while."""
        self._denied_until = time.monotonic() + _DENIED_SECONDS
        self._denials.note(f"Redis at {self.url} takes nothing at the moment, and is only read", str(exc))

    def _note_wait(self, link: RedisLink, seconds: float, size: int) -> None:
        """Add a reader's wait, and bypass Redis if it has become slower than the storage."""
        self._redis.note(seconds, size)
        if self._redis.samples >= _FEWEST_SAMPLES and self._redis.seconds > _SLOWER * self._storage.seconds > 0:
            reason = f"slower than the storage ({self._redis} for a page, beside {self._storage})"
            self._leave(link, reason, is_away=False)

    def _leave(self, link: RedisLink, reason: str, *, is_away: bool = True) -> None:
        """Bypass Redis from now on, unless that was done already."""
        if link is not self._link:
            return
        self._link = None
        self._metrics.add("bypasses")
        self._spawn(link.close())
        is_soon = time.monotonic() - self._since < _MOST_PAUSE
        self._pause = min(2 * self._pause, _MOST_PAUSE) if is_soon else _FIRST_PAUSE
        self._bypass(reason)
        if is_away:
            self._note_absence(reason)
        else:
            self._journal.note("redis", f"Redis at {self.url} is {reason}, and the server goes on without it")

    def _bypass(self, reason: str) -> None:
        self._bypassed, self._since = reason, time.monotonic()
        self._spawn(self._come_back(self._since))

    async def _come_back(self, since: float) -> None:
        """Retry Redis from time to time, until it is used again."""
        while self._since == since:
            await asyncio.sleep(self._pause)
            await self.check()

    async def check(self) -> None:
        """Check whether Redis answers, within a second. If it is bypassed, use it again unless it is too slow.

        The journal notes any change.
        """
        is_under_way = self._checking.locked()
        async with self._checking:
            link = self._link
            if is_under_way:
                return  # another caller has just checked
            if link is not None:
                try:
                    await link.has(_NONE)
                except AwayError as exc:
                    self._leave(link, str(exc))
            elif self._bypassed:
                await self._try()

    async def _try(self) -> None:
        """Use a bypassed Redis again, if it is reachable and not slower than the storage."""
        link, was_reachable = self._known.again(), self._reachable
        try:
            started = time.monotonic()
            if self._last is None:
                await link.has(_NONE)
            else:
                await link.read(self._last.key, PAGE_BYTES)
            self._reachable = True
            if time.monotonic() - started > self._storage.seconds > 0:
                self._bypassed = "slower than the storage"
                return
            self._redis, self._link, self._bypassed, self._since = Pace(), link, "", time.monotonic()
            how = "is used again" if was_reachable else "is reached"
            self._journal.note("redis", f"Redis at {self.url} {how}")
        except AwayError as exc:
            self._bypassed = str(exc)
            if was_reachable is not False:
                self._note_absence(str(exc))
        finally:
            if link is not self._link:
                await link.close()

    def _note_absence(self, reason: str) -> None:
        self._reachable = False
        text = f"Redis at {self.url} cannot be reached, and the server goes on without it"
        self._journal.note("redis", text, reason, level=logging.WARNING)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
