"""Finds the modules that hold a mixture's stacked experts, and determines which experts a forward will use.

Transformers stores the weights of all experts of a layer in a few tensors whose first dimension is the expert. A module
that holds only such tensors receives the router's choice as an argument and computes with the chosen experts only:
transformers' `use_experts_implementation` (`transformers/integrations/moe.py`) provides this, and none of its kernels
reads the weights of other experts.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from surfw.manifest import slice_name
from surfw.skeleton.units import Slot, Unit

_SPREAD = frozenset({"Llama4TextExperts"})
"""Classes of transformers that compute with all experts and zero the inputs of unused ones: an expert whose inputs are
all zero yields zeros, whatever its weights are."""

Choice = list[int]
"""The number of tokens that each expert of a module computes; 0 for unused experts."""


@dataclass(frozen=True)
class ExpertModule:
    """A module that holds experts and nothing else.

    Attributes:
        path: its path in the model.
        module: the module.
        slots: the slots of its stacks.
        count: the number of experts.
    """

    path: str
    module: nn.Module
    slots: tuple[Slot, ...]
    count: int

    @property
    def reads_all(self) -> bool:
        """Whether a forward reads the weights of all experts, multiplying unused ones by zeros."""
        return type(self.module).__name__ in _SPREAD

    def choice(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Choice, list[int]]:
        """Determine the experts that a forward with these arguments uses.

        Returns:
            The number of tokens per expert, and the indices of the used experts, those with most tokens first.
        """
        counts = self._counts(args, kwargs)
        used = [index for index, count in enumerate(counts) if count]
        return counts, sorted(used, key=lambda index: -counts[index])

    def _counts(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Choice:
        everything = [1] * self.count
        if self.reads_all:
            inputs = args[0] if args else kwargs.get("hidden_states")
            if not isinstance(inputs, torch.Tensor) or inputs.numel() % self.count:
                return everything
            spread = inputs.reshape(self.count, -1, inputs.shape[-1])
            found: Choice = spread.ne(0).any(dim=-1).sum(dim=-1).tolist()
            return found
        if not _is_routed(self.module):
            return everything
        chosen = args[1] if len(args) > 1 else kwargs.get(_second_argument(type(self.module)))
        if not isinstance(chosen, torch.Tensor) or chosen.is_floating_point():
            return everything
        # Transformers marks the experts of other processes with indices out of range.
        inside = chosen.reshape(-1).cpu()
        counted = torch.bincount(inside[(inside >= 0) & (inside < self.count)], minlength=self.count)
        return counted.tolist()


def find_experts(model: nn.Module) -> Iterator[ExpertModule]:
    """The modules of a model that hold at least two experts and use a subset of them per forward."""
    for path, module in model.named_modules():
        if not (_is_routed(module) or type(module).__name__ in _SPREAD):
            continue
        found = expert_module(path, module)
        if found is not None and found.count > 1:
            yield found


def expert_matrices(modules: Iterable[ExpertModule]) -> frozenset[str]:
    """The names of stack slices that are laid out like the weight of `torch.nn.Linear`: rows are outputs."""
    return frozenset(
        slice_name(slot.name, index)
        for one in modules
        if _is_routed(one.module) and not one.module.is_transposed
        for slot in one.slots
        if slot.tensor.dim() == 3
        for index in range(one.count)
    )


def experts_in(modules: Iterable[ExpertModule], unit: Unit) -> dict[str, list[str]]:
    """The names of the stacks of each expert module inside a unit, by the module's path."""
    inside = {slot.name for slot in unit.slots}
    found = {one.path: [slot.name for slot in one.slots] for one in modules}
    return {path: names for path, names in found.items() if inside.issuperset(names)}


def expert_module(path: str, module: nn.Module) -> ExpertModule | None:
    """The module as an `ExpertModule`; None if it holds anything but stacks of the same length."""
    parameters: dict[str, nn.Parameter | None] = dict(module._parameters)  # noqa: SLF001 - torch's registries
    held = {leaf: one for leaf, one in parameters.items() if one is not None}
    counts = {one.shape[0] if one.dim() else 0 for one in held.values()}
    inside = {id(one) for one in [*module.parameters(), *module.buffers()]}
    if len(counts) != 1 or inside != {id(one) for one in held.values()}:
        return None
    slots = tuple(Slot(f"{path}.{leaf}", module, leaf, is_buffer=False) for leaf in held)
    return ExpertModule(path, module, slots, counts.pop())


def _is_routed(module: nn.Module) -> bool:
    """Whether `use_experts_implementation` made the module, so that it receives the router's choice."""
    return hasattr(module, "_is_expert_parallel") and hasattr(module, "is_transposed")


def _second_argument(cls: type[nn.Module]) -> str:
    """The name of the argument with the router's choice, which differs between classes."""
    if cls not in _names:
        forward: Callable[..., Any] = cls.forward
        _names[cls] = [*inspect.signature(forward).parameters, "", "", ""][2]
    return _names[cls]


_names: dict[type[nn.Module], str] = {}
