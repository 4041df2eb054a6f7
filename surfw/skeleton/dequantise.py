"""Dequantises checkpoints with transformers' own operations.

Given a quantizer, transformers' loader collects the parts of each weight (blocks, scales, shapes) and makes the dense
weight from them before any other conversion. `loading` does the same.
"""

from collections.abc import Mapping
from typing import Any

import torch

from surfw.config import DEQUANTISED
from surfw.errors import UnsupportedModelError
from surfw.skeleton.guards import foreign_errors

_PACKAGES = {"compressed-tensors": "compressed_tensors"}
"""Packages that transformers needs for a method; each is installed by an extra of surfw."""


def open_quantizer(settings: Mapping[str, Any] | None, *, where: str) -> Any:
    """Return the transformers quantizer that dequantises a checkpoint's weights, as `dequantize=True` does.

    Args:
        settings: the `quantization_config` of its configuration; None if the configuration has none.
        where: names the checkpoint in errors.

    Raises:
        UnsupportedModelError: the weights are not quantised, or a package is missing.
    """
    if settings is None:
        raise UnsupportedModelError(
            f"{where} has no quantised weights (quantization_config in config.json) that could be dequantised; "
            "leave --dequantize (dequantize=) out, and convert with --dtype (dtype=)"
        )
    method = settings.get("quant_method")
    assert method in DEQUANTISED, "others are refused when the checkpoint is opened"
    _expect_package(method, where)
    from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig

    with foreign_errors(f"the quantisation of {where} ({method})"):
        wanted: Any = AutoQuantizationConfig.from_dict(dict(settings))
        wanted.dequantize = True
        quantizer: Any = AutoHfQuantizer.from_config(wanted, pre_quantized=True)
        quantizer.validate_environment()
    return quantizer


def _expect_package(method: str, where: str) -> None:
    from importlib.util import find_spec

    package = _PACKAGES.get(method)
    if package is not None and find_spec(package) is None:
        raise UnsupportedModelError(
            f"{where} has weights quantised with {method}, which needs the package of that name to be dequantised; "
            f"install it with: pip install 'surfw[{method}]'"
        )


def source_dtype(quantizer: Any, converter: Any, tensor: torch.Tensor, dtype: torch.dtype) -> torch.dtype | None:
    """The dtype that a source tensor is cast to before conversion; None if it is not cast."""
    found: torch.dtype | None = dtype if quantizer is None else quantizer.get_new_dtype(converter, tensor, dtype)
    return found
