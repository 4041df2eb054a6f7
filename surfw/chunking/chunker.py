"""A checkpoint on its way into a store, from its name to the published manifest.

What is wrong with the arguments, or with the checkpoint's files, is said before torch and transformers are imported.
"""

import asyncio
from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from surfw.checkpoint import Checkpoint, open_checkpoint
from surfw.checkpoint.layout import read_small
from surfw.chunking.remote import open_remote_checkpoint
from surfw.chunking.writer import ChunkWriter, Progress
from surfw.config import DEFAULT_SILENCE_SECONDS, FILE_BYTES, OnMissing, check_dtype, check_on_missing, display_url
from surfw.errors import ConfigurationError, StorageError
from surfw.manifest import Manifest, ModelFile, check_model_name, payload_digest
from surfw.skeleton.sanitise import sanitise_config, tag_floats
from surfw.storage.backends import read_address
from surfw.storage.base import StorageBackend
from surfw.storage.origins import is_local_url
from surfw.storage.store import Store, blob_key

if TYPE_CHECKING:
    from surfw.chunking.prepared import PreparedModel


def prepare_model(
    model: str,
    *,
    name: str | None = None,
    revision: str | None = None,
    dtype: str | None = None,
    model_class: Any = None,
    on_missing: OnMissing = "error",
    show_progress: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    silence_timeout: float = DEFAULT_SILENCE_SECONDS,
) -> "PreparedModel":
    """Open a checkpoint and plan its chunks.

    Args:
        model: a hub id (`org/name`), a local directory, or a storage URL under which a checkpoint lies.
        name: the model's name in the store; default: the hub id in full, or the directory's name.
        revision: of the hub repository.
        dtype: convert the weights to this dtype, as `from_pretrained(dtype=…)` would; default: `auto`.
        model_class: the caller's own subclass of transformers' `PreTrainedModel`; default: the one that the
            configuration names in its `architectures`, else the base model of its type.
        on_missing: `error`, or `uninitialized`: chunk a checkpoint that lacks weights of its class, with a warning.
            Such a model runs only where this is asked for again.
        show_progress: let the hub library draw its bars on stderr, in a terminal.
        storage_options: for a storage URL.
        silence_timeout: seconds without progress after which that is given up.

    Raises:
        CheckpointError: the checkpoint is damaged, incomplete, or not there.
        UnsupportedModelError: surfw cannot run it.
    """
    if dtype is not None:
        check_dtype(dtype)  # refused before anything is fetched, as is the name
    if name is not None:
        check_model_name(name)
    check_on_missing(on_missing)
    if model_class is not None:
        from surfw.skeleton.build import check_model_class

        check_model_class(model_class)
    with ExitStack() as opened:
        opening = _open(model, revision, storage_options, silence_timeout, show_progress=show_progress)
        checkpoint = opened.enter_context(opening)
        checked = check_model_name(name or checkpoint.name)
        from surfw.chunking.prepared import plan_model

        prepared = plan_model(checkpoint, checked, dtype, model_class, on_missing, where=model)
        opened.pop_all()
    return prepared


def _open(
    model: str,
    revision: str | None,
    options: Mapping[str, Any] | None,
    silence_timeout: float,
    *,
    show_progress: bool,
) -> Checkpoint:
    model = read_address(model)
    if is_local_url(model):
        return open_checkpoint(model.removeprefix("file://"), revision=revision, show_progress=show_progress)
    if revision is not None:
        raise ConfigurationError(f"revision {revision!r} is for hub models, but {display_url(model)} is a storage URL")
    return open_remote_checkpoint(model, options, silence_timeout=silence_timeout)


async def write_model(
    prepared: "PreparedModel", backend: StorageBackend, *, progress: Progress = lambda *_: None
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


async def _write(prepared: "PreparedModel", store: Store, writer: ChunkWriter) -> Manifest:
    chunks = await writer.write(prepared.plan)
    generation = prepared.checkpoint.generation_config
    files = sorted(prepared.checkpoint.files)
    manifest = Manifest(
        name=prepared.name,
        class_name=prepared.class_name,
        dtype=prepared.dtype,
        config=prepared.config,
        generation_config=tag_floats(sanitise_config(generation)[0]) if generation is not None else None,
        files=tuple([await _write_file(prepared, writer, path) for path in files]),
        ties=prepared.loading.ties,
        chunks=tuple(chunks),
        order=prepared.plan.order,
    )
    await writer.publish(store, manifest)
    return manifest


async def _write_file(prepared: "PreparedModel", writer: ChunkWriter, path: str) -> ModelFile:
    file = prepared.checkpoint.files[path]
    data = await asyncio.to_thread(read_small, file, FILE_BYTES)
    digest = payload_digest(data)
    key = blob_key(digest, file.suffix or ".bin")
    await writer.lease.hold([key])
    await writer.backend.save(key, data)
    return ModelFile(path, len(data), digest, key)
