"""Executes a plan: streams every chunk into the store, then publishes the manifest.

- Blobs first, the manifest last: a model is visible only when all of it is there and durable.
- Bytes go through a few buffers of 8 MiB; a converted tensor is held with its sources, nothing else ever is.
- While one chunk is written, the one before it is synced and put in its place.
- A blob is in the writer's lease before it is looked for or put in place, so that nobody prunes it: see
  `storage.housekeeping.leases`.
- A journal beside the unfinished files names the chunks that are done. The same plan over the same source goes on from
  there; a lock, held until the journal is given up, keeps two writers of it apart.
"""

import asyncio
import fcntl
import os
import shutil
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from blake3 import blake3

from surfw.checkpoint.layout import read_small
from surfw.chunking.plan import ChunkPlan, PlannedChunk, TensorBytes
from surfw.chunking.prepare import PreparedModel
from surfw.config import FILE_BYTES, MIB, PIECE_BYTES
from surfw.errors import NotFoundError, StorageError
from surfw.files import read_regular
from surfw.manifest import (
    Chunk,
    Digester,
    Form,
    Location,
    Manifest,
    ModelFile,
    decode_line,
    encode_line,
    payload_digest,
)
from surfw.safetensors_header import encode_header
from surfw.storage.base import StorageBackend
from surfw.storage.filesystem import create_file, forget_pages
from surfw.storage.fsspec_backend import translate_errors
from surfw.storage.housekeeping.leases import WriteLease
from surfw.storage.store import Store, blob_key, objects_of

_BUFFERS = 3
_LOOK_SECONDS = 0.05
_JOURNAL_BYTES = 256 * MIB

Progress = Callable[[int, str], None]
"""Called with the bytes just finished and the name of their chunk, from a worker thread."""


async def write_model(
    prepared: PreparedModel, backend: StorageBackend, *, progress: Progress = lambda *_: None
) -> Manifest:
    """Write a prepared model into a store, and publish it.

    Args:
        prepared: what to write.
        backend: where; an empty place becomes a store.
        progress: called as bytes are done.

    Raises:
        StorageError: the storage cannot take it. Nothing is visible, and the next run goes on where this one stopped.
    """
    store = Store(backend)
    await store.create()
    writer = ChunkWriter(store.backend, prepared.payloads(), model=prepared.name, key=prepared.key, progress=progress)
    with writer.locked():
        try:
            async with writer.lease.renewed():
                return await _write(prepared, store, writer)
        except StorageError as exc:
            raise type(exc)(f"{exc}; what was finished is kept, and the same command goes on where it stopped") from exc


async def _write(prepared: PreparedModel, store: Store, writer: "ChunkWriter") -> Manifest:
    chunks = await writer.write(prepared.plan)
    files = [await _write_tokenizer_file(prepared, writer, path) for path in sorted(prepared.checkpoint.files)]
    manifest = prepared.manifest(chunks, files)
    await writer.publish(store, manifest)
    return manifest


async def _write_tokenizer_file(prepared: PreparedModel, writer: "ChunkWriter", path: str) -> ModelFile:
    file = prepared.checkpoint.files[path]
    data = await asyncio.to_thread(read_small, file, FILE_BYTES)
    digest = payload_digest(data)
    key = blob_key(digest, file.suffix or ".bin")
    await writer.lease.hold([key])
    await writer.backend.save(key, data)
    return ModelFile(path, len(data), digest, key)


class ChunkWriter:
    """Writes the chunks of one plan into one storage."""

    def __init__(
        self, backend: StorageBackend, source: TensorBytes, *, model: str, key: str, progress: Progress
    ) -> None:
        """Name the parts; `key` identifies plan and source, so that only the very same work is resumed."""
        self.backend = backend
        self.source = source
        self.progress = progress
        self.folder = backend.spool() / key
        self.lease = WriteLease(backend, model, self.folder)
        self._stop = threading.Event()

    async def write(self, plan: ChunkPlan) -> list[Chunk]:
        """Write all chunks that are not there yet, and return the facts of all of them; call it under `locked`.

        Raises:
            StorageError: the storage cannot take them; what was finished is kept for the next run.
        """
        done = self._read_journal()
        await self.lease.hold(form.locations[0].object for form in done.values())
        forms: list[Form] = []
        finishing: asyncio.Task[Form] | None = None
        try:
            for index, planned in enumerate(plan.chunks):
                form = done.get(planned.name)
                fresh = form is None or not await self._stored(form)
                scratch = self.folder / f"{index:06d}.tmp"
                if form is None or fresh:
                    form = await self._in_thread(planned, scratch)
                else:
                    self.progress(planned.payload_bytes, planned.name)
                if finishing:
                    forms.append(await finishing)
                finishing = asyncio.create_task(self._finish(planned.name, form, scratch) if fresh else _now(form))
            if finishing:
                forms.append(await finishing)
        except BaseException:
            self._stop.set()
            raise
        finally:
            if finishing:
                await asyncio.gather(finishing, return_exceptions=True)
            for scratch in self.folder.glob("*.tmp"):
                scratch.unlink(missing_ok=True)
        return [planned.chunk(form.digest, form) for planned, form in zip(plan.chunks, forms, strict=True)]

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other writers of the same plan away.

        Raises:
            StorageError: there is another one.
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
        """Make the model visible, and forget how far the work was; call it under `locked`.

        Raises:
            StorageError: a blob vanished since it was written, or the manifest cannot be written.
        """
        await self.lease.confirm(objects_of(manifest))
        await store.publish(manifest)
        await self.lease.release()
        self.forget()

    def forget(self) -> None:
        """Remove the journal: the model is published. Call it under `locked`."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):  # others are at work there
            self.folder.parent.rmdir()

    async def _in_thread(self, planned: PlannedChunk, scratch: Path) -> Form:
        work = asyncio.ensure_future(asyncio.to_thread(self._write_file, planned, scratch))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            self._stop.set()
            await asyncio.gather(work, return_exceptions=True)
            raise

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

    async def _place(self, form: Form) -> Form:
        """Where the payload will lie: behind our header, or behind that of an equal payload that is there already."""
        (ours,) = form.locations
        try:
            size = await self.backend.size(ours.object)
        except NotFoundError:
            return form
        there = Location(ours.object, size - form.stored_bytes, size)
        if there == ours or there.start <= 0:
            return form
        seen = blake3()
        for start in range(there.start, there.stop, PIECE_BYTES):
            seen.update(await self.backend.load_range(there.object, start, min(start + PIECE_BYTES, there.stop)))
        return replace(form, locations=(there,)) if seen.hexdigest() == form.digest else form

    async def _finish(self, name: str, form: Form, scratch: Path) -> Form:
        """Make a chunk's file durable, put it in its place, and note that it is done; returns where it lies."""

        def sync() -> None:
            with translate_errors(f"writing chunk {name} to {self.backend.url}"):
                fd = os.open(scratch, os.O_RDONLY)
                try:
                    os.fsync(fd)
                    forget_pages(fd)
                finally:
                    os.close(fd)

        if self.backend.local_path(form.locations[0].object):  # elsewhere the file is only on its way
            await asyncio.to_thread(sync)
        await self.lease.hold([form.locations[0].object])
        async with self._placing(form):
            placed = await self._place(form)
            if placed == form:
                await self.backend.adopt(form.locations[0].object, scratch)
            # else an equal payload behind another header is there, and stays; `write` removes ours
        entry = {"chunk": name, "digest": form.digest, "bytes": form.stored_bytes, "start": placed.locations[0].start}
        self._note(encode_line(entry | {"blocks": form.blocks.hex()}))
        return placed

    @asynccontextmanager
    async def _placing(self, form: Form) -> AsyncIterator[None]:
        """One writer at a time puts a payload in place: another model may have an equal one behind another header.

        Writers of other payloads, or into other stores, are not in its way.
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
            file.unlink(missing_ok=True)  # first, so that whoever waits for it makes a new one
            os.close(fd)

    def _note(self, line: bytes) -> None:
        """Add a line to the journal."""
        with translate_errors(f"writing the journal in {self.folder}"), self._journal.open("ab") as journal:
            journal.write(line)

    @property
    def _journal(self) -> Path:
        return self.folder / "journal.jsonl"

    def _read_journal(self) -> dict[str, Form]:
        """Chunks that an earlier run finished; a line that was cut off or damaged does not count."""
        done: dict[str, Form] = {}
        if not self._journal.exists():
            return done
        with translate_errors(f"reading the journal in {self.folder}"):
            written = read_regular(self._journal, _JOURNAL_BYTES)
        for line in written.splitlines():
            try:
                entry = decode_line(line)
                size, start, digest = entry["bytes"], entry["start"], entry["digest"]
                location = Location(blob_key(digest, ".safetensors"), start, start + size)
                done[entry["chunk"]] = Form("none", size, digest, bytes.fromhex(entry["blocks"]), (location,))
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
        return done

    async def _stored(self, form: Form) -> bool:
        """Whether a chunk of the journal is still in the storage, whole."""
        location = form.locations[0]
        try:
            return await self.backend.size(location.object) == location.stop
        except NotFoundError:
            return False


def _lock(file: Path) -> int | None:
    """The descriptor of the locked file; None if another writer has locked it."""
    while True:
        fd = create_file(file)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        except BaseException:
            os.close(fd)
            raise
        if os.fstat(fd).st_nlink:
            return fd
        os.close(fd)  # the writer that had it has just removed it, so it locks nobody out: make a new one


async def _now(form: Form) -> Form:
    """A chunk that was finished before."""
    return form


def _write_all(fd: int, data: memoryview) -> None:
    while data:
        data = data[os.write(fd, data) :]
