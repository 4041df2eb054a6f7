"""A disk cache in front of a source: what arrives is kept on a local disk, and read from there from then on.

`disk` has the folder. Blocks are verified whenever they are read, and what is damaged is fetched again. The first pass
computes from the stream while this fills the disk; a run that was interrupted goes on where it was. Whoever fetches
blocks holds a lock on them, so that tasks and processes that want the same ones at once fetch them once.

Without a source (`offline`) it delivers what is there, and says what is missing. A folder that cannot be written, or a
full disk, costs a warning and nothing else: what is missing then comes from the source, each time.
"""

import asyncio
import logging
import mmap
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial

from surfw.config import BLOCK_BYTES, MIB, count
from surfw.errors import ConfigurationError, IntegrityError, StorageError
from surfw.manifest import Chunk, Digests, Form, Manifest, count_blocks, payload_digest, with_digests
from surfw.source import ChunkSource, Read, SourceInFront, Verification, View, find_damage
from surfw.sources.disk import Blob, CacheFolder
from surfw.sources.offline import NOT_FETCHED, OfflineSource, missing
from surfw.storage.local_reader import FileRange, LocalReader, MappedFile
from surfw.threads import in_thread, together

logger = logging.getLogger("surfw.cache")

_RUN_BLOCKS = 8
"""So many blocks are fetched and written at a time, while others of the same read are on their way."""

_RUNS_AT_A_TIME = 6
_KEPT_AT_A_TIME = 3
_SCRATCH_BYTES = 4 * MIB
_FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 0.002, 0.05
_PATIENCE_SECONDS = 20.0
"""After this long, what another process was about to fetch is fetched all the same: it may have been stopped."""


class DiskCache(SourceInFront):
    """A source whose bytes are kept in a folder.

    Attributes:
        near_bytes: stored bytes that came from the folder.
        far_bytes: stored bytes that came from the source.
        kept_bytes: stored bytes that were written to the folder.
        healed_blocks: blocks that were damaged there.
        folder: where they are kept.
        is_offline: whether there is no source, and what is missing is an error.
    """

    def __init__(self, source: ChunkSource | None, folder: CacheFolder, url: str) -> None:
        """Put a folder before a source, which is closed with this; without one, only what is there is delivered.

        Args:
            source: where everything comes from, or None to work offline.
            folder: the cache.
            url: the address of the source, for people; models are found by it when there is no source.
        """
        super().__init__(source or OfflineSource(folder, url))
        self.url = url
        self.is_offline = source is None
        self.near_bytes = self.far_bytes = self.kept_bytes = self.healed_blocks = 0
        self.folder = folder
        self._local = LocalReader()
        self._writable = True
        self._seen: dict[str, Manifest] = {}  # the manifests as the source has them, by their digests
        self._meant: dict[str, Manifest] = {}  # the same, by the digests of what a run makes of them
        self._accepted: set[str] = set()  # digests of those that are kept
        self._accepting = asyncio.Lock()
        self._digests: dict[str, Digests] = {}  # of chunks that lack them, by their provisional ids
        self._held: dict[str, bytearray] = {}  # flags of blocks, by the digests of forms: what is near, as last seen
        self._keeping = asyncio.Semaphore(_KEPT_AT_A_TIME)
        self._spare: list[memoryview] = []  # what is kept went through it; nobody has it now

    async def open(self) -> None:
        """Make the folder, or go on without it.

        Raises:
            ConfigurationError: something else lies there; or it is not there, and there is no source.
        """
        if self.is_offline:
            if not await in_thread(lambda: self.folder.exists):
                raise ConfigurationError(
                    f"there is no disk cache in {self.folder.path}, and {NOT_FETCHED}; fill it with a run "
                    "that is online (disk_cache, --disk-cache), or name another (cache_dir, --cache-dir)"
                )
            self._writable = False
            return
        try:
            await in_thread(self.folder.create)
        except OSError as exc:
            self._give_up(exc)

    @property
    def is_writable(self) -> bool:
        """Whether what arrives is kept."""
        return self._writable

    def _give_up(self, error: OSError) -> None:
        """Write nothing any more; what is there may still be read."""
        if self._writable:
            self._writable = False
            why = error.strerror or type(error).__name__
            logger.warning(
                "the disk cache in %s cannot be written: %s; what is missing there is fetched at every use",
                self.folder.path, why,
            )  # fmt: skip

    async def manifest(self, model: str) -> Manifest:
        """The manifest of a model, which is kept once something of the model is asked for."""
        manifest = await self._source.manifest(model)
        await in_thread(self._look, manifest)
        self._seen.pop(manifest.digest, None)  # it is the last one now
        self._seen[manifest.digest] = manifest
        return manifest

    async def _accept(self, manifest: Manifest) -> None:
        """Keep the manifest: whoever asks for something of the model has accepted it, by its pin and its signature."""
        kept = self._as_seen(manifest)
        if kept is None or kept.digest in self._accepted:
            return
        async with self._accepting:
            if kept.digest not in self._accepted:
                await in_thread(self._enter, kept)
                self._accepted.add(kept.digest)

    def _as_seen(self, manifest: Manifest) -> Manifest | None:
        """A manifest as the source has it: a run leaves out forms and chunks that it does not read."""
        if manifest.digest not in self._meant:
            found = next((one for one in reversed(self._seen.values()) if _is_of(manifest, one)), None)
            if found is None:
                return None
            self._meant[manifest.digest] = found
        return self._meant[manifest.digest]

    def _enter(self, manifest: Manifest) -> None:
        """Keep a manifest, and note that the model is used."""
        try:
            if self._writable:
                self.folder.keep_model(manifest, self.url)
        except OSError as exc:
            self._give_up(exc)
        self.folder.use(manifest)

    def _look(self, manifest: Manifest) -> None:
        """See what is there of a model's chunks."""
        self._digests |= self.folder.digests(manifest)
        for chunk in manifest.chunks:
            known = with_digests(chunk, self._digests.get(chunk.id))
            for form in known.forms:
                if form.is_known:
                    self._held[form.digest] = bytearray(self.folder.flags(form))

    async def file(self, manifest: Manifest, path: str) -> bytes:
        """A tokenizer file, from the folder if it is there as it should be."""
        entry = manifest.file(path)
        await self._accept(manifest)
        data = await in_thread(self.folder.read_file, entry.digest, entry.size)
        if data is not None and payload_digest(data) == entry.digest:
            return data
        if data is not None and self.is_offline:
            raise missing(f"{path} of {manifest.name}", "is damaged", self.folder)
        fetched = await self._source.file(manifest, path)
        try:
            if self._writable:
                await in_thread(self.folder.keep_file, entry.digest, fetched)
        except OSError as exc:
            self._give_up(exc)
        return fetched

    async def fetch(self, manifest: Manifest, reads: Sequence[Read], *, priority: int = 0) -> None:
        """Fill every read's destination from the folder, or from the source, and the folder with what that gave."""
        await self._accept(manifest)
        turns = asyncio.Semaphore(_RUNS_AT_A_TIME)
        # Nobody is told of single blocks: whoever changes them then would change what is written to the folder.
        plain = [replace(read, on_verified=None) for read in reads]
        await together(self._fetch(manifest, read, priority, turns) for read in plain)

    async def _fetch(self, manifest: Manifest, read: Read, priority: int, turns: asyncio.Semaphore) -> None:
        is_whole = read.stop - read.start == read.form.stored_bytes
        if is_whole and not self._is_known(read.chunk, read.form):
            async with turns:
                await self._from_source(manifest, [read], priority)  # its digests are computed on the way
            await self._keep_whole(manifest, read)
            return
        digested = await self._with_digests(manifest, read)
        blob = None if digested is None else await self._open_blob(digested.form)
        if digested is None or blob is None:
            async with turns:
                await self._from_source(manifest, [read], priority)
            return
        with closing(blob):
            there = await in_thread(blob.present)
            self._held[digested.form.digest] = bytearray(there)
            damaged: list[int] = []
            for low, high, is_there in _stretches(there, digested):
                if is_there:
                    damaged += await self._read_near(_part(digested, low, high), blob, urgent=priority == 0)
            again = bytearray(there)
            for block in damaged:
                again[block] = 0
            runs = [
                (start, min(start + _RUN_BLOCKS, high))
                for low, high, is_there in _stretches(bytes(again), digested)
                if not is_there
                for start in range(low, high, _RUN_BLOCKS)
            ]

            async def fill(low: int, high: int) -> None:
                async with turns:
                    await self._fill(manifest, _part(read, low, high), digested.form, blob, priority)

            await together(fill(low, high) for low, high in runs)

    async def _keep_whole(self, manifest: Manifest, read: Read) -> None:
        """Keep all of a form that had no digests before it was read."""
        digested = await self._with_digests(manifest, read)
        blob = None if digested is None else await self._open_blob(digested.form)
        if digested is not None and blob is not None:
            with closing(blob):
                await self._write(blob, digested.form, read, is_mapped_next=False)

    async def _fill(
        self, manifest: Manifest, read: Read, form: Form, blob: Blob, priority: int, *, is_mapped_next: bool = False
    ) -> None:
        """Fill the destination of a few blocks that are missing, unless somebody else has fetched them by then."""
        first, stop = _blocks(read)
        if not await self._lock(blob, first, stop):
            await self._from_source(manifest, [read], priority)
            return
        try:
            there = bytearray(blob.present(first, stop))
            for low, high, is_there in _stretches(bytes(first) + bytes(there), read):
                if is_there:
                    part = replace(_part(read, low, high), form=form)
                    for block in await self._read_near(part, blob, urgent=priority == 0):
                        there[block - first] = 0
            parts = [
                _part(read, low, high)
                for low, high, is_there in _stretches(bytes(first) + bytes(there), read)
                if not is_there
            ]
            await self._from_source(manifest, parts, priority)
            for part in parts:
                await self._write(blob, form, part, is_mapped_next=is_mapped_next)
        finally:
            blob.unlock(first, stop)

    async def _lock(self, blob: Blob, first: int, stop: int) -> bool:
        """Have blocks to oneself; False if another had them for too long."""
        wait, waited = _FIRST_WAIT_SECONDS, 0.0
        while not blob.lock(first, stop):
            if waited >= _PATIENCE_SECONDS:
                return False
            await asyncio.sleep(wait)
            waited += wait
            wait = min(2 * wait, _LONGEST_WAIT_SECONDS)
        return True

    async def _from_source(self, manifest: Manifest, reads: Sequence[Read], priority: int) -> None:
        if not reads:
            return
        await self._source.fetch(manifest, reads, priority=priority)
        self.far_bytes += sum(read.stop - read.start for read in reads)

    async def _read_near(self, read: Read, blob: Blob, *, urgent: bool) -> list[int]:
        """Read blocks from the folder; returns those that are damaged, which are marked as not there."""
        check = Verification(read)
        try:
            await self._local.read(
                [FileRange(blob.path, read.start, read.stop)], read.destination, check, urgent=urgent
            )
        except StorageError:
            return list(range(*_blocks(read)))  # it was removed, cut off, or the disk is broken
        damaged = sorted(check.damaged)
        spoiled = sum(min((block + 1) * BLOCK_BYTES, read.stop) - block * BLOCK_BYTES for block in damaged)
        self.near_bytes += read.stop - read.start - spoiled
        await self._forget(read.chunk, read.form, blob, damaged)
        return damaged

    async def _forget(self, chunk: Chunk, form: Form, blob: Blob, damaged: Sequence[int]) -> None:
        """Mark damaged blocks as not there, and say so."""
        if not damaged:
            return
        self.healed_blocks += len(damaged)
        logger.warning(
            "%s of chunk %s damaged in the disk cache in %s%s",
            count(len(damaged), "block"), chunk.name, self.folder.path, "" if self.is_offline else "; fetching again",
        )  # fmt: skip
        for block in damaged:
            self._held.setdefault(form.digest, bytearray(blob.count))[block] = 0
        try:
            await in_thread(blob.forget, list(damaged))
        except OSError as exc:
            self._give_up(exc)
        if self.is_offline:
            raise missing(f"chunk {chunk.name}", "is damaged", self.folder)

    async def _write(self, blob: Blob, form: Form, read: Read, *, is_mapped_next: bool) -> None:
        if not self._writable:
            return
        first, stop = _blocks(read)
        try:
            await in_thread(partial(blob.write, first, read.destination, is_mapped_next=is_mapped_next))
        except OSError as exc:
            self._give_up(exc)
            return
        self.kept_bytes += read.stop - read.start
        self._held.setdefault(form.digest, bytearray(blob.count))[first:stop] = b"\1" * (stop - first)

    async def _open_blob(self, form: Form) -> Blob | None:
        if not form.stored_bytes:
            return None
        try:
            return await in_thread(partial(self.folder.open_blob, form, create=self._writable))
        except OSError as exc:
            self._give_up(exc)
            return None

    def _is_known(self, chunk: Chunk, form: Form) -> bool:
        return form.is_known or chunk.id in self._digests

    async def _with_digests(self, manifest: Manifest, read: Read) -> Read | None:
        """The read with the digests that its form may lack; None if nobody knows them."""
        if read.form.is_known:
            return read
        if read.chunk.id not in self._digests:
            found = await self._source.digests(manifest, read.chunk)
            if found is None:
                return None
            self._digests[read.chunk.id] = found
            try:
                if self._writable and (seen := self._as_seen(manifest)) is not None:
                    await in_thread(self.folder.learn, seen, read.chunk.id, found)
            except OSError as exc:
                self._give_up(exc)
        known = with_digests(read.chunk, self._digests[read.chunk.id])
        return replace(read, chunk=known, form=known.forms[0])

    async def digests(self, manifest: Manifest, chunk: Chunk) -> Digests | None:
        """The digests of a chunk that lacks them."""
        return self._digests.get(chunk.id) or await self._source.digests(manifest, chunk)

    async def view(self, manifest: Manifest, chunk: Chunk, form: Form) -> View | None:
        """The form's bytes as mapped pages of the folder, if all of them are there."""
        await self._accept(manifest)
        if not form.stored_bytes or not self._is_known(chunk, form):
            return None
        form = self._digested(chunk, form)
        blob = await self._open_known(form)
        if blob is None:
            return None
        with closing(blob):
            if b"\0" in blob.present():
                return None
            try:
                mapped = await in_thread(MappedFile, FileRange(blob.path, 0, form.stored_bytes))
            except StorageError:
                return None
            check = Verification(Read(chunk, form, 0, form.stored_bytes, mapped.memory))
            await self._local.check(mapped.memory, check)
            await self._forget(chunk, form, blob, sorted(check.damaged))
            if check.damaged:
                return None
        self.near_bytes += form.stored_bytes

        def expect_same(at: int, piece: memoryview) -> None:
            if find_damage(form, at // BLOCK_BYTES, piece):
                raise IntegrityError(
                    f"chunk {chunk.name} was changed in the disk cache in {self.folder.path} while it was in use, and "
                    "what was computed since may be wrong; open the model again"
                )

        return View(mapped.memory, partial(mapped.expect_unchanged, expect_same))

    async def _open_known(self, form: Form) -> Blob | None:
        try:
            return await in_thread(partial(self.folder.open_blob, form, create=False))
        except OSError:
            return None

    async def pin(self, manifest: Manifest) -> None:
        """Have a model stay in the folder, whatever room is needed."""
        await self._accept(manifest)
        try:
            await in_thread(self.folder.pin, manifest)
        except OSError as exc:
            self._give_up(exc)

    async def learn(self, manifest: Manifest, chunk: Chunk) -> None:
        """Ask for digests that a chunk lacks; where its source has none either, it cannot be kept."""
        await self._accept(manifest)
        form = chunk.forms[0]
        await self._with_digests(manifest, Read(chunk, form, 0, 0, memoryview(bytearray())))

    async def keep(self, manifest: Manifest, chunk: Chunk, form: Form, *, priority: int = 0) -> bool:
        """Have all of a form in the folder, if there is room; it takes little memory. Returns whether all is there."""
        await self._accept(manifest)
        if not self._writable or not self._is_known(chunk, form):
            return False
        known = self._digested(chunk, form)
        blob = await self._open_blob(known)
        if blob is None:
            return not known.stored_bytes
        with closing(blob):
            is_mapped_next = known.codec != "lossless"
            missing = [block for block, there in enumerate(await in_thread(blob.present)) if not there]

            async def fill(low: int, high: int) -> None:
                async with self._keeping:
                    start, stop = low * BLOCK_BYTES, min(high * BLOCK_BYTES, form.stored_bytes)
                    scratch = self._spare.pop() if self._spare else memoryview(mmap.mmap(-1, _SCRATCH_BYTES))
                    read = Read(chunk, form, start, stop, scratch[: stop - start])
                    try:
                        await self._fill(manifest, read, known, blob, priority, is_mapped_next=is_mapped_next)
                    finally:
                        self._spare.append(scratch)

            await together(fill(low, high) for low, high in _runs(missing, _SCRATCH_BYTES // BLOCK_BYTES))
            self._held[known.digest] = bytearray(there := blob.present())  # others may have written some of it
            return b"\0" not in there

    def _digested(self, chunk: Chunk, form: Form) -> Form:
        """The form with the digests that are known."""
        return form if form.is_known else with_digests(chunk, self._digests[chunk.id]).forms[0]

    def near(self, manifest: Manifest, chunk: Chunk) -> tuple[Form, ...]:
        """The forms of a chunk that are in the folder as a whole; if there are none, those of which a part is."""
        del manifest
        known = with_digests(chunk, self._digests.get(chunk.id))
        flags = [self._held.get(form.digest, b"\0") for form in known.forms]
        forms = list(zip(chunk.forms, flags, strict=True))
        whole = tuple(form for form, there in forms if 0 not in there)
        return whole or tuple(form for form, there in forms if any(there))

    @property
    def buffered_bytes(self) -> int:
        """The most memory that fetching takes besides the destinations."""
        return 0 if self.is_offline else self._source.buffered_bytes + _KEPT_AT_A_TIME * _SCRATCH_BYTES

    @property
    def refetched_blocks(self) -> int:
        """Blocks that arrived damaged, or were damaged in the folder, and were fetched again."""
        return self.healed_blocks + self._source.refetched_blocks

    @property
    def fetched_bytes(self) -> int:
        """Stored bytes delivered so far."""
        return self.near_bytes + self.far_bytes

    async def close(self) -> None:
        """Close the source, and let go of the folder."""
        await self._source.close()
        await in_thread(self._local.close)
        await in_thread(self.folder.close)


def _is_of(part: Manifest, whole: Manifest) -> bool:
    """Whether a manifest is another one, or has some of its chunks and forms, or digests that it lacks."""
    about = [(one.name, one.config, one.files, one.signature) for one in (part, whole)]
    if about[0] != about[1] or any(chunk.name not in whole.by_name for chunk in part.chunks):
        return False
    pairs = [(chunk, whole.by_name[chunk.name]) for chunk in part.chunks]
    return all(
        not there.forms[0].is_known or (chunk.id == there.id and {*_digests_of(chunk)} <= {*_digests_of(there)})
        for chunk, there in pairs
    )


def _digests_of(chunk: Chunk) -> Iterator[tuple[str, str, bytes]]:
    """Which bytes each form of a chunk is."""
    return ((form.codec, form.digest, form.blocks) for form in chunk.forms)


def _blocks(read: Read) -> tuple[int, int]:
    """The blocks of a read, end-exclusive."""
    return read.start // BLOCK_BYTES, count_blocks(read.stop)


def _part(read: Read, low: int, high: int) -> Read:
    """Blocks `low` to `high` (end-exclusive) of a read."""
    start, stop = low * BLOCK_BYTES, min(high * BLOCK_BYTES, read.stop)
    return replace(read, start=start, stop=stop, destination=read.destination[start - read.start : stop - read.start])


def _stretches(flags: bytes, read: Read) -> Iterator[tuple[int, int, bool]]:
    """The blocks of a read in runs, end-exclusive, each with whether it is there."""
    first, stop = _blocks(read)
    low = first
    for block in range(first, stop):
        if block + 1 == stop or bool(flags[block + 1]) != bool(flags[low]):
            yield low, block + 1, bool(flags[low])
            low = block + 1


def _runs(blocks: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """Blocks in order as runs of neighbours, end-exclusive, of at most so many."""
    low = 0
    for at in range(1, len(blocks) + 1):
        if at == len(blocks) or blocks[at] != blocks[at - 1] + 1 or at - low == most:
            yield blocks[low], blocks[at - 1] + 1
            low = at
