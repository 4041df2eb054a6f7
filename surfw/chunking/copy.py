"""Copy a chunked model from a store or a server into another store, or into other forms.

Payloads are read and verified as in the runtime, and written as `write` writes a checkpoint's. Chunks keep their ids:
every payload is checked against its id before anything becomes visible. The checkpoint is not needed; torch is needed
only to find the weights that can be quantised. Existing quantised forms are copied unchanged, and so are all forms of
an encrypted model, for which no key is needed.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import replace
from functools import partial

from surfw.chunking.plan import ChunkPlan, PlannedChunk, PlannedTensor, with_exact_rest
from surfw.chunking.prepare import find_matrices
from surfw.chunking.write import Contents, Outcome, Progress, check_target, write_contents
from surfw.codec import (
    DEFAULT_CODECS,
    PACKED_CODECS,
    choose_form,
    exact_forms,
    has_exact_forms,
    stored_codecs,
    stored_packed_codecs,
)
from surfw.codec.lossless import FRAME_BYTES, CodedRange
from surfw.encryption import EncryptionKey
from surfw.errors import ConfigurationError, IntegrityError, NotAStoreError, StorageError, UnknownModelError
from surfw.manifest import Chunk, Form, Manifest, ModelFile, check_model_name, payload_digest
from surfw.signing import SigningKey
from surfw.source import ChunkSource, Read, expect_base
from surfw.storage import StorageBackend, Store
from surfw.threads import to_its_end

logger = logging.getLogger("surfw.chunking")


async def copy_model(
    source: ChunkSource,
    model: str | Manifest | None,
    backend: StorageBackend,
    *,
    name: str | None = None,
    codecs: Sequence[str] | None = None,
    only_experts: bool = False,
    key: EncryptionKey | None = None,
    signer: SigningKey | None = None,
    progress: Progress = lambda *_: None,
    on_outcome: Callable[[str, Outcome], object] = lambda *_: None,
) -> Manifest:
    """Write a chunked model into a store and publish it. An empty location becomes a store.

    Args:
        source: the source of the model.
        model: its full name there or a unique last part of it; None for the only model; or its manifest.
        backend: the storage.
        name: its name in the store; default: its current name.
        codecs: see `write_model`; default: `DEFAULT_CODECS`, or all existing codecs for a model that is encrypted or
            has no exact forms.
        only_experts: quantise only the experts of a mixture; existing packed forms are copied.
        key: encrypts the copy. An encrypted model is copied unchanged, so for one, `key` must be its own key.
        signer: signs the copy; without one, the copy keeps the model's signature if that covers its forms.
        progress: see `write_model`.
        on_outcome: see `write_model`.

    Raises:
        UnknownModelError: the source has no such model.
        ConfigurationError: a form cannot be made from the existing ones.
        IntegrityError: bytes from the source do not match its manifest.
        StorageError, WireError: reading or writing failed. Nothing is visible yet, and the next run resumes where this
            one stopped.
    """
    manifest = model if isinstance(model, Manifest) else await source.manifest(await source.resolve(model))
    name = check_model_name(name or manifest.name)
    await _expect_base(manifest, backend)
    if not codecs:
        codecs = _default_codecs(manifest)
        if left := [codec for codec in stored_packed_codecs(manifest) if codec not in codecs]:
            logger.warning(
                "of %s, %s is not copied; to have it in the copy too, name it (codecs, --codec %s)",
                manifest.name, " and ".join(left), ",".join([*codecs, *left]),
            )  # fmt: skip
    chunks = await asyncio.to_thread(_plan, manifest, codecs, key, only_experts=only_experts)
    key = None if manifest.key_id else key  # an encrypted model is not encrypted again
    payloads = SourcePayloads(source, manifest, asyncio.get_running_loop())
    contents = Contents(
        name=name,
        key=payload_digest(f"{name} {manifest.digest}".encode())[:32],
        plan=ChunkPlan(chunks, manifest.order),
        payloads=payloads,
        files={file.path: partial(source.file, manifest, file.path) for file in manifest.files},
        manifest=partial(_copied, manifest, name, source.url, key=key),
    )
    writing = asyncio.ensure_future(
        write_contents(
            contents, backend, codecs=codecs, key=key, signer=signer, progress=progress, on_outcome=on_outcome
        )
    )

    def stop() -> None:
        payloads.stop()
        writing.cancel()

    copied = await to_its_end(writing, on_cancel=stop)
    if manifest.signature and not copied.signature:
        logger.warning(
            "%s is signed with key %s in %s, and its copy is not, which is another or in other forms; to sign it, give "
            "the key (signing_key_file, --sign)",
            manifest.name, manifest.signature.key_id, source.url,
        )  # fmt: skip
    return copied


async def check_copy(
    manifest: Manifest,
    backend: StorageBackend,
    *,
    name: str | None = None,
    codecs: Sequence[str] | None = None,
    only_experts: bool = False,
    key: EncryptionKey | None = None,
) -> None:
    """Check, without writing anything, that `copy_model` may write a model; same arguments and errors."""
    await _expect_base(manifest, backend)
    codecs = codecs or _default_codecs(manifest)
    await asyncio.to_thread(_plan, manifest, codecs, key, only_experts=only_experts)
    await check_target(backend, check_model_name(name or manifest.name), codecs)


async def _expect_base(manifest: Manifest, backend: StorageBackend) -> None:
    """Check that an adapter's base is already in the target store.

    Raises:
        ConfigurationError: the base is missing.
        ManifestError: the model with the base's name has other weights.
    """
    if manifest.base is None:
        return
    store = Store(backend)
    try:
        base = await store.facts(manifest.base.name)
    except (UnknownModelError, NotAStoreError) as exc:
        raise ConfigurationError(
            f"{manifest.name} is an adapter over {manifest.base.name}, which {store.url} does not have; copy that "
            "first, under the same name"
        ) from exc
    expect_base(manifest, base, where=store.url)


def _default_codecs(manifest: Manifest) -> Sequence[str]:
    if manifest.key_id:
        return stored_codecs(manifest)
    return DEFAULT_CODECS if has_exact_forms(manifest) else stored_packed_codecs(manifest)


def _plan(
    manifest: Manifest, codecs: Sequence[str], key: EncryptionKey | None, *, only_experts: bool
) -> tuple[PlannedChunk, ...]:
    """Plan the chunks to write; requires torch if a packed form has to be made."""
    if manifest.key_id:
        return _plan_encrypted(manifest, codecs, key)
    if manifest.base is not None and key is not None:
        raise ConfigurationError(
            f"{manifest.name} is an adapter, and adapters are not encrypted; copy it without a key (--encrypt)"
        )
    new = set(codecs).intersection(PACKED_CODECS).difference(stored_codecs(manifest))
    matrices = find_matrices(manifest) if new else frozenset[str]()
    planned = []
    for chunk in manifest.chunks:
        packed = tuple(form for form in chunk.forms if form.is_packed)
        missing = set(codecs) - {form.codec for form in packed}
        if missing and not exact_forms(chunk):
            raise ConfigurationError(
                f"{manifest.name} is stored as {', '.join(form.codec for form in packed)} alone, of which "
                f"{min(missing)} cannot be made; leave that out, or chunk its checkpoint"
            )
        tensors = tuple(PlannedTensor(info, None, info.name in matrices) for info in chunk.tensors)
        planned.append(PlannedChunk(chunk.name, chunk.kind, tensors, chunk.id, packed))
    return with_exact_rest(planned, manifest.name) if only_experts and new else tuple(planned)


def _plan_encrypted(manifest: Manifest, codecs: Sequence[str], key: EncryptionKey | None) -> tuple[PlannedChunk, ...]:
    """Plan the chunks of an encrypted model, each with the forms to copy."""
    if key and key.id != manifest.key_id:
        raise ConfigurationError(
            f"{manifest.name} is encrypted with key {manifest.key_id} already, and a copy stays as it is; the "
            f"{key.where} holds key {key.id}; for that one, chunk its checkpoint again"
        )
    if missing := set(codecs).difference(stored_codecs(manifest)):
        raise ConfigurationError(
            f"{manifest.name} is encrypted and copied as it is, as {', '.join(stored_codecs(manifest))}; "
            f"{min(missing)} cannot be made of it; leave that out, or chunk its checkpoint"
        )
    planned = []
    for chunk in manifest.chunks:
        kept = tuple(form for form in chunk.forms if form.codec in codecs) or exact_forms(chunk)
        if not kept:
            raise ConfigurationError(
                f"chunk {chunk.name} of {manifest.name} is stored as "
                f"{', '.join(form.codec for form in chunk.forms)} alone; name that too"
            )
        tensors = tuple(PlannedTensor(info, None) for info in chunk.tensors)
        planned.append(PlannedChunk(chunk.name, chunk.kind, tensors, chunk.id, kept))
    return tuple(planned)


def _copied(
    manifest: Manifest,
    name: str,
    where: str,
    chunks: Sequence[Chunk],
    files: Sequence[ModelFile],
    *,
    key: EncryptionKey | None,
) -> Manifest:
    for ours, theirs in zip(chunks, manifest.chunks, strict=True):
        is_known = all(form.is_known for form in theirs.forms)
        if is_known and ours.id != (key.hide(theirs.id) if key else theirs.id):
            raise IntegrityError(
                f"chunk {theirs.name} from {where} has a payload with BLAKE3 {ours.id[:16]}…, its manifest promises "
                f"{theirs.id[:16]}…; chunk the model again"
            )
    copied = replace(manifest, name=name, chunks=tuple(chunks), files=tuple(files), origin=None)
    # An encrypted copy of a plain model has another identity, known only once the manifest has the key's id.
    return replace(copied, signature=None) if key else copied.with_signature_of(manifest)


class SourcePayloads:
    """Reads payloads from a chunk source; besides the destination, one piece of coded bytes is in memory."""

    def __init__(self, source: ChunkSource, manifest: Manifest, loop: asyncio.AbstractEventLoop) -> None:
        """`loop` is the event loop in which the source runs."""
        self._source = source
        self._manifest = manifest
        self._loop = loop
        self._fetches: set[Future[None]] = set()
        self._is_stopped = False

    def stop(self) -> None:
        """Stop fetching; pending reads fail."""
        self._is_stopped = True
        for fetch in list(self._fetches):
            fetch.cancel()

    def read_into(self, chunk: PlannedChunk, start: int, destination: memoryview) -> None:
        """Fill `destination` with a chunk's payload from byte `start`; both ends must be block boundaries.

        Raises:
            IntegrityError: bytes do not match the manifest.
            StorageError, WireError: they could not be read, or reading was stopped.
        """
        stored = self._manifest.by_name[chunk.name]
        form = choose_form(stored)
        assert not form.is_packed, "there is an exact one"
        if form.codec == "none":
            self._fetch(stored, form, start, destination)
        else:
            self._decode(stored, form, start, destination)

    def read_form_into(self, chunk: PlannedChunk, form: Form, start: int, destination: memoryview) -> None:
        """Fill `destination` with bytes of a form from byte `start`; both ends must be block boundaries.

        Raises:
            IntegrityError: bytes do not match the manifest.
            StorageError, WireError: they could not be read.
        """
        self._fetch(self._manifest.by_name[chunk.name], form, start, destination)

    def _fetch(self, chunk: Chunk, form: Form, start: int, destination: memoryview) -> None:
        read = Read(chunk, form, start, start + len(destination), destination)
        fetch = asyncio.run_coroutine_threadsafe(self._source.fetch(self._manifest, [read]), self._loop)
        self._fetches.add(fetch)
        try:
            if self._is_stopped:
                fetch.cancel()
            fetch.result()
        except CancelledError:
            raise StorageError(f"copying chunk {chunk.name} was stopped") from None
        finally:
            self._fetches.discard(fetch)

    def _decode(self, chunk: Chunk, form: Form, start: int, destination: memoryview) -> None:
        first, stop = start // FRAME_BYTES, -(-(start + len(destination)) // FRAME_BYTES)
        place = CodedRange(form.frames, first, stop)
        coded = memoryview(bytearray(place.high - place.low))
        self._fetch(chunk, form, place.low, coded)
        try:
            place.decode(coded, destination)
        except IntegrityError as exc:
            raise IntegrityError(f"chunk {chunk.name} from {self._source.url}: {exc}; chunk the model again") from exc
