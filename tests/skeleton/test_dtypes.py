"""Names of element types, and the dtype of a model."""

import pytest
import torch

from surfw.errors import ConfigurationError, UnsupportedModelError
from surfw.manifest import DTYPE_BITS
from surfw.skeleton.dtypes import automatic_dtype, dtype_name, parse_dtype, safetensors_dtype, torch_dtype


@pytest.mark.parametrize("name", DTYPE_BITS)
def test_every_dtype_of_the_format_is_one_of_torch(name: str) -> None:
    assert torch_dtype(name).itemsize * 8 == DTYPE_BITS[name]
    assert safetensors_dtype(torch_dtype(name)) == name


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("bf16", torch.bfloat16), ("bfloat16", torch.bfloat16), ("fp16", torch.float16), ("float32", torch.float32)],
)
def test_dtypes_to_compute_with(name: str, dtype: torch.dtype) -> None:
    assert parse_dtype(name) == dtype
    assert parse_dtype(dtype_name(dtype)) == dtype


@pytest.mark.parametrize("name", ["int8", "", "float", "torch.float32", "__class__"])
def test_other_dtypes_are_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match=r"is not one of float32, fp32, float16"):
        parse_dtype(name)


@pytest.mark.parametrize(
    ("configured", "stored", "dtype"),
    [
        (torch.bfloat16, ["F32"], torch.bfloat16),
        ("float16", ["F32"], torch.float16),
        ("auto", ["I64", "BF16", "F32"], torch.bfloat16),
        (None, ["BOOL", "F32", "BF16"], torch.float32),
        (None, ["F64"], torch.float64),
    ],
)
def test_the_dtype_to_build_with(configured: object, stored: list[str], dtype: torch.dtype) -> None:
    assert automatic_dtype(configured, stored, where="here") == dtype


def test_a_checkpoint_without_numbers() -> None:
    with pytest.raises(UnsupportedModelError, match="here has no floating-point tensor"):
        automatic_dtype(None, ["I64", "U8"], where="here")
