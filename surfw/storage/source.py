"""A storage as a `ChunkSource`: no server between. Pieces are verified as they arrive, or while others are read.

Chunks of a model that was not copied may lack digests. Whoever reads one first reads all of it and keeps its digests
(see `digest_log`); from then on it is verified as any other.
"""

import asyncio
import mmap
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise

from surfw.config import BLOCK_BYTES
from surfw.errors import IntegrityError, StorageError
from surfw.manifest import Chunk, Digester, Digests, Form, Manifest, payload_digest, with_digests
from surfw.source import ChunkSource, Read, verify_blocks
from surfw.storage.base import ChangedObjectError, Check, StorageBackend, shifted
from surfw.storage.local_reader import BOUNCES_BYTES, FileRange, LocalReader, map_file
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
        self._local = LocalReader()
        self._digesting: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    @property
    def fetched_bytes(self) -> int:
        """Stored bytes delivered so far."""
        return self._fetched_bytes

    async def models(self) -> list[str]:
        """The names of the models there are."""
        return await self.store.models()

    async def manifest(self, model: str) -> Manifest:
        """The manifest of the model."""
        return await self.store.manifest(model)

    async def file(self, manifest: Manifest, path: str) -> bytes:
        """A tokenizer file of the model, verified."""
        entry = manifest.file(path)
        data = await self.store.objects.load(entry.object)
        if payload_digest(data) != entry.digest:
            raise IntegrityError(f"{path} of {manifest.name} in {self.url} is damaged; chunk the model again")
        return data

    async def fetch(self, manifest: Manifest, reads: Sequence[Read], *, priority: int = 0) -> None:
        """Fill every read's destination, piece by piece; from local files, those of priority 0 overtake the others."""
        for read in reads:
            if read.form.is_known:
                await self._fetch(read, urgent=priority == 0)
            else:
                await self._fetch_unknown(manifest, read, urgent=priority == 0)
            self._fetched_bytes += read.stop - read.start

    async def _fetch_unknown(self, manifest: Manifest, read: Read, *, urgent: bool) -> None:
        """Fetch bytes of a chunk that had no digests when its manifest was read."""
        async with self._digesting[read.chunk.id]:
            digests = self.store.digests(manifest, read.chunk)
            if digests is None and read.stop - read.start == read.form.stored_bytes:
                await self._fetch(read, urgent=urgent, verify=False)
                await self._learn(manifest, read.chunk, read.destination)
                return
            if digests is None:
                digests = await self.digest(manifest, read.chunk, urgent=urgent)
        known = with_digests(read.chunk, digests)
        await self._fetch(replace(read, chunk=known, form=known.forms[0]), urgent=urgent)

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
            await self._fetch(piece, urgent=urgent, verify=False)
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

    async def view(self, manifest: Manifest, chunk: Chunk, form: Form) -> memoryview | None:
        """The form's bytes as they lie in a local file, in pages that all processes share; verified here, once.

        Blobs of a store are replaced, and never changed. A checkpoint's own files may be: these are read.
        """
        files = self._files(form, 0, form.stored_bytes)
        if manifest.origin or len(files) != 1 or files[0].start % mmap.ALLOCATIONGRANULARITY:
            return None
        mapped = await in_thread(map_file, files[0])
        await self._local.check(mapped, partial(self._verify, chunk, form, 0))
        self._fetched_bytes += form.stored_bytes
        return mapped

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
        verify_blocks(chunk, form, (start + at) // BLOCK_BYTES, piece, where=self.url)

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

    async def _fetch(self, read: Read, *, urgent: bool, verify: bool = True) -> None:
        """Fill a destination; without `verify`, whoever calls does what has to be done about the bytes."""
        if not read.form.locations:
            raise StorageError(f"the manifest says of no place where chunk {read.chunk.name} lies in {self.url}")
        check = partial(self._verify, read.chunk, read.form, read.start) if verify else None
        try:
            if files := self._files(read.form, read.start, read.stop):
                await self._local.read(files, read.destination, check or _accept, urgent=urgent)
                return
        except ChangedObjectError as exc:
            raise explain_change(exc) from exc
        await self._fetch_from_afar(read, check)

    async def _fetch_from_afar(self, read: Read, check: Check | None) -> None:
        """Fill a destination, with as many pieces under way as are worth it."""
        cuts = [*range(read.start, read.stop, self._piece_bytes()), read.stop]
        left = pairwise(cuts)
        at_once = min(len(cuts) - 1, self.store.objects.parallel_reads)
        await together(self._take(read, left, check) for _ in range(at_once))

    async def _take(self, read: Read, left: Iterator[tuple[int, int]], check: Check | None) -> None:
        """Read and verify one piece after the other, until none is left."""
        objects = self.store.objects
        for start, stop in left:
            begin = start - read.start
            piece = read.destination[begin : stop - read.start]
            check_piece = shifted(check, begin) if check else None
            parts = segments(read.form.locations, start, stop)
            if check_piece and len(parts) == 1:
                await objects.read_verified(parts[0][0], parts[0][1], piece, check_piece)
                continue
            at = 0
            for key, offset, length in parts:
                await self._read(key, offset, piece[at : at + length])
                at += length
            if check_piece:
                await in_thread(check_piece, 0, piece)

    async def _read(self, key: str, start: int, destination: memoryview) -> None:
        """Read into place. Only streams are known to write nothing any more once they are cancelled."""
        objects = self.store.objects
        reading = objects.read_into(key, start, destination)
        await (reading if objects.find(key).backend.reads_in_place else to_its_end(reading))

    async def close(self) -> None:
        """Close the backend, if it belongs to this."""
        await in_thread(self._local.close)
        await self.store.objects.close()
        if self._owned:
            await self.store.backend.close()
        else:
            await self.store.let_go()


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
