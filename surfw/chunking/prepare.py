"""Preparing a checkpoint: the class it is of, what each chunk will hold, and where those bytes come from.

Mistakes in the arguments, and damage to the files of the checkpoint, are reported before torch and transformers are
loaded: the functions that need them import them.
"""

import json
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from blake3 import blake3

from surfw.checkpoint import Checkpoint, SourceTensor, open_checkpoint
from surfw.chunking.plan import ChunkPlan, PlannedChunk, PlannedTensor, UnitFacts, plan_chunks
from surfw.chunking.remote import open_remote_checkpoint
from surfw.config import (
    DEFAULT_SILENCE_SECONDS,
    PIECE_BYTES,
    OnMissing,
    check_dtype,
    check_on_missing,
    count,
    display_url,
)
from surfw.errors import CheckpointError, ConfigurationError, UninitializedWeightsWarning, UnsupportedModelError
from surfw.manifest import Chunk, Form, Manifest, ModelFile, Origin, TensorInfo, check_model_name, payload_digest
from surfw.skeleton.sanitise import (
    refuse_kernels,
    sanitise,
    tag_floats,
)
from surfw.storage.backends import read_address
from surfw.storage.origins import is_local_url

if TYPE_CHECKING:
    from surfw.skeleton.loading import Loading, SourceFacts

logger = logging.getLogger("surfw.chunking")


@dataclass(frozen=True)
class PreparedModel:
    """A checkpoint whose chunks are planned, before a byte is written. Use it as a context manager, or `close()` it.

    Attributes:
        name: the model's name in the store.
        checkpoint: the source.
        class_name: the class that will be built.
        dtype: the dtype it will be built with.
        config: its configuration, without requests for foreign code.
        generation_config: its settings for `generate()`, likewise; None if it has none.
        plan: what will be written.
        loading: where it comes from.
        facts: the source tensors.
    """

    name: str
    checkpoint: Checkpoint
    class_name: str
    dtype: str
    config: Mapping[str, Any]
    generation_config: Mapping[str, Any] | None
    plan: ChunkPlan
    loading: "Loading"
    facts: "SourceFacts"

    @property
    def key(self) -> str:
        """Identifies the plan and its source; work with the same key can be resumed."""
        chunks = [
            (c.name, [(t.info.name, t.info.dtype, t.info.shape, t.copy_of) for t in c.tensors])
            for c in self.plan.chunks
        ]
        config = json.dumps(self.config, sort_keys=True)
        return payload_digest(repr((self.name, config, chunks, self.checkpoint.fingerprint())).encode())[:32]

    def manifest(
        self, chunks: Sequence[Chunk], files: Sequence[ModelFile] = (), origin: Origin | None = None
    ) -> Manifest:
        """The model's manifest, with the places where chunks and tokenizer files lie; `origin` if nothing is copied."""
        return Manifest(
            name=self.name,
            class_name=self.class_name,
            dtype=self.dtype,
            config=self.config,
            generation_config=self.generation_config,
            files=tuple(files),
            ties=self.loading.ties,
            chunks=tuple(chunks),
            order=self.plan.order,
            origin=origin,
        )

    def close(self) -> None:
        """Close the checkpoint."""
        self.checkpoint.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


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
    on_step: Callable[[str], object] = lambda _: None,
) -> PreparedModel:
    """Open a checkpoint and plan its chunks.

    Args:
        model: a hub id (`org/name`), a local directory, or a storage URL under which a checkpoint lies.
        name: the model's name in the store; default: the hub id in full, or the directory's name.
        revision: of the hub repository.
        dtype: convert the weights to this dtype, as `from_pretrained(dtype=…)` would; default: `auto`.
        model_class: default: the one that the configuration names in its `architectures`, else the base model of its
            type.
        on_missing: with `uninitialized`, a model that lacks weights runs only where this is asked for again.
        show_progress: let the hub library draw its bars on stderr, in a terminal.
        storage_options: for a storage URL in `model`.
        silence_timeout: seconds without progress after which a remote storage is given up.
        on_step: called with what goes on, in words, whenever that changes.

    Raises:
        CheckpointError: the checkpoint is damaged, incomplete, or missing.
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
    address = read_address(model)
    if is_local_url(address):
        checkpoint = open_checkpoint(address.removeprefix("file://"), revision=revision, show_progress=show_progress)
    elif revision is None:
        checkpoint = open_remote_checkpoint(address, storage_options, silence_timeout=silence_timeout)
    else:
        raise ConfigurationError(
            f"revision {revision!r} is for hub models, but {display_url(address)} is a storage URL"
        )
    with ExitStack() as opened:
        opened.enter_context(checkpoint)
        name = check_model_name(name or checkpoint.name)
        prepared = _plan_model(checkpoint, name, dtype, model_class, on_missing, where=model, on_step=on_step)
        opened.pop_all()
    return prepared


def _plan_model(
    checkpoint: Checkpoint,
    name: str,
    dtype: str | None,
    model_class: Any,
    on_missing: OnMissing,
    *,
    where: str,
    on_step: Callable[[str], object],
) -> PreparedModel:
    """Decide what of a checkpoint goes where."""
    refuse_kernels(checkpoint.config, where=where)
    clean, generation, code, unfit = sanitise(checkpoint.config, checkpoint.generation_config, where=where)
    for lines, why in ((code, "surfw runs no code that comes with a model"), (unfit, "no file may choose it")):
        for line in lines:
            logger.warning("%s: left out of the configuration, because %s: %s", name, why, line)
    on_step("importing torch and transformers")
    from surfw.skeleton.build import build_skeleton, read_config, resolve_class
    from surfw.skeleton.dtypes import automatic_dtype, dtype_name, parse_dtype, safetensors_dtype
    from surfw.skeleton.experts import experts_in
    from surfw.skeleton.loading import plan_loading
    from surfw.skeleton.units import matrices_of

    on_step(f"planning the chunks of {name}")
    config = read_config(clean, where=where, model_class=model_class)
    architectures = getattr(config, "architectures", None) or [None]
    cls = model_class or resolve_class(architectures[0], config, where=where)
    facts = {tensor.name: (tensor.dtype, tensor.shape) for tensor in checkpoint.tensors.values()}
    stored = (tensor.dtype for tensor in checkpoint.tensors.values())
    built = parse_dtype(dtype) if dtype is not None else automatic_dtype(config.dtype, stored, where=where)
    skeleton = build_skeleton(config, cls, built, tensor_count=len(facts), where=where)
    loading = plan_loading(skeleton, facts, partial(_equal_tensors, checkpoint), where=where)
    _report_missing(loading.missing, cls.__name__, on_missing, where)
    if loading.unused:
        logger.warning(
            "%s: %s has no place for %d tensors of the checkpoint, such as %s; they are left out, as transformers does",
            name, cls.__name__, len(loading.unused), loading.unused[0],
        )  # fmt: skip
    tensors, matrices = {}, matrices_of(skeleton.units, loading.ties)
    for target, recipe in loading.recipes.items():
        target_dtype, shape = recipe.targets[target]
        info = TensorInfo(target, safetensors_dtype(target_dtype), shape, 0)
        as_it_is = recipe.converter is None and facts[recipe.sources[0]][0] == info.dtype
        copy_of = recipe.sources[0] if as_it_is else None
        tensors[target] = PlannedTensor(info, copy_of, target in matrices, recipe.start)
    units = [
        UnitFacts(
            unit.path, unit.kind, tuple(slot.name for slot in unit.slots), experts_in(skeleton.experts.values(), unit)
        )
        for unit in skeleton.units
    ]
    plan = plan_chunks(units, tensors, loading.ties)
    if not plan.chunks:
        raise UnsupportedModelError(
            f"{where} has no tensor that {cls.__name__} has a place for; check its architectures"
        )
    clean, generation = tag_floats(clean), tag_floats(generation)
    return PreparedModel(name, checkpoint, cls.__name__, dtype_name(built), clean, generation, plan, loading, facts)


def _report_missing(missing: Sequence[str], cls: str, on_missing: OnMissing, where: str) -> None:
    if not missing:
        return
    seen = f"{where} lacks {count(len(missing), 'weight')} of {cls}, such as {missing[0]}"
    if on_missing == "error":
        raise CheckpointError(
            f"{seen}; surfw never makes weights up. Check the architectures in config.json, save the model again with "
            "save_pretrained, or chunk it without them: --on-missing uninitialized (on_missing='uninitialized')"
        )
    warnings.warn(f"{seen}; it is chunked without them", UninitializedWeightsWarning, stacklevel=2)


def find_matrices(manifest: Manifest) -> frozenset[str]:
    """The tensors of a chunked model that may be quantised: see `PlannedTensor.is_matrix`. This takes torch.

    Raises:
        UnsupportedModelError: its class or configuration cannot be used here.
    """
    from surfw.skeleton.build import build_skeleton, read_config, resolve_class
    from surfw.skeleton.dtypes import parse_dtype
    from surfw.skeleton.units import matrices_of

    clean, *_ = sanitise(manifest.config, manifest.generation_config, where=manifest.name)
    config = read_config(clean, where=manifest.name)
    cls = resolve_class(manifest.class_name, config, where=manifest.name)
    tensor_count = len(manifest.tensors) + len(manifest.ties)
    dtype = parse_dtype(manifest.dtype)
    skeleton = build_skeleton(config, cls, dtype, tensor_count=tensor_count, where=manifest.name)
    return matrices_of(skeleton.units, manifest.ties)


class PayloadReader:
    """The payloads of chunks: source bytes as they are, or what transformers converts them to."""

    def __init__(self, prepared: PreparedModel) -> None:
        self._prepared = prepared
        self._checkpoint = prepared.checkpoint
        self._converted: dict[str, memoryview] = {}

    def read_into(self, chunk: PlannedChunk, start: int, destination: memoryview) -> None:
        """Fill `destination` with the chunk's payload from byte `start` on; called with rising `start`."""
        stop = start + len(destination)
        for tensor in chunk.tensors:
            begin, end = tensor.info.offset, tensor.info.offset + tensor.info.nbytes
            low, high = max(start, begin), min(stop, end)
            if low >= high:
                continue
            into = destination[low - start : high - start]
            if tensor.copy_of is not None:
                first = tensor.copy_from - begin
                self._checkpoint.read_into(tensor.copy_of, into, first + low, first + high)
            else:
                into[:] = self._convert(tensor.info.name)[low - begin : high - begin]
                if high == end:
                    self._converted.pop(tensor.info.name, None)

    def read_form_into(self, chunk: PlannedChunk, form: Form, start: int, destination: memoryview) -> None:
        """A checkpoint has no forms to copy."""
        raise NotImplementedError

    def _convert(self, name: str) -> memoryview:
        if name not in self._converted:
            from surfw.skeleton.loading import convert_bytes

            recipe = self._prepared.loading.recipes[name]
            self._converted |= convert_bytes(recipe, self._read_source, self._prepared.facts)
        return self._converted[name]

    def _read_source(self, name: str, destination: memoryview, start: int) -> None:
        self._checkpoint.read_into(name, destination, start, start + len(destination))


def _equal_tensors(checkpoint: Checkpoint, one: str, other: str) -> bool:
    a, b = checkpoint.tensors[one], checkpoint.tensors[other]
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return _digest(checkpoint, a) == _digest(checkpoint, b)


def _digest(checkpoint: Checkpoint, tensor: SourceTensor) -> bytes:
    whole, buffer = blake3(), memoryview(bytearray(min(tensor.nbytes, PIECE_BYTES)))
    for start in range(0, tensor.nbytes, PIECE_BYTES):
        piece = buffer[: tensor.nbytes - start]
        checkpoint.read_into(tensor.name, piece, start, start + len(piece))
        whole.update(piece)
    return whole.digest()
