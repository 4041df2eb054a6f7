"""The modules of a model that hold the experts of a mixture, stacked, and which of them a forward will use.

Transformers keeps the weights of all experts of a layer in a few tensors whose first dimension counts experts. A module
with nothing but such tensors computes with those experts alone that its router has chosen, and is told which: that is
what `use_experts_implementation` of transformers is for (`transformers/integrations/moe.py`), whose kernels all leave
the others untouched.
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
"""Classes of transformers that compute with all experts, and get zeros for what is not an expert's to compute: an
expert whose inputs are all zero yields zeros, whatever its weights are."""

Choice = list[int]
"""How many tokens each expert of a module computes; 0 for those that are not used."""


@dataclass(frozen=True)
class ExpertModule:
    """A module that holds experts, and nothing else.

    Attributes:
        path: its name in the model.
        module: it.
        slots: of its stacks.
        count: how many experts there are.
    """

    path: str
    module: nn.Module
    slots: tuple[Slot, ...]
    count: int

    @property
    def reads_all(self) -> bool:
        """Whether a forward multiplies with all experts, by zeros for those that it does not use."""
        return type(self.module).__name__ in _SPREAD

    def choice(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Choice, list[int]]:
        """Which experts a forward with these arguments uses.

        Returns:
            How many tokens each of them computes, and the used ones, the most wanted first.
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
        # What is not in range is what transformers marks as another process's expert: nobody computes it here.
        inside = chosen.reshape(-1).cpu()
        counted = torch.bincount(inside[(inside >= 0) & (inside < self.count)], minlength=self.count)
        return counted.tolist()


def find_experts(model: nn.Module) -> Iterator[ExpertModule]:
    """The modules of a model that hold at least two experts, and that are told which of them to use."""
    for path, module in model.named_modules():
        if not (_is_routed(module) or type(module).__name__ in _SPREAD):
            continue
        found = expert_module(path, module)
        if found is not None and found.count > 1:
            yield found


def expert_matrices(modules: Iterable[ExpertModule]) -> frozenset[str]:
    """The slices of stacks that are multiplied with as the weight of `torch.nn.Linear` is: rows are outputs."""
    return frozenset(
        slice_name(slot.name, index)
        for one in modules
        if _is_routed(one.module) and not one.module.is_transposed
        for slot in one.slots
        if slot.tensor.dim() == 3
        for index in range(one.count)
    )


def experts_in(modules: Iterable[ExpertModule], unit: Unit) -> dict[str, list[str]]:
    """Those of the modules that hold experts of a unit: their paths, and the names of the stacks of each."""
    inside = {slot.name for slot in unit.slots}
    found = {one.path: [slot.name for slot in one.slots] for one in modules}
    return {path: names for path, names in found.items() if inside.issuperset(names)}


def expert_module(path: str, module: nn.Module) -> ExpertModule | None:
    """A module as one that holds experts; None if it does not."""
    parameters: dict[str, nn.Parameter | None] = dict(module._parameters)  # noqa: SLF001 - torch's registries
    held = {leaf: one for leaf, one in parameters.items() if one is not None}
    counts = {one.shape[0] if one.dim() else 0 for one in held.values()}
    inside = {id(one) for one in [*module.parameters(), *module.buffers()]}
    if len(counts) != 1 or inside != {id(one) for one in held.values()}:
        return None
    slots = tuple(Slot(f"{path}.{leaf}", module, leaf, is_buffer=False) for leaf in held)
    return ExpertModule(path, module, slots, counts.pop())


def _is_routed(module: nn.Module) -> bool:
    """Whether it was made by `use_experts_implementation`: then it is told which experts to use."""
    return hasattr(module, "_is_expert_parallel") and hasattr(module, "is_transposed")


def _second_argument(cls: type[nn.Module]) -> str:
    """The name of what says which experts to use; classes name it differently."""
    if cls not in _names:
        forward: Callable[..., Any] = cls.forward
        _names[cls] = [*inspect.signature(forward).parameters, "", "", ""][2]
    return _names[cls]


_names: dict[type[nn.Module], str] = {}
