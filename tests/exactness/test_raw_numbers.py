"""Checkpoints with numbers that JSON lacks, like published Mamba-2 models, are chunked and run bit-equal."""

import asyncio
import copy
import json
from pathlib import Path

import torch
from transformers import Mamba2Config, Mamba2ForCausalLM

from surfw.chunking import prepare_model, write_model
from surfw.models import StreamingModel
from surfw.storage import open_backend

VOCABULARY = 64


def save_mamba2(path: Path) -> Path:
    """Save a random Mamba-2 whose files have `Infinity`, as written by older releases of transformers."""
    torch.manual_seed(0)
    config = Mamba2Config(
        hidden_size=32,
        num_heads=8,
        head_dim=8,
        expand=2,
        state_size=8,
        n_groups=2,
        num_hidden_layers=3,
        chunk_size=4,
        vocab_size=VOCABULARY,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    Mamba2ForCausalLM(config).save_pretrained(path)
    for name, key, value in (
        ("config.json", "time_step_limit", [0.0, float("inf")]),
        ("generation_config.json", "max_time", float("inf")),
    ):
        text = json.dumps(json.loads((path / name).read_text()) | {key: value})
        assert "Infinity" in text.replace('"Infinity"', ""), "raw, not tagged"
        (path / name).write_text(text)
    return path


def test_infinity_in_json_is_chunked_and_streams_bit_equal(tmp_path: Path) -> None:
    path = save_mamba2(tmp_path / "mamba2")
    resident = copy.deepcopy(Mamba2ForCausalLM.from_pretrained(path))
    backend = open_backend(tmp_path / "store")
    with prepare_model(str(path)) as prepared:
        manifest = asyncio.run(write_model(prepared, backend))
    assert manifest.config["time_step_limit"] == [0.0, {"__float__": "Infinity"}]
    assert manifest.generation_config is not None
    assert manifest.generation_config["max_time"] == {"__float__": "Infinity"}
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = resident(ids).logits
        tokens = resident.generate(ids, max_new_tokens=5, do_sample=False)
    for cache_size in (1, None):
        with StreamingModel.open(str(tmp_path / "store"), "mamba2", cache_size=cache_size) as streaming:
            assert streaming.model.config.time_step_limit == resident.config.time_step_limit
            assert streaming.model.generation_config.max_time == resident.generation_config.max_time == float("inf")
            assert torch.equal(streaming(ids).logits, logits)
            assert torch.equal(streaming.generate(ids, max_new_tokens=5, do_sample=False), tokens)
