"""Chunk and stream a custom model class that transformers does not know, and compare it with the resident model.

python examples/custom_model.py
"""

import tempfile
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from surfw import ModelChunker, StreamingBaseModel


class TinyConfig(PreTrainedConfig):
    """The configuration of the model below."""

    model_type = "tiny-mixer"

    def __init__(self, width: int = 64, depth: int = 6, vocab_size: int = 100, **kwargs: Any) -> None:
        self.width, self.depth, self.vocab_size = width, depth, vocab_size
        super().__init__(**kwargs)


class TinyMixer(PreTrainedModel):
    """Embeddings and a list of layers; surfw finds the layers by the `ModuleList`."""

    config_class = TinyConfig

    def __init__(self, config: TinyConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(nn.Linear(config.width, config.width) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        self.post_init()

    def forward(self, input_ids: torch.Tensor) -> BaseModelOutput:
        """Return states of shape (batch, tokens, width) for ids of shape (batch, tokens)."""
        hidden = self.embeddings(input_ids)
        for layer in self.layers:
            hidden = hidden + torch.tanh(layer(hidden))
        return BaseModelOutput(last_hidden_state=self.norm(hidden))


class StreamingTinyMixer(StreamingBaseModel):
    """The same model, streamed. Only `model_class` is required; custom methods go here."""

    model_class = TinyMixer

    def similarity(self, one: torch.Tensor, other: torch.Tensor) -> float:
        """Return the cosine similarity of two inputs' mean states."""
        states = [self(input_ids=ids).last_hidden_state.mean(1) for ids in (one, other)]
        return float(torch.cosine_similarity(*states))


def main() -> None:
    """Save a random model as a checkpoint, chunk it, and run it with two layers in memory."""
    torch.manual_seed(0)
    resident = TinyMixer(TinyConfig()).eval()
    ids = torch.randint(100, (1, 12))
    with tempfile.TemporaryDirectory() as folder:
        resident.save_pretrained(f"{folder}/checkpoint")
        info = ModelChunker(f"{folder}/checkpoint", f"{folder}/store", model_class=TinyMixer).chunk_model_sync()
        print(f"{info.name}: {info.layers} layers in {info.chunks} chunks")
        with StreamingTinyMixer(f"{folder}/store", cache_size=2) as model, torch.no_grad():
            equal = torch.equal(model(input_ids=ids).last_hidden_state, resident(ids).last_hidden_state)
            print(f"equal to the resident model: {equal}; similar to itself: {model.similarity(ids, ids):.3f}")


if __name__ == "__main__":
    main()
