"""The models of `bench device`: shapes, random weights made on the device, and the timing of generations."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

SHAPES: Mapping[str, Mapping[str, Any]] = {
    "tiny": {
        "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 8000, "max_position_embeddings": 512,
    },
    "1b": {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
        "num_key_value_heads": 4, "vocab_size": 32000, "max_position_embeddings": 2048,
    },
    "8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
    },
}  # fmt: skip
"""Shapes of LLaMAs in bfloat16, by name."""

PROMPT_TOKENS = 16

_LEAST_LAYERS = 4
"""With fewer, all layers would fit in the ring of buffers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """A model's output, to compare with another model's.

    Attributes:
        logits: logits of one forward pass, of shape (rows, tokens, vocabulary), on the CPU.
        tokens: tokens of a greedy generation, per row.
    """

    logits: torch.Tensor
    tokens: list[list[int]]

    def equals(self, other: "Outcome") -> bool:
        """Whether the logits have the same bits, and the tokens are equal up to the shorter length."""
        count = min(len(self.tokens[0]), len(other.tokens[0]))
        same = all(a[:count] == b[:count] for a, b in zip(self.tokens, other.tokens, strict=True))
        return same and torch.equal(self.logits, other.logits)


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """The speed of a generation: tokens per second after the first of each row, and the seconds until that one."""

    per_second: float
    first_seconds: float
    tokens: list[list[int]]


def a_quarter(shape: Mapping[str, Any]) -> dict[str, Any]:
    """A shape with a quarter of the layers and of the vocabulary, so that its head has the same share of the bytes."""
    layers = max(_LEAST_LAYERS, shape["num_hidden_layers"] // 4)
    return {**shape, "num_hidden_layers": layers, "vocab_size": max(4 * PROMPT_TOKENS, shape["vocab_size"] // 4)}


def make_model(shape: Mapping[str, Any], device: torch.device) -> Any:
    """Make a LLaMA of this shape with seeded random weights, in evaluation mode."""
    classes: Any = transformers  # lazily imported, and untyped
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model: Any = classes.LlamaForCausalLM(classes.LlamaConfig(**shape, tie_word_embeddings=False))
    finally:
        torch.set_default_dtype(before)
    model.eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


def save_model(model: Any, folder: Path) -> None:
    """Write a model as a checkpoint."""
    model.save_pretrained(folder, max_shard_size="4GB")


def prompt(rows: int, device: torch.device) -> torch.Tensor:
    """Token ids of shape (rows, 16), different in each row."""
    ids = torch.stack([torch.arange(1, PROMPT_TOKENS + 1) + row for row in range(rows)])
    return ids.to(device)


def generate(model: Any, ids: torch.Tensor, count: int) -> list[list[int]]:
    """Generate greedily without an end token, and return the new tokens."""
    with torch.no_grad():
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False
        )
    tokens: list[list[int]] = found[:, ids.shape[1] :].tolist()
    return tokens


def outcome(model: Any, ids: torch.Tensor, count: int) -> Outcome:
    """Compute a model's logits for a prompt, and generate from it."""
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits.cpu()
    return Outcome(logits=logits, tokens=generate(model, ids, count))


def time_generation(model: Any, ids: torch.Tensor, count: int, synchronize: Callable[[], object]) -> Timing:
    """Time a generation after a short warm-up."""
    generate(model, ids, 2)
    seconds = []
    tokens: list[list[int]] = []
    for length in (1, count):
        synchronize()
        start = time.perf_counter()
        tokens = generate(model, ids, length)
        synchronize()
        seconds.append(time.perf_counter() - start)
    first, whole = seconds
    return Timing(per_second=(count - 1) * ids.shape[0] / (whole - first), first_seconds=first, tokens=tokens)
