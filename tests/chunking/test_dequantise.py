"""Quantised checkpoints, written by other libraries, become dense chunks with the values that transformers computes."""

import asyncio
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from transformers import CompressedTensorsConfig, FineGrainedFP8Config, Mxfp4Config
from transformers.integrations.finegrained_fp8 import Fp8Quantize
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

from surfw import StreamingModel
from surfw.chunking import prepare_model, write_model
from surfw.errors import CheckpointError, ConfigurationError, UnsupportedModelError
from surfw.manifest import Manifest
from surfw.storage import open_backend

IDS = torch.tensor([[5, 9, 70, 3, 41, 8]])
SIZES = {"vocab_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(hidden_size=128, intermediate_size=192, **SIZES)
    return transformers.LlamaForCausalLM(config).to(torch.bfloat16)


def mixtral() -> Any:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(hidden_size=64, intermediate_size=64, num_local_experts=3, **SIZES)
    return transformers.MixtralForCausalLM(config).to(torch.bfloat16)


def gpt_oss() -> Any:
    torch.manual_seed(0)
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    kinds = ["sliding_attention", "full_attention"]
    config = transformers.GptOssConfig(
        hidden_size=64, intermediate_size=64, head_dim=16, layer_types=kinds, **experts, **SIZES
    )
    return transformers.GptOssForCausalLM(config).to(torch.bfloat16)


def rewrite(folder: Path, quantisation: dict[str, Any], work: Callable[[str, torch.Tensor], dict[str, Any]]) -> None:
    """Replace a checkpoint's tensors, and change its configuration accordingly."""
    found = load_file(folder / "model.safetensors")
    tensors = {name: one for old, tensor in found.items() for name, one in work(old, tensor).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantisation}, default=str))


def save_fp8(folder: Path, make: Callable[[], Any] = llama) -> None:
    """FP8 in blocks, quantised by transformers."""
    make().save_pretrained(folder)
    settings = FineGrainedFP8Config(weight_block_size=(32, 32))
    quantise = Fp8Quantize(FineGrainedFP8HfQuantizer(settings, pre_quantized=False))

    def work(name: str, tensor: torch.Tensor) -> dict[str, Any]:
        if not any(part in name for part in ("proj", ".w1.", ".w2.", ".w3.")):
            return {name: tensor}
        made = quantise.convert({name: [tensor]})
        return {one: value[0] if isinstance(value, list) else value for one, value in made.items()}

    rewrite(folder, settings.to_dict() | {"quant_method": "fp8"}, work)


def save_mxfp4(folder: Path) -> None:
    """MXFP4, in which any bytes are valid blocks and scales."""
    gpt_oss().save_pretrained(folder)

    def work(name: str, tensor: torch.Tensor) -> dict[str, Any]:
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            return {name: tensor}
        experts, inner, outer = tensor.shape
        blocks = torch.randint(0, 256, (experts, outer, inner // 32, 16), dtype=torch.uint8)
        scales = torch.randint(117, 124, (experts, outer, inner // 32), dtype=torch.uint8)
        return {f"{name}_blocks": blocks, f"{name}_scales": scales}

    rewrite(folder, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, work)


def save_compressed(folder: Path, **weights: Any) -> None:
    """A model compressed and saved by the package compressed-tensors."""
    model, wanted = llama(), QuantizationArgs(**weights)
    scheme = QuantizationScheme(targets=["Linear"], weights=wanted)
    apply_quantization_config(model, QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head"]))
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is None:
            continue
        rows = module.weight.shape[0]
        values = module.weight.reshape(rows, -1, wanted.group_size or module.weight.shape[1])
        scale, zero = calculate_qparams(values.amin(-1), values.amax(-1), wanted)
        module.weight_scale.data.copy_(scale.reshape(module.weight_scale.shape))
        if hasattr(module, "weight_zero_point"):
            module.weight_zero_point.data.copy_(zero.reshape(module.weight_zero_point.shape))
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))


KINDS: dict[str, tuple[Callable[[Path], None], Any]] = {
    "fp8": (save_fp8, FineGrainedFP8Config),
    "fp8 experts": (lambda folder: save_fp8(folder, mixtral), FineGrainedFP8Config),
    "mxfp4 experts": (save_mxfp4, Mxfp4Config),
    "int4": (
        lambda folder: save_compressed(folder, num_bits=4, strategy="group", group_size=32, symmetric=False),
        CompressedTensorsConfig,
    ),
    "int8": (lambda folder: save_compressed(folder, num_bits=8, strategy="channel"), CompressedTensorsConfig),
    "float8": (
        lambda folder: save_compressed(folder, num_bits=8, type="float", strategy="channel"),
        CompressedTensorsConfig,
    ),
}


def chunk(folder: Path, store: Path, dequantize: str | None = "bfloat16", **options: Any) -> Manifest:
    with prepare_model(str(folder), name="model", dequantize=dequantize, **options) as prepared:
        return asyncio.run(write_model(prepared, open_backend(store)))


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("kind", KINDS)
def test_dense_weights_have_transformers_own_bits(tmp_path: Path, kind: str) -> None:
    save, settings = KINDS[kind]
    save(tmp_path / "quantised")
    manifest = chunk(tmp_path / "quantised", tmp_path / "store")
    assert "quantization_config" not in manifest.config
    assert bool(manifest.experts) is kind.endswith("experts")
    assert {tensor.dtype for tensor in manifest.tensors.values()} == {"BF16"}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "quantised", dtype=torch.bfloat16, quantization_config=settings(dequantize=True)
    ).eval()
    with StreamingModel.open(tmp_path / "store") as model:
        for name, tensor in loaded.named_parameters():
            assert torch.equal(model.model.get_parameter(name), tensor), name
        with torch.no_grad():
            assert torch.equal(model(IDS).logits, loaded(IDS).logits)


def test_a_weight_without_its_scale_is_not_taken_for_values(tmp_path: Path) -> None:
    save_fp8(tmp_path / "fp8")
    weights = load_file(tmp_path / "fp8" / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight_scale_inv")
    save_file(weights, tmp_path / "fp8" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"has model.layers.1.mlp.up_proj.weight in F8_E4M3 and no scale for it"):
        chunk(tmp_path / "fp8", tmp_path / "store")


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "aqlm", None])
def test_other_methods_are_refused_by_name(tmp_path: Path, method: str | None) -> None:
    llama().save_pretrained(tmp_path / "other")
    rewrite(tmp_path / "other", {"bits": 4} | ({"quant_method": method} if method else {}), lambda *one: dict([one]))
    for dequantize in ("bfloat16", None):
        with pytest.raises(UnsupportedModelError) as refused:
            chunk(tmp_path / "other", tmp_path / "store", dequantize)
        said = f"config.json asks for quantised weights ({(method or 'of an unnamed kind')!r}), and surfw makes dense"
        assert f"{tmp_path}/other/{said}" in str(refused.value)


def test_what_is_not_quantised_is_not_dequantised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llama().save_pretrained(tmp_path / "dense")
    with pytest.raises(UnsupportedModelError, match=r"dense has no quantised weights .*; leave --dequantize"):
        chunk(tmp_path / "dense", tmp_path / "store")
    with pytest.raises(ConfigurationError, match="dtype and dequantize exclude each other"):
        chunk(tmp_path / "dense", tmp_path / "store", dtype="float16")
    rewrite(tmp_path / "dense", {"quant_method": "compressed-tensors"}, lambda *one: dict([one]))
    with pytest.raises(UnsupportedModelError, match=r"make dense ones of them with --dequantize"):
        chunk(tmp_path / "dense", tmp_path / "store", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedModelError, match=r"install it with: pip install 'surfw\[compressed-tensors\]'"):
        chunk(tmp_path / "dense", tmp_path / "store")
