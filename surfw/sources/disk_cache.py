"""A disk cache in front of a source: fetched bytes are written to a local disk, and later reads come from there.

`disk` manages the folder. Blocks are verified at every read; damaged ones are fetched again. The first pass computes
from the stream while the cache fills; a run that was interrupted resumes where it stopped. A task or process locks
blocks while it fetches them, so that concurrent readers fetch each block only once.

Without a source (`offline`), the cache delivers what it has, and reports what is missing. If the folder cannot be
written or the disk is full, the cache logs one warning, and every miss is fetched from the source.
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
from surfw.sources.blob import Blob, block_bytes
from surfw.sources.disk import CacheFolder
from surfw.sources.offline import NOT_FETCHED, OfflineSource, missing
from surfw.storage.local_reader import FileRange, LocalReader, MappedFile
from surfw.threads import in_thread, together

logger = logging.getLogger("surfw.cache")

_RUN_BLOCKS = 8
"""How many blocks are fetched and written as one run; other runs of the same read are in flight meanwhile."""

_RUNS_AT_A_TIME = 6
_KEPT_AT_A_TIME = 3
_SCRATCH_BYTES = 4 * MIB
_FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 0.002, 0.05
_PATIENCE_SECONDS = 20.0
"""How long to wait for blocks that another process has locked; it may have been stopped, so they are then fetched."""


class DiskCache(SourceInFront):
    """A source with a disk cache in front of it.

    Attributes:
        near_bytes: stored bytes read from the cache.
        far_bytes: stored bytes fetched from the source.
        kept_bytes: stored bytes written to the cache.
        healed_blocks: blocks found damaged in the cache.
        folder: the cache folder.
    """

    def __init__(self, source: ChunkSource | None, folder: CacheFolder, url: str) -> None:
        """Put a cache folder in front of a source.

        Args:
            source: the source, which is closed with the cache; None to work offline.
            folder: the cache folder.
            url: the address of the source, for display. Offline, it selects the models that this source had.
        """
        super().__init__(source or OfflineSource(folder, url))
        self.url = url
        self._is_offline = source is None
        self.near_bytes = self.far_bytes = self.kept_bytes = self.healed_blocks = 0
        self.folder = folder
        self._local = LocalReader()
        self._writable = True
        self._seen: dict[str, Manifest] = {}  # manifests as the source has them, by digest
        self._meant: dict[str, Manifest] = {}  # the same, by the digest of the manifest that a run derived
        self._accepted: set[str] = set()  # digests of manifests that are stored
        self._accepting = asyncio.Lock()
        self._digests: dict[str, Digests] = {}  # of chunks whose manifests lack them, by provisional id
        self._held: dict[str, bytearray] = {}  # block flags by form digest, as last seen
        self._keeping = asyncio.Semaphore(_KEPT_AT_A_TIME)
        self._spare: list[memoryview] = []  # free buffers of `keep`

    async def open(self) -> None:
        """Create the folder. If it cannot be written, the cache only reads.

        Raises:
            ConfigurationError: the folder is used for something else; or it does not exist, and the cache is offline.
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
        """Whether fetched bytes are written to the cache."""
        return self._writable

    def _give_up(self, error: OSError) -> None:
        """Stop writing; cached bytes can still be read."""
        if self._writable:
            self._writable = False
            why = error.strerror or type(error).__name__
            logger.warning(
                "the disk cache in %s cannot be written: %s; what is missing there is fetched at every use",
                self.folder.path, why,
            )  # fmt: skip

    async def manifest(self, model: str) -> Manifest:
        """Return the manifest of a model. It is stored when something of the model is first requested."""
        manifest = await self._source.manifest(model)
        await in_thread(self._look, manifest)
        self._seen.pop(manifest.digest, None)  # moves it to the end
        self._seen[manifest.digest] = manifest
        return manifest

    async def _accept(self, manifest: Manifest) -> None:
        """Store the manifest. A caller that requests bytes of the model has already checked its pin and signature."""
        kept = self._as_seen(manifest)
        if kept is None or kept.digest in self._accepted:
            return
        async with self._accepting:
            if kept.digest not in self._accepted:
                await in_thread(self._enter, kept)
                self._accepted.add(kept.digest)

    def _as_seen(self, manifest: Manifest) -> Manifest | None:
        """Map a manifest to the source's: a run drops the forms and chunks that it does not read."""
        if manifest.digest not in self._meant:
            found = next((one for one in reversed(self._seen.values()) if _is_of(manifest, one)), None)
            if found is None:
                return None
            self._meant[manifest.digest] = found
        return self._meant[manifest.digest]

    def _enter(self, manifest: Manifest) -> None:
        """Store a manifest, and mark the model as in use."""
        try:
            if self._writable:
                self.folder.keep_model(manifest, self.url)
        except OSError as exc:
            self._give_up(exc)
        self.folder.use(manifest)

    def _look(self, manifest: Manifest) -> None:
        """Look up which blocks of a model are cached."""
        self._digests |= self.folder.digests(manifest)
        for chunk in manifest.chunks:
            known = with_digests(chunk, self._digests.get(chunk.id))
            for form in known.forms:
                if form.is_known:
                    self._held[form.digest] = bytearray(self.folder.flags(form))

    async def file(self, manifest: Manifest, path: str) -> bytes:
        """Return a tokenizer file, from the cache if its digest matches."""
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
        """Fill every read's destination from the cache or the source, and write what was fetched to the cache."""
        await self._accept(manifest)
        turns = asyncio.Semaphore(_RUNS_AT_A_TIME)
        # No callback per block: a caller that changed a block would change what is cached.
        plain = [replace(read, on_verified=None) for read in reads]
        await together(self._fetch(manifest, read, priority, turns) for read in plain)

    async def _fetch(self, manifest: Manifest, read: Read, priority: int, turns: asyncio.Semaphore) -> None:
        is_whole = read.stop - read.start == read.form.stored_bytes
        if is_whole and not self._is_known(read.chunk, read.form):
            async with turns:
                await self._from_source(manifest, [read], priority)  # the source computes the digests while it reads
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
        """Write a whole form to the cache whose digests were unknown before it was read."""
        digested = await self._with_digests(manifest, read)
        blob = None if digested is None else await self._open_blob(digested.form)
        if digested is not None and blob is not None:
            with closing(blob):
                await self._write(blob, digested.form, read, is_mapped_next=False)

    async def _fill(
        self, manifest: Manifest, read: Read, form: Form, blob: Blob, priority: int, *, is_mapped_next: bool = False
    ) -> None:
        """Fetch and write a run of missing blocks; those that another process fetched meanwhile are read from disk."""
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
        """Lock blocks. Returns False if another process held them for too long."""
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
        """Read blocks from the cache. Returns the damaged ones, which are marked as missing."""
        check = Verification(read)
        try:
            await self._local.read(
                [FileRange(blob.path, read.start, read.stop)], read.destination, check, urgent=urgent
            )
        except StorageError:
            return list(range(*_blocks(read)))  # the file was removed or truncated, or the disk is broken
        damaged = sorted(check.damaged)
        self.near_bytes += read.stop - read.start - sum(block_bytes(read.form, block) for block in damaged)
        await self._forget(read.chunk, read.form, blob, damaged)
        return damaged

    async def _forget(self, chunk: Chunk, form: Form, blob: Blob, damaged: Sequence[int]) -> None:
        """Mark damaged blocks as missing, and log them."""
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
        """The read with the digests that its form may lack; None if they are unknown."""
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
        """Return the digests of a chunk whose manifest lacks them."""
        return self._digests.get(chunk.id) or await self._source.digests(manifest, chunk)

    async def view(self, manifest: Manifest, chunk: Chunk, form: Form) -> View | None:
        """Return the form's bytes as mapped pages of its blob, if all of them are cached."""
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
        """Pin a model, so that it is never evicted."""
        await self._accept(manifest)
        try:
            await in_thread(self.folder.pin, manifest)
        except OSError as exc:
            self._give_up(exc)

    async def learn(self, manifest: Manifest, chunk: Chunk) -> None:
        """Get the digests that a chunk lacks. A chunk without digests cannot be cached."""
        await self._accept(manifest)
        form = chunk.forms[0]
        await self._with_digests(manifest, Read(chunk, form, 0, 0, memoryview(bytearray())))

    async def keep(self, manifest: Manifest, chunk: Chunk, form: Form, *, priority: int = 0) -> bool:
        """Cache all of a form if the budget allows it, using little memory. Returns whether the form is complete."""
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
            self._held[known.digest] = bytearray(there := blob.present())  # other processes may have written some of it
            return b"\0" not in there

    def _digested(self, chunk: Chunk, form: Form) -> Form:
        """The form with its known digests."""
        return form if form.is_known else with_digests(chunk, self._digests[chunk.id]).forms[0]

    def near(self, manifest: Manifest, chunk: Chunk) -> tuple[Form, ...]:
        """Return the forms of a chunk that are cached completely; if no form is, those cached in part."""
        del manifest
        known = with_digests(chunk, self._digests.get(chunk.id))
        flags = [self._held.get(form.digest, b"\0") for form in known.forms]
        forms = list(zip(chunk.forms, flags, strict=True))
        whole = tuple(form for form, there in forms if 0 not in there)
        return whole or tuple(form for form, there in forms if any(there))

    async def expect_there(self, manifest: Manifest, run: Manifest) -> None:
        """Check offline that weights are cached in a form that a run reads; where there is a choice, in that one.

        Raises:
            NotFoundError: none are.
        """
        if not self.is_offline:
            return
        chosen = [chunk for chunk in run.chunks if chunk.forms != manifest.by_name[chunk.name].forms] or run.chunks
        if not any(self.near(run, chunk) for chunk in chosen):
            codecs = dict.fromkeys(form.codec for chunk in chosen for form in chunk.forms)
            raise missing(f"{manifest.name} as {' or '.join(codecs)}", "is not", self.folder)

    @property
    def is_offline(self) -> bool:
        """Whether there is no source, so that a miss is an error."""
        return self._is_offline

    @property
    def buffered_bytes(self) -> int:
        """The most memory that fetching takes, not counting the destinations."""
        return 0 if self.is_offline else self._source.buffered_bytes + _KEPT_AT_A_TIME * _SCRATCH_BYTES

    @property
    def refetched_blocks(self) -> int:
        """Blocks that arrived damaged or were damaged in the cache, and were fetched again."""
        return self.healed_blocks + self._source.refetched_blocks

    @property
    def fetched_bytes(self) -> int:
        """Stored bytes delivered so far."""
        return self.near_bytes + self.far_bytes

    async def close(self) -> None:
        """Close the source and release the folder."""
        await self._source.close()
        await in_thread(self._local.close)
        await in_thread(self.folder.close)


def _is_of(part: Manifest, whole: Manifest) -> bool:
    """Whether `part` is derived from `whole`: the same model with fewer chunks or forms, or with added digests."""
    about = [(one.name, one.config, one.files, one.signature) for one in (part, whole)]
    if about[0] != about[1] or any(chunk.name not in whole.by_name for chunk in part.chunks):
        return False
    pairs = [(chunk, whole.by_name[chunk.name]) for chunk in part.chunks]
    return all(
        not there.forms[0].is_known or (chunk.id == there.id and {*_digests_of(chunk)} <= {*_digests_of(there)})
        for chunk, there in pairs
    )


def _digests_of(chunk: Chunk) -> Iterator[tuple[str, str, bytes]]:
    """The codec, digest and block digests of each form."""
    return ((form.codec, form.digest, form.blocks) for form in chunk.forms)


def _blocks(read: Read) -> tuple[int, int]:
    """The block range of a read, end-exclusive."""
    return read.start // BLOCK_BYTES, count_blocks(read.stop)


def _part(read: Read, low: int, high: int) -> Read:
    """Blocks `low` to `high` (end-exclusive) of a read."""
    start, stop = low * BLOCK_BYTES, min(high * BLOCK_BYTES, read.stop)
    return replace(read, start=start, stop=stop, destination=read.destination[start - read.start : stop - read.start])


def _stretches(flags: bytes, read: Read) -> Iterator[tuple[int, int, bool]]:
    """Split the blocks of a read into runs, end-exclusive, each with whether it is present."""
    first, stop = _blocks(read)
    low = first
    for block in range(first, stop):
        if block + 1 == stop or bool(flags[block + 1]) != bool(flags[low]):
            yield low, block + 1, bool(flags[low])
            low = block + 1


def _runs(blocks: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """Group sorted blocks into runs of consecutive ones, end-exclusive, of at most `most` blocks."""
    low = 0
    for at in range(1, len(blocks) + 1):
        if at == len(blocks) or blocks[at] != blocks[at - 1] + 1 or at - low == most:
            yield blocks[low], blocks[at - 1] + 1
            low = at
