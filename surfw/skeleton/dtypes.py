"""Element types: safetensors' names ⇄ torch's, and the choice `from_pretrained(dtype="auto")` would make."""

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
if hasattr(torch, "float8_e8m0fnu"):  # since torch 2.7: powers of two, by which blocks of other weights are scaled
    _BY_NAME["F8_E8M0"] = torch.float8_e8m0fnu
_NAMES = {dtype: name for name, dtype in _BY_NAME.items()}


def torch_dtype(name: str) -> torch.dtype:
    """The dtype that a safetensors name means."""
    return _BY_NAME[name]


def safetensors_dtype(dtype: torch.dtype) -> str:
    """The safetensors name of torch's dtype."""
    return _NAMES[dtype]


def dtype_name(dtype: torch.dtype) -> str:
    """The name a configuration writes, such as `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def parse_dtype(name: str) -> torch.dtype:
    """A dtype a model can compute with, from its name."""
    check_dtype(name)
    found: torch.dtype = getattr(torch, DTYPES[name])
    return found


def automatic_dtype(configured: object, stored: Iterable[str], *, where: str) -> torch.dtype:
    """The dtype to build a model with: what its configuration says, else that of its first floating-point tensor.

    Args:
        configured: the configuration's `dtype`, a torch dtype, a name, or None.
        stored: safetensors dtypes of the source tensors, in order.
        where: names the checkpoint in errors.
    """
    if isinstance(configured, torch.dtype):
        return configured
    if isinstance(configured, str) and configured != "auto":
        return parse_dtype(configured)
    for name in stored:
        if torch_dtype(name).is_floating_point and torch_dtype(name).itemsize > 1:  # not float8
            return torch_dtype(name)
    raise UnsupportedModelError(f"{where} has no floating-point tensor")
