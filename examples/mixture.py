"""Write a mixture of experts for benchmarks: random weights, and routers as skewed as those of trained models.

    python examples/mixture.py my-mixture
    surfw bench infer my-mixture --cap 1.2GB --against resident,accelerate

It has the shape of a small Qwen3-MoE: 10 layers of 128 experts, 8 of which compute each token, 3.2 GB in bfloat16.

The routers are skewed as follows. Every embedding has a large component in one common direction, which the residual
stream keeps because everything added to it is small. A router's row for an expert has a component in that direction
that falls with the logarithm of the expert's rank; the ranks are shuffled per layer, and the rest of the row is noise.
So an expert is chosen with a probability of about rank ** -SKEW, whatever the text. Nothing here depends on surfw.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Qwen3MoeConfig

SKEW = 1.0
DIRECTION = 0.9
"""The component of an embedding in the common direction, as a share of its length."""


def write(folder: Path, *, layers: int, experts: int, chosen: int, hidden: int, width: int) -> None:
    """Write config.json, an index, and one shard per layer."""
    config = Qwen3MoeConfig(
        architectures=["Qwen3MoeForCausalLM"],
        hidden_size=hidden,
        intermediate_size=width,
        moe_intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 256),
        head_dim=64,
        num_experts=experts,
        num_experts_per_tok=chosen,
        norm_topk_prob=True,
        vocab_size=32000,
        max_position_embeddings=4096,
        dtype="bfloat16",
    )
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    common = torch.nn.functional.normalize(torch.randn(hidden, generator=generator), dim=0)

    def random(*shape: int, scale: float = 0.02) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * scale).bfloat16()

    places: dict[str, str] = {}

    def save(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / name, metadata={"format": "pt"})
        places.update(dict.fromkeys(tensors, name))

    heads, kv_heads = config.num_attention_heads * 64, config.num_key_value_heads * 64
    noise = torch.nn.functional.normalize(torch.randn(32000, hidden, generator=generator), dim=1)
    embedded = DIRECTION * common + (1 - DIRECTION**2) ** 0.5 * noise
    save(
        "outside.safetensors",
        {
            "model.embed_tokens.weight": embedded.bfloat16(),
            "model.norm.weight": torch.ones(hidden).bfloat16(),
            "lm_head.weight": random(32000, hidden),
        },
    )
    for layer in range(layers):
        path = f"model.layers.{layer}"
        ranks = torch.randperm(experts, generator=generator) + 1
        # A normed input has a component of about hidden ** 0.5 * DIRECTION in the common direction. The rows are scaled
        # so that its remaining noise becomes noise of variance 1.
        gate = torch.randn(experts, hidden, generator=generator) / (hidden * (1 - DIRECTION**2)) ** 0.5
        gate -= (gate @ common)[:, None] * common
        gate += -SKEW * ranks.log()[:, None] * common / (hidden**0.5 * DIRECTION)
        tensors = {
            f"{path}.self_attn.q_proj.weight": random(heads, hidden),
            f"{path}.self_attn.k_proj.weight": random(kv_heads, hidden),
            f"{path}.self_attn.v_proj.weight": random(kv_heads, hidden),
            f"{path}.self_attn.o_proj.weight": random(hidden, heads, scale=0.001),
            f"{path}.self_attn.q_norm.weight": torch.ones(64).bfloat16(),
            f"{path}.self_attn.k_norm.weight": torch.ones(64).bfloat16(),
            f"{path}.input_layernorm.weight": torch.ones(hidden).bfloat16(),
            f"{path}.post_attention_layernorm.weight": torch.ones(hidden).bfloat16(),
            f"{path}.mlp.gate.weight": gate.bfloat16(),
        }
        for index in range(experts):
            expert = f"{path}.mlp.experts.{index}"
            tensors[f"{expert}.gate_proj.weight"] = random(width, hidden)
            tensors[f"{expert}.up_proj.weight"] = random(width, hidden)
            tensors[f"{expert}.down_proj.weight"] = random(hidden, width, scale=0.001)
        save(f"layer-{layer:02d}.safetensors", tensors)
    total = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    index_file = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file))
    print(f"{folder}: {total / 1e9:.2f} GB")


def main() -> None:
    """Parse the options and write the model."""
    parser = argparse.ArgumentParser(description="Write a mixture of experts with random weights.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--chosen", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--width", type=int, default=384)
    options = parser.parse_args()
    write(
        options.folder,
        layers=options.layers,
        experts=options.experts,
        chosen=options.chosen,
        hidden=options.hidden,
        width=options.width,
    )


if __name__ == "__main__":
    main()
