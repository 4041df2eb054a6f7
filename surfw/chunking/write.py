"""Write a planned model: stream every chunk into the store, then publish the manifest.

- Blobs are written first and the manifest last: a model becomes visible only when all of it is stored and durable.
- Bytes pass through a few 8 MiB buffers; only a converted tensor is held whole, with its sources.
- All forms of a chunk are made from one read of its payload; each form is a separate blob.
- While one chunk is written, the previous one is synced and moved into place.
- A blob is added to the writer's lease before it is looked up or moved into place, so that it is never pruned: see
  `storage.housekeeping.leases`.
- A journal in the folder for unfinished files lists the finished chunks. The same plan over the same source resumes
  from it; a lock, held until the journal is removed, excludes other writers of the same plan.
"""

import asyncio
import fcntl
import logging
import os
import shutil
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from blake3 import blake3

from surfw.checkpoint.layout import read_small
from surfw.chunking.forms import (
    LEAST_GAIN,
    FormFiles,
    PayloadSource,
    Written,
    codecs_of,
    decode_entry,
    encode_entry,
    planned_form,
    scratch_file,
)
from surfw.chunking.plan import ChunkPlan, PlannedChunk
from surfw.chunking.prepare import PayloadReader, PreparedModel, check_files
from surfw.codec import CODECS, PACKED_CODECS, name_forms, whole_codecs
from surfw.config import FILE_BYTES, MIB, PIECE_BYTES, count, format_size
from surfw.encryption import EncryptionKey
from surfw.errors import (
    ConfigurationError,
    ManifestError,
    NotFoundError,
    StorageError,
    StorageFullError,
    UnknownModelError,
)
from surfw.files import read_regular
from surfw.manifest import (
    Chunk,
    Form,
    Location,
    Manifest,
    ModelFile,
    payload_digest,
)
from surfw.safetensors_header import MAX_HEADER_BYTES, PREFIX_BYTES, is_header
from surfw.signing import SigningKey
from surfw.storage.base import StorageBackend
from surfw.storage.filesystem import create_file, forget_pages
from surfw.storage.fsspec_backend import translate_errors
from surfw.storage.housekeeping.leases import WriteLease
from surfw.storage.store import MARKER, Store, blob_key, objects_of
from surfw.threads import to_its_end

logger = logging.getLogger("surfw.chunking")

_BUFFERS = 3
_OUTCOMES: Sequence["Outcome"] = ("replaced", "new", "unchanged")
"""Precedence of outcomes: if the forms of a chunk differ, the first of these is reported."""

_LOOK_SECONDS = 0.05
_JOURNAL_BYTES = 256 * MIB

Progress = Callable[[int, str], None]
"""Called with the bytes just finished and the name of their chunk, from a worker thread."""

Outcome = Literal["new", "unchanged", "replaced"]
"""What happened to a chunk: written, already stored, or rewritten because the stored bytes were damaged."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Contents:
    """A model to write.

    Attributes:
        name: the model's name.
        key: identifies the work; work with the same key can be resumed.
        plan: its chunks.
        payloads: the source of their bytes.
        files: for each tokenizer file, by name, the function that reads it.
        manifest: builds the manifest from the written chunks and files.
    """

    name: str
    key: str
    plan: ChunkPlan
    payloads: PayloadSource
    files: Mapping[str, Callable[[], Awaitable[bytes]]]
    manifest: Callable[[Sequence[Chunk], Sequence[ModelFile]], Manifest]


async def write_model(
    prepared: PreparedModel,
    backend: StorageBackend,
    *,
    codecs: Sequence[str] = ("none",),
    key: EncryptionKey | None = None,
    signer: SigningKey | None = None,
    progress: Progress = lambda *_: None,
    on_outcome: Callable[[str, Outcome], object] = lambda *_: None,
) -> Manifest:
    """Write a prepared model into a store and publish it. An empty location becomes a store.

    Args:
        prepared: the model.
        backend: the storage.
        codecs: the forms to write for each chunk. Next to `none`, `lossless` is kept only where it is at least 10 %
            smaller; `int8` and `int4` are written only for chunks with weights to quantise.
        key: encrypts all forms; tokenizer files and the manifest stay readable.
        signer: signs the model; without one, an existing signature is kept if it covers this same model.
        progress: see `Progress`.
        on_outcome: called with each chunk's name and outcome once the chunk is in the store.

    Raises:
        CheckpointError: the tokenizer built from the stored files differs from the checkpoint's.
        ConfigurationError: the store has the model in exact forms, and none of `codecs` is exact.
        StorageError: the storage failed. Nothing is visible yet, and the next run resumes where this one stopped.
    """
    await asyncio.to_thread(check_files, prepared)
    contents = Contents(
        name=prepared.name,
        key=prepared.key,
        plan=prepared.plan,
        payloads=PayloadReader(prepared),
        files={
            name: partial(asyncio.to_thread, read_small, path, FILE_BYTES)
            for name, path in sorted(prepared.checkpoint.files.items())
        },
        manifest=prepared.manifest,
    )
    return await write_contents(
        contents, backend, codecs=codecs, key=key, signer=signer, progress=progress, on_outcome=on_outcome
    )


async def write_contents(
    contents: Contents,
    backend: StorageBackend,
    *,
    codecs: Sequence[str],
    key: EncryptionKey | None = None,
    signer: SigningKey | None = None,
    progress: Progress,
    on_outcome: Callable[[str, Outcome], object],
) -> Manifest:
    """Write a model and publish it. For arguments and errors, see `write_model`."""
    store = Store(backend)
    await store.create()
    work = contents.key
    if tuple(codecs) != ("none",) or key:
        work = payload_digest(" ".join([work, *codecs, *([key.id] if key else [])]).encode())[:32]
    writer = ChunkWriter(store.backend, contents.payloads, model=contents.name, key=work, progress=progress)
    writer.on_outcome = on_outcome
    writer.codecs, writer.encryption = codecs, key
    with writer.locked():
        facts = await _find_stored(store, contents.name)
        before = whole_codecs(facts) if facts else ()
        _expect_exact_forms(store, contents.name, before, codecs)
        _warn_of_lost_forms(contents.name, before, codecs)
        await writer.expect_space(store, contents.plan)
        try:
            async with writer.lease.renewed():
                chunks = await writer.write(contents.plan)
                files = [await writer.write_file(name, await read()) for name, read in contents.files.items()]
                manifest = contents.manifest(chunks, files)
                manifest = replace(manifest, key_id=key.id) if key else manifest
                manifest = await asyncio.to_thread(_sign, manifest, facts, signer)
                await writer.publish(store, manifest)
        except StorageError as exc:
            raise type(exc)(f"{exc}; what was finished is kept, and the same command goes on where it stopped") from exc
    if facts and facts.signature and not manifest.signature:
        logger.warning(
            "%s was signed with key %s in %s, and is not any more; to sign it, give the key (signing_key_file, --sign)",
            manifest.name, facts.signature.key_id, store.url,
        )  # fmt: skip
    if facts and facts.weights_key != manifest.weights_key and (adapters := await store.adapters_of(manifest.name)):
        logger.warning(
            "%s has other weights now, over which %s of %s (such as %s) cannot be applied; chunk the adapters again, "
            "or the previous weights",
            manifest.name, count(len(adapters), "adapter"), store.url, adapters[0],
        )  # fmt: skip
    if facts and facts.key_id != manifest.key_id:
        _warn_of_change(store, facts, manifest)
    return manifest


def _sign(manifest: Manifest, before: Manifest | None, signer: SigningKey | None) -> Manifest:
    """Return the manifest with a new signature, or with the previous one if that still covers it."""
    if signer is not None:
        return signer.sign(manifest)
    return manifest if before is None or manifest.signature else manifest.with_signature_of(before)


def _warn_of_lost_forms(name: str, before: Sequence[str], codecs: Sequence[str]) -> None:
    """Warn, before anything is written, of stored forms that are not among the new ones."""
    lost = [codec for codec in before if codec not in codecs]
    if not lost:
        return
    logger.warning(
        "%s is stored as %s too, and will not be any more; to keep that, stop this, and give all of them (codecs, "
        "--codec): %s",
        name, name_forms(lost), ",".join(codec for codec in CODECS if codec in {*before, *codecs}),
    )  # fmt: skip


def _warn_of_change(store: Store, before: Manifest, manifest: Manifest) -> None:
    if before.key_id and not manifest.key_id:
        logger.warning("%s was encrypted in %s, and is not any more", manifest.name, store.url)
    elif not before.key_id and before.origin is None:
        logger.warning(
            "%s was stored without encryption before, and those blobs can still be read in %s: remove them with "
            "'surfw prune'",
            manifest.name, store.url,
        )  # fmt: skip


async def check_target(backend: StorageBackend, name: str, codecs: Sequence[str]) -> None:
    """Check, without writing anything, that a model may be written into a store in these forms.

    Raises:
        NotAStoreError: the location is used for something else.
        ConfigurationError: see `write_model`.
        StorageError: the storage cannot be read.
    """
    store = Store(backend)
    if await store.check_place():
        facts = await _find_stored(store, name)
        _expect_exact_forms(store, name, whole_codecs(facts) if facts else (), codecs)


async def _find_stored(store: Store, name: str) -> Manifest | None:
    """Return the stored manifest of a model; None if it is missing or damaged."""
    with suppress(UnknownModelError, ManifestError):  # a damaged manifest may be replaced
        return await store.facts(name)
    return None


def _expect_exact_forms(store: Store, name: str, before: Sequence[str], codecs: Sequence[str]) -> None:
    """Refuse to replace all exact forms of a stored model with quantised ones: they could not be restored.

    Raises:
        ConfigurationError: the model is stored in exact forms, and `codecs` has none.
    """
    if set(codecs).issubset(PACKED_CODECS) and not set(before).issubset(PACKED_CODECS):
        raise ConfigurationError(
            f"{store.url} has {name} with all bits, which {' and '.join(codecs)} alone would replace; keep 'none' "
            "or 'lossless' beside it (codecs, --codec), choose another name (name, --name), or remove the model "
            "first"
        )


class ChunkWriter:
    """Writes the chunks of one plan into one storage. Call every method under `locked`."""

    def __init__(
        self, backend: StorageBackend, source: PayloadSource, *, model: str, key: str, progress: Progress
    ) -> None:
        """`key` identifies plan and source, so that only the same work is resumed."""
        self.backend = backend
        self.source = source
        self.progress = progress
        self.folder = backend.spool() / key
        self.lease = WriteLease(backend, model, self.folder)
        self.on_outcome: Callable[[str, Outcome], object] = lambda *_: None
        self.codecs: Sequence[str] = ("none",)
        self.encryption: EncryptionKey | None = None
        self._model = model
        self._journal = self.folder / "journal.jsonl"
        self._stop = threading.Event()

    async def expect_space(self, store: Store, plan: ChunkPlan) -> None:
        """Check that a local store has space for the chunks that are still to be written.

        If space is short, a chunk does not count if another model in the store has one of the same size, since the two
        may be equal. If only the `lossless` forms do not fit, they are dropped.

        Raises:
            StorageFullError: there is not enough space.
        """
        if self.backend.local_path(MARKER) is None:
            return
        done = self._read_journal()
        left = {chunk: codecs_of(chunk, self.codecs) for chunk in plan.chunks if chunk.name not in done}
        packed_bytes = sum(
            planned_form(chunk, codec).stored_bytes for chunk in left for codec in left[chunk] if chunk.kinds(codec)
        )
        sizes = Counter(chunk.payload_bytes for chunk in left if not set(left[chunk]).issubset(PACKED_CODECS))
        coded_bytes = (1 - LEAST_GAIN) * sum(sizes.elements()) if {"none", "lossless"}.issubset(self.codecs) else 0
        free = await asyncio.to_thread(lambda: shutil.disk_usage(self.folder).free)
        if sum(sizes.elements()) + packed_bytes + coded_bytes > free:
            for model in await store.models():
                with suppress(ManifestError, StorageError):
                    sizes -= Counter(chunk.payload_bytes for chunk in (await store.facts(model)).chunks)
        needed = sum(sizes.elements()) + packed_bytes
        if coded_bytes and needed + coded_bytes > free:
            if needed <= free:
                logger.warning(
                    "%s has no space for compressed forms of %s beside the others: %s are free; free some, and chunk "
                    "it again, or name the forms to store (--codec)",
                    self.backend.url, self._model, format_size(free),
                )  # fmt: skip
            self.codecs = tuple(codec for codec in self.codecs if codec != "lossless")
        if needed > free:
            less = ", or store the compressed form alone (--codec lossless)" if "none" in self.codecs else ""
            raise StorageFullError(
                f"{self.backend.url} has no space for {self._model}: {format_size(needed)} ({needed} bytes) are to be "
                f"written, and {format_size(free)} ({free} bytes) are free; free some, name another store{less}"
            )

    async def write(self, plan: ChunkPlan) -> list[Chunk]:
        """Write the chunks that are not stored yet, and return all chunks."""
        done = self._read_journal()
        await self.lease.hold(place.object for one in done.values() for form in one.forms for place in form.locations)
        finishing: asyncio.Task[None] | None = None
        try:
            for index, planned in enumerate(plan.chunks):
                if planned.name in done and await self._is_stored(done[planned.name]):
                    self.progress(planned.payload_bytes, planned.name)
                    self.on_outcome(planned.name, "unchanged")
                    continue
                scratch = self.folder / f"{index:06d}"
                writing = asyncio.to_thread(self._write_forms, planned, scratch)
                written = await to_its_end(writing, on_cancel=self._stop.set)
                if finishing:
                    await finishing
                finishing = asyncio.create_task(self._finish(planned.name, written, scratch, done))
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
        return [planned.chunk(done[planned.name].id, *done[planned.name].forms) for planned in plan.chunks]

    async def write_file(self, name: str, data: bytes) -> ModelFile:
        """Write a tokenizer file."""
        digest = payload_digest(data)
        key = blob_key(digest, Path(name).suffix or ".bin")
        await self.lease.hold([key])
        await self.backend.save(key, data)
        return ModelFile(name, len(data), digest, key)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Exclude other writers of the same plan.

        Raises:
            StorageError: another writer is active.
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
        """Make the model visible and remove the journal.

        Raises:
            StorageError: a blob disappeared after it was written, or the manifest cannot be written.
        """
        await self.lease.confirm(objects_of(manifest))
        await store.publish(manifest)
        await self.lease.release()
        self.forget()

    def forget(self) -> None:
        """Remove the journal of a published model."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):  # other writers use it
            self.folder.parent.rmdir()

    def _write_forms(self, planned: PlannedChunk, scratch: Path) -> Written:
        """Stream a chunk into one file per form; a piece is hashed and encoded while the next is read and written."""
        size = planned.payload_bytes
        buffers = [memoryview(bytearray(min(size, PIECE_BYTES))) for _ in range(min(_BUFFERS, -(-size // PIECE_BYTES)))]
        with (
            translate_errors(f"writing chunk {planned.name} to {self.backend.url}"),
            FormFiles(planned, scratch, self.codecs, self.encryption) as files,
        ):
            for index, start in enumerate(range(0, size if files.needs_payload else 0, PIECE_BYTES)):
                self._expect_to_go_on(planned)
                if index >= len(buffers):
                    files.settle()  # frees the buffer of its previous piece
                piece = buffers[index % len(buffers)][: min(PIECE_BYTES, size - start)]
                self.source.read_into(planned, start, piece)
                files.add(piece)
                self.progress(len(piece), planned.name)
            for form in files.copied:
                self._copy(planned, form, files)
            if not files.needs_payload:
                self.progress(size, planned.name)
            return files.finish()

    def _copy(self, planned: PlannedChunk, form: Form, files: FormFiles) -> None:
        buffer = memoryview(bytearray(min(form.stored_bytes, PIECE_BYTES)))
        for start in range(0, form.stored_bytes, PIECE_BYTES):
            self._expect_to_go_on(planned)
            piece = buffer[: form.stored_bytes - start]
            self.source.read_form_into(planned, form, start, piece)
            files.copy(form, piece)

    def _expect_to_go_on(self, planned: PlannedChunk) -> None:
        if self._stop.is_set():
            raise StorageError(f"writing chunk {planned.name} was stopped")

    async def _place(self, form: Form) -> tuple[Form, Outcome]:
        """Return the form at its final location, and its outcome.

        An equal payload that is already stored and undamaged is reused, even behind another header than ours.
        """
        (ours,) = form.locations
        size = await self._size(ours.object)
        if size is None:
            return form, "new"
        there = Location(ours.object, size - form.stored_bytes, size)
        if there == ours and self.backend.local_path(ours.object) is None:
            return form, "unchanged"  # remote: only the size is checked, since reading is as slow as writing
        if await self._is_whole(there, form):
            return replace(form, locations=(there,)), "unchanged"
        return form, "replaced"

    async def _is_whole(self, at: Location, form: Form) -> bool:
        """Whether an object has these stored bytes. Plain payloads follow a header; other forms have none."""
        has_header = form.codec == "none" and not form.seals
        if not (PREFIX_BYTES < at.start <= PREFIX_BYTES + MAX_HEADER_BYTES if has_header else at.start == 0):
            return False
        seen = blake3()
        for start in range(at.start, at.stop, PIECE_BYTES):
            seen.update(await self.backend.load_range(at.object, start, min(start + PIECE_BYTES, at.stop)))
        if seen.hexdigest() != form.digest:
            return False
        return not has_header or is_header(await self.backend.load_range(at.object, 0, at.start), at.stop)

    async def _finish(self, name: str, written: Written, scratch: Path, done: dict[str, Written]) -> None:
        """Move a chunk's files into place durably, and record the chunk in `done` and in the journal."""
        placed, outcomes = [], set[Outcome]()
        for form in written.forms:
            found, outcome = await self._finish_form(name, form, scratch_file(scratch, form.codec))
            placed.append(found)
            outcomes.add(outcome)
        done[name] = Written(written.id, tuple(placed))
        with translate_errors(f"writing the journal in {self.folder}"), self._journal.open("ab") as journal:
            journal.write(encode_entry(name, self.codecs, done[name]))
        self.on_outcome(name, next(one for one in _OUTCOMES if one in outcomes))

    async def _finish_form(self, name: str, form: Form, scratch: Path) -> tuple[Form, Outcome]:
        """Store a form; return it at its final location, and its outcome."""

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
                if self.backend.local_path(key):  # otherwise the file is uploaded, and need not be durable
                    await asyncio.to_thread(sync)
                await self.backend.adopt(key, scratch)
        return placed, outcome

    @asynccontextmanager
    async def _placing(self, form: Form) -> AsyncIterator[None]:
        """Let one writer at a time store a payload: another model may have the same one behind another header.

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
            file.unlink(missing_ok=True)  # before unlocking, so that a waiting writer creates a new one
            os.close(fd)

    def _read_journal(self) -> dict[str, Written]:
        """Return the chunks that an earlier run finished; truncated or damaged lines are skipped."""
        done: dict[str, Written] = {}
        with translate_errors(f"reading the journal in {self.folder}"):
            journal = read_regular(self._journal, _JOURNAL_BYTES) if self._journal.exists() else b""
        for line in journal.splitlines():
            try:
                name, codecs, written = decode_entry(line)
                if codecs == tuple(self.codecs):  # they differ if the free space has changed since
                    done[name] = written
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
        return done

    async def _is_stored(self, written: Written) -> bool:
        """Whether a chunk of the journal is still stored in full length."""
        places = [place for form in written.forms for place in form.locations]
        return all([await self._size(place.object) == place.stop for place in places])

    async def _size(self, key: str) -> int | None:
        """Return the length of an object; None if it does not exist."""
        with suppress(NotFoundError):
            return await self.backend.size(key)
        return None


def _lock(file: Path) -> int | None:
    """Lock a file and return its descriptor; None if another writer holds the lock."""
    with suppress(BlockingIOError):
        while True:
            with ExitStack() as opened:
                fd = create_file(file)
                opened.callback(os.close, fd)
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(fd).st_nlink:  # otherwise it was just removed, and the lock excludes nobody
                    opened.pop_all()
                    return fd
    return None
