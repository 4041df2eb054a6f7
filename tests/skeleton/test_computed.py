"""Weights that transformers computes itself are not missing; weights that are still to be trained are."""

import asyncio
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from surfw.chunking import prepare_model, write_model
from surfw.errors import CheckpointError, UnsupportedModelError
from surfw.models import StreamingModel
from surfw.storage import open_backend
from tests.exactness.families import VOCABULARY
from tests.exactness.test_families import assert_equal, inputs, outputs
from tests.models.test_streaming import opener

SEQ2SEQ = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": VOCABULARY,
    "max_position_embeddings": 64, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1,
    "forced_eos_token_id": 1, "decoder_vocab_size": VOCABULARY,
}  # fmt: skip


def saved(class_name: str, folder: Path, settings: dict[str, Any]) -> Path:
    torch.manual_seed(3)
    cls = getattr(transformers, class_name)
    cls(cls.config_class(**settings)).eval().save_pretrained(folder)
    return folder


def chunked(folder: Path) -> Path:
    store = folder.with_name("store")
    with prepare_model(str(folder)) as prepared:
        asyncio.run(write_model(prepared, open_backend(store)))
    return store


def drop(folder: Path, word: str) -> int:
    """Remove the tensors with this word in their names from a checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if word not in name}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return len(tensors) - len(kept)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("class_name", ["MarianMTModel", "PegasusForConditionalGeneration"])
def test_sinusoidal_positions_are_computed(class_name: str, dtype: str | None, tmp_path: Path) -> None:
    folder = saved(class_name, tmp_path / "model", SEQ2SEQ | ({"dtype": dtype} if dtype else {}))
    dropped = drop(folder, "embed_positions")
    assert dropped == (0 if class_name == "MarianMTModel" else 2), "of Marian's, transformers saves none"
    resident = copy.deepcopy(getattr(transformers, class_name).from_pretrained(folder).eval())
    given = inputs(resident, 2)
    with StreamingModel.open(opener(chunked(folder)), cache_size=1) as model:
        assert "model.encoder.embed_positions.weight" in model.manifest.tensors
        assert_equal(outputs(model, given), outputs(resident, given), class_name)
    with pytest.raises(UnsupportedModelError, match=r"embed_positions.weight is not .* transformers computes it"):
        asyncio.run(_in_place(folder))


async def _in_place(folder: Path) -> None:
    from surfw.chunking.in_place import build_manifest

    with await asyncio.to_thread(prepare_model, str(folder)) as prepared:
        await build_manifest(prepared)


@pytest.mark.parametrize("word", ["layer_norm", "shared", "fc1.bias"])
def test_what_is_to_be_trained_is_missing(word: str, tmp_path: Path) -> None:
    folder = saved("MarianMTModel", tmp_path / "model", SEQ2SEQ)
    assert drop(folder, word) > 0
    with pytest.raises(CheckpointError, match=f"lacks .* such as model.*{word}.*; surfw never makes weights up"):
        chunked(folder)


SPEECH = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "conv_dim": [16, 16], "conv_stride": [5, 4], "conv_kernel": [10, 8], "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "vocab_size": 32,
}  # fmt: skip


@pytest.mark.parametrize("class_name", ["Wav2Vec2ForCTC", "HubertModel", "WavLMForSequenceClassification", "SEWModel"])
def test_weights_that_are_made_of_others_before_each_use(class_name: str, tmp_path: Path) -> None:
    """Weight norm by parametrisation: two tensors are stored, from which the weight is computed."""
    folder = saved(class_name, tmp_path / "model", SPEECH)
    resident = copy.deepcopy(getattr(transformers, class_name).from_pretrained(folder).eval())
    sound = {"input_values": torch.randn(1, 2000)}
    with StreamingModel.open(opener(chunked(folder)), cache_size=1) as model, torch.no_grad():
        assert any("parametrizations.weight.original0" in name for name in model.manifest.tensors)
        for _ in range(2):
            assert torch.equal(model(**sound)[0], resident(**sound)[0])


@pytest.mark.parametrize(
    ("class_name", "settings", "given"),
    [
        (
            "SegformerForImageClassification",
            {"hidden_sizes": [8, 8, 8, 16], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 1, 2]},
            {"pixel_values": torch.ones(1, 3, 64, 64)},
        ),
        (
            "LxmertModel",
            {
                "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 40,
                "l_layers": 1, "x_layers": 1, "r_layers": 1, "visual_feat_dim": 16,
            },
            {
                "input_ids": torch.tensor([[5, 6, 7]]),
                "visual_feats": torch.ones(1, 2, 16), "visual_pos": torch.zeros(1, 2, 4),
            },
        ),
    ],
)  # fmt: skip
def test_configurations_without_the_usual_sizes_open(
    class_name: str, settings: dict[str, Any], given: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    folder = saved(class_name, tmp_path / "model", settings)
    resident = copy.deepcopy(getattr(transformers, class_name).from_pretrained(folder).eval())
    with StreamingModel.open(opener(chunked(folder)), cache_size=1) as model, torch.no_grad():
        assert torch.equal(model(**given)[0], resident(**given)[0])
