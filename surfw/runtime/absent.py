"""Absent tensors, which stand in for weights that are not in place.

An absent tensor has a shape and a dtype but no values. Reading its metadata is free. Computing with it, which happens
if a model uses a weight outside of the forward of the module that owns it, loads the weight first, unless a part of it
suffices for the result. So a model never computes with missing weights. The underlying tensor is on the meta device,
where torch itself refuses to compute. In-place changes are refused, as they would be lost when the weight is evicted.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch

from surfw.errors import ModelError

_FACTS = {
    "size", "dim", "numel", "nelement", "ndimension", "stride", "storage_offset", "is_floating_point", "is_complex",
    "is_contiguous", "element_size", "get_device", "__len__", "__hash__", "requires_grad_", "is_inference", "is_signed",
    "detach_",
}  # fmt: skip
_CPU = torch.device("cpu")
_VALUES = {"data", "T", "H", "mT", "mH", "real", "imag"}
_READS = {"__index__", "__int__", "__invert__"}
_CONVERSIONS = {"to", "cpu", "float", "double", "half", "bfloat16"}

Load = Callable[[], torch.Tensor]
"""Loads the whole weight."""
Apply = Callable[[Callable[..., Any], Sequence[Any], Mapping[str, Any]], Any]
"""The result of a torch function whose second argument, or whose `weight`, is the absent tensor; NotImplemented if it
needs the whole weight."""


class _Absent(torch.Tensor):
    """Loads itself when torch is asked to compute with it."""

    _surfw_load: Load
    _surfw_apply: Apply | None
    _surfw_device: torch.device

    def __new__(cls, like: torch.Tensor, load: Load, apply: Apply | None = None, device: torch.device = _CPU) -> Self:
        """Take the metadata from a tensor on the meta device; `device` is where the weight is once it is loaded."""
        absent: Self = torch.Tensor._make_subclass(cls, like.detach(), like.requires_grad)  # noqa: SLF001 - as Parameter's
        absent._surfw_load, absent._surfw_apply, absent._surfw_device = load, apply, device
        return absent

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Answer for the metadata; for everything else, substitute the loaded weights for the absent ones."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in {"__get__", "__set__", "__delete__"}:
            attribute = func.__self__.__name__
            if attribute == "device":
                return args[0]._surfw_device  # noqa: SLF001 - ours
            if attribute == "is_cuda":
                return args[0]._surfw_device.type == "cuda"  # noqa: SLF001 - ours
            if attribute == "is_meta":
                return False
            known = attribute not in _VALUES
        else:
            known = name in _FACTS
        if not known:
            result = _without_values(func, name, args, kwargs)
            if result is not NotImplemented:
                return result
            args = _present(args)
            kwargs = {key: _present(value) for key, value in kwargs.items()}
        with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001 - the documented way to call on, see torch.overrides
            return func(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        """A copy has the values, and is a parameter if this stands in for one."""
        values = copy.deepcopy(self._surfw_load().detach(), memo)
        return torch.nn.Parameter(values, self.requires_grad) if isinstance(self, torch.nn.Parameter) else values

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # torch's has no types
        """Dtype and shape, as there are no values."""
        return f"<absent weight, {self.dtype}, {tuple(self.shape)}>"


class AbsentParameter(_Absent, torch.nn.Parameter):
    """Stands in for a parameter."""


class AbsentBuffer(_Absent):
    """Stands in for a buffer that is part of the checkpoint."""


def _without_values(function: Callable[..., Any], name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The result of a function that does not need an absent tensor's values; NotImplemented if it needs them.

    Raises:
        ModelError: the function would change the values.
    """
    if name == "share_memory_":  # there are no values to share: each process reads its own
        return args[0]
    if _changes_absent(name, args, kwargs):
        raise ModelError(
            "a streamed weight cannot be changed in place, as it is read anew for every use; put a parameter of your "
            "own in its place (module.weight = torch.nn.Parameter(...)), and for another dtype open the model with "
            "dtype=..."
        )
    if name == "_has_compatible_shallow_copy_type":  # `Module.to` asks this, and sets `data` if it is true
        return True
    if name == "__set__":  # setting its own data, as `Module.to` does if there is nothing to convert
        return None
    if name in _CONVERSIONS and _converts_to_itself(function, args, kwargs):
        return args[0]
    weight = args[1] if len(args) > 1 else kwargs.get("weight")
    apply = weight._surfw_apply if isinstance(weight, _Absent) else None  # noqa: SLF001 - ours
    return apply(function, args, kwargs) if apply else NotImplemented


def _changes_absent(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether torch is asked to write to an absent tensor."""
    if name == "__set__":
        return args[1] is not args[0]
    is_in_place = (name.endswith("_") and not name.endswith("__")) or (name.startswith("__i") and name not in _READS)
    written = [kwargs.get("out")]
    if is_in_place or name == "__setitem__":
        first = next(iter([*args, *kwargs.values()]), None)  # functions of `torch.nn.init` pass it by keyword
        written += first if isinstance(first, tuple | list) else [first]
    return any(isinstance(one, _Absent) for one in written)


def _converts_to_itself(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a conversion, such as `to`, returns the tensor itself: it already has that dtype and device."""
    like = torch.empty(0, dtype=args[0].dtype, device=args[0]._surfw_device)  # noqa: SLF001 - ours
    return function(like, *args[1:], **kwargs) is like


def _present(value: Any) -> Any:
    if isinstance(value, _Absent):
        return value._surfw_load()  # noqa: SLF001 - ours
    if type(value) in {tuple, list}:
        return type(value)(_present(one) for one in value)
    return value
