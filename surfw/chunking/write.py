"""Writing a planned model: every chunk is streamed into the store, then the manifest is published.

- Blobs first, the manifest last: a model is visible only when all of it is there and durable.
- Bytes go through a few buffers of 8 MiB; only a converted tensor is held whole, with its sources.
- While one chunk is written, the one before it is synced and put in its place.
- A blob is in the writer's lease before it is looked for or put in place, so that nobody prunes it: see
  `storage.housekeeping.leases`.
- A journal in the folder of the unfinished files lists the chunks that are done. The same plan over the same source
  resumes from it; a lock, held until the journal is removed, keeps two writers of it apart.
"""

import asyncio
import fcntl
import os
import shutil
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Literal

from blake3 import blake3

from surfw.checkpoint.layout import read_small
from surfw.chunking.plan import ChunkPlan, PlannedChunk
from surfw.chunking.prepare import PayloadReader, PreparedModel
from surfw.config import FILE_BYTES, MIB, PIECE_BYTES, format_size
from surfw.errors import ManifestError, NotFoundError, StorageError, StorageFullError
from surfw.files import read_regular
from surfw.manifest import (
    Chunk,
    Digester,
    Digests,
    Form,
    Location,
    Manifest,
    ModelFile,
    decode_line,
    encode_line,
    payload_digest,
    read_digests,
)
from surfw.safetensors_header import MAX_HEADER_BYTES, PREFIX_BYTES, encode_header, is_header
from surfw.storage.base import StorageBackend
from surfw.storage.filesystem import create_file, forget_pages
from surfw.storage.fsspec_backend import translate_errors
from surfw.storage.housekeeping.leases import WriteLease
from surfw.storage.store import MARKER, Store, blob_key, objects_of
from surfw.threads import to_its_end

_BUFFERS = 3
_LOOK_SECONDS = 0.05
_JOURNAL_BYTES = 256 * MIB

Progress = Callable[[int, str], None]
"""Called with the bytes just finished and the name of their chunk, from a worker thread."""

Outcome = Literal["new", "unchanged", "replaced"]
"""What became of a chunk: it was written, was there already, or was written because what was there is damaged."""


async def write_model(
    prepared: PreparedModel,
    backend: StorageBackend,
    *,
    progress: Progress = lambda *_: None,
    on_outcome: Callable[[str, Outcome], object] = lambda *_: None,
) -> Manifest:
    """Write a prepared model into a store, and publish it. An empty place becomes a store.

    Args:
        prepared: the model.
        backend: the storage.
        progress: see `Progress`.
        on_outcome: called with the name of each chunk, once it is in the store, and with what became of it.

    Raises:
        StorageError: the storage failed. Nothing is visible, and the next run continues where this one stopped.
    """
    store = Store(backend)
    await store.create()
    source = PayloadReader(prepared)
    writer = ChunkWriter(store.backend, source, model=prepared.name, key=prepared.key, progress=progress)
    writer.on_outcome = on_outcome
    with writer.locked():
        try:
            async with writer.lease.renewed():
                await writer.expect_space(store, prepared.plan)
                chunks = await writer.write(prepared.plan)
                files = [await writer.write_file(path) for _, path in sorted(prepared.checkpoint.files.items())]
                manifest = prepared.manifest(chunks, files)
                await writer.publish(store, manifest)
                return manifest
        except StorageError as exc:
            raise type(exc)(f"{exc}; what was finished is kept, and the same command goes on where it stopped") from exc


class ChunkWriter:
    """Writes the chunks of one plan into one storage; everything is to be called under `locked`."""

    def __init__(
        self, backend: StorageBackend, source: PayloadReader, *, model: str, key: str, progress: Progress
    ) -> None:
        """`key` identifies plan and source, so that only the same work is resumed."""
        self.backend = backend
        self.source = source
        self.progress = progress
        self.folder = backend.spool() / key
        self.lease = WriteLease(backend, model, self.folder)
        self.on_outcome: Callable[[str, Outcome], object] = lambda *_: None
        self._model = model
        self._journal = self.folder / "journal.jsonl"
        self._stop = threading.Event()

    async def expect_space(self, store: Store, plan: ChunkPlan) -> None:
        """Make sure that a store on this machine has room for what is still to be written.

        Where there is too little, chunks do not count that may be those of other models of the store, by their sizes.

        Raises:
            StorageFullError: there is not.
        """
        if self.backend.local_path(MARKER) is None:
            return
        done = self._read_journal()
        sizes = Counter(chunk.payload_bytes for chunk in plan.chunks if chunk.name not in done)
        free = await asyncio.to_thread(lambda: shutil.disk_usage(self.folder).free)
        if sum(sizes.elements()) > free:
            for model in await store.models():
                with suppress(ManifestError, StorageError):
                    sizes -= Counter(chunk.payload_bytes for chunk in (await store.facts(model)).chunks)
        needed = sum(sizes.elements())
        if needed > free:
            raise StorageFullError(
                f"{self.backend.url} has no space for {self._model}: {format_size(needed)} ({needed} bytes) are to be "
                f"written, and {format_size(free)} ({free} bytes) are free; free some, or name another store"
            )

    async def write(self, plan: ChunkPlan) -> list[Chunk]:
        """Write the chunks that are not in the storage yet, and return all of them."""
        forms = self._read_journal()
        await self.lease.hold(form.locations[0].object for form in forms.values())
        finishing: asyncio.Task[None] | None = None
        try:
            for index, planned in enumerate(plan.chunks):
                if planned.name in forms and await self._is_stored(forms[planned.name]):
                    self.progress(planned.payload_bytes, planned.name)
                    self.on_outcome(planned.name, "unchanged")
                    continue
                scratch = self.folder / f"{index:06d}.tmp"
                writing = asyncio.to_thread(self._write_file, planned, scratch)
                form = await to_its_end(writing, on_cancel=self._stop.set)
                if finishing:
                    await finishing
                finishing = asyncio.create_task(self._finish(planned.name, form, scratch, forms))
            if finishing:
                await finishing
        except BaseException:
            self._stop.set()
            raise
        finally:
            if finishing:
                await asyncio.gather(finishing, return_exceptions=True)
            for scratch in self.folder.glob("*.tmp"):
                scratch.unlink(missing_ok=True)
        return [planned.chunk(forms[planned.name].digest, forms[planned.name]) for planned in plan.chunks]

    async def write_file(self, file: Path) -> ModelFile:
        """Write a tokenizer file."""
        data = await asyncio.to_thread(read_small, file, FILE_BYTES)
        digest = payload_digest(data)
        key = blob_key(digest, file.suffix or ".bin")
        await self.lease.hold([key])
        await self.backend.save(key, data)
        return ModelFile(file.name, len(data), digest, key)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other writers of the same plan away.

        Raises:
            StorageError: another one is at work.
        """
        with translate_errors(f"preparing {self.folder}"):
            fd = _lock(self.folder / "lock")
        if fd is None:
            raise StorageError(f"another surfw is chunking this model into {self.backend.url}; wait for it")
        try:
            yield
        finally:
            os.close(fd)

    async def publish(self, store: Store, manifest: Manifest) -> None:
        """Make the model visible, and remove the journal.

        Raises:
            StorageError: a blob vanished since it was written, or the manifest cannot be written.
        """
        await self.lease.confirm(objects_of(manifest))
        await store.publish(manifest)
        await self.lease.release()
        self.forget()

    def forget(self) -> None:
        """Remove the journal: the model is published."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):  # others are at work there
            self.folder.parent.rmdir()

    def _write_file(self, planned: PlannedChunk, scratch: Path) -> Form:
        """Stream a chunk into a file; the hash of one piece is computed while the next is read and written."""
        header = encode_header([tensor.info for tensor in planned.tensors])
        size = planned.payload_bytes
        digester = Digester()
        buffers = [memoryview(bytearray(min(size, PIECE_BYTES))) for _ in range(min(_BUFFERS, -(-size // PIECE_BYTES)))]
        with (
            translate_errors(f"writing chunk {planned.name} to {self.backend.url}"),
            ThreadPoolExecutor(1, "surfw-hash") as hashing,
            scratch.open("wb", buffering=0) as out,
        ):
            _write_all(out.fileno(), memoryview(header))

            pending: list[Future[None]] = []
            for index, start in enumerate(range(0, size, PIECE_BYTES)):
                if self._stop.is_set():
                    raise StorageError(f"writing chunk {planned.name} was stopped")
                if len(pending) == len(buffers):
                    pending.pop(0).result()  # the buffer's previous piece has been digested
                piece = buffers[index % len(buffers)][: min(PIECE_BYTES, size - start)]
                self.source.read_into(planned, start, piece)
                pending.append(hashing.submit(digester.update, piece))
                _write_all(out.fileno(), piece)
                self.progress(len(piece), planned.name)
            for job in pending:
                job.result()
        found = digester.result()
        location = Location(blob_key(found.digest, ".safetensors"), len(header), len(header) + size)
        return Form("none", size, *found, (location,))

    async def _place(self, form: Form) -> tuple[Form, Outcome]:
        """Where the payload will lie, and what becomes of it.

        That is behind our header, or behind that of an equal payload that is already stored, whole and undamaged.
        """
        (ours,) = form.locations
        size = await self._size(ours.object)
        if size is None:
            return form, "new"
        there = Location(ours.object, size - form.stored_bytes, size)
        with suppress(StorageError):  # what cannot be read is damaged too
            if await self._is_whole(there, form.digest):
                return replace(form, locations=(there,)), "unchanged"
        return form, "replaced"

    async def _is_whole(self, at: Location, digest: str) -> bool:
        """Whether an object has a payload with this digest, behind a header."""
        if not PREFIX_BYTES < at.start <= PREFIX_BYTES + MAX_HEADER_BYTES:
            return False
        seen = blake3()
        for start in range(at.start, at.stop, PIECE_BYTES):
            seen.update(await self.backend.load_range(at.object, start, min(start + PIECE_BYTES, at.stop)))
        return seen.hexdigest() == digest and is_header(await self.backend.load_range(at.object, 0, at.start), at.stop)

    async def _finish(self, name: str, form: Form, scratch: Path, forms: dict[str, Form]) -> None:
        """Put a chunk's file in its place, durably, and note in `forms` and in the journal that it is done."""

        def sync() -> None:
            with translate_errors(f"writing chunk {name} to {self.backend.url}"), scratch.open("rb") as file:
                os.fsync(file.fileno())
                forget_pages(file.fileno())

        key = form.locations[0].object
        await self.lease.hold([key])
        async with self._placing(form):
            placed, outcome = await self._place(form)
            if outcome == "unchanged":
                await asyncio.to_thread(scratch.unlink)
            else:
                if self.backend.local_path(key):  # else the file is only a step of an upload
                    await asyncio.to_thread(sync)
                await self.backend.adopt(key, scratch)
        entry = {"chunk": name, "bytes": form.stored_bytes, "start": placed.locations[0].start}
        with translate_errors(f"writing the journal in {self.folder}"), self._journal.open("ab") as journal:
            journal.write(encode_line(entry | Digests(form.digest, form.blocks).document()))
        forms[name] = placed
        self.on_outcome(name, outcome)

    @asynccontextmanager
    async def _placing(self, form: Form) -> AsyncIterator[None]:
        """Let one writer at a time store a payload: another model may have an equal one behind another header.

        Writers of other payloads, or into other stores, do not wait.
        """
        file = self.folder.parent / f"{form.digest}.lock"
        with translate_errors(f"locking {file}"):
            while (fd := _lock(file)) is None:
                if self._stop.is_set():
                    raise StorageError(f"writing {form.locations[0].object} was stopped")
                await asyncio.sleep(_LOOK_SECONDS)
        try:
            yield
        finally:
            file.unlink(missing_ok=True)  # before it is unlocked, so that a waiting writer makes a new one
            os.close(fd)

    def _read_journal(self) -> dict[str, Form]:
        """The chunks that an earlier run finished; lines that are cut off or damaged do not count."""
        done: dict[str, Form] = {}
        with translate_errors(f"reading the journal in {self.folder}"):
            written = read_regular(self._journal, _JOURNAL_BYTES) if self._journal.exists() else b""
        for line in written.splitlines():
            try:
                entry = decode_line(line)
                size, start = entry["bytes"], entry["start"]
                digests = read_digests(entry, size)
                location = Location(blob_key(digests.digest, ".safetensors"), start, start + size)
                done[entry["chunk"]] = Form("none", size, *digests, (location,))
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
        return done

    async def _is_stored(self, form: Form) -> bool:
        """Whether a chunk of the journal is still in the storage, in full length."""
        return await self._size(form.locations[0].object) == form.locations[0].stop

    async def _size(self, key: str) -> int | None:
        """The length of an object; None if it does not exist."""
        with suppress(NotFoundError):
            return await self.backend.size(key)
        return None


def _lock(file: Path) -> int | None:
    """The descriptor of the locked file; None if another writer has locked it."""
    with suppress(BlockingIOError):
        while True:
            with ExitStack() as opened:
                fd = create_file(file)
                opened.callback(os.close, fd)
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(fd).st_nlink:  # else another writer has just removed it, and it locks nobody out
                    opened.pop_all()
                    return fd
    return None


def _write_all(fd: int, data: memoryview) -> None:
    while data:
        data = data[os.write(fd, data) :]
