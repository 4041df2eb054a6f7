"""Converts GGUF files as transformers does: a configuration, a tokenizer, and dense weights, one tensor at a time.

The operations are those of `transformers.modeling_gguf_pytorch_utils.load_gguf_checkpoint`, which converts all weights
at once: the package `gguf` dequantises a tensor to float32, transformers' processor for the architecture reverts
llama.cpp's changes to it, and the result is cast.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import transformers
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from surfw.errors import CheckpointError, UnsupportedModelError
from surfw.skeleton.build import Skeleton
from surfw.skeleton.guards import foreign_errors, no_hub
from surfw.skeleton.loading import Loading, Recipe, finish_loading, slice_experts, target_dtypes

_Read = Callable[[str], torch.Tensor]


class Stored(Protocol):
    """How a tensor is stored: its ggml type, and the numpy dtype and shape of its bytes."""

    @property
    def ggml_type(self) -> Any:
        """The type of its blocks or values, from the package `gguf`."""

    @property
    def dtype(self) -> str:
        """The numpy dtype of its stored bytes."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in elements of `dtype`."""


def read_settings(path: Path, architecture: str) -> dict[str, Any]:
    """Read a GGUF file's configuration with transformers, in the form of a `config.json`.

    Raises:
        UnsupportedModelError: transformers cannot read it, or reads this architecture without the package `gguf`.
    """
    if architecture in GGUF_CONFIG_ARCHS:
        raise UnsupportedModelError(
            f"{path} has the architecture {architecture!a:.80}, which transformers reads in another way than surfw "
            "does; take the model's own checkpoint"
        )
    with foreign_errors(f"the configuration in {path}"), no_hub():
        config, _ = PreTrainedConfig.get_config_dict(path.parent, gguf_file=path.name, local_files_only=True)
    return {key: value for key, value in config.items() if not key.startswith("_")}


def class_of(config: PreTrainedConfig, *, where: str) -> type[PreTrainedModel]:
    """The class of a GGUF file's model: the one its configuration names, else the one that generates text.

    Raises:
        UnsupportedModelError: transformers has no such class.
    """
    for name in config.architectures or ():
        if cls := getattr(transformers, name, None):
            return _checked(cls)
    for mapping in (transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING):
        if type(config) in mapping:
            return _checked(mapping[type(config)])
    raise UnsupportedModelError(
        f"{where} is a model of type {config.model_type!a:.80}, and transformers has no class of it that generates text"
    )


def _checked(cls: Any) -> type[PreTrainedModel]:
    assert issubclass(cls, PreTrainedModel), "transformers lists models there"
    found: type[PreTrainedModel] = cls
    return found


def save_tokenizer(path: Path, folder: Path) -> None:
    """Save the tokenizer of a GGUF file to a folder, as transformers converts it.

    Raises:
        UnsupportedModelError: transformers cannot convert it.
    """
    with foreign_errors(f"the tokenizer in {path}"), no_hub():
        auto: Any = AutoTokenizer
        tokenizer = auto.from_pretrained(
            path.parent, gguf_file=path.name, local_files_only=True, trust_remote_code=False
        )
        tokenizer.save_pretrained(folder)


def plan_gguf(
    skeleton: Skeleton, stored: Mapping[str, Stored], architecture: str, settings: Mapping[str, Any], *, where: str
) -> Loading:
    """Plan what `from_pretrained(gguf_file=…)` would load into the skeleton.

    Args:
        skeleton: a fresh skeleton of the model.
        stored: the file's tensors, in file order.
        architecture: llama.cpp's name for it.
        settings: the result of `read_settings`.
        where: names the file in errors.

    Raises:
        CheckpointError: weights have unexpected shapes, or cannot be converted.
    """
    kind: Any = TENSOR_PROCESSORS.get(architecture, TensorProcessor)
    processor = kind(config=dict(settings))
    find_names: Any = get_gguf_hf_weights_map
    with foreign_errors(f"the names of the tensors in {where}"):
        names: dict[str, str] = find_names(skeleton.model, processor)
    process = partial(_process, processor, names, where)
    sources: dict[str, list[str]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    unused = []
    for name in stored:
        made = process([name], lambda one: np.broadcast_to(np.float32(0), _dense_shape(stored[one])))
        if not made:
            unused.append(name)
        for target, tensor in made.items():
            sources.setdefault(target, []).append(name)
            shapes[target] = tuple(tensor.shape)
    dtypes = target_dtypes(skeleton)
    recipes = {
        target: Recipe(
            {target: (dtypes(target), shapes[target])},
            tuple(needed),
            partial(_convert, process, stored, target, tuple(needed), dtypes=(skeleton.dtype, dtypes(target))),
        )
        for target, needed in sources.items()
        if target in skeleton.slots
    }
    return slice_experts(skeleton, finish_loading(skeleton, recipes, unused, lambda *_: False, where=where))


def _process(
    processor: Any, names: Mapping[str, str], where: str, needed: Sequence[str], read: Callable[[str], Any]
) -> dict[str, torch.Tensor]:
    """Convert some of the file's tensors; returns the model's tensors by name, before the cast to their dtypes."""
    parsed: dict[str, Any] = {"tensors": {}}
    for name in needed:
        try:
            result = processor.process(
                weights=read(name), name=name, tensor_key_mapping=names, parsed_parameters=parsed
            )
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as exc:
            raise CheckpointError(f"{where}: transformers cannot use the tensor {name!a:.120}: {exc}") from exc
        if result.name in names:
            parsed["tensors"][names[result.name]] = torch.from_numpy(np.array(result.weights))
    tensors: dict[str, torch.Tensor] = parsed["tensors"]
    return tensors


def _convert(
    process: Callable[[Sequence[str], Callable[[str], Any]], dict[str, torch.Tensor]],
    stored: Mapping[str, Stored],
    target: str,
    needed: Sequence[str],
    read: _Read,
    *,
    dtypes: Sequence[torch.dtype],
) -> dict[str, torch.Tensor]:
    """Make one of the model's tensors from the file's stored bytes."""
    from gguf import dequantize

    def dense(name: str) -> Any:
        one = stored[name]
        data = read(name).numpy().view(np.dtype(one.dtype)).reshape(one.shape)
        return dequantize(data, one.ggml_type)

    tensor = process(needed, dense)[target]
    for dtype in dtypes:  # first the model's dtype, then the one that transformers keeps this tensor in
        tensor = tensor.to(dtype)
    return {target: tensor}


def _dense_shape(stored: Stored) -> tuple[int, ...]:
    from gguf import GGML_QUANT_SIZES

    values, size = GGML_QUANT_SIZES[stored.ggml_type]
    if np.dtype(stored.dtype) != np.uint8:
        return tuple(map(int, stored.shape))
    return (*map(int, stored.shape[:-1]), int(stored.shape[-1]) // size * values)
