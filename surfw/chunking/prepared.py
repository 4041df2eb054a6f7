"""A checkpoint that was understood: the class it is of, what each chunk will hold, and where those bytes come from.

Imports torch and transformers; `chunker` asks for it once everything that can be refused without them was looked at.
"""

import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Self

from blake3 import blake3

from surfw.checkpoint import Checkpoint
from surfw.chunking.plan import ChunkPlan, PlannedChunk, PlannedTensor, UnitFacts, plan_chunks
from surfw.chunking.writer import TensorBytes
from surfw.config import MIB, OnMissing, count
from surfw.errors import CheckpointError, UninitializedWeightsWarning, UnsupportedModelError
from surfw.manifest import TensorInfo, payload_digest
from surfw.skeleton.build import build_skeleton, read_config, resolve_class
from surfw.skeleton.dtypes import automatic_dtype, dtype_name, parse_dtype, safetensors_dtype
from surfw.skeleton.loading import Loading, SourceFacts, convert_bytes, plan_loading
from surfw.skeleton.sanitise import (
    refuse_absurd_sizes,
    refuse_endless_numbers,
    refuse_kernels,
    sanitise_config,
    sanitise_outputs,
    tag_floats,
)

logger = logging.getLogger("surfw.chunking")


@dataclass(frozen=True)
class PreparedModel:
    """A checkpoint that was understood, before a byte of it is written. Use it as a context manager, or `close()` it.

    Attributes:
        name: the model's name in the store.
        checkpoint: the source.
        class_name: the class that will be built.
        dtype: the dtype it will be built with.
        config: its configuration, without requests for foreign code.
        plan: what will be written.
        loading: where it comes from.
        facts: the source tensors.
    """

    name: str
    checkpoint: Checkpoint
    class_name: str
    dtype: str
    config: Mapping[str, Any]
    plan: ChunkPlan
    loading: Loading
    facts: SourceFacts

    @property
    def key(self) -> str:
        """Identifies the plan and its source: equal for work that can be resumed."""
        chunks = [
            (c.name, [(t.info.name, t.info.dtype, t.info.shape, t.copy_of) for t in c.tensors])
            for c in self.plan.chunks
        ]
        config = json.dumps(self.config, sort_keys=True)
        return payload_digest(repr((self.name, config, chunks, self.checkpoint.fingerprint())).encode())[:32]

    def payloads(self) -> TensorBytes:
        """Gives a writer the chunks' bytes."""
        return _PayloadReader(self)

    def close(self) -> None:
        """Close the checkpoint."""
        self.checkpoint.close()

    def __enter__(self) -> Self:
        """Enter the context."""
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        """Close."""
        self.close()


def plan_model(
    checkpoint: Checkpoint, name: str, dtype: str | None, model_class: Any, on_missing: OnMissing, *, where: str
) -> PreparedModel:
    """What of a checkpoint goes where; arguments as of `prepare_model`, `where` names it in errors.

    Raises:
        CheckpointError: it lacks weights.
        UnsupportedModelError: surfw cannot run it.
    """
    refuse_kernels(checkpoint.config, where=where)
    refuse_absurd_sizes(checkpoint.config, where=where)
    refuse_endless_numbers(checkpoint.config, where=where)
    refuse_endless_numbers(checkpoint.generation_config or {}, where=where)
    clean, dropped = sanitise_config(checkpoint.config)
    for line in dropped:
        logger.warning(
            "%s: left out of the configuration, because surfw runs no code that comes with a model: %s", name, line
        )
    clean, unfit = sanitise_outputs(clean, where=where)
    for line in unfit:
        logger.warning("%s: left out of the configuration, because no file may choose it: %s", name, line)
    clean = tag_floats(clean)
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
    tensors = {}
    for target, recipe in loading.recipes.items():
        target_dtype, shape = recipe.targets[target]
        info = TensorInfo(target, safetensors_dtype(target_dtype), shape, 0)
        as_it_is = recipe.converter is None and facts[recipe.sources[0]][0] == info.dtype
        tensors[target] = PlannedTensor(info, recipe.sources[0] if as_it_is else None)
    units = [UnitFacts(unit.path, unit.kind, tuple(slot.name for slot in unit.slots)) for unit in skeleton.units]
    plan = plan_chunks(units, tensors, loading.ties)
    if not plan.chunks:
        raise UnsupportedModelError(
            f"{where} has no tensor that {cls.__name__} has a place for; check its architectures"
        )
    return PreparedModel(name, checkpoint, cls.__name__, dtype_name(built), clean, plan, loading, facts)


def _report_missing(missing: Sequence[str], cls: str, on_missing: OnMissing, where: str) -> None:
    if missing and on_missing == "error":
        raise CheckpointError(
            f"{where} lacks {count(len(missing), 'weight')} of {cls}, such as {missing[0]}; surfw never makes weights "
            "up. Check the architectures in config.json, save the model again with save_pretrained, or chunk it "
            "without them: --on-missing uninitialized (on_missing='uninitialized')"
        )
    if missing:
        warnings.warn(
            f"{where} lacks {count(len(missing), 'weight')} of {cls}, such as {missing[0]}; it is chunked without them",
            UninitializedWeightsWarning,
            stacklevel=2,
        )


class _PayloadReader:
    """Gives the writer a chunk's payload: source bytes as they are, or what transformers converts them to."""

    def __init__(self, prepared: PreparedModel) -> None:
        self.prepared = prepared
        self.checkpoint = prepared.checkpoint
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
                self.checkpoint.read_into(tensor.copy_of, into, low - begin, high - begin)
            else:
                into[:] = self._convert(tensor.info.name)[low - begin : high - begin]
                if high == end:
                    self._converted.pop(tensor.info.name, None)

    def _convert(self, name: str) -> memoryview:
        if name not in self._converted:
            recipe = self.prepared.loading.recipes[name]
            self._converted |= convert_bytes(recipe, self._read_source, self.prepared.facts)
        return self._converted[name]

    def _read_source(self, name: str, destination: memoryview) -> None:
        self.checkpoint.read_into(name, destination, 0, len(destination))


def _equal_tensors(checkpoint: Checkpoint, one: str, other: str) -> bool:
    a, b = checkpoint.tensors[one], checkpoint.tensors[other]
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return _digest_tensor(checkpoint, one, a.nbytes) == _digest_tensor(checkpoint, other, b.nbytes)


def _digest_tensor(checkpoint: Checkpoint, name: str, size: int) -> bytes:
    whole, buffer = blake3(), memoryview(bytearray(min(size, 8 * MIB)))
    for start in range(0, size, 8 * MIB):
        piece = buffer[: min(8 * MIB, size - start)]
        checkpoint.read_into(name, piece, start, start + len(piece))
        whole.update(piece)
    return whole.digest()
