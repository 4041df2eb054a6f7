"""Pipeline stages: assigns a model's layers to ranks, and cuts a model down to one stage.

The layers are split into contiguous runs whose weights are as equal in size as possible. Modules before the layers
(embeddings) belong to the first stage, modules after them (norm and head) to the last one.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from surfw.distributed.plan import Run
from surfw.errors import ConfigurationError, UnsupportedModelError
from surfw.manifest import Manifest
from surfw.skeleton.build import Skeleton
from surfw.skeleton.units import Unit


@dataclass(frozen=True)
class Stage:
    """The units of one rank of a pipeline.

    Attributes:
        index, count: the stage's index, and the number of stages.
        layers: the paths of its layers, in execution order.
        others: the paths of its other units.
        absent: the paths of the units of other stages.
    """

    index: int
    count: int
    layers: tuple[str, ...]
    others: tuple[str, ...]
    absent: tuple[str, ...]

    @property
    def is_first(self) -> bool:
        """Whether this stage computes the embeddings."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """Whether this stage computes the logits."""
        return self.index == self.count - 1

    @property
    def paths(self) -> frozenset[str]:
        """The paths of all its units."""
        return frozenset((*self.layers, *self.others))


def cut_evenly(sizes: Sequence[int], count: int) -> list[Run]:
    """Split items into `count` contiguous, non-empty runs so that the largest run is as small as possible.

    Args:
        sizes: the sizes of the items, in order; at least `count` of them.
        count: the number of runs.
    """
    least, most = max(sizes), sum(sizes)
    while least < most:
        limit = (least + most) // 2
        least, most = (least, limit) if len(_runs_within(sizes, limit)) <= count else (limit + 1, most)
    runs = _runs_within(sizes, least)
    while len(runs) < count:  # fewer runs would do, but no stage may be empty: split the longest
        at = max(range(len(runs)), key=lambda one: runs[one][1] - runs[one][0])
        low, high = runs[at]
        runs[at : at + 1] = [(low, (low + high) // 2), ((low + high) // 2, high)]
    return runs


def _runs_within(sizes: Sequence[int], limit: int) -> list[Run]:
    runs, low, size = [], 0, 0
    for at, one in enumerate(sizes):
        if at > low and size + one > limit:
            runs.append((low, at))
            low, size = at, 0
        size += one
    return [*runs, (low, len(sizes))]


def plan_stages(manifest: Manifest, units: Sequence[Unit], count: int) -> list[Stage]:
    """Plan the stages of a model from the sizes of its chunks.

    Args:
        manifest: the model.
        units: its units.
        count: the number of stages.

    Raises:
        ConfigurationError: the model has fewer layers than stages.
    """
    uses = {use.module: use.chunks for use in manifest.order}
    order = [unit for path in uses for unit in units if unit.path == path]
    layers = [at for at, unit in enumerate(order) if unit.kind == "layer"]
    if len(layers) < count:
        raise ConfigurationError(
            f"{manifest.name} has {len(layers)} layers, which cannot be {count} stages of a pipeline; take fewer ranks"
        )
    sizes = [sum(manifest.by_name[chunk].payload_bytes for chunk in uses[unit.path]) for unit in order]
    own = [sizes[at] for at in layers]
    own[0] += sum(sizes[: layers[0]])
    own[-1] += sum(sizes[layers[-1] + 1 :])
    stages = []
    for index, (low, high) in enumerate(cut_evenly(own, count)):
        mine = [order[at] for at in layers[low:high]]
        first = 0 if index == 0 else layers[low]
        last = len(order) if index == count - 1 else layers[high]
        others = [unit for unit in order[first:last] if unit.kind != "layer"]
        kept = {unit.path for unit in (*mine, *others)}
        absent = tuple(unit.path for unit in units if unit.path not in kept)
        layer_paths, other_paths = tuple(unit.path for unit in mine), tuple(unit.path for unit in others)
        stages.append(Stage(index, count, layer_paths, other_paths, absent))
    return stages


class _Layers(nn.ModuleList):
    """Some layers of a list, under their names in the whole list."""

    def __init__(self, layers: Iterable[nn.Module] = (), names: Iterable[str] | None = None) -> None:
        super().__init__()
        for name, layer in zip(names, layers, strict=True) if names is not None else enumerate(layers):
            self.add_module(str(name), layer)


class _Absent(nn.Module):
    """Stands in for a module of another stage: an embedding returns zeros, any other module returns its input.

    The zeros are never used: this stage receives its hidden states from the previous one.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self._width = module.embedding_dim if isinstance(module, nn.Embedding) else None
        self._dtype = dtype

    def forward(self, given: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        """Return the input, or for an embedding zeros of shape (*ids.shape, width)."""
        return given if self._width is None else torch.zeros(*given.shape, self._width, dtype=self._dtype)


def cut_out(manifest: Manifest, skeleton: Skeleton, index: int, count: int) -> tuple[Manifest, Skeleton]:
    """Cut a decoder down to one stage, which then looks like a smaller model with the stage's layers.

    Args:
        manifest: the whole model.
        skeleton: its skeleton, modified in place.
        index: the index of the stage.
        count: the number of stages.

    Raises:
        UnsupportedModelError: the model's layers exchange more than hidden states.
        ConfigurationError: the model has too few layers.
    """
    model, config, units = skeleton.model, skeleton.model.config, skeleton.units
    if not _passes_states_only(skeleton):
        raise UnsupportedModelError(
            f"{manifest.name} ({manifest.class_name}) cannot be run as a pipeline: transformers does not say that what "
            "its layers pass on is their output alone; use fewer, larger processes without --pipeline"
        )
    stage = plan_stages(manifest, units, count)[index]
    uses = {use.module: set(use.chunks) for use in manifest.order}
    needed = set[str]().union(*(uses[path] for path in stage.paths))
    kept_paths = stage.paths | {unit.path for unit in units if unit.kind == "part" and uses[unit.path] & needed}
    for unit in units:
        if unit.kind == "part" and unit.path not in kept_paths:  # the head keeps the embeddings it is tied to
            parent, _, leaf = unit.path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, _Absent(unit.module, skeleton.dtype))
    layers = [unit for unit in units if unit.kind == "layer"]
    first = layers.index(next(unit for unit in layers if unit.path == stage.layers[0]))
    (parent,) = {unit.path.rpartition(".")[0] for unit in layers}
    kept = layers[first : first + len(stage.layers)]
    holder, _, leaf = parent.rpartition(".")
    names = [unit.path.rpartition(".")[2] for unit in kept]
    setattr(model.get_submodule(holder), leaf, _Layers((unit.module for unit in kept), names))
    modules: list[Any] = [module for unit in kept for module in unit.module.modules()]
    for module in modules:
        if isinstance(getattr(module, "layer_idx", None), int):
            module.layer_idx -= first  # its index in the KV cache
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[first : first + len(kept)]
    order = tuple(use for use in manifest.order if use.module in kept_paths)
    needed = {name for use in order for name in use.chunks}
    chunks = tuple(chunk for chunk in manifest.chunks if chunk.name in needed)
    return replace(manifest, chunks=chunks, order=order), Skeleton(model, skeleton.dtype)


def _passes_states_only(skeleton: Skeleton) -> bool:
    """Whether layers pass on hidden states only: transformers has a pipeline plan, or the type is in `_TRIED`."""
    model, config = skeleton.model, skeleton.model.config
    lists = {unit.path.rpartition(".")[0] for unit in skeleton.units if unit.kind == "layer"}
    is_plain = config.get_text_config() is config and not config.is_encoder_decoder and model.can_generate()
    has_plan = bool(getattr(config, "base_model_pp_plan", None)) or config.model_type in _TRIED
    return is_plain and has_plan and len(lists) == 1 and all(unit.kind != "own" for unit in skeleton.units)


_TRIED = frozenset({"gpt2"})
"""Model types without a pipeline plan in transformers whose layers pass on hidden states only."""
