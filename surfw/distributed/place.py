"""Builds a model without weights and places its parameters over a mesh, with torch's and transformers' own methods."""

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
    """Build a source's model without weights: tied parameters on the meta device, and real buffers.

    Args:
        source: as for `load_sharded`.
        name: the model's name, if the source has several.
        dtype: such as `"float32"`; default: the stored dtype.

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
    """Share one parameter between slots that are tied in the manifest."""
    for name, stored in manifest.ties.items():
        if name in skeleton.slots and stored in skeleton.slots:
            skeleton.slots[name].put(skeleton.slots[stored].tensor)


def place_model(model: nn.Module, mesh: Any, plan: str | Mapping[str, str]) -> None:
    """Place a model over a mesh; see `load_sharded`.

    Raises:
        ConfigurationError: the mesh does not have one dimension, the plan is unknown, or it matches no module.
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
    """The validated rules of tensor parallelism: transformers' own, or the given ones."""
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
    """Groups of slots that share a parameter; transformers places only the first slot of each."""
    groups: dict[int, list[Slot]] = {}
    for slot in state_slots(model):
        if not slot.is_buffer:
            groups.setdefault(id(slot.tensor), []).append(slot)
    return [group for group in groups.values() if len(group) > 1]


def _expand(model: nn.Module, plan: Mapping[str, str]) -> dict[str, str]:
    """Expand patterns to names of parameters and modules, as transformers expects: parameters before their module."""
    found: dict[str, str] = {}
    known = {name for name, _ in model.named_parameters()}  # for a tied one, only the first name
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
