"""A LLaMA checkpoint as a GGUF file for llama.cpp."""

import json
from pathlib import Path

import gguf
import torch
from safetensors.torch import load_file

_LAYER = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_gguf(model_dir: Path, path: Path) -> Path:
    """Write it, in float32."""
    config = json.loads((model_dir / "config.json").read_text())
    heads, pairs = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(pairs)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_vocab_size(config["vocab_size"])
    _add_vocabulary(writer, config["vocab_size"])
    for name, tensor in load_file(model_dir / "model.safetensors").items():
        module = name.removesuffix(".weight")
        data = tensor.float()
        if module.endswith(("q_proj", "k_proj")):
            data = _pair_neighbours(data, heads if module.endswith("q_proj") else pairs)
        writer.add_tensor(f"{_name(module)}.weight", data.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    """Tokens without a meaning: only ids go in and come out."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [f"<t{index}>" for index in range(len(tokens), size)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _pair_neighbours(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp pairs neighbouring dimensions when it rotates, transformers pairs halves."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def _name(module: str) -> str:
    if not module.startswith("model.layers."):
        return _TOP[module]
    _, _, index, rest = module.split(".", 3)
    return f"blk.{index}.{_LAYER[rest]}"
