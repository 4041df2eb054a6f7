"""A stack of packed experts, each computed with on its own (`surfw.runtime.packed`).

Transformers' implementations of experts use a stack in three ways: the matrix of one expert (`eager`), the matrices of
several (`batched_mm`), and products of groups of rows with its transpose, each group with the matrix of one expert
(`grouped_mm`). These are computed here from the matrices of the experts involved. For any other function, the values of
all experts are read.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Self

import torch

from surfw.runtime.absent import AbsentBuffer, AbsentParameter, Load
from surfw.runtime.packed import values_of

_GROUPED = getattr(torch.nn.functional, "grouped_mm", None)  # torch 2.10

Expert = Callable[[int], torch.Tensor]
"""The matrix of an expert that is in memory, packed or not, of shape (out, in)."""


class ExpertStack(AbsentParameter):
    """Stands in for the stack of a module's experts."""

    _surfw_expert: Expert

    def __new__(cls, like: torch.Tensor, expert: Expert, load: Load, device: torch.device) -> Self:
        """Create one.

        Args:
            like: a tensor on the meta device with the stack's dtype and shape, (experts, out, in).
            expert: returns the matrix of an expert.
            load: loads the values of the whole stack.
            device: where the stack is.
        """
        stack = super().__new__(cls, like, load, None, device)
        stack._surfw_expert = expert
        stack.requires_grad_()
        return stack

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Also answer for the matrices of some experts, and for the transpose of the stack."""
        if args and isinstance(stack := args[0], ExpertStack) and not kwargs:
            if func is torch.Tensor.__getitem__ and (found := _pick(stack, args[1])) is not None:
                return found
            if func in {torch.transpose, torch.Tensor.transpose} and {one % 3 for one in args[1:]} == {1, 2}:
                return _transposed(stack)
        return super().__torch_function__(func, types, args, kwargs)


def _pick(stack: ExpertStack, index: Any) -> torch.Tensor | None:
    """The matrix of one expert, or the values of several; None for other indices."""
    if isinstance(index, torch.Tensor) and not index.is_floating_point() and index.dtype is not torch.bool:
        index = index.tolist()
        if isinstance(index, list) and all(isinstance(one, int) for one in index):
            values = {one: values_of(stack._surfw_expert(one)) for one in dict.fromkeys(index)}  # noqa: SLF001 - ours
            return torch.stack([values[one] for one in index]) if index else None
    return stack._surfw_expert(index) if type(index) is int and index >= 0 else None  # noqa: SLF001 - ours


def _transposed(stack: ExpertStack) -> AbsentBuffer:
    like = torch.empty(stack.shape, dtype=stack.dtype, device="meta").transpose(1, 2)
    load, expert = stack._surfw_load, stack._surfw_expert  # noqa: SLF001 - ours
    return AbsentBuffer(like, lambda: load().transpose(1, 2), partial(_compute, expert), stack.device)


def _compute(expert: Expert, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """As torch's `grouped_mm`: products of groups of rows; NotImplemented for any other function."""
    if function is not _GROUPED or len(args) != 2 or kwargs.keys() != {"offs"}:
        return NotImplemented
    rows, start, products = args[0], 0, []
    for index, stop in enumerate(kwargs["offs"].tolist()):
        if stop > start:
            products.append(torch.nn.functional.linear(rows[start:stop], expert(index)))
            start = stop
    if start < len(rows) or not products:  # rows of no expert
        products.append(rows.new_zeros(len(rows) - start, args[1].shape[2]))
    return torch.cat(products)
