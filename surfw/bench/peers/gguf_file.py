"""Converts a LLaMA or Qwen3-MoE checkpoint to GGUF for llama.cpp, one tensor at a time, without a real vocabulary."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surfw.errors import UnsupportedModelError

if TYPE_CHECKING:
    import torch

KINDS = ("bf16", "q8_0", "q4_0")
"""How matrices can be stored; all other tensors are float32."""

_ARCHITECTURES = {"llama": "llama", "qwen3_moe": "qwen3moe"}
"""llama.cpp's names for these model types."""
_EXPERT = re.compile(r"(model\.layers\.\d+\.mlp)\.experts\.(\d+)\.(gate|up|down)_proj\.weight")
_LAYER = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "mlp.gate": "ffn_gate_inp", "mlp.gate_exps": "ffn_gate_exps",
    "mlp.up_exps": "ffn_up_exps", "mlp.down_exps": "ffn_down_exps", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def check_gguf(model_dir: str) -> str | None:
    """Why a checkpoint cannot be converted here; None if it can."""
    if find_spec("gguf") is None:
        return "gguf, which converts the checkpoint for llama.cpp, is not installed; 'pip install gguf' does it"
    config = _read_config(Path(model_dir))
    rope = config.get("rope_parameters") or {}
    heads = config.get("num_attention_heads", 1)
    kind = config.get("model_type")
    is_whole = kind == "llama" and config.get("head_dim") in {None, config.get("hidden_size", 0) // heads}
    is_mixture = kind == "qwen3_moe" and not config.get("mlp_only_layers") and config.get("decoder_sparse_step", 1) == 1
    is_plain = (
        (is_whole or is_mixture)
        and rope.get("rope_type", "default") == "default"
        and not config.get("rope_scaling")
        and not config.get("attention_bias")
        and not config.get("mlp_bias")
    )
    if is_plain:
        return None
    return f"surfw converts plain LLaMA and Qwen3-MoE checkpoints for it, and this one is not: a {kind!a:.40}"


def write_gguf(model_dir: Path, path: Path, kind: str = "bf16", *, head: str | None = None) -> Path:
    """Convert a checkpoint to a GGUF file.

    Args:
        model_dir: a checkpoint that `check_gguf` accepts.
        path: the file to write.
        kind: one of `KINDS`, for all matrices.
        head: one of `KINDS`, for the matrix that makes the logits; None for `kind`.

    Raises:
        UnsupportedModelError: the checkpoint cannot be converted here.
    """
    if reason := check_gguf(str(model_dir)):
        raise UnsupportedModelError(f"{model_dir}: {reason}")
    import gguf

    config = _read_config(model_dir)
    architecture = _ARCHITECTURES[config["model_type"]]
    writer = gguf.GGUFWriter(path, architecture, use_temp_file=True)  # otherwise it holds all tensors in memory
    _add_config(writer, config, getattr(gguf.LlamaFileType, f"MOSTLY_{kind.upper()}"))
    _add_vocabulary(writer, config["vocab_size"])
    tensors = dict(_read_shapes(model_dir))
    last = "lm_head.weight" if "lm_head.weight" in tensors else "model.embed_tokens.weight"
    for name, parts in _stacked(tensors).items():
        weight = _read(tensors, parts)
        module = name.removesuffix(".weight")
        if architecture == "llama" and module.endswith(("q_proj", "k_proj")):
            heads = config["num_attention_heads"]
            pairs = config.get("num_key_value_heads") or heads
            weight = _pair_neighbours(weight, heads if module.endswith("q_proj") else pairs)
        taken = (head or kind) if name == last else kind
        _add_tensor(writer, f"{_name(module)}.weight", weight, None if weight.dim() == 1 else taken.upper())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _read_config(model_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((model_dir / "config.json").read_text("utf-8"))
    return found


def _read_shapes(model_dir: Path) -> Iterator[tuple[str, Path]]:
    """The names of a checkpoint's tensors, each with its file."""
    from safetensors import safe_open

    for shard in sorted(model_dir.glob("*.safetensors")):
        with safe_open(shard, "pt") as opened:
            yield from ((name, shard) for name in opened.keys() if name.endswith(".weight"))  # noqa: SIM118 - no dict


def _stacked(tensors: Iterable[str]) -> dict[str, list[str]]:
    """The source tensors of each tensor in the file: itself, or all experts that form one stack, in order."""
    stacks: dict[str, list[str]] = {}
    for name in sorted(tensors, key=lambda one: int(found[2]) if (found := _EXPERT.fullmatch(one)) else -1):
        found = _EXPERT.fullmatch(name)
        stacks.setdefault(f"{found[1]}.{found[3]}_exps.weight" if found else name, []).append(name)
    return stacks


def _read(tensors: Mapping[str, Path], names: Sequence[str]) -> "torch.Tensor":
    """Load one tensor of a checkpoint, or stack several experts."""
    import torch
    from safetensors import safe_open

    found = []
    for name in names:
        with safe_open(tensors[name], "pt") as opened:
            found.append(opened.get_tensor(name))
    return torch.stack(found) if _EXPERT.fullmatch(names[0]) else found[0]


def _add_config(writer: Any, config: dict[str, Any], file_type: int) -> None:
    heads = config["num_attention_heads"]
    writer.add_file_type(file_type)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    head_size = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_rope_dimension_count(head_size)
    if config["model_type"] == "qwen3_moe":
        writer.add_key_length(head_size)
        writer.add_value_length(head_size)
        writer.add_expert_count(config.get("num_experts") or config["num_local_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    rope = config.get("rope_parameters") or config
    writer.add_rope_freq_base(float(rope.get("rope_theta") or 10000.0))
    writer.add_vocab_size(config["vocab_size"])


def _add_vocabulary(writer: Any, size: int) -> None:
    """Add placeholder tokens: only token ids go in and out."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [f"<t{index}>" for index in range(len(tokens), size)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _add_tensor(writer: Any, name: str, weight: "torch.Tensor", kind: str | None) -> None:
    import gguf

    data = weight.float().contiguous().numpy()
    if kind is None:
        writer.add_tensor(name, data)
    else:
        dtype = gguf.GGMLQuantizationType[kind]
        coded = gguf.quants.quantize(data, dtype)
        writer.add_tensor(name, coded, raw_shape=coded.shape, raw_dtype=dtype)


def _pair_neighbours(weight: "torch.Tensor", heads: int) -> "torch.Tensor":
    """Reorder rows for rotary embeddings: llama.cpp pairs neighbouring dimensions, transformers pairs halves."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def _name(module: str) -> str:
    if not module.startswith("model.layers."):
        return _TOP[module]
    _, _, index, rest = module.split(".", 3)
    return f"blk.{index}.{_LAYER[rest]}"
