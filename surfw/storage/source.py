"""A storage as a `ChunkSource`: no server between. Each piece is verified while the next one is read."""

import asyncio
import mmap
from collections.abc import Iterator, Sequence
from functools import partial

from surfw.config import BLOCK_BYTES
from surfw.errors import IntegrityError, StorageError
from surfw.manifest import Chunk, Form, Manifest, payload_digest
from surfw.source import ChunkSource, Read, verify_blocks
from surfw.storage.base import StorageBackend
from surfw.storage.local_reader import FileRange, LocalReader, map_file
from surfw.storage.ranges import MOST_RANGE_BYTES
from surfw.storage.store import MARKER, Store, segments
from surfw.threads import in_thread, to_its_end

_PIECE_BYTES = 8 * BLOCK_BYTES
_FAR_PIECE_BYTES = MOST_RANGE_BYTES
"""What is read at a time, and verified while the next is read; from far away, as much as a request asks for."""

_STREAM_BYTES = 2 * BLOCK_BYTES
"""What a connection may have received and not yet put in place."""


class StorageSource(ChunkSource):
    """Reads a store directly."""

    def __init__(self, backend: StorageBackend, *, owned: bool = True) -> None:
        """Name the backend, and whether it is closed with this; `open_storage_source` also checks the store."""
        self.store = Store(backend)
        self._owned = owned
        self.url = backend.url
        self._fetched_bytes = 0
        self._local = LocalReader()

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
        data = await self.store.backend.load(entry.object)
        if payload_digest(data) != entry.digest:
            raise IntegrityError(f"{path} of {manifest.name} in {self.url} is damaged; chunk the model again")
        return data

    async def fetch(self, manifest: Manifest, reads: Sequence[Read], *, priority: int = 0) -> None:
        """Fill every read's destination, piece by piece; from local files, those of priority 0 overtake the others."""
        for read in reads:
            if file := self._file(read.form, read.start, read.stop):
                check = partial(self._verify, read.chunk, read.form, read.start)
                await self._local.read(file, read.destination, check, urgent=priority == 0)
                self._fetched_bytes += read.stop - read.start
            else:
                await self._fetch(read)

    async def view(self, manifest: Manifest, chunk: Chunk, form: Form) -> memoryview | None:
        """The form's bytes as they lie in a local file, in pages that all processes share; verified here, once."""
        file = self._file(form, 0, form.stored_bytes)
        if file is None or not form.stored_bytes or file.start % mmap.ALLOCATIONGRANULARITY:
            return None
        mapped = await in_thread(map_file, file)
        await self._local.check(mapped, partial(self._verify, chunk, form, 0))
        self._fetched_bytes += form.stored_bytes
        return mapped

    def _file(self, form: Form, start: int, stop: int) -> FileRange | None:
        """Where these stored bytes lie in one local file; None if they do not."""
        parts = segments(form.locations, start, stop)
        path = self.store.backend.local_path(parts[0][0]) if len(parts) == 1 else None
        return FileRange(path, parts[0][1], parts[0][1] + parts[0][2]) if path else None

    def _verify(self, chunk: Chunk, form: Form, start: int, at: int, piece: memoryview) -> None:
        verify_blocks(chunk, form, (start + at) // BLOCK_BYTES, piece, where=self.url)

    @property
    def buffered_bytes(self) -> int:
        """Pieces that a backend hands over before they are put in place; files and streams are read in place."""
        backend = self.store.backend
        if backend.local_path(MARKER):
            return 0
        return backend.parallel_reads * (_STREAM_BYTES if backend.reads_in_place else self._piece_bytes)

    @property
    def _piece_bytes(self) -> int:
        return _FAR_PIECE_BYTES if self.store.backend.parallel_reads > 1 else _PIECE_BYTES

    async def _fetch(self, read: Read) -> None:
        """Fill a destination, with as many pieces under way as are worth it."""
        if not read.form.locations:
            raise StorageError(f"the manifest says of no place where chunk {read.chunk.name} lies in {self.url}")
        starts = range(read.start, read.stop, self._piece_bytes)
        left = iter(starts)
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(len(starts), self.store.backend.parallel_reads)):
                    group.create_task(self._take(read, left))
        except BaseExceptionGroup as failed:
            first = failed.exceptions[0]
            raise first from first.__cause__

    async def _take(self, read: Read, left: Iterator[int]) -> None:
        """Read one piece after the other, until none is left; each is verified while the next is read."""
        checking: asyncio.Task[None] | None = None
        try:
            for start in left:
                stop = min(start + self._piece_bytes, read.stop)
                piece = read.destination[start - read.start : stop - read.start]
                at = 0
                for key, offset, length in segments(read.form.locations, start, stop):
                    await self._read(key, offset, piece[at : at + length])
                    at += length
                if checking:
                    await checking
                first = start // BLOCK_BYTES
                check = asyncio.to_thread(verify_blocks, read.chunk, read.form, first, piece, where=self.url)
                checking = asyncio.create_task(check)
                self._fetched_bytes += len(piece)
        finally:
            if checking:
                await to_its_end(checking)

    async def _read(self, key: str, start: int, destination: memoryview) -> None:
        """Read into place. Only streams are known to write nothing any more once they are cancelled."""
        backend = self.store.backend
        reading = backend.read_into(key, start, destination)
        await (reading if backend.reads_in_place else to_its_end(reading))

    async def close(self) -> None:
        """Close the backend, if it belongs to this."""
        await in_thread(self._local.close)
        if self._owned:
            await self.store.backend.close()
        else:
            await self.store.let_go()


async def open_storage_source(backend: StorageBackend, *, owned: bool = True) -> StorageSource:
    """A source over the backend, which must hold a store; an `owned` backend is closed with the source.

    Raises:
        NotAStoreError: it does not.
    """
    source = StorageSource(backend, owned=owned)
    await source.store.check()
    return source
