"""A model without weights, and where its parameters go: torch's and transformers' own ways, over a mesh of ranks."""

import re
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES
from transformers.distributed.tensor_parallel import apply_tensor_parallelism

from surfw.distributed.targets import state_slots
from surfw.errors import ConfigurationError
from surfw.manifest import Manifest
from surfw.models.client import Source, SourceThread, WeightClient
from surfw.models.from_manifest import open_skeleton
from surfw.skeleton.build import Skeleton
from surfw.skeleton.dtypes import parse_dtype
from surfw.skeleton.units import Slot, find_units


def build_model(source: Source, *, name: str | None = None, dtype: str | None = None) -> PreTrainedModel:
    """The model of a source without its weights: parameters on the meta device, tied as they will be; buffers real.

    Args:
        source: as of `load_sharded`.
        name: the model's name, where the source has several.
        dtype: such as `"float32"`; default: the one it is stored in.

    Raises:
        SurfwError: there is no such model, or it cannot be built.
    """
    client = source if isinstance(source, SourceThread) else WeightClient(source)
    try:

        async def find(opened: Any) -> Manifest:
            found: Manifest = await opened.manifest(await opened.resolve(name))
            return found

        manifest = client.run(find)
    finally:
        if client is not source:
            client.close()
    skeleton = open_skeleton(manifest, None if dtype is None else parse_dtype(dtype))
    tie(skeleton, manifest)
    return skeleton.model


def tie(skeleton: Skeleton, manifest: Manifest) -> None:
    """Make tensors that are stored once one parameter."""
    for name, stored in manifest.ties.items():
        if name in skeleton.slots and stored in skeleton.slots:
            skeleton.slots[name].put(skeleton.slots[stored].tensor)


def place_model(model: nn.Module, mesh: Any, plan: str | Mapping[str, str]) -> None:
    """Place a model over a mesh; see `load_sharded`.

    Raises:
        ConfigurationError: there is no such plan, or it has nothing for this model.
    """
    if getattr(mesh, "ndim", None) != 1:
        raise ConfigurationError(
            f"mesh is {type(mesh).__name__} of {getattr(mesh, 'ndim', 'no')} dimensions, expected a DeviceMesh of one; "
            "place the model yourself over another one, and leave mesh out"
        )
    if plan == "fsdp":
        for unit in find_units(model):
            if unit.kind == "layer":
                fully_shard(unit.module, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return
    expanded = _expand(model, _rules(model, plan))
    if not expanded:
        raise ConfigurationError(f"the plan names no module of {type(model).__name__}")
    tied = _tied(model)
    apply_tensor_parallelism(model, mesh, expanded)
    for first, *others in tied:
        for slot in others:
            slot.put(first.tensor)


def _rules(model: nn.Module, plan: str | Mapping[str, str]) -> Mapping[str, str]:
    """The rules of tensor parallelism, checked: transformers' own, or those that are given."""
    rules = dict(getattr(model, "tp_plan", None) or {}) if plan == "tp" else plan
    if not isinstance(rules, Mapping):
        raise ConfigurationError(f"plan is {plan!a:.80}; expected 'fsdp', 'tp', or a mapping of patterns to styles")
    if not rules:
        raise ConfigurationError(
            f"transformers has no plan of tensor parallelism for {type(model).__name__}; give one as plan=…, place the "
            "model with torch's parallelize_module, or take plan='fsdp'"
        )
    if unknown := sorted({str(style) for style in rules.values()} - set(ALL_PARALLEL_STYLES)):
        raise ConfigurationError(f"there is no style {unknown[0]!a:.80} of tensor parallelism in transformers")
    return rules


def _tied(model: nn.Module) -> list[list[Slot]]:
    """The places that hold the same parameter, where there are several; transformers places the first one."""
    groups: dict[int, list[Slot]] = {}
    for slot in state_slots(model):
        if not slot.is_buffer:
            groups.setdefault(id(slot.tensor), []).append(slot)
    return [group for group in groups.values() if len(group) > 1]


def _expand(model: nn.Module, plan: Mapping[str, str]) -> dict[str, str]:
    """The plan by names of parameters and of modules, parameters first, as transformers takes it."""
    found: dict[str, str] = {}
    known = {name for name, _ in model.named_parameters()}  # of a tied one, the first
    rules = [(re.compile(re.escape(name).replace(r"\*", r"\d+")), style) for name, style in plan.items()]
    for path, module in model.named_modules():
        style = next((style for pattern, style in rules if pattern.fullmatch(path)), None)
        for leaf, _ in module.named_parameters(recurse=False):
            name = f"{path}.{leaf}"
            own = next((style for pattern, style in rules if pattern.fullmatch(name)), style)
            if own is not None and name in known:
                found[name] = own
        if style is not None:
            found[path] = style
    return found
