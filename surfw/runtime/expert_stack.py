"""A stack of experts that are computed with one by one, as each of them is packed (`surfw.runtime.packed`).

Transformers' implementations of experts ask three things of a stack: the matrix of one expert (`eager`), the matrices
of several (`batched_mm`), and products of groups of rows with its transpose, each group with the matrix of one expert
(`grouped_mm`). These are answered here out of the matrices of the experts that are asked for. For anything else the
stack gets its values as a whole, of all experts, read for that.
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
    """Stands for the stack of a module's experts."""

    _surfw_expert: Expert

    def __new__(cls, like: torch.Tensor, expert: Expert, load: Load, device: torch.device) -> Self:
        """Stand for a stack.

        Args:
            like: of its shape, (experts, out, in), and dtype, on the meta device.
            expert: has the matrices.
            load: brings all of it, as values.
            device: where it is.
        """
        stack = super().__new__(cls, like, load, None, device)
        stack._surfw_expert = expert
        stack.requires_grad_()
        return stack

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Answer for the matrices of some experts, and for the transpose of all."""
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
    """Products of groups of rows: as torch's `grouped_mm`; NotImplemented for anything else."""
    if function is not _GROUPED or len(args) != 2 or kwargs.keys() != {"offs"}:
        return NotImplemented
    rows, start, products = args[0], 0, []
    for index, stop in enumerate(kwargs["offs"].tolist()):
        if stop > start:
            products.append(torch.nn.functional.linear(rows[start:stop], expert(index)))
            start = stop
    if start < len(rows) or not products:  # no expert's
        products.append(rows.new_zeros(len(rows) - start, args[1].shape[2]))
    return torch.cat(products)
