"""Parameters over quantised matrices, which stay packed in memory while the model computes (`surfw.codec.quantised`).

A packed parameter takes the place of an ordinary one in a module. It has the shape, and the dtype that the model
computes in; its codes and scales are views of a chunk's memory. `linear`, products with its transpose and `embedding`
are computed directly from them. For any other function, the whole matrix is unpacked into new memory; that is logged
once.

There are no gradients: a backward pass through a packed parameter fails.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Self

import torch
from torch import nn

from surfw.errors import ModelError
from surfw.manifest import Part
from surfw.runtime.absent import AbsentBuffer, AbsentParameter
from surfw.runtime.matrices import Packed, matrix_over

logger = logging.getLogger("surfw.runtime")


class PackedParameter(AbsentParameter):
    """Stands in for a parameter whose values are quantised.

    Attributes:
        packed: its codes and scales.
    """

    packed: Packed

    def __new__(cls, packed: Packed, dtype: torch.dtype) -> Self:
        """Create one with this dtype. It requires gradients, for the reason given in `loader.as_parameter`."""
        like = torch.empty(packed.shape, dtype=dtype, device="meta")
        load, compute = partial(_unpack_whole, packed, dtype), partial(_compute, packed, dtype)
        parameter = super().__new__(cls, like, load, compute, packed.codes.device)
        parameter.packed = packed
        parameter.requires_grad_()
        return parameter

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Also answer for the transpose and the storage, which other absent tensors cannot."""
        if args and isinstance(weight := args[0], PackedParameter):
            if func is torch.Tensor.untyped_storage:
                return weight.packed.codes.untyped_storage()
            if _is_transpose(func, args[1:], kwargs):
                return PackedTranspose(weight.packed, weight.dtype)
        return super().__torch_function__(func, types, args, kwargs)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # torch's has no types
        """Kind, dtype and shape."""
        return f"<{self.packed.kind} weight, {self.dtype}, {tuple(self.shape)}>"


class PackedTranspose(AbsentBuffer):
    """The transpose of a packed parameter."""

    def __new__(cls, packed: Packed, dtype: torch.dtype) -> Self:
        """Create one with this dtype."""
        like = torch.empty(packed.shape[::-1], dtype=dtype, device="meta")
        load = partial(_unpack_whole, packed, dtype)
        compute = partial(_compute_transposed, packed, dtype)
        return super().__new__(cls, like, lambda: load().t(), compute, packed.codes.device)


def packed_parameter(
    part: Part, memory: torch.Tensor, dtype: torch.dtype, operand: torch.Tensor | None = None
) -> PackedParameter:
    """A parameter over the stored form of a quantised tensor, without a copy.

    Args:
        part: of kind int8 or int4.
        memory: the stored form that contains it, as uint8, on any device; kept alive.
        dtype: the dtype that the model computes in.
        operand: see `matrix_over`.
    """
    return PackedParameter(matrix_over(part, memory, operand), dtype)


def values_of(tensor: torch.Tensor) -> torch.Tensor:
    """The values of a parameter or a view, packed or not, in new memory."""
    return tensor.packed.unpacked(tensor.dtype) if isinstance(tensor, PackedParameter) else tensor.detach().clone()


class _Multiplied(torch.autograd.Function):
    """A product whose backward pass fails instead of omitting gradients."""

    @staticmethod
    def forward(_: Any, packed: Packed, inputs: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return packed.multiply(inputs, bias)

    @staticmethod
    def backward(*_: Any) -> Any:
        raise ModelError("int8 and int4 weights have no gradients; open the model with weights that are not quantised")


def _multiply(packed: Packed, dtype: torch.dtype, inputs: Any, *, bias: torch.Tensor | None = None) -> Any:
    """As torch's `linear`; NotImplemented if that would fail or convert dtypes."""
    fits = type(inputs) is torch.Tensor and inputs.dtype is dtype and inputs.device == packed.codes.device
    if not fits or not inputs.dim() or inputs.shape[-1] != packed.shape[1]:
        return NotImplemented
    if bias is not None and bias.dtype is not dtype:
        return NotImplemented
    if not torch.is_grad_enabled():
        return packed.multiply(inputs, bias)
    return _Multiplied.apply(packed, inputs, bias)  # type: ignore[no-untyped-call]  # torch's has no types


def _compute(
    packed: Packed, dtype: torch.dtype, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """Compute a torch function with a packed weight; NotImplemented if it needs all values."""
    if function in {nn.functional.linear, nn.functional.embedding}:
        names = _LINEAR if function is nn.functional.linear else _EMBEDDING
        given = dict(zip(names, args, strict=False)) | dict(kwargs)
        del given["weight"]
        compute = _multiply if function is nn.functional.linear else _embedding
        return compute(packed, dtype, given.pop("input"), **given)
    return NotImplemented


def _embedding(
    packed: Packed,
    dtype: torch.dtype,
    ids: Any,
    *,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    **_: Any,
) -> Any:
    """As torch's `embedding`; arguments that only affect gradients are ignored."""
    rows, columns = packed.shape
    fits = type(ids) is torch.Tensor and ids.dtype in {torch.int32, torch.int64} and ids.device == packed.codes.device
    padded = padding_idx is not None and not -rows <= padding_idx < rows
    if not fits or padded or max_norm is not None:
        return NotImplemented
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < rows:
        raise IndexError("index out of range in self")
    return packed.look_up(ids.reshape(-1).long(), dtype).view(*ids.shape, columns)


def _compute_transposed(
    packed: Packed, dtype: torch.dtype, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    is_product = function in _PRODUCTS and len(args) == 2 and not kwargs
    return _multiply(packed, dtype, args[0]) if is_product else NotImplemented


_LINEAR = ("input", "weight", "bias")
_EMBEDDING = ("input", "weight", "padding_idx", "max_norm")  # the others are for gradients
_TRANSPOSED = {torch.t, torch.Tensor.t, *(getattr(torch.Tensor, name).__get__ for name in ("T", "mT"))}
_PRODUCTS = {torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.__matmul__}


def _is_transpose(function: Any, others: Sequence[Any], kwargs: Mapping[str, Any] | None) -> bool:
    """Whether a call transposes its first argument, as in DeBERTa and Falcon, which multiply with the transpose."""
    if kwargs:
        return False
    if function in _TRANSPOSED:
        return True
    return function in {torch.transpose, torch.Tensor.transpose} and {one % 2 for one in others} == {0, 1}


def _unpack_whole(packed: Packed, dtype: torch.dtype) -> torch.Tensor:
    if not _said:
        _said.append(packed)
        logger.warning(
            "an %s weight of shape %s is unpacked as a whole: the model does more with it than multiply or look up; "
            "this takes time and memory, and is not said again",
            packed.kind,
            packed.shape,
        )
    return packed.unpacked(dtype)


_said: list[Packed] = []
