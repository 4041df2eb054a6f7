"""Matches an adapter's tensors with the modules they change, and checks their shapes against the model.

The rules are those of peft's LoRA: a low-rank product added to a linear module or an embedding, and full copies of
other modules. `surfw.runtime.lora` does the computation.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from surfw.config import quote
from surfw.errors import UnsupportedModelError
from surfw.skeleton.build import Skeleton
from surfw.skeleton.units import Slot

_LINEAR = {"lora_A.weight": "first", "lora_B.weight": "second", "lora_B.bias": "bias"}
_EMBEDDING = {"lora_embedding_A": "first", "lora_embedding_B": "second"}
_ROLES = {**_LINEAR, **_EMBEDDING}
_ROLE = re.compile(rf"(.+)\.({'|'.join(map(re.escape, _ROLES))})")
_WIDENED = {torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2}

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class LoraPart:
    """A module to whose output a low-rank product is added.

    Attributes:
        path: the module's path.
        module: `torch.nn.Linear`, transformers' `Conv1D`, or an embedding.
        first: the name of the first factor, of shape (rank, in); for an embedding, (rank, vocabulary).
        second: the name of the second factor, of shape (out, rank).
        bias: the name of the bias of the second product, of shape (out,); None if that product has no bias.
        scaling: the factor applied to the result.
    """

    path: str
    module: nn.Module
    first: str
    second: str
    bias: str | None
    scaling: float

    @property
    def tensors(self) -> list[str]:
        """The names of its tensors."""
        return [name for name in (self.first, self.second, self.bias) if name is not None]

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype: float32 if the module's weight has a narrower float dtype, as is peft's default."""
        weight = self.module.weight
        assert isinstance(weight, torch.Tensor), "these modules have one"
        return torch.float32 if weight.dtype in _WIDENED else weight.dtype


@dataclass(frozen=True, slots=True)
class SavedPart:
    """A module whose weights the adapter replaces; `slots` are the module's slots by name."""

    path: str
    module: nn.Module
    slots: Mapping[str, Slot]

    @property
    def tensors(self) -> list[str]:
        """The names of its tensors."""
        return list(self.slots)


@dataclass(frozen=True, slots=True)
class Lora:
    """Everything that an adapter changes in a model."""

    parts: tuple[LoraPart, ...]
    saved: tuple[SavedPart, ...]

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """The compute dtypes of its tensors, by name."""
        found = {name: part.dtype for part in self.parts for name in part.tensors}
        return found | {name: slot.tensor.dtype for part in self.saved for name, slot in part.slots.items()}


def find_lora(
    skeleton: Skeleton,
    shapes: Shapes,
    scaling_of: Callable[[str, int], float],
    saved: Collection[str],
    *,
    where: str,
) -> Lora:
    """Find what an adapter changes in a model.

    Args:
        skeleton: the model.
        shapes: the shapes of the adapter's tensors, by their names within the model.
        scaling_of: returns the scaling of a module, from its path and rank.
        saved: the paths of the modules that the adapter has full copies of.
        where: names the adapter in errors.

    Raises:
        UnsupportedModelError: the adapter does not fit this model, lacks a tensor, or has an unknown one.
    """
    modules = dict(skeleton.model.named_modules())
    found: dict[str, dict[str, str]] = {}
    copies: dict[str, dict[str, Slot]] = {}
    cls = type(skeleton.model).__name__
    for name in shapes:
        if match := _ROLE.fullmatch(name):
            found.setdefault(match[1], {})[match[2]] = name
        elif (home := _home_of(name, saved)) is not None and name in skeleton.slots:
            copies.setdefault(home, {})[name] = skeleton.slots[name]
        else:
            _refuse(name, "is neither a part of a low-rank product nor of one of the modules_to_save", cls, where)
    for path in {*found, *copies} - set(modules):
        _refuse(next(name for name in shapes if name.startswith(f"{path}.")), "has no module there", cls, where)
    parts = tuple(
        _part(path, modules[path], found[path], shapes, scaling_of, cls=cls, where=where)
        for path in modules
        if path in found
    )
    return Lora(
        parts,
        tuple(
            _saved(skeleton, path, modules[path], copies[path], shapes, where=where)
            for path in modules
            if path in copies
        ),
    )


def _part(
    path: str,
    module: nn.Module,
    roles: Mapping[str, str],
    shapes: Shapes,
    scaling_of: Callable[[str, int], float],
    *,
    cls: str,
    where: str,
) -> LoraPart:
    known, inner, outer = _widths(module)
    first_name = next(iter(roles.values()))
    if not known or not set(roles) <= set(known):
        _refuse(first_name, f"changes a {type(module).__name__}, which surfw does not apply an adapter to", cls, where)
    named = {known[role]: name for role, name in roles.items()}
    if lacking := [role for role in known if known[role] != "bias" and known[role] not in named]:
        _refuse(first_name, f"stands alone: the adapter has no {path}.{lacking[0]}", cls, where)
    rank = shapes[named["first"]][0] if shapes[named["first"]] else 0
    expected = {"first": (rank, inner), "second": (outer, rank), "bias": (outer,)}
    for role, name in named.items():
        if shapes[name] != expected[role] or not rank:
            _refuse(name, f"has shape {shapes[name]}, expected {expected[role]}", cls, where)
    return LoraPart(path, module, named["first"], named["second"], named.get("bias"), scaling_of(path, rank))


def _widths(module: nn.Module) -> tuple[Mapping[str, str], int, int]:
    """The roles of a module's adapter tensors, and its input and output width; no roles if it is not supported."""
    if isinstance(module, nn.Linear):
        return _LINEAR, module.in_features, module.out_features
    if isinstance(module, Conv1D):
        inner, outer = module.weight.shape
        return _LINEAR, inner, outer
    if isinstance(module, nn.Embedding):
        return _EMBEDDING, module.num_embeddings, module.embedding_dim
    return {}, 0, 0


def _saved(
    skeleton: Skeleton, path: str, module: nn.Module, slots: Mapping[str, Slot], shapes: Shapes, *, where: str
) -> SavedPart:
    cls = type(skeleton.model).__name__
    for name, slot in slots.items():
        if tuple(slot.tensor.shape) != shapes[name]:
            why = f"has shape {shapes[name]}, expected {tuple(slot.tensor.shape)}: the base was resized for it"
            _refuse(name, why, cls, where)
    for name in skeleton.slots:
        if name.startswith(f"{path}.") and name not in slots:
            _refuse(next(iter(slots)), f"is one weight of {path}, and the adapter has no {name} for it", cls, where)
    if any(unit.path.startswith(f"{path}.") for unit in skeleton.units):
        _refuse(next(iter(slots)), f"is of {path}, which has layers inside: surfw replaces no such modules", cls, where)
    return SavedPart(path, module, slots)


def _home_of(name: str, saved: Collection[str]) -> str | None:
    return next((path for path in saved if name.startswith(f"{path}.")), None)


def _refuse(name: str, why: str, cls: str, where: str) -> NoReturn:
    raise UnsupportedModelError(
        f"{where}: {quote(name)} {why} (base: {cls}); is this its base? If so, merge it with peft (merge_and_unload), "
        "and chunk the result"
    )
