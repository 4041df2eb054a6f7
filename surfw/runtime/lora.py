"""Applies an adapter to a model while it runs: adds a product to a module's output, or replaces a module's weights.

The order of operations and the dtypes are peft's (`peft.tuners.lora.layer`, `Linear.forward` and `Embedding.forward`),
so that the results have the same bits. The base model's weights are read as without an adapter; after `detach`, nothing
remains.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import embedding, linear

from surfw.skeleton.lora import Lora, LoraPart, SavedPart

Tensors = Mapping[str, torch.Tensor]
_Forward = Callable[..., Any]


class AttachedLora:
    """An adapter that is applied to its model until `detach`."""

    def __init__(self, lora: Lora, tensors: Tensors) -> None:
        """Apply the adapter; `tensors` has the tensors that it names, in their `Lora.dtypes`."""
        self._changed: list[nn.Module] = []
        for part in lora.parts:
            apply = _add_rows if isinstance(part.module, nn.Embedding) else _add_product
            self._wrap(part.module, partial(apply, part, tensors))
        for saved in lora.saved:
            self._wrap(saved.module, partial(_run_with, saved, tensors))

    def detach(self) -> None:
        """Restore the modules."""
        for module in reversed(self._changed):
            del module.forward
        self._changed.clear()

    def _wrap(self, module: nn.Module, apply: Callable[..., Any]) -> None:
        forward = module.forward
        assert "forward" not in vars(module), "it is the class's own"
        module.forward = partial(apply, forward)  # hooks still run around it
        self._changed.append(module)


def _add_product(
    part: LoraPart, tensors: Tensors, forward: _Forward, x: torch.Tensor, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """The output of a linear module plus the scaled product of the two small matrices."""
    result: torch.Tensor = forward(x, *args, **kwargs)
    dtype, first = result.dtype, tensors[part.first]
    bias = None if part.bias is None else tensors[part.bias]
    if x.dtype != first.dtype:
        x = x.to(first.dtype)
    result = result + linear(linear(x, first), tensors[part.second], bias) * part.scaling
    return result.to(dtype)


def _add_rows(
    part: LoraPart, tensors: Tensors, forward: _Forward, x: torch.Tensor, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """The rows of an embedding plus the scaled product of the first matrix's rows with the second."""
    result: torch.Tensor = forward(x, *args, **kwargs)
    base: Any = part.module
    rows = embedding(
        x, tensors[part.first].T, padding_idx=base.padding_idx, max_norm=base.max_norm, norm_type=base.norm_type,
        scale_grad_by_freq=base.scale_grad_by_freq, sparse=base.sparse,
    )  # fmt: skip
    added = (rows @ tensors[part.second].T) * part.scaling
    scale = getattr(base, "embed_scale", None)
    if isinstance(scale, int | float):
        scale = torch.tensor(scale, device=result.device, dtype=base.weight.dtype)
    if isinstance(scale, torch.Tensor):
        added = added * scale.to(added.dtype)
    return (result + added).to(result.dtype)


def _run_with(part: SavedPart, tensors: Tensors, forward: _Forward, *args: Any, **kwargs: Any) -> Any:
    """The output of a module with the adapter's weights in place of its own, which are restored afterwards."""
    held: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for name, slot in part.slots.items():
            registry: Any = slot.module._buffers if slot.is_buffer else slot.module._parameters  # noqa: SLF001 - torch's
            held.append((registry, slot.leaf, registry[slot.leaf]))
            registry[slot.leaf] = tensors[name]
        return forward(*args, **kwargs)
    finally:
        for registry, leaf, tensor in held:
            registry[leaf] = tensor
