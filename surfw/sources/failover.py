"""Failover between several sources of one model: when one fails, the others continue where it stopped.

`choice` selects the source. A read is cut into ranges. Each range is requested from one source; if that is late, a
second source gets the same request (a hedge). After a fault only the missing blocks are requested again: blocks that
have arrived are verified by their digests. A source is opened at its first use, and must have the same model: config,
files and payloads. A source that delivered damage is set aside. A request fails when every source has used up the
attempts of the retry policy without progress or, if a deadline is set, when the deadline has passed.

With a single source, this retries it until the deadline.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from surfw.config import BLOCK_BYTES
from surfw.errors import (
    ConnectionFailedError,
    IntegrityError,
    ManifestError,
    RefusedError,
    StorageError,
    SurfwError,
    UnknownModelError,
    WireError,
)
from surfw.manifest import Chunk, Digests, Manifest
from surfw.retry import RetryPolicy
from surfw.source import ChunkSource, Read, Waiting, find_damage
from surfw.sources.choice import SourceTable, Standing
from surfw.sources.identity import find_difference, share_forms
from surfw.threads import cancel_all, in_thread, together

logger = logging.getLogger("surfw.sources")

T = TypeVar("T")
OpenSource = Callable[[], Coroutine[Any, Any, ChunkSource]]
"""Opens a source. It should try only once: retries are decided here."""

_RANGE_BLOCKS = 8
_RANGES_AT_A_TIME = 6
_HEDGES_AT_A_TIME = 2
_COMPARE_SECONDS = 1.0
"""How long to wait for the other manifests after the first; later ones are compared when they arrive."""

_NOT_LET_IN = {"no-token", "another-token"}
_HEDGE_SECONDS = 0.25
"""How often a late range checks whether another source may be asked."""

_LOOK_SECONDS = 0.1
"""How often a waiting request checks whether another one has found a source working again."""

_FAULTS = (WireError, StorageError, IntegrityError, ManifestError, UnknownModelError)


class _LateError(ConnectionFailedError):
    """A source was late, and another one answered the request."""


class Failover(ChunkSource):
    """Several sources as one, used in the given order of preference or by speed.

    Attributes:
        fetched_bytes: stored bytes delivered so far.
        hedged_ranges: ranges that were also requested from a second source because the first was late.
        failures: how often a source failed or was late.
    """

    fetched_bytes = 0

    def __init__(
        self,
        places: Sequence[tuple[str, OpenSource]],
        *,
        retry: RetryPolicy | None = None,
        deadline_seconds: float | None = None,
        by_speed: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Set the sources; none is opened yet.

        Args:
            places: for each source, its address for display, and the function that opens it.
            retry: how long a source rests after failures, and how many failures are tolerated without a deadline.
            deadline_seconds: the time limit of each request, retries included.
            by_speed: whether to prefer the source measured fastest, and not the one given first.
            clock: returns the time in seconds, from any origin.
        """
        self.url = places[0][0]
        self.hedged_ranges = self.failures = 0
        self._retry = retry or RetryPolicy()
        self._table = SourceTable([Standing(url) for url, _ in places], self._retry, by_speed)
        self._open = [open_source for _, open_source in places]
        self._sources: dict[int, ChunkSource] = {}
        self._opening = [asyncio.Lock() for _ in places]
        self._theirs: dict[tuple[int, str], Manifest] = {}  # manifests as each source has them
        self._announced: dict[str, tuple[Manifest, Sequence[Chunk], Sequence[Chunk]]] = {}
        self._deadline_seconds = deadline_seconds
        self._clock = clock
        self._hedges = asyncio.Semaphore(_HEDGES_AT_A_TIME)
        self._waiting: Waiting | None = None
        self._closed = False

    @property
    def waiting(self) -> Waiting | None:
        """What is waited for after a failure, until a source delivers again."""
        return self._waiting

    @property
    def standings(self) -> Sequence[Standing]:
        """The state of each source."""
        return self._table.standings

    async def models(self) -> list[str]:
        """Return the model names of the first source that answers."""
        return await self._somewhere("the list of models", lambda source, _: source.models())

    async def manifest(self, model: str) -> Manifest:
        """Return the manifest of the model. All sources that answer must agree on it.

        Raises:
            ManifestError: sources have different models under this name.
        """
        first = await self._somewhere(f"the manifest of {model}", lambda source, _: source.manifest(model), key=model)
        asking = {
            index: asyncio.create_task(self._ask(index, model))
            for index in self._table.usable(self._clock())
            if (index, model) not in self._theirs
        }
        try:
            if asking:
                await asyncio.wait(asking.values(), timeout=_COMPARE_SECONDS)
        finally:
            await cancel_all(asking.values())
        theirs = {index: found for (index, name), found in self._theirs.items() if name == model}
        for index, found in theirs.items():
            if (difference := find_difference(first, found)) is not None:
                urls = [self._url(next(one for one, other in theirs.items() if other is first)), self._url(index)]
                raise ManifestError(
                    f"{urls[0]} and {urls[1]} have different models {model!r}: they differ in {difference}; "
                    "name sources of one model only"
                )
        return share_forms(first, list(theirs.values()))

    async def _ask(self, index: int, model: str) -> None:
        """Get a source's manifest; after a failure it is requested again when the source is used."""
        try:
            self._theirs[index, model] = await (await self._opened(index)).manifest(model)
        except _FAULTS as exc:
            self._note(index, exc)

    async def file(self, manifest: Manifest, path: str) -> bytes:
        """Return a tokenizer file of the model from the first source that delivers it."""
        what = f"{path} of {manifest.name}"
        return await self._somewhere(what, lambda source, theirs: source.file(theirs or manifest, path), of=manifest)

    async def digests(self, manifest: Manifest, chunk: Chunk) -> Digests | None:
        """Return the digests of a chunk whose manifest lacks them."""
        what = f"the digests of chunk {chunk.name}"
        return await self._somewhere(
            what,
            lambda source, theirs: source.digests(theirs or manifest, (theirs or manifest).by_name[chunk.name]),
            of=manifest,
        )

    async def announce(self, manifest: Manifest, cycle: Sequence[Chunk], kept: Sequence[Chunk]) -> None:
        """Announce to all sources what will be read, including sources that are opened later."""
        self._announced[manifest.name] = manifest, cycle, kept
        for source in list(self._sources.values()):  # a source that is opened meanwhile is told by `_opened`
            await source.announce(manifest, cycle, kept)

    async def fetch(self, manifest: Manifest, reads: Sequence[Read], *, priority: int = 0) -> None:
        """Fill every read's destination, range by range, from any source that can deliver the range."""
        turns = asyncio.Semaphore(_RANGES_AT_A_TIME)

        async def fetch(read: Read) -> None:
            async with turns:
                await self._fetch_range(manifest, read, priority)

        # No callback per block: a caller that changed the block there would make it look missing.
        plain = [replace(read, on_verified=None) for read in reads]
        await together(fetch(part) for read in plain for part in _ranges(read))
        self.fetched_bytes += sum(read.stop - read.start for read in reads)

    async def _fetch_range(self, manifest: Manifest, read: Read, priority: int) -> None:
        """Fill one range; after each fault, request only what is missing."""
        missing = [read]

        async def attempt(index: int) -> None:
            nonlocal missing
            try:
                await self._fetch_from(index, manifest, missing, priority)
            except _LateError as exc:  # the other source has filled them
                self._note(index, exc.__cause__ or exc)
            except _FAULTS as exc:
                left = [part for one in missing for part in await in_thread(_find_missing, one)]
                if _size(left) < _size(missing):
                    self._progressed(index)
                missing = left
                if missing:
                    raise
                self._note(index, exc)

        await self._persistently(f"chunk {read.chunk.name} of {manifest.name}", attempt)

    async def _fetch_from(self, index: int, manifest: Manifest, reads: Sequence[Read], priority: int) -> None:
        """Fetch ranges from a source; if it is late, hedge with another source, into separate memory."""
        began, size = self._clock(), _size(reads)
        deliver = partial(self._deliver, manifest=manifest, priority=priority)
        first = asyncio.create_task(deliver(index, reads))
        try:
            await asyncio.wait([first], timeout=self._table.late_seconds(index, size))
            while not first.done():
                other = next((one for one in self._table.usable(self._clock()) if one != index), None)
                if other is not None and not self._hedges.locked():
                    async with self._hedges:
                        await self._hedge(first, index, other, reads, deliver)
                    break
                await asyncio.wait([first], timeout=_HEDGE_SECONDS)
            await first
        finally:
            await cancel_all([first])
        self._table.succeeded(index, size, self._clock() - began)

    async def _hedge(
        self,
        first: "asyncio.Task[None]",
        index: int,
        other: int,
        reads: Sequence[Read],
        deliver: Callable[[int, Sequence[Read]], Coroutine[Any, Any, None]],
    ) -> None:
        """Request late ranges from another source as well. Returns once `first` has ended.

        Raises:
            _LateError: the other source was faster; the cause is the failure of `first`, if it failed meanwhile.
        """
        self.hedged_ranges += 1
        began = self._clock()
        copies = [_copy(read) for read in reads]
        second = asyncio.create_task(deliver(other, copies))
        try:
            await asyncio.wait([first, second], return_when=asyncio.FIRST_COMPLETED)
            if not first.done() and second.exception() is None:
                await cancel_all([first])
            if first.done() and not first.cancelled() and first.exception() is None:
                return
            try:
                await second
            except _FAULTS as exc:
                self._note(other, exc)
                await asyncio.wait([first])
                return
        finally:
            await cancel_all([second])
        for read, copy in zip(reads, copies, strict=True):
            read.destination[:] = copy.destination
        self._table.succeeded(other, _size(reads), self._clock() - began)
        failure = None if first.cancelled() else first.exception()
        raise _LateError(f"{self._url(index)} is late") from failure

    async def _deliver(self, index: int, reads: Sequence[Read], *, manifest: Manifest, priority: int) -> None:
        """Fetch ranges from a source, translated to its manifest."""
        source, theirs = await self._opened(index), await self._their(index, manifest)
        await source.fetch(theirs, [_translate(read, theirs, self._url(index)) for read in reads], priority=priority)

    async def _their(self, index: int, manifest: Manifest) -> Manifest:
        """The source's own manifest of the model.

        Raises:
            ManifestError: the source has another model under this name.
        """
        key = index, manifest.name
        if key not in self._theirs:
            found = await (await self._opened(index)).manifest(manifest.name)
            known = next((theirs for (_, name), theirs in self._theirs.items() if name == manifest.name), manifest)
            if (difference := find_difference(known, found)) is not None:
                raise ManifestError(f"{self._url(index)} has another model {manifest.name!r}: {difference} differs")
            self._theirs[key] = found
        return self._theirs[key]

    async def _opened(self, index: int) -> ChunkSource:
        async with self._opening[index]:
            if self._closed:
                raise ConnectionFailedError(f"{self._url(index)} is closed")
            if index not in self._sources:
                source = self._sources[index] = await self._open[index]()
                for announced in list(self._announced.values()):
                    await source.announce(*announced)
            return self._sources[index]

    async def _somewhere(
        self,
        what: str,
        ask: Callable[[ChunkSource, Manifest | None], Awaitable[T]],
        *,
        of: Manifest | None = None,
        key: str | None = None,
    ) -> T:
        """Return the answer of the first source that succeeds. `ask` gets the source, and its own manifest of `of`."""
        found: list[T] = []

        async def attempt(index: int) -> None:
            source = await self._opened(index)
            found.append(await ask(source, None if of is None else await self._their(index, of)))
            if key is not None and isinstance(found[0], Manifest):
                self._theirs[index, key] = found[0]
            self._table.succeeded(index, 0, 0.0)

        await self._persistently(what, attempt)
        return found[0]

    async def _persistently(self, what: str, attempt: Callable[[int], Awaitable[None]]) -> None:
        """Run `attempt` with one source after another until it succeeds, the attempts are used up or time runs out.

        Raises:
            SurfwError: no source succeeded: the last failure of a single source, or an error that names all sources.
        """
        ends = float("inf") if self._deadline_seconds is None else self._clock() + self._deadline_seconds
        last: BaseException | None = None
        while True:
            now = self._clock()
            usable = self._table.usable(now)
            if usable and now < ends:
                index = usable[0]
                self._table.begin(index, now)
                try:
                    async with asyncio.timeout(None if ends == float("inf") else ends - now):
                        await attempt(index)
                except TimeoutError:
                    continue
                except _FAULTS as exc:
                    last = exc
                    self._note(index, exc)
                    continue
                finally:
                    self._table.end(index)
                self._waiting = None
                return
            resting = self._table.next_try()
            is_over = now >= ends or (ends == float("inf") and self._table.is_exhausted())
            if resting is None or is_over or self._is_hopeless(last):
                raise self._give_up(what, last, in_time=now < ends) from last
            at, index = resting
            self._wait_for(index, at)
            await asyncio.sleep(min(max(0.0, min(at, ends) - now), _LOOK_SECONDS))

    def _is_hopeless(self, last: BaseException | None) -> bool:
        """Whether the only source failed permanently, and no deadline is set."""
        may_pass = not isinstance(last, SurfwError) or (isinstance(last, ConnectionFailedError) and last.transient)
        return len(self._open) == 1 and self._deadline_seconds is None and not may_pass

    def _give_up(self, what: str, last: BaseException | None, *, in_time: bool) -> SurfwError:
        if in_time and len(self._open) == 1 and isinstance(last, SurfwError):
            return last
        within = "" if in_time else f" within {self._deadline_seconds:g} seconds (deadline, --deadline)"
        whys = "; ".join(f"{one.url}: {one.why or 'too slow'}" for one in self._table.standings)
        text = f"{what} could not be had{within}: {whys}"
        if all(one.aside for one in self._table.standings) and isinstance(last, IntegrityError | ManifestError):
            return IntegrityError(text)
        if isinstance(last, UnknownModelError | RefusedError) and in_time:
            return last
        return ConnectionFailedError(text, transient=True)

    def _note(self, index: int, error: BaseException | None) -> None:
        """Record a failure: set the source aside, or let it rest."""
        standing, now = self._table.standings[index], self._clock()
        why = str(error)
        self.failures += 1
        is_final = isinstance(error, IntegrityError | ManifestError | UnknownModelError) or (
            isinstance(error, RefusedError) and error.code in _NOT_LET_IN
        )
        if is_final and not standing.aside:
            if len(self._open) > 1:
                logger.warning("%s is not asked any more: %s", standing.url, why)
            self._table.set_aside(index, why)
        elif not is_final:
            if standing.failed_at is None:
                level = logging.WARNING if len(self._open) > 1 else logging.INFO
                logger.log(level, "%s failed, and is tried again later: %s", standing.url, why)
            self._table.failed(index, now, why)

    def _wait_for(self, index: int, at: float) -> None:
        lost = [one for one in self._table.standings if one.failed_at is not None]
        since = min((one.failed_at for one in lost if one.failed_at is not None), default=self._clock())
        self._waiting = Waiting(lost[0].url if lost else self.url, since, self._url(index), at)

    def _progressed(self, index: int) -> None:
        self._table.progressed(index)
        self._waiting = None

    def _url(self, index: int) -> str:
        return self._table.standings[index].url

    @property
    def buffered_bytes(self) -> int:
        """The most memory that fetching takes, without destinations; an unopened source counts as the largest."""
        each = max((source.buffered_bytes for source in self._sources.values()), default=0)
        hedges = _HEDGES_AT_A_TIME * _RANGE_BLOCKS * BLOCK_BYTES if len(self._open) > 1 else 0
        return each * len(self._open) + hedges

    @property
    def refetched_blocks(self) -> int:
        """Blocks that arrived damaged and were fetched again."""
        return sum(source.refetched_blocks for source in self._sources.values())

    async def close(self) -> None:
        """Close all sources that were opened."""
        self._closed = True
        for index, lock in enumerate(self._opening):
            async with lock:
                source = self._sources.get(index)
            if source is not None:
                with suppress(WireError, StorageError):
                    await source.close()


def _size(reads: Sequence[Read]) -> int:
    return sum(read.stop - read.start for read in reads)


def _ranges(read: Read) -> Iterator[Read]:
    """Cut a read into ranges of a few blocks."""
    step = _RANGE_BLOCKS * BLOCK_BYTES
    for start in range(read.start, max(read.stop, read.start + 1), step):
        yield _part(read, start, min(start + step, read.stop))


def _part(read: Read, start: int, stop: int) -> Read:
    return replace(read, start=start, stop=stop, destination=read.destination[start - read.start : stop - read.start])


def _find_missing(read: Read) -> list[Read]:
    """Find the runs of blocks that are missing in the destination; the whole range if it has no digests."""
    if not read.form.is_known:
        return [read]
    first = read.start // BLOCK_BYTES
    missing = sorted(find_damage(read.form, first, read.destination)) if read.stop > read.start else []
    parts: list[Read] = []
    for block in missing:
        start, stop = block * BLOCK_BYTES, min((block + 1) * BLOCK_BYTES, read.stop)
        if parts and parts[-1].stop == start:
            start = parts.pop().start
        parts.append(_part(read, start, stop))
    return parts


def _copy(read: Read) -> Read:
    """The same range, with its own memory as destination."""
    return replace(read, destination=memoryview(bytearray(read.stop - read.start)))


def _translate(read: Read, theirs: Manifest, url: str) -> Read:
    """The same range, located as in the source's manifest, but verified with our digests.

    Raises:
        StorageError: the source does not have that form.
    """
    chunk = theirs.by_name[read.chunk.name]
    for form in chunk.forms:
        if form.codec == read.form.codec and form.digest in {read.form.digest, ""}:
            ours = replace(read.form, locations=form.locations) if read.form.is_known and form.is_known else form
            return replace(read, chunk=chunk, form=ours)
    raise StorageError(f"chunk {chunk.name} is not stored as '{read.form.codec}' in {url}")
