"""A storage as a `ChunkSource`: no server between. Pieces are verified as they arrive, or while others are read.

Chunks of a model that was not copied may lack digests. Whoever reads one first reads all of it and keeps its digests
(see `digest_log`); from then on it is verified as any other.
"""

import asyncio
import mmap
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from surfw.config import BLOCK_BYTES, DAMAGE_RETRIES, FILE_BYTES
from surfw.errors import IntegrityError, NotFoundError, StorageError
from surfw.manifest import Chunk, Digester, Digests, Form, Manifest, payload_digest, with_digests
from surfw.source import ChunkSource, Read, View, describe_damage, find_damage, locate_damage
from surfw.storage.base import ChangedObjectError, Check, StorageBackend, shifted
from surfw.storage.local_reader import BOUNCES_BYTES, FileRange, LocalReader, MappedFile
from surfw.storage.origins import PlacedOptions, explain_change
from surfw.storage.ranges import most_range_bytes
from surfw.storage.store import MARKER, Store, segments
from surfw.threads import in_thread, to_its_end, together

_PIECE_BYTES = 8 * BLOCK_BYTES
"""What is read of a local file at a time, and verified while the next is read."""

_DIGESTED_BYTES = 16 * BLOCK_BYTES
"""What is held of a chunk whose digests are found out."""

_STREAM_BYTES = 2 * BLOCK_BYTES
"""What a connection may have received and not yet put in place."""


class StorageSource(ChunkSource):
    """Reads a store directly."""

    def __init__(
        self, backend: StorageBackend, *, owned: bool = True, origin_options: PlacedOptions | None = None
    ) -> None:
        """Name the backend, and whether it is closed with this; `open_storage_source` also checks the store."""
        self.store = Store(backend, origin_options)
        self._owned = owned
        self.url = backend.url
        self._fetched_bytes = 0
        self._refetched_blocks = 0
        self._local = LocalReader()
        self._digesting: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    @property
    def fetched_bytes(self) -> int:
        """Stored bytes delivered so far."""
        return self._fetched_bytes

    @property
    def refetched_blocks(self) -> int:
        """Blocks, files and manifests that arrived damaged and were read again."""
        return self._refetched_blocks + self.store.reloads

    async def models(self) -> list[str]:
        """The names of the models there are."""
        return await self.store.models()

    async def manifest(self, model: str) -> Manifest:
        """The manifest of the model."""
        return await self.store.manifest(model)

    async def file(self, manifest: Manifest, path: str) -> bytes:
        """A tokenizer file of the model, verified; one that arrives damaged is loaded again."""
        entry, objects = manifest.file(path), self.store.objects

        def check(data: bytes) -> bytes:
            if payload_digest(data) != entry.digest:
                raise IntegrityError(f"{path} of {manifest.name} in {self.url} is damaged")
            return data

        return await self.store.load_right(
            lambda: objects.load_capped(entry.object, min(entry.size, FILE_BYTES)),
            check,
            forget=lambda: objects.forget(entry.object),
        )

    async def fetch(self, manifest: Manifest, reads: Sequence[Read], *, priority: int = 0) -> None:
        """Fill every read's destination, piece by piece; from local files, those of priority 0 overtake the others.

        Local files are read in the order of the reads. From far away as many pieces of them are under way as are worth
        it. A block that arrives damaged is read again.
        """
        urgent = priority == 0
        found = [await self._with_digests(manifest, read, urgent=urgent) for read in reads]
        known = [read for read in found if read is not None]
        far = []
        for read in known:
            if self._files(read.form, read.start, read.stop):
                await self._fetch_near(read, urgent=urgent)
            else:
                far.append(read)
        await self._fetch_from_afar(far)
        self._fetched_bytes += sum(read.stop - read.start for read in reads)

    async def _with_digests(self, manifest: Manifest, read: Read, *, urgent: bool) -> Read | None:
        """The read with its chunk's digests, which may have to be found out; None if that has filled it."""
        if read.form.is_known:
            return read
        async with self._digesting[read.chunk.id]:
            digests = self.store.digests(manifest, read.chunk)
            if digests is None and read.stop - read.start == read.form.stored_bytes:
                await self._fetch_unverified(read, urgent=urgent)
                await self._learn(manifest, read.chunk, read.destination)
                return None
            if digests is None:
                digests = await self.digest(manifest, read.chunk, urgent=urgent)
        known = with_digests(read.chunk, digests)
        return replace(read, chunk=known, form=known.forms[0])

    async def digest(
        self,
        manifest: Manifest,
        chunk: Chunk,
        *,
        urgent: bool = False,
        progress: Callable[[int, str], object] = lambda *_: None,
    ) -> Digests:
        """Read all bytes of a chunk that lacks digests, a piece at a time, and keep what theirs are.

        Args:
            manifest: the model.
            chunk: one of its chunks.
            urgent: whether somebody waits for it.
            progress: called with the bytes just read and the name of the chunk.

        Raises:
            StorageError: they could not be read.
        """
        (form,) = chunk.forms
        size, digester = form.stored_bytes, Digester()
        scratch = memoryview(mmap.mmap(-1, max(1, min(size, _DIGESTED_BYTES))))
        for start in range(0, size, _DIGESTED_BYTES):
            stop = min(start + _DIGESTED_BYTES, size)
            piece = Read(chunk, form, start, stop, scratch[: stop - start])
            await self._fetch_unverified(piece, urgent=urgent)
            await in_thread(digester.update, piece.destination)
            progress(stop - start, chunk.name)
        digests = digester.result()
        await in_thread(self.store.learn, manifest, chunk, digests)
        return digests

    async def _learn(self, manifest: Manifest, chunk: Chunk, payload: memoryview) -> None:
        """Keep the digests of a chunk whose bytes are all here."""

        def learn() -> None:
            digester = Digester()
            digester.update(payload)
            self.store.learn(manifest, chunk, digester.result())

        await in_thread(learn)

    async def view(self, manifest: Manifest, chunk: Chunk, form: Form) -> View | None:
        """The form's bytes as they lie in a local file, in pages that all processes share; verified here.

        Blobs of a store are replaced, and never changed. A checkpoint's own files may be: these are read.
        """
        files = self._files(form, 0, form.stored_bytes)
        if manifest.origin or len(files) != 1 or files[0].start % mmap.ALLOCATIONGRANULARITY:
            return None
        with _naming(chunk, self.url):
            mapped = await in_thread(MappedFile, files[0])
        try:
            await self._local.check(mapped.memory, partial(self._verify, chunk, form, 0))
        except _DamagedBlockError as exc:
            start = exc.block * BLOCK_BYTES
            stop = min(start + BLOCK_BYTES, form.stored_bytes)
            again = Read(chunk, form, start, stop, memoryview(mmap.mmap(-1, stop - start)))
            await self._mend(again, start, stop, exc, urgent=True)
            return None  # the file is as it should be, and its pages in memory are not: it is read past them
        self._fetched_bytes += form.stored_bytes

        def expect_unchanged() -> None:
            try:
                mapped.expect_unchanged(partial(self._verify, chunk, form, 0))
            except IntegrityError as exc:
                raise IntegrityError(
                    f"chunk {chunk.name} was changed in {self.url} while it was in use, and what was computed since "
                    "may be wrong; chunk the model again, and open it again"
                ) from exc

        return View(mapped.memory, expect_unchanged)

    def _files(self, form: Form, start: int, stop: int) -> list[FileRange]:
        """Where these stored bytes lie in local files; empty if they do not."""
        found = []
        for key, offset, length in segments(form.locations, start, stop):
            path = self.store.objects.local_path(key)
            if path is None:
                return []
            found.append(FileRange(path, offset, offset + length, self.store.objects.find(key).revision))
        return found

    def _verify(self, chunk: Chunk, form: Form, start: int, at: int, piece: memoryview) -> None:
        for block, seen in find_damage(form, (start + at) // BLOCK_BYTES, piece).items():
            raise _DamagedBlockError(chunk, form, block, [seen], self.url)

    @property
    def buffered_bytes(self) -> int:
        """Pieces that a backend hands over before they are put in place; files and streams are read in place.

        Shards of checkpoints are read through buffers, as their tensors begin anywhere.
        """
        objects = self.store.objects
        bounces = BOUNCES_BYTES if objects.has_local_origin else 0
        if objects.parallel_reads == 1 and self.store.backend.local_path(MARKER):
            return bounces
        return objects.parallel_reads * (_STREAM_BYTES if objects.reads_in_place else self._piece_bytes()) + bounces

    def _piece_bytes(self) -> int:
        """What is read at a time: from far away, what a request asks for. An origin that is mounted may change it."""
        objects = self.store.objects
        if objects.parallel_reads == 1:
            return _PIECE_BYTES
        return most_range_bytes(objects.parallel_reads, streamed=objects.reads_in_place)

    async def _fetch_unverified(self, read: Read, *, urgent: bool) -> None:
        """Fill a destination; whoever calls does what has to be done about the bytes."""
        if not await self._fetch_local(read, _accept, urgent=urgent):
            await self._fetch_from_afar([read], check=False)

    async def _fetch_near(self, read: Read, *, urgent: bool) -> None:
        try:
            await self._fetch_local(read, self._check(read), urgent=urgent)
        except _DamagedBlockError as exc:
            await self._mend(read, read.start, read.stop, exc, urgent=urgent)

    async def _fetch_local(self, read: Read, check: Check, *, urgent: bool) -> bool:
        """Fill a destination from local files; whether the bytes lie in such."""
        if not read.form.locations:
            raise StorageError(f"the manifest says of no place where chunk {read.chunk.name} lies in {self.url}")
        files = self._files(read.form, read.start, read.stop)
        try:
            with _naming(read.chunk, self.url):
                if files:
                    await self._local.read(files, read.destination, check, urgent=urgent)
        except ChangedObjectError as exc:
            raise explain_change(exc) from exc
        return bool(files)

    def _check(self, read: Read) -> Check:
        return partial(self._verify, read.chunk, read.form, read.start)

    async def _fetch_from_afar(self, reads: Sequence[Read], *, check: bool = True) -> None:
        """Fill destinations, with as many pieces under way as are worth it, whichever reads they are of."""
        pieces = self._pieces(reads)
        left = iter(pieces)
        at_once = min(len(pieces), self.store.objects.parallel_reads)
        await together(self._take(left, check=check) for _ in range(at_once))

    def _pieces(self, reads: Sequence[Read]) -> list[tuple[Read, int, int]]:
        """What is read at a time: stored bytes of a read, from start to stop."""
        size, found = self._piece_bytes(), list[tuple[Read, int, int]]()
        for read in reads:
            if not read.form.locations:
                raise StorageError(f"the manifest says of no place where chunk {read.chunk.name} lies in {self.url}")
            found += ((read, start, min(start + size, read.stop)) for start in range(read.start, read.stop, size))
        return found

    async def _take(self, left: Iterator[tuple[Read, int, int]], *, check: bool) -> None:
        """Read and verify one piece after the other, until none is left."""
        objects = self.store.objects
        for read, start, stop in left:
            begin = start - read.start
            piece = read.destination[begin : stop - read.start]
            parts = segments(read.form.locations, start, stop)
            check_piece = shifted(self._check(read), begin)
            try:
                if check and len(parts) == 1:
                    await objects.read_verified(parts[0][0], parts[0][1], piece, check_piece)
                    continue
                await self._read(parts, piece)
                if check:
                    await in_thread(check_piece, 0, piece)
            except _DamagedBlockError as exc:
                await self._mend(read, start, stop, exc, urgent=True)

    async def _read(self, parts: Sequence[tuple[str, int, int]], destination: memoryview) -> None:
        """Read into place. Only streams are known to write nothing any more once they are cancelled."""
        objects, at = self.store.objects, 0
        for key, start, length in parts:
            reading = objects.read_into(key, start, destination[at : at + length])
            await (reading if objects.find(key).backend.reads_in_place else to_its_end(reading))
            at += length

    async def _mend(self, read: Read, start: int, stop: int, damaged: "_DamagedBlockError", *, urgent: bool) -> None:
        """Read stored bytes of which a block arrived damaged once more, block by block.

        Raises:
            IntegrityError: a block stays damaged, however often it is read.
        """
        for low in range(start, stop, BLOCK_BYTES):
            high, block = min(low + BLOCK_BYTES, stop), low // BLOCK_BYTES
            seen = list(damaged.seen) if block == damaged.block else []
            one = replace(
                read, start=low, stop=high, destination=read.destination[low - read.start : high - read.start]
            )
            while True:
                if seen:
                    self._refetched_blocks += 1
                    for key, _, _ in segments(read.form.locations, low, high):
                        self.store.objects.forget(key)
                try:
                    if not await self._fetch_local(one, self._check(one), urgent=urgent):
                        await self._read(segments(read.form.locations, low, high), one.destination)
                        await in_thread(self._check(one), 0, one.destination)
                    break
                except _DamagedBlockError as exc:
                    seen += exc.seen
                    if len(seen) > DAMAGE_RETRIES:
                        raise _DamagedBlockError(read.chunk, read.form, block, seen, self.url) from exc

    async def close(self) -> None:
        """Close the backend, if it belongs to this."""
        await in_thread(self._local.close)
        await self.store.objects.close()
        if self._owned:
            await self.store.backend.close()
        else:
            await self.store.let_go()


class _DamagedBlockError(IntegrityError):
    """A block is not what the manifest promises; `seen` has its digest, of each time that it was read."""

    def __init__(self, chunk: Chunk, form: Form, block: int, seen: Sequence[str], where: str) -> None:
        """Say which, and what was seen."""
        self.block = block
        self.seen = tuple(seen)
        what = describe_damage(chunk, form, block, seen[-1], where=where)
        super().__init__(f"{what}; {locate_damage(seen, stored=where)}")


@contextmanager
def _naming(chunk: Chunk, where: str) -> Iterator[None]:
    """Errors of the chunk's file as those of the chunk."""
    try:
        yield
    except ChangedObjectError:
        raise
    except StorageError as exc:
        kind = NotFoundError if isinstance(exc, NotFoundError) else StorageError
        raise kind(
            f"chunk {chunk.name} in {where} cannot be read: {exc}; put its file back, or chunk the model again"
        ) from exc


def _accept(at: int, piece: memoryview) -> None:
    """Bytes that are digested as a whole."""


async def open_storage_source(
    backend: StorageBackend, *, owned: bool = True, origin_options: PlacedOptions | None = None
) -> StorageSource:
    """A source over the backend, which must hold a store; an `owned` backend is closed with the source.

    Raises:
        NotAStoreError: it does not.
    """
    source = StorageSource(backend, owned=owned, origin_options=origin_options)
    await source.store.check()
    return source
