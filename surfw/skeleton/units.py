"""Finds the units of a model, the modules that are executed one after another, without a list of architectures.

A *unit* is a module whose weights are loaded and evicted together: each item of an outermost `ModuleList` (a layer),
and each largest other module that holds weights and no such list (embeddings, norms, heads). Weights held directly by
a module that contains layers form their own unit, written `path.*`.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList


@dataclass(frozen=True, slots=True)
class Slot:
    """A place for a tensor in a module: a parameter, or a buffer that is part of the state dict."""

    name: str
    module: nn.Module
    leaf: str
    is_buffer: bool

    @property
    def tensor(self) -> torch.Tensor:
        """The current tensor."""
        held = (self.module._buffers if self.is_buffer else self.module._parameters)[self.leaf]  # noqa: SLF001 - torch's registries
        assert held is not None, f"slot {self.name} is empty"
        return held

    def put(self, tensor: torch.Tensor) -> None:
        """Replace the tensor; for a parameter, with an `nn.Parameter`."""
        registry = self.module._buffers if self.is_buffer else self.module._parameters  # noqa: SLF001 - torch's registries
        registry[self.leaf] = tensor  # type: ignore[assignment]  # a Parameter where one is expected


@dataclass(frozen=True, slots=True)
class Unit:
    """A module that is executed, and the slots of its weights.

    Attributes:
        path: the module's path in the model; `path.*` (or `*` at the root) for weights that a module with layers inside
            holds directly.
        kind: `layer`, `part`, or `own` for such directly held weights.
        module: the module to hook.
        slots: in registration order.
    """

    path: str
    kind: str
    module: nn.Module
    slots: tuple[Slot, ...]


def find_units(model: nn.Module) -> list[Unit]:
    """The units of a model in registration order; every slot belongs to exactly one unit."""
    return list(_visit(model, "", set()))


def matrices_of(units: Iterable[Unit], ties: Mapping[str, str]) -> frozenset[str]:
    """The names of stored tensors that are only used as weights of `torch.nn.Linear` or of embeddings.

    Args:
        units: the model's units.
        ties: maps tied tensors to the name under which they are stored.
    """
    matrices, others = set[str](), set[str]()
    for slot in (slot for unit in units for slot in unit.slots):
        is_matrix = isinstance(slot.module, nn.Linear | nn.Embedding) and slot.leaf == "weight"
        (matrices if is_matrix else others).add(ties.get(slot.name, slot.name))
    return frozenset(matrices - others)


def _visit(module: nn.Module, path: str, seen: set[int]) -> Iterator[Unit]:
    seen.add(id(module))
    if own := tuple(own_slots(module, path)):
        yield Unit(f"{path}.*".lstrip("."), "own", module, own)
    for name, child in module.named_children():
        if id(child) in seen:
            continue
        child_path = f"{path}.{name}".lstrip(".")
        if _is_list(child):
            yield from _visit_list(child, child_path, seen)
        elif _holds_list(child):
            yield from _visit(child, child_path, seen)
        else:
            yield from _leaf(child, child_path, "part", seen)


def _visit_list(items: nn.ModuleList, path: str, seen: set[int]) -> Iterator[Unit]:
    seen.add(id(items))
    for name, item in items.named_children():  # a partial list keeps the layers' names
        if id(item) in seen:
            continue
        if type(item).forward is nn.Module.forward:  # a list of lists: it is never called itself
            inside: Any = _visit_list if _is_list(item) else _visit
            yield from inside(item, f"{path}.{name}", seen)
        else:
            yield from _leaf(item, f"{path}.{name}", "layer", seen)


def _leaf(module: nn.Module, path: str, kind: str, seen: set[int]) -> Iterator[Unit]:
    slots: list[Slot] = []
    for name, inner in module.named_modules(prefix=path):
        if id(inner) not in seen:
            seen.add(id(inner))
            slots += own_slots(inner, name)
    if slots:
        yield Unit(path, kind, module, tuple(slots))


def own_slots(module: nn.Module, path: str) -> Iterator[Slot]:
    """The slots of a module itself, without its submodules; `path` is its path, "" for the whole model."""
    prefix = f"{path}." if path else ""
    for leaf, parameter in module._parameters.items():  # noqa: SLF001 - torch's registries
        if parameter is not None:
            yield Slot(prefix + leaf, module, leaf, is_buffer=False)
    for leaf, buffer in module._buffers.items():  # noqa: SLF001 - torch's registries
        if buffer is not None and leaf not in module._non_persistent_buffers_set:  # noqa: SLF001 - torch's registries
            yield Slot(prefix + leaf, module, leaf, is_buffer=True)


def _holds_list(module: nn.Module) -> bool:
    return any(_is_list(inner) and len(inner) > 0 for inner in module.modules())


def _is_list(module: nn.Module) -> TypeGuard[nn.ModuleList]:
    """Whether a module is a list of layers; torch's `ParametrizationList`, which computes one weight, is not."""
    return isinstance(module, nn.ModuleList) and not isinstance(module, ParametrizationList)
