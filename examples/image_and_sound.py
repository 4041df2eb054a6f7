"""Run models that take no text: an image through a ViT, and a sound through a Whisper.

python examples/image_and_sound.py

Both are small, with random weights, created and chunked here; your own checkpoint is chunked in the same way. Use
transformers' AutoImageProcessor and AutoFeatureExtractor to turn pictures and recordings into tensors.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import (
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from surfw import ModelChunker, StreamingModel


def make_models(folder: Path) -> None:
    """Save a small ViT and a small Whisper with `save_pretrained`."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
    ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=3)).save_pretrained(
        folder / "vit"
    )
    config = WhisperConfig(
        vocab_size=100, d_model=64, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=96, decoder_ffn_dim=96,
        encoder_attention_heads=4, decoder_attention_heads=4, num_mel_bins=16, max_source_positions=100,
        max_target_positions=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3,
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    WhisperForConditionalGeneration(config).save_pretrained(folder / "whisper")


def main(folder: Path) -> None:
    """Chunk both models and stream them."""
    make_models(folder)
    for name in ("vit", "whisper"):
        ModelChunker(folder / name, output_dir=folder / "chunks").chunk_model_sync()

    with StreamingModel.open(folder / "chunks", "vit", cache_size=2) as model:
        image = torch.linspace(0, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)  # stands for an image processor's pixel_values
        label = int(model(pixel_values=image).logits[0].argmax())
        print("image:", model.model.config.id2label[label])

    with StreamingModel.open(folder / "chunks", "whisper", cache_size=2) as model:
        second = np.sin(np.linspace(0, 2 * np.pi * 440, 16_000, dtype=np.float32))  # the note A, sampled at 16 kHz
        extractor = WhisperFeatureExtractor(feature_size=16, chunk_length=2, sampling_rate=16_000)
        features = extractor(second, sampling_rate=16_000, return_tensors="pt").input_features
        start = torch.tensor([[model.model.config.decoder_start_token_id]])
        first = int(model(input_features=features, decoder_input_ids=start).logits[0, -1].argmax())
        print("sound: begins with token", first)  # model.generate(features) would continue


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(temporary))
