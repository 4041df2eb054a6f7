"""Chunk a LoRA adapter over its base, which must already be in the store.

The adapter becomes a separate model in the store, whose manifest names its base. Each of its chunks has the name of a
base chunk and holds the adapter's tensors for it.
"""

import asyncio
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from surfw.checkpoint import Checkpoint
from surfw.checkpoint.adapter import is_saved, open_adapter, scaling_of, strip_prefix
from surfw.chunking.copy import SourcePayloads
from surfw.chunking.plan import PlannedChunk, PlannedTensor, UnitFacts, plan_chunks
from surfw.chunking.prepare import PreparedModel, refuse_revision_of_url, skeleton_of
from surfw.chunking.remote import open_remote_adapter
from surfw.config import BLOCK_BYTES, PIECE_BYTES, quote
from surfw.errors import CheckpointError, ConfigurationError, NotAStoreError, UnsupportedModelError
from surfw.manifest import Base, Manifest, TensorInfo, check_model_name
from surfw.storage import StorageBackend, Store
from surfw.storage.backends import read_address
from surfw.storage.origins import is_local_url
from surfw.storage.store_source import StorageSource

if TYPE_CHECKING:
    from surfw.skeleton.build import Skeleton


_BASE_LAYER = ".base_layer."
"""What peft inserts into the names of base weights that it saves."""


async def read_base(backend: StorageBackend, name: str) -> Manifest:
    """Read the manifest of the base model for an adapter.

    Args:
        backend: the storage of the store.
        name: the model's full name or a unique last part of it.

    Raises:
        NotAStoreError, UnknownModelError: there is no such store or model.
        ConfigurationError: the model is an adapter itself, or its chunks have no digests.
    """
    store = Store(backend)
    if not await store.check_place():
        raise NotAStoreError(
            f"{store.url} is no store yet, so it has no base {quote(name)}; chunk the base first, with surfw chunk"
        )
    base = await store.facts(await store.resolve(name))
    if base.base is not None:
        raise ConfigurationError(
            f"{base.name} is an adapter itself, over {base.base.name}; name that one (base, --base)"
        )
    if not base.is_known:
        raise ConfigurationError(f"{base.name} has chunks without digests; chunk it again, and then the adapter")
    return base


def prepare_adapter(
    model: str,
    base: Manifest,
    backend: StorageBackend,
    *,
    name: str | None = None,
    revision: str | None = None,
    show_progress: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    on_step: Callable[[str], object] = lambda _: None,
) -> PreparedModel:
    """Open an adapter and plan its chunks; `write_model` writes them.

    Args:
        model: a hub id, a local directory, or the storage URL of an adapter.
        base: the manifest of its base.
        backend: the storage of the store that has the base.
        name: its name in the store; default: the hub id in full, or the directory's name.
        revision: the revision of the hub repository.
        show_progress: let the hub library draw progress bars on stderr, if that is a terminal.
        storage_options: options for the storage, if `model` is a storage URL.
        on_step: called with a description of each step as it starts.

    Raises:
        CheckpointError: it is damaged, incomplete, or missing.
        UnsupportedModelError: surfw does not support this kind of adapter, or it does not fit the base.
        ConfigurationError: it would have the same name as its base, or `revision` is given but `model` is no hub id.
    """
    if name is not None:
        check_model_name(name)
    address = read_address(model)
    if is_local_url(address):
        checkpoint = open_adapter(address.removeprefix("file://"), revision=revision, show_progress=show_progress)
    else:
        refuse_revision_of_url(revision, address)
        checkpoint = open_remote_adapter(address, storage_options)
    with ExitStack() as opened:
        opened.enter_context(checkpoint)
        name = check_model_name(name or checkpoint.name)
        if name == base.name:
            raise ConfigurationError(
                f"the adapter would take the name of its base, {name}; choose another (name, --name)"
            )
        on_step("importing torch and transformers")
        skeleton = skeleton_of(base)
        copies = _copies_of_base(checkpoint, skeleton, base, backend)
        prepared = _plan_adapter(checkpoint, name, skeleton, base, copies)
        opened.pop_all()
    return prepared


def _copies_of_base(
    checkpoint: Checkpoint, skeleton: "Skeleton", base: Manifest, backend: StorageBackend
) -> frozenset[str]:
    """Return the tensors of an adapter that are copies of base weights, as peft saves for changed embeddings.

    Raises:
        UnsupportedModelError: they differ from the base's weights: the base was changed.
    """
    found: dict[str, str] = {}
    for outer, inner in strip_prefix(list(checkpoint.tensors), where=checkpoint.url).items():
        slot = inner.replace(_BASE_LAYER, ".")
        if slot in skeleton.slots and (_BASE_LAYER in inner or not is_saved(checkpoint.config, inner)):
            found[outer] = base.ties.get(slot, slot)
    if not found:
        return frozenset()
    expected = asyncio.run(_digest_tensors(backend, base, set(found.values())))
    for outer, name in found.items():
        ours, theirs = checkpoint.tensors[outer], base.tensors[name]
        same = (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        if not same or checkpoint.digest(outer) != expected[name]:
            raise UnsupportedModelError(
                f"{checkpoint.url} has {quote(outer)} of {ours.dtype} {list(ours.shape)}, and its base {base.name} "
                f"has other values there ({theirs.dtype} {list(theirs.shape)}): the base was resized or trained with "
                "it; merge them with peft (merge_and_unload), and chunk the result"
            )
    return frozenset(found)


async def _digest_tensors(backend: StorageBackend, manifest: Manifest, names: Collection[str]) -> dict[str, bytes]:
    """Return the BLAKE3 of tensors of a stored model; whole blocks are read and verified."""
    source = StorageSource(backend, owned=False)
    try:
        mounted = await source.manifest(manifest.name)
        payloads = SourcePayloads(source, mounted, asyncio.get_running_loop())
        return {name: await asyncio.to_thread(_digest_tensor, payloads, mounted, name) for name in names}
    finally:
        await source.close()


def _digest_tensor(payloads: SourcePayloads, manifest: Manifest, name: str) -> bytes:
    info, chunk = manifest.tensors[name], manifest.home[name]
    planned = PlannedChunk(chunk.name, chunk.kind, tuple(PlannedTensor(one, None) for one in chunk.tensors))
    stop = info.offset + info.nbytes
    whole, buffer = blake3(), memoryview(bytearray(min(chunk.payload_bytes, PIECE_BYTES)))
    for start in range(info.offset // BLOCK_BYTES * BLOCK_BYTES, stop, PIECE_BYTES):
        piece = buffer[: chunk.payload_bytes - start]
        payloads.read_into(planned, start, piece)
        whole.update(piece[max(0, info.offset - start) : stop - start])
    return whole.digest()


def _plan_adapter(
    checkpoint: Checkpoint, name: str, skeleton: "Skeleton", base: Manifest, copies: Collection[str]
) -> PreparedModel:
    from surfw.skeleton.dtypes import dtype_name, torch_dtype
    from surfw.skeleton.loading import Loading
    from surfw.skeleton.lora import find_lora

    (shard,), settings = checkpoint.shards, checkpoint.config
    where = f"{checkpoint.url}/{shard.path.name}"
    names = strip_prefix(list(checkpoint.tensors), where=where)
    sources = {inner: checkpoint.tensors[outer] for outer, inner in names.items() if outer not in copies}
    if not sources:
        raise UnsupportedModelError(f"{where} has no tensors; expected those of an adapter")
    saved = [path for path, _ in skeleton.model.named_modules() if is_saved(settings, path)]  # the outermost first
    lora = find_lora(
        skeleton,
        {inner: source.shape for inner, source in sources.items()},
        partial(_scaling, settings, where),
        saved,
        where=where,
    )
    scaling = {part.path: part.scaling for part in lora.parts}
    homes = {f"{part.path}.weight": part.tensors for part in lora.parts}
    homes |= {next(iter(part.tensors)): part.tensors for part in lora.saved}
    units = [
        UnitFacts(unit.path, unit.kind, tuple(one for slot in unit.slots for one in homes.get(slot.name, ())))
        for unit in skeleton.units
    ]
    tensors = {
        inner: PlannedTensor(TensorInfo(inner, source.dtype, source.shape, 0), source.name)
        for inner, source in sources.items()
    }
    plan = plan_chunks(units, tensors, {})
    if lost := set(tensors) - {tensor.info.name for chunk in plan.chunks for tensor in chunk.tensors}:
        raise UnsupportedModelError(f"{where}: {quote(min(lost))} changes a weight that {base.name} does not have")
    facts = {tensor.name: (tensor.dtype, tensor.shape) for tensor in checkpoint.tensors.values()}
    config = {"peft_type": "LORA", "scaling": scaling, "saved": [part.path for part in lora.saved]}
    dtype = dtype_name(torch_dtype(next(iter(sources.values())).dtype))
    return PreparedModel(
        name, checkpoint, base.class_name, dtype, config, None, plan, Loading({}, {}, (), ()), facts,
        Base(base.name, base.weights_key),
    )  # fmt: skip


def _scaling(settings: dict[str, object], where: str, module: str, rank: int) -> float:
    expected, scaling = scaling_of(settings, module)
    if rank != expected:
        raise CheckpointError(
            f"{where}: the adapter of {module} has rank {rank}, but its settings say {expected}; they do not belong "
            "together, download both again"
        )
    return scaling
