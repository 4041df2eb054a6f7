"""GGUF files written by the package gguf: their dense weights have the bits that transformers makes of them."""

import asyncio
import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, get_tensor_name_map, quantize
from tokenizers.pre_tokenizers import ByteLevel

from surfw import StreamingModel
from surfw.chunking import prepare_model, write_model
from surfw.errors import CheckpointError, SurfwError, UnsupportedModelError
from surfw.manifest import Manifest
from surfw.storage import open_backend

IDS = torch.tensor([[5, 9, 70, 3, 41, 8]])
LAYERS, HIDDEN, INNER = 2, 64, 96
TOKENS = ["<s>", "</s>", *sorted(ByteLevel.alphabet()), "he"]
SIZES = {
    "vocab_size": len(TOKENS), "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
EXPERTS = {"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632, "num_experts": 4}
"""Transformers reads only the last of these from a file, and assumes the others."""


def write(file: Path, name: str, model: Any, kind: GGMLQuantizationType, *, parts: int = 0) -> Path:
    """A file with random weights for a model: matrices in the ggml type, the rest in float32."""
    writer, values = GGUFWriter(file, name), np.random.default_rng(0)
    add_settings(writer, parts)
    names = get_tensor_name_map(MODEL_ARCH[name.upper()], LAYERS)
    for own, tensor in model.state_dict().items():
        path, leaf = own.rsplit(".", 1)
        if path.endswith(".experts"):
            add_experts(writer, path, leaf, tensor.shape, kind, values)
            continue
        shape = tuple(tensor.shape)
        is_turned = name == "gpt2" and tensor.ndim == 2 and ".h." in own  # as llama.cpp transposes its Conv1D
        weights = values.standard_normal(shape[::-1] if is_turned else shape).astype(np.float32) * 0.1
        if path.endswith("shared_expert_gate"):
            weights = weights[0]  # llama.cpp stores matrices of one row as vectors
        add_tensor(writer, f"{names.get_name(path)}.{leaf}", weights, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def add_settings(writer: GGUFWriter, parts: int) -> None:
    writer.add_name("toy")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_layer_norm_eps(1e-5)
    writer.add_rope_dimension_count(HIDDEN // 4)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_expert_count(EXPERTS["num_experts"])
    writer.add_expert_used_count(2)
    writer.add_expert_feed_forward_length(EXPERTS["moe_intermediate_size"])
    writer.add_expert_shared_feed_forward_length(EXPERTS["shared_expert_intermediate_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, *[1] * (len(TOKENS) - 2)])
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    if parts:
        writer.add_uint16("split.count", parts)


def add_experts(
    writer: GGUFWriter, path: str, leaf: str, shape: torch.Size, kind: GGMLQuantizationType, values: Any
) -> None:
    """A layer's experts as llama.cpp stores them, with gate and up separate."""
    block, (experts, outer, inner) = path.split(".")[2], shape
    wanted = {"gate": outer // 2, "up": outer // 2} if leaf == "gate_up_proj" else {"down": outer}
    for role, rows in wanted.items():
        weights = values.standard_normal((experts, rows, inner)).astype(np.float32) * 0.1
        add_tensor(writer, f"blk.{block}.ffn_{role}_exps.weight", weights, kind)


def add_tensor(writer: GGUFWriter, name: str, weights: Any, kind: GGMLQuantizationType) -> None:
    if weights.ndim > 1 and not name.startswith(("position_embd", "blk.0.ffn_gate_inp", "blk.1.ffn_gate_inp")):
        writer.add_tensor(name, quantize(weights, kind), raw_dtype=kind)
    else:
        writer.add_tensor(name, weights)


def llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))


def qwen2() -> Any:
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES))


def qwen2_moe() -> Any:
    return transformers.Qwen2MoeForCausalLM(transformers.Qwen2MoeConfig(**SIZES, **EXPERTS))


def gpt2() -> Any:
    config = transformers.GPT2Config(
        vocab_size=len(TOKENS), n_embd=HIDDEN, n_layer=LAYERS, n_head=4, n_inner=4 * HIDDEN, n_positions=1024
    )
    return transformers.GPT2LMHeadModel(config)


def chunk(file: Path, store: Path, **options: Any) -> Manifest:
    with prepare_model(str(file), **options) as prepared:
        return asyncio.run(write_model(prepared, open_backend(store)))


@pytest.mark.parametrize(
    ("name", "make", "kind", "dtype"),
    [
        ("llama", llama, GGMLQuantizationType.Q4_0, None),
        ("qwen2", qwen2, GGMLQuantizationType.Q8_0, "bfloat16"),
        ("qwen2moe", qwen2_moe, GGMLQuantizationType.Q8_0, None),
        ("gpt2", gpt2, GGMLQuantizationType.F16, "float16"),
    ],
)
def test_dense_weights_have_transformers_own_bits(
    tmp_path: Path, name: str, make: Callable[[], Any], kind: GGMLQuantizationType, dtype: str | None
) -> None:
    file = write(tmp_path / "toy.gguf", name, make(), kind)
    manifest = chunk(file, tmp_path / "store", dtype=dtype)
    assert (manifest.name, manifest.dtype) == ("toy", dtype or "float32")
    assert len(manifest.experts) == (LAYERS if name.endswith("moe") else 0)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="toy.gguf", dtype=getattr(torch, manifest.dtype)
    ).eval()
    for parameter in loaded.parameters():  # GPT-2's matrices are transposed in memory, which gives other sums
        parameter.data = parameter.data.contiguous()
    text = "hello, weights"
    with StreamingModel.open(tmp_path / "store") as model:
        for own, tensor in loaded.named_parameters():
            assert torch.equal(model.model.get_parameter(own), tensor), own
        with torch.no_grad():
            assert torch.equal(model(IDS).logits, loaded(IDS).logits)
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="toy.gguf")
        assert model.tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"] != []
        assert model.model.generation_config.eos_token_id == loaded.generation_config.eos_token_id


def damage(file: Path, data: bytes) -> Path:
    file.write_bytes(data)
    return file


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (
            lambda path: write(path, "llama", llama(), GGMLQuantizationType.F16, parts=3),
            UnsupportedModelError,
            "one of 3",
        ),
        (lambda path: damage(path, b"nothing"), CheckpointError, "does not begin with GGUF"),
        (lambda path: damage(path, b"GGUF" + bytes(40)), CheckpointError, "is damaged, or no GGUF file"),
    ],
)
def test_files_that_cannot_be_read_are_refused(
    tmp_path: Path, make: Callable[[Path], Path], error: type[SurfwError], said: str
) -> None:
    file = make(tmp_path / "bad.gguf")
    with pytest.raises(error) as refused:
        chunk(file, tmp_path / "store")
    assert said in str(refused.value)
    assert str(file) in str(refused.value)


def test_a_file_that_ends_too_soon_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "short.gguf", "llama", llama(), GGMLQuantizationType.Q8_0)
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"short\.gguf is"):
        chunk(file, tmp_path / "store")


def test_a_model_whose_tokenizer_cannot_be_made_takes_ids(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "mute.gguf"
    TOKENS.append(TOKENS.pop()[::-1])  # then the merge creates no token
    try:
        write(file, "llama", llama(), GGMLQuantizationType.Q8_0)
    finally:
        TOKENS.append(TOKENS.pop()[::-1])
    with caplog.at_level(logging.WARNING, "surfw"):
        manifest = chunk(file, tmp_path / "store")
    assert manifest.files == ()
    assert any("the tokenizer in" in one.message and "takes token ids only" in one.message for one in caplog.records)


def test_the_package_is_named_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = damage(tmp_path / "toy.gguf", b"GGUF")
    monkeypatch.setattr("surfw.checkpoint.gguf.find_spec", lambda name: None)
    with pytest.raises(UnsupportedModelError, match=r"needs a package: pip install 'surfw\[gguf\]'"):
        chunk(file, tmp_path / "store")
    assert importlib.util.find_spec("gguf") is not None
