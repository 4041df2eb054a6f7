"""A streamed model's weights between runs: they can be read and replaced, and keep their values."""

import asyncio
import logging
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from surfw.chunking import prepare_model, write_model
from surfw.errors import ConfigurationError
from surfw.models import StreamingModel
from surfw.storage import open_backend
from tests.checkpoints import save_llama

IDS = torch.arange(3, 12)[None]
OPTIONS = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with tied weights, and a store with it."""
    folder = tmp_path_factory.mktemp("outside")
    save_llama(folder / "tiny", layers=6, hidden=128, tie_word_embeddings=True)
    asyncio.run(write_model(prepare_model(str(folder / "tiny")), open_backend(folder / "store")))
    return folder


def least_budget(store: Path) -> int:
    with pytest.raises(ConfigurationError, match="too small") as refused:
        StreamingModel.open(store, memory_budget=1)
    return int(str(refused.value).split("(")[1].split(" bytes")[0])


def test_all_weights_can_be_read_one_by_one_with_the_smallest_budget(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    resident = AutoModelForCausalLM.from_pretrained(folder / "tiny").eval()
    budget = least_budget(folder / "store") + (1 << 20)  # and for the KV cache
    with (
        caplog.at_level(logging.WARNING, "surfw"),
        StreamingModel.open(folder / "store", memory_budget=budget) as model,
    ):
        expected = resident.generate(IDS, **OPTIONS)
        assert torch.equal(model.generate(IDS, **OPTIONS), expected)
        plan = model.plan
        state, its = model.model.state_dict(), resident.state_dict()
        for name, here in model.model.named_parameters():
            assert torch.equal(here.detach(), its[name]), name
            assert here.sum() == its[name].sum()
            assert model.statistics()["cache"]["resident_bytes"] <= plan.peak_bytes
        assert state.keys() == its.keys()
        assert all(torch.equal(state[name], its[name]) for name in its)
        model.model.save_pretrained(tmp_path / "saved")
        assert model.plan is plan
        assert torch.equal(model.generate(IDS, **OPTIONS), expected)
    assert caplog.records == []
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(saved(IDS).logits, resident(IDS).logits)


def test_weights_of_ones_own_are_used_and_the_others_streamed(folder: Path) -> None:
    resident = AutoModelForCausalLM.from_pretrained(folder / "tiny").eval()
    with StreamingModel.open(folder / "store", cache_size=1) as model, torch.no_grad():
        before = model(IDS).logits
        for one in (model.model, resident):
            one.model.layers[3].mlp.down_proj.weight = torch.nn.Parameter(torch.full((128, 256), 0.01))
        changed = model(IDS).logits
        assert torch.equal(changed, resident(IDS).logits)
        assert not torch.equal(changed, before)
        assert torch.equal(model.generate(IDS, **OPTIONS), resident.generate(IDS, **OPTIONS))
        assert model.model.to("cpu") is model.model
        model.model.tie_weights()
        assert torch.equal(model(IDS).logits, changed)
