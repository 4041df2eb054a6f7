"""Prepare a GGUF file for chunking as dense weights, as transformers reads it."""

import logging
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from surfw.checkpoint import Checkpoint
from surfw.checkpoint.companions import companions, list_files
from surfw.checkpoint.gguf import GgufShard
from surfw.checkpoint.reader import folder_name
from surfw.chunking.plan import PlannedTensor, plan_chunks
from surfw.chunking.prepare import PreparedModel, quantisable, report_loading, unit_facts
from surfw.config import OnMissing, check_dtype
from surfw.errors import UnsupportedModelError
from surfw.manifest import TensorInfo, check_model_name
from surfw.skeleton.sanitise import sanitise, tag_floats

logger = logging.getLogger("surfw.chunking")

_DTYPE = "float32"
"""The dtype to which transformers converts a GGUF file by default."""


def prepare_gguf(
    file: Path,
    *,
    name: str | None,
    dtype: str | None,
    on_missing: OnMissing,
    on_step: Callable[[str], object],
) -> PreparedModel:
    """Open a GGUF file and plan its chunks.

    Args:
        file: the file.
        name: the model's name in the store; default: the file's name without its suffix.
        dtype: the dtype of the dense weights; default: float32, as in transformers.
        on_missing: see `prepare_model`.
        on_step: called with a description of each step as it starts.

    Raises:
        CheckpointError: it is damaged, or lacks weights.
        UnsupportedModelError: transformers cannot read it, or the package `gguf` is not installed.
    """
    check_dtype(dtype or _DTYPE)
    name = check_model_name(name or folder_name(file))
    with ExitStack() as opened:
        shard = GgufShard(file)
        opened.callback(shard.close)
        folder = opened.enter_context(tempfile.TemporaryDirectory(prefix="surfw-gguf-"))
        on_step("importing torch and transformers")
        from surfw.skeleton.gguf import read_settings

        settings = read_settings(file, shard.architecture)
        checkpoint = Checkpoint(
            name=name,
            path=file.parent,
            config=settings,
            generation_config=None,
            files=_tokenizer_files(file, Path(folder)),
            shards=(shard,),
            url=str(file.absolute()),
            release=opened.pop_all().close,
        )
        opened.callback(checkpoint.close)
        on_step(f"planning the chunks of {name}")
        prepared = _plan(checkpoint, shard, name, dtype or _DTYPE, on_missing)
        opened.pop_all()
    return prepared


def _tokenizer_files(file: Path, folder: Path) -> dict[str, Path]:
    """Save the tokenizer that transformers builds from a GGUF file; if it cannot, warn and return no files."""
    from surfw.skeleton.gguf import save_tokenizer

    try:
        save_tokenizer(file, folder)
    except UnsupportedModelError as exc:
        logger.warning("%s; the model takes token ids only", exc)
        return {}
    return {one: folder / one for one in companions(list_files(folder))}


def _plan(checkpoint: Checkpoint, shard: GgufShard, name: str, dtype: str, on_missing: OnMissing) -> PreparedModel:
    from surfw.skeleton.build import build_skeleton, read_config
    from surfw.skeleton.dtypes import dtype_name, parse_dtype, safetensors_dtype
    from surfw.skeleton.gguf import class_of, plan_gguf

    where = str(shard.path)
    clean, *_ = sanitise(checkpoint.config, None, where=where)
    config = read_config(clean, where=where)
    cls, built = class_of(config, where=where), parse_dtype(dtype)
    skeleton = build_skeleton(config, cls, built, tensor_count=len(shard.tensors), where=where)
    loading = plan_gguf(skeleton, shard.stored, shard.architecture, checkpoint.config, where=where)
    report_loading(loading, name, cls.__name__, on_missing, where)
    matrices = quantisable(skeleton, loading.ties)
    tensors = {}
    for target, recipe in loading.recipes.items():
        target_dtype, shape = recipe.targets[target]
        info = TensorInfo(target, safetensors_dtype(target_dtype), shape, 0)
        tensors[target] = PlannedTensor(info, None, target in matrices)
    plan = plan_chunks(unit_facts(skeleton), tensors, loading.ties)
    facts = {tensor.name: (tensor.dtype, tensor.shape) for tensor in shard.tensors}
    clean = tag_floats(clean | {"architectures": [cls.__name__]})
    return PreparedModel(name, checkpoint, cls.__name__, dtype_name(built), clean, None, plan, loading, facts)
