"""Prepare a checkpoint: resolve its class, plan its chunks, and map each chunk to its source bytes.

Wrong arguments and damaged checkpoint files are reported before torch and transformers are loaded: only the functions
that need these import them.
"""

import json
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from surfw.checkpoint import Checkpoint, open_checkpoint
from surfw.checkpoint.companions import is_of_sentences
from surfw.checkpoint.layout import quantisation_of, read_small, without_quantisation
from surfw.checkpoint.reader import not_distributed
from surfw.checkpoint.shard import refuse_pointer
from surfw.chunking.plan import ChunkPlan, PlannedChunk, PlannedTensor, UnitFacts, plan_chunks, with_exact_rest
from surfw.chunking.remote import open_remote_checkpoint
from surfw.config import (
    DEFAULT_SILENCE_SECONDS,
    FILE_BYTES,
    OnMissing,
    check_dtype,
    check_on_missing,
    count,
    display_url,
    quote,
)
from surfw.errors import CheckpointError, ConfigurationError, UninitializedWeightsWarning, UnsupportedModelError
from surfw.files import expand_home
from surfw.manifest import Base, Chunk, Form, Manifest, ModelFile, Origin, TensorInfo, check_model_name, payload_digest
from surfw.skeleton.sanitise import (
    refuse_kernels,
    sanitise,
    tag_floats,
)
from surfw.storage.backends import read_address
from surfw.storage.origins import is_local_url

if TYPE_CHECKING:
    from surfw.skeleton.build import Skeleton
    from surfw.skeleton.loading import Loading, SourceFacts

logger = logging.getLogger("surfw.chunking")


@dataclass(frozen=True)
class PreparedModel:
    """A checkpoint whose chunks are planned but not written. Use it as a context manager, or `close()` it.

    Attributes:
        name: the model's name in the store.
        checkpoint: the source.
        class_name: the class to build.
        dtype: the dtype to build it with.
        config: its configuration, without references to foreign code.
        generation_config: its settings for `generate()`, cleaned in the same way; None if it has none.
        plan: the chunks to write.
        loading: how the model's tensors are made from the source tensors.
        facts: the source tensors.
        base: for an adapter, the model that it changes.
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
    base: Base | None = None

    @property
    def key(self) -> str:
        """Identifies the plan and its source; work with the same key can be resumed."""
        chunks = [
            (c.name, [(t.info.name, t.info.dtype, t.info.shape, t.copy_of, t.is_matrix) for t in c.tensors])
            for c in self.plan.chunks
        ]
        config = json.dumps(self.config, sort_keys=True)
        return payload_digest(
            repr((self.name, config, chunks, self.checkpoint.fingerprint(), *filter(None, [self.base]))).encode()
        )[:32]

    def manifest(
        self, chunks: Sequence[Chunk], files: Sequence[ModelFile] = (), origin: Origin | None = None
    ) -> Manifest:
        """Build the manifest from stored chunks and tokenizer files; `origin` is given if nothing is copied."""
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
            base=self.base,
        )

    def only_experts(self) -> "PreparedModel":
        """Return a copy in which only the experts of a mixture have packed forms.

        Raises:
            ConfigurationError: it has no experts that can be quantised.
        """
        return replace(self, plan=replace(self.plan, chunks=with_exact_rest(self.plan.chunks, self.name)))

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
    variant: str | None = None,
    dtype: str | None = None,
    dequantize: str | None = None,
    model_class: Any = None,
    config_from: str | None = None,
    on_missing: OnMissing = "error",
    show_progress: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    silence_timeout: float = DEFAULT_SILENCE_SECONDS,
    on_step: Callable[[str], object] = lambda _: None,
) -> PreparedModel:
    """Open a checkpoint and plan its chunks.

    Args:
        model: a hub id (`org/name`), a local directory, or the storage URL of a checkpoint.
        name: the model's name in the store; default: the hub id in full, or the directory's name.
        revision: the revision of the hub repository.
        variant: which weight files to use, if there are several kinds: `fp16` for `model.fp16.safetensors`.
        dtype: convert the weights to this dtype, as `from_pretrained(dtype=…)` would; default: `auto`.
        dequantize: instead of `dtype`, convert quantised weights to dense ones of this dtype, as transformers does.
        model_class: default: the class that the configuration names in `architectures`, else the base model of its
            type.
        config_from: a local directory with `config.json` and tokenizer, if `model` is a directory with weights only,
            as saved by `torch.distributed.checkpoint`.
        on_missing: `uninitialized` accepts a model that lacks weights; running it requires the same option again.
        show_progress: let the hub library draw progress bars on stderr, if that is a terminal.
        storage_options: options for the storage, if `model` is a storage URL.
        silence_timeout: seconds without progress after which access to a remote storage fails.
        on_step: called with a description of each step as it starts.

    Raises:
        CheckpointError: the checkpoint is damaged, incomplete, or missing.
        UnsupportedModelError: surfw cannot run it.
    """
    if dtype is not None:
        check_dtype(dtype)  # dtype and name are checked before anything is fetched
    if name is not None:
        check_model_name(name)
    check_on_missing(on_missing)
    if dequantize is not None:
        check_dtype(dequantize)
        if dtype is not None:
            raise ConfigurationError("dtype and dequantize exclude each other; give one of them")
    is_quantised = dequantize is not None
    if model_class is not None:
        from surfw.skeleton.build import check_model_class

        check_model_class(model_class)
    address = read_address(model)
    file = expand_home(address.removeprefix("file://"))
    is_file = is_local_url(address) and file.suffix.lower() == ".gguf" and file.is_file()
    if config_from is not None and (is_file or not is_local_url(address)):
        raise not_distributed(display_url(address))
    if is_file:
        from surfw.chunking.gguf_file import prepare_gguf

        return prepare_gguf(file, name=name, dtype=dequantize or dtype, on_missing=on_missing, on_step=on_step)
    if is_local_url(address):
        checkpoint = open_checkpoint(
            address.removeprefix("file://"),
            revision=revision,
            variant=variant,
            config_from=config_from,
            show_progress=show_progress,
            may_be_quantised=is_quantised,
        )
    else:
        refuse_revision_of_url(revision, address)
        checkpoint = open_remote_checkpoint(
            address,
            storage_options,
            variant=variant,
            silence_timeout=silence_timeout,
            may_be_quantised=is_quantised,
        )
    with ExitStack() as opened:
        opened.enter_context(checkpoint)
        name = check_model_name(name or checkpoint.name)
        prepared = _plan_model(
            checkpoint, name, dequantize or dtype, model_class, on_missing, is_quantised=is_quantised, where=model,
            on_step=on_step,
        )  # fmt: skip
        opened.pop_all()
    return prepared


def refuse_revision_of_url(revision: str | None, address: str) -> None:
    """Refuse a revision for a storage URL.

    Raises:
        ConfigurationError: a revision is given.
    """
    if revision is not None:
        raise ConfigurationError(
            f"revision {revision!r} is for hub models, but {display_url(address)} is a storage URL"
        )


def _plan_model(
    checkpoint: Checkpoint,
    name: str,
    dtype: str | None,
    model_class: Any,
    on_missing: OnMissing,
    *,
    is_quantised: bool,
    where: str,
    on_step: Callable[[str], object],
) -> PreparedModel:
    refuse_kernels(checkpoint.config, where=where)
    dense = without_quantisation(checkpoint.config) if is_quantised else checkpoint.config
    clean, generation, code, unfit = sanitise(dense, checkpoint.generation_config, where=where)
    for lines, why in ((code, "surfw runs no code that comes with a model"), (unfit, "no file may choose it")):
        for line in lines:
            logger.warning("%s: left out of the configuration, because %s: %s", name, why, line)
    on_step("importing torch and transformers")
    from surfw.skeleton.build import build_skeleton, read_config, resolve_class
    from surfw.skeleton.dtypes import automatic_dtype, dtype_name, parse_dtype, safetensors_dtype
    from surfw.skeleton.loading import plan_loading

    on_step(f"planning the chunks of {name}")
    quantizer = None
    if is_quantised:
        from surfw.skeleton.dequantise import open_quantizer

        quantizer = open_quantizer(quantisation_of(checkpoint.config), where=where)
    checkpoint = _with_registered_files(checkpoint)
    config = read_config(clean, where=where, model_class=model_class)
    architectures = getattr(config, "architectures", None) or [None]
    cls = model_class or resolve_class(architectures[0], config, where=where)
    facts = {tensor.name: (tensor.dtype, tensor.shape) for tensor in checkpoint.tensors.values()}
    stored = (tensor.dtype for tensor in checkpoint.tensors.values())
    built = parse_dtype(dtype) if dtype is not None else automatic_dtype(config.dtype, stored, where=where)
    skeleton = build_skeleton(config, cls, built, tensor_count=len(facts), where=where)
    loading = plan_loading(skeleton, facts, partial(_equal_tensors, checkpoint), where=where, quantizer=quantizer)
    report_loading(loading, name, cls.__name__, on_missing, where)
    tensors, matrices = {}, quantisable(skeleton, loading.ties)
    for target, recipe in loading.recipes.items():
        target_dtype, shape = recipe.targets[target]
        info = TensorInfo(target, safetensors_dtype(target_dtype), shape, 0)
        as_it_is = recipe.converter is None and facts[recipe.sources[0]][0] == info.dtype
        copy_of = recipe.sources[0] if as_it_is else None
        tensors[target] = PlannedTensor(info, copy_of, target in matrices, recipe.start)
    plan = plan_chunks(unit_facts(skeleton), tensors, loading.ties)
    if not plan.chunks:
        raise UnsupportedModelError(
            f"{where} has no tensor that {cls.__name__} has a place for; check its architectures"
        )
    clean, generation = tag_floats(clean), tag_floats(generation)
    return PreparedModel(name, checkpoint, cls.__name__, dtype_name(built), clean, generation, plan, loading, facts)


def _with_registered_files(checkpoint: Checkpoint) -> Checkpoint:
    """Add the files of the checkpoint that are named by tokenizer classes which the program has registered."""
    from surfw.skeleton.tokenizers import registered_names

    own = {name: checkpoint.path / name for name in registered_names() if (checkpoint.path / name).is_file()}
    return replace(checkpoint, files={**own, **checkpoint.files}) if own else checkpoint


def check_files(prepared: PreparedModel) -> None:
    """Check that the tokenizer built from the files to be stored equals the checkpoint's.

    Raises:
        CheckpointError: it has no vocabulary, yields other token ids, or its files cannot be read.
    """
    from surfw.skeleton.tokenizers import check_tokenizer

    checkpoint = prepared.checkpoint
    paths = {name: path for name, path in checkpoint.files.items() if not is_of_sentences(name)}
    if paths:
        files = {name: read_small(path, FILE_BYTES) for name, path in paths.items()}
        for name, data in files.items():
            refuse_pointer(data, f"{checkpoint.url}/{name}")
        check_tokenizer(checkpoint.path, files, prepared.config, where=checkpoint.url)


def report_loading(loading: "Loading", name: str, cls: str, on_missing: OnMissing, where: str) -> None:
    """Warn about unused tensors, and refuse a model that lacks weights unless `on_missing` allows it.

    Raises:
        CheckpointError: weights are missing.
    """
    _report_missing(loading, cls, on_missing, where)
    if loading.unused:
        logger.warning(
            "%s: %s has no place for %s of the checkpoint, such as %s; left out, as transformers does",
            name, cls, count(len(loading.unused), "tensor"), loading.unused[0],
        )  # fmt: skip


def _report_missing(loading: "Loading", cls: str, on_missing: OnMissing, where: str) -> None:
    if not (missing := loading.missing):
        return
    seen = f"{where} lacks {count(len(missing), 'weight')} of {cls}, such as {missing[0]}"
    if loading.unused:
        one = quote(loading.unused[0])
        seen += f", and has {count(len(loading.unused), 'tensor')} that {cls} has no place for, such as {one}"
    if on_missing == "error":
        raise CheckpointError(
            f"{seen}; surfw never makes weights up. Check the architectures in config.json, save the model again with "
            "save_pretrained, or chunk it without them: --on-missing uninitialized (on_missing='uninitialized')"
        )
    warnings.warn(f"{seen}; it is chunked without them", UninitializedWeightsWarning, stacklevel=2)


def find_matrices(manifest: Manifest) -> frozenset[str]:
    """Return the tensors of a chunked model that may be quantised (see `PlannedTensor.is_matrix`). Requires torch.

    Raises:
        UnsupportedModelError: its class or configuration cannot be used here.
    """
    return quantisable(skeleton_of(manifest), manifest.ties)


def quantisable(skeleton: "Skeleton", ties: Mapping[str, str]) -> frozenset[str]:
    """Return the tensors of a model that may be quantised, including slices of stacked experts.

    Args:
        skeleton: the model.
        ties: tensors that are stored under another name.
    """
    from surfw.skeleton.experts import expert_matrices
    from surfw.skeleton.units import matrices_of

    return matrices_of(skeleton.units, ties) | expert_matrices(skeleton.experts.values())


def unit_facts(skeleton: "Skeleton") -> list[UnitFacts]:
    """Return the facts about a model's units that planning needs."""
    from surfw.skeleton.experts import experts_in

    experts = skeleton.experts.values()
    return [
        UnitFacts(unit.path, unit.kind, tuple(slot.name for slot in unit.slots), experts_in(experts, unit))
        for unit in skeleton.units
    ]


def skeleton_of(manifest: Manifest) -> "Skeleton":
    """Build a manifest's model without weights, as it was when it was chunked. Requires torch.

    Raises:
        UnsupportedModelError: its class or configuration cannot be used here.
    """
    from surfw.skeleton.build import build_skeleton, read_config, resolve_class
    from surfw.skeleton.dtypes import parse_dtype

    clean, *_ = sanitise(manifest.config, manifest.generation_config, where=manifest.name)
    config = read_config(clean, where=manifest.name)
    cls = resolve_class(manifest.class_name, config, where=manifest.name)
    tensor_count = len(manifest.tensors) + len(manifest.ties)
    dtype = parse_dtype(manifest.dtype)
    return build_skeleton(config, cls, dtype, tensor_count=tensor_count, where=manifest.name)


class PayloadReader:
    """Reads the payloads of chunks: source bytes unchanged, or as transformers converts them."""

    def __init__(self, prepared: PreparedModel) -> None:
        self._prepared = prepared
        self._checkpoint = prepared.checkpoint
        self._converted: dict[str, memoryview] = {}

    def read_into(self, chunk: PlannedChunk, start: int, destination: memoryview) -> None:
        """Fill `destination` with the chunk's payload from byte `start`; call it with increasing `start`."""
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
        """Not supported: a checkpoint has no forms to copy."""
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
    return checkpoint.digest(one) == checkpoint.digest(other)
