"""Converts dtype names between safetensors and torch, and chooses a dtype as `from_pretrained(dtype="auto")` does."""

from collections.abc import Iterable

import torch

from surfw.config import DTYPES, check_dtype
from surfw.errors import UnsupportedModelError

_BY_NAME = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "U16": torch.uint16, "I16": torch.int16, "F16": torch.float16, "BF16": torch.bfloat16,
    "U32": torch.uint32, "I32": torch.int32, "F32": torch.float32, "C64": torch.complex64, "U64": torch.uint64,
    "I64": torch.int64, "F64": torch.float64,
}  # fmt: skip
if hasattr(torch, "float8_e8m0fnu"):  # since torch 2.7: powers of two, used as block scales
    _BY_NAME["F8_E8M0"] = torch.float8_e8m0fnu
_NAMES = {dtype: name for name, dtype in _BY_NAME.items()}


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype for a safetensors name."""
    return _BY_NAME[name]


def safetensors_dtype(dtype: torch.dtype) -> str:
    """The safetensors name for a torch dtype."""
    return _NAMES[dtype]


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype's name in configurations, such as `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def parse_dtype(name: str) -> torch.dtype:
    """Parse the name of a dtype that models can compute with.

    Raises:
        ConfigurationError: there is no such dtype.
    """
    check_dtype(name)
    found: torch.dtype = getattr(torch, DTYPES[name])
    return found


def automatic_dtype(configured: object, stored: Iterable[str], *, where: str) -> torch.dtype:
    """Choose the dtype to build a model with: its configuration's, else that of its first floating-point tensor.

    Float8 tensors are skipped.

    Args:
        configured: the configuration's `dtype`: a torch dtype, a name, or None.
        stored: the safetensors dtypes of the source tensors, in order.
        where: names the checkpoint in errors.

    Raises:
        ConfigurationError: the configured name is unknown.
        UnsupportedModelError: there is no floating-point tensor.
    """
    if isinstance(configured, torch.dtype):
        return configured
    if isinstance(configured, str) and configured != "auto":
        return parse_dtype(configured)
    for name in stored:
        if torch_dtype(name).is_floating_point and torch_dtype(name).itemsize > 1:  # skip float8
            return torch_dtype(name)
    raise UnsupportedModelError(f"{where} has no floating-point tensor")
