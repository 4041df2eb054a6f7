"""A store as a `ChunkSource`, without a server. Blocks are verified as they arrive, or while others are read.

Local files are read by `local_reader`, everything else by `RangedBackend.read_all`. Blocks that arrive damaged are
recorded, and read again after all others. Chunks of a model that was not copied may lack digests: all bytes of such a
chunk are read once to compute them (see `digests`), and from then on it is verified like any other.
"""

import asyncio
import mmap
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from surfw.config import BLOCK_BYTES, FILE_BYTES
from surfw.errors import IntegrityError, NotFoundError, StorageError
from surfw.manifest import Chunk, Digests, Form, Manifest, payload_digest, with_digests
from surfw.source import (
    ChunkSource,
    Read,
    Verification,
    View,
    describe_damage,
    find_damage,
    locate_damage,
    read_again,
)
from surfw.storage.base import ChangedObjectError, StorageBackend
from surfw.storage.fsspec_backend import is_denial
from surfw.storage.local_reader import BOUNCES_BYTES, FileRange, LocalReader, MappedFile
from surfw.storage.origins import PlacedOptions, explain_change
from surfw.storage.ranges import Check, ObjectRange, ObjectRead
from surfw.storage.store import Store, segments
from surfw.threads import in_thread, together

_DIGESTED_BYTES = 16 * BLOCK_BYTES
"""How much of a chunk is in memory at a time while its digests are computed."""


class StorageSource(ChunkSource):
    """A source that reads a store directly."""

    def __init__(
        self, backend: StorageBackend, *, owned: bool = True, origin_options: PlacedOptions | None = None
    ) -> None:
        """Set the backend; an `owned` one is closed with the source. `open_storage_source` also checks the store."""
        self.store = Store(backend, origin_options)
        self._owned = owned
        self.url = backend.url
        self._fetched_bytes = 0
        self._refetched_blocks = 0
        self._local = LocalReader()

    @property
    def fetched_bytes(self) -> int:
        """Stored bytes delivered so far."""
        return self._fetched_bytes

    @property
    def refetched_blocks(self) -> int:
        """Blocks, files and manifests that arrived damaged and were read again."""
        return self._refetched_blocks + self.store.reloads

    async def models(self) -> list[str]:
        """Return the names of all models."""
        return await self.store.models()

    async def manifest(self, model: str) -> Manifest:
        """Return the manifest of the model."""
        return await self.store.manifest(model)

    async def file(self, manifest: Manifest, path: str) -> bytes:
        """Return a tokenizer file of the model, verified; if it arrives damaged, it is loaded again."""
        entry, objects = manifest.file(path), self.store.objects

        def check(data: bytes) -> bytes:
            if payload_digest(data) != entry.digest:
                raise IntegrityError(f"{path} of {manifest.name} in {self.url} is damaged")
            return data

        async def load() -> bytes:
            with _naming(f"{path} of {manifest.name}", self.url):
                return await objects.load_capped(entry.object, min(entry.size, FILE_BYTES))

        return await self.store.load_right(load, check, forget=lambda: objects.forget(entry.object))

    async def fetch(self, manifest: Manifest, reads: Sequence[Read], *, priority: int = 0) -> None:
        """Fill every read's destination. Reads of local files with priority 0 overtake others.

        Local files are read in the order of the reads; from remote storage, several ranges are in flight at a time.
        """
        urgent = priority == 0
        found = [await self._with_digests(manifest, read, urgent=urgent) for read in reads]
        verified = [(read, Verification(read)) for read in found if read is not None]
        await self._read(verified, urgent=urgent)
        for read, check in verified:
            await self._mend(read, check.damaged, urgent=urgent)
        self._fetched_bytes += sum(read.stop - read.start for read in reads)

    async def _with_digests(self, manifest: Manifest, read: Read, *, urgent: bool) -> Read | None:
        """The read with its chunk's digests, computed if needed; None if computing them has filled the destination."""
        if read.form.is_known:
            return read
        filled = False

        async def whole() -> AsyncGenerator[memoryview]:
            nonlocal filled
            await self._read([(read, None)], urgent=urgent)
            filled = True
            yield read.destination

        is_whole = read.stop - read.start == read.form.stored_bytes
        pieces = whole if is_whole else partial(self._pieces, read.chunk, urgent=urgent)
        digests = await self.store.learned.find(manifest, read.chunk, pieces)
        known = with_digests(read.chunk, digests)
        return None if filled else replace(read, chunk=known, form=known.forms[0])

    async def digests(self, manifest: Manifest, chunk: Chunk) -> Digests | None:
        """Return the digests of a chunk whose manifest lacks them; if unknown, the whole chunk is read."""
        if chunk.forms[0].is_known:
            return None
        return await self.store.learned.find(manifest, chunk, partial(self._pieces, chunk))

    async def _pieces(
        self, chunk: Chunk, *, urgent: bool = False, progress: Callable[[int, str], object] = lambda *_: None
    ) -> AsyncGenerator[memoryview]:
        """Yield all stored bytes of a chunk that lacks digests, piece by piece, in a reused buffer."""
        (form,) = chunk.forms
        size = form.stored_bytes
        scratch = memoryview(mmap.mmap(-1, max(1, min(size, _DIGESTED_BYTES))))
        for start in range(0, size, _DIGESTED_BYTES):
            stop = min(start + _DIGESTED_BYTES, size)
            await self._read([(Read(chunk, form, start, stop, scratch[: stop - start]), None)], urgent=urgent)
            yield scratch[: stop - start]
            progress(stop - start, chunk.name)

    async def digest_all(
        self, manifest: Manifest, *, progress: Callable[[int, str], object] = lambda *_: None
    ) -> Mapping[str, Digests]:
        """Read all bytes of the chunks that lack digests, and store the digests.

        Args:
            manifest: the model.
            progress: called with the bytes just read and the name of their chunk.

        Returns:
            The digests by the provisional ids of their chunks; see `Manifest.with_digests`.

        Raises:
            StorageError: a chunk could not be read.
        """
        slots = asyncio.Semaphore(self.store.objects.parallel_reads)
        found: dict[str, Digests] = {}

        async def digest(chunk: Chunk) -> None:
            async with slots:
                pieces = self._pieces(chunk, progress=progress)
                found[chunk.id] = await self.store.learned.learn(manifest, chunk, pieces)

        await together(digest(chunk) for chunk in manifest.chunks if not chunk.forms[0].is_known)
        return found

    async def view(self, manifest: Manifest, chunk: Chunk, form: Form) -> View | None:
        """Return the form's bytes, verified, as mapped pages of a local file, which all processes share.

        Only blobs of a store are mapped: they may be replaced, but never change. Files of a checkpoint may change, so
        they are read instead.
        """
        files = self._files(form, 0, form.stored_bytes)
        if manifest.origin or len(files) != 1 or files[0].start % mmap.ALLOCATIONGRANULARITY:
            return None
        with _naming(f"chunk {chunk.name}", self.url):
            mapped = await in_thread(MappedFile, files[0])
        check = Verification(Read(chunk, form, 0, form.stored_bytes, mapped.memory))
        await self._local.check(mapped.memory, check)
        if check.damaged:
            for block, seen in check.damaged.items():
                start, stop = block * BLOCK_BYTES, min((block + 1) * BLOCK_BYTES, form.stored_bytes)
                again = Read(chunk, form, start, stop, memoryview(mmap.mmap(-1, stop - start)))
                await self._mend(again, {block: seen}, urgent=True)
            return None  # the file is intact but its cached pages are not: read past the cache
        self._fetched_bytes += form.stored_bytes

        def expect_same(at: int, piece: memoryview) -> None:
            if find_damage(form, at // BLOCK_BYTES, piece):
                raise IntegrityError(
                    f"chunk {chunk.name} was changed in {self.url} while it was in use, and what was computed since "
                    "may be wrong; chunk the model again, and open it again"
                )

        return View(mapped.memory, partial(mapped.expect_unchanged, expect_same))

    def _files(self, form: Form, start: int, stop: int) -> list[FileRange]:
        """The ranges of local files that hold these stored bytes; empty if they are not in local files."""
        found = []
        for key, offset, length in segments(form.locations, start, stop):
            path = self.store.objects.local_path(key)
            if path is None:
                return []
            found.append(FileRange(path, offset, offset + length, self.store.objects.find(key).revision))
        return found

    @property
    def buffered_bytes(self) -> int:
        """The most memory that fetching takes, not counting the destinations.

        It counts the ranges that a backend buffers, and the buffers for unaligned reads of local shards.
        """
        objects = self.store.objects
        return objects.buffered_bytes + (BOUNCES_BYTES if objects.has_local_origin else 0)

    async def _read(self, reads: Sequence[tuple[Read, Check | None]], *, urgent: bool) -> None:
        """Fill destinations from local files or remote objects, and verify those that have a check."""
        far = []
        for read, check in reads:
            if not read.form.locations:
                raise StorageError(f"the manifest says of no place where chunk {read.chunk.name} lies in {self.url}")
            if files := self._files(read.form, read.start, read.stop):
                with explain_change(), _naming(f"chunk {read.chunk.name}", self.url):
                    await self._local.read(files, read.destination, check, urgent=urgent)
            else:
                parts = [ObjectRange(*part) for part in segments(read.form.locations, read.start, read.stop)]
                far.append(ObjectRead(parts, read.destination, check))
        await self.store.objects.read_all(far)

    async def _mend(self, read: Read, damaged: Mapping[int, str], *, urgent: bool) -> None:
        """Read damaged blocks again; `damaged` maps each to the wrong digest that it had.

        Raises:
            IntegrityError: a block stays damaged.
        """
        for block, first in sorted(damaged.items()):
            low, high = block * BLOCK_BYTES, min((block + 1) * BLOCK_BYTES, read.stop)
            destination = read.destination[low - read.start : high - read.start]
            one, seen = replace(read, start=low, stop=high, destination=destination), [first]

            async def again(one: Read = one) -> str | None:
                self._refetched_blocks += 1
                for key, _, _ in segments(one.form.locations, one.start, one.stop):
                    self.store.objects.forget(key)
                check = Verification(one)
                await self._read([(one, check)], urgent=urgent)
                return next(iter(check.damaged.values()), None)

            if not await read_again(again, seen):
                what = describe_damage(read.chunk, read.form, block, seen[-1], where=self.url)
                raise IntegrityError(f"{what}; {locate_damage(seen, stored=self.url)}")

    async def close(self) -> None:
        """Close the reader and the store, including the backend if it is owned."""
        await in_thread(self._local.close)
        await self.store.close(owned=self._owned)


@contextmanager
def _naming(what: str, where: str) -> Iterator[None]:
    """Name the chunk or file in storage errors."""
    try:
        yield
    except ChangedObjectError:
        raise
    except StorageError as exc:
        kind = NotFoundError if isinstance(exc, NotFoundError) else StorageError
        advice = "" if is_denial(exc) else "; put its file back, or chunk the model again"
        raise kind(f"{what} in {where} cannot be read: {exc}{advice}") from exc


async def open_storage_source(
    backend: StorageBackend, *, owned: bool = True, origin_options: PlacedOptions | None = None
) -> StorageSource:
    """Return a source for the store in the backend; an `owned` backend is closed with the source.

    Raises:
        NotAStoreError: the backend holds no store.
    """
    source = StorageSource(backend, owned=owned, origin_options=origin_options)
    await source.store.check()
    return source
