"""Packed weights: the results are those of the quantised values, the same for all sources."""

import asyncio
import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from surfw.chunking import prepare_model, write_model
from surfw.codec.quantised import decode_tensor
from surfw.config import CodecChoice
from surfw.manifest import Manifest, parts_of, split_name
from surfw.models import StreamingModel
from surfw.storage import open_backend
from tests.checkpoints import save_llama
from tests.exactness.families import FAMILIES
from tests.exactness.test_families import inputs, outputs
from tests.servers import Served, serve

IDS = torch.tensor([[1, 17, 42, 101, 7]])
FORMS = ("none", "int8", "int4")
TOLERANCE = {"bfloat16": 0.03, "float16": 0.003, "float32": 1e-5}
"""The allowed difference from logits with these values in ordinary matrices, relative to the largest logit."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA in each dtype, whose layers have more than a block in each form; one head is not tied."""
    folder = tmp_path_factory.mktemp("packed")
    for name in TOLERANCE:
        save_llama(folder / name, layers=3, hidden=640, vocab_size=1000, tie_word_embeddings=name != "bfloat16")
        model = transformers.LlamaForCausalLM.from_pretrained(folder / name)
        copy.deepcopy(model).to(getattr(torch, name)).save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def store(checkpoints: Path) -> Path:
    """A store with all forms of each, and `only-int4` with only that one."""
    path = checkpoints / "store"
    for name in TOLERANCE:
        chunk_into(path, checkpoints / name, FORMS)
    chunk_into(path, checkpoints / "bfloat16", ("int4",), name="only-int4")
    return path


@pytest.fixture(scope="module")
def server(store: Path) -> Iterator[Served]:
    """A server for the store."""
    with serve(store) as served:
        yield served


def chunk_into(store: Path, checkpoint: Path, codecs: tuple[str, ...], *, name: str | None = None) -> Manifest:
    with prepare_model(str(checkpoint), name=name) as prepared:
        return asyncio.run(write_model(prepared, open_backend(store), codecs=codecs))


def quantised(resident: PreTrainedModel, manifest: Manifest, store: Path, codec: str) -> int:
    """Give a resident model the values of a packed form; return how many of its tensors are quantised."""
    state, count = resident.state_dict(), 0
    for chunk in manifest.chunks:
        if form := chunk.form(codec):
            (place,) = form.locations
            stored = (store / place.object).read_bytes()[place.start : place.stop]
            for part in (part for part in parts_of(chunk, form) if part.kind != "raw"):
                name, *expert = split_name(part.name) or (part.name,)
                into = state[name][expert[0]] if expert else state[name]
                into.copy_(torch.from_numpy(decode_tensor(part, stored)))
                count += 1
    return count


def assert_close(seen: torch.Tensor, want: torch.Tensor) -> None:
    """Check that values differ only as by products in another order."""
    most = TOLERANCE[str(want.dtype).removeprefix("torch.")] * float(want.abs().max())
    assert float((seen - want).abs().max()) <= most


@pytest.mark.parametrize("codec", ["int8", "int4"])
@pytest.mark.parametrize("name", TOLERANCE)
def test_packed_weights_compute_what_their_values_give(
    name: str, codec: CodecChoice, checkpoints: Path, store: Path, server: Served
) -> None:
    resident = copy.deepcopy(transformers.LlamaForCausalLM.from_pretrained(checkpoints / name))
    with StreamingModel.open(str(store), name) as exact, torch.no_grad():
        assert torch.equal(exact(IDS).logits, resident(IDS).logits)  # packed forms are read only on request
    full = asyncio.run(stored_manifest(store, name))
    is_tied = name != "bfloat16"
    assert quantised(resident, full, store, codec) == 3 * 7 + 2 - is_tied
    with torch.no_grad():
        want = resident(IDS).logits
    with StreamingModel.open(str(store), name, codec=codec) as model:
        logits = model(IDS).logits
        assert_close(logits, want)
        tokens = model.generate(IDS, max_new_tokens=4, do_sample=False)
        for weight in ("model.layers.1.mlp.up_proj.weight", "model.layers.1.input_layernorm.weight", "lm_head.weight"):
            assert torch.equal(model.model.state_dict()[weight], resident.state_dict()[weight])
        least = model.explain().least_budget_bytes
    for source, options in (
        (str(store), {"cache_size": 1}),
        (str(store), {"memory_budget": least}),
        (server.url, {}),
        (server.url, {"memory_budget": least, "prefetch": False}),
    ):
        with StreamingModel.open(source, name, codec=codec, **options) as model:
            assert torch.equal(model(IDS).logits, logits)
            assert torch.equal(model.generate(IDS, max_new_tokens=4, do_sample=False), tokens)
            assert model.statistics()["cache"]["decoded_bytes"] == 0


async def stored_manifest(store: Path, name: str) -> Manifest:
    from surfw.storage import Store

    return await Store(open_backend(store)).manifest(name)


def test_what_is_not_exact_says_so_where_nobody_asked_for_it(
    store: Path, checkpoints: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with StreamingModel.open(str(store), "only-int4") as model:
        logits = model(IDS).logits
    assert "only-int4: weights are int4, not exact; nothing else is stored of them" in caplog.text
    caplog.clear()
    with StreamingModel.open(str(store), "bfloat16", codec="int4") as model:
        assert torch.equal(model(IDS).logits, logits)
    assert caplog.text == ""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_another_dtype_casts_what_is_not_quantised(dtype: str, checkpoints: Path, store: Path) -> None:
    """Matrices have no dtype of their own: their values are rounded to the dtype of the computation."""
    name = {"float32": "bfloat16", "bfloat16": "float32"}[dtype]
    resident = copy.deepcopy(transformers.LlamaForCausalLM.from_pretrained(checkpoints / name, dtype=dtype))
    quantised(resident, asyncio.run(stored_manifest(store, name)), store, "int4")
    with torch.no_grad():
        want = resident(IDS).logits
    for options in ({}, {"cache_size": 1}):
        with StreamingModel.open(str(store), name, codec="int4", dtype=dtype, **options) as model:
            logits = model(IDS).logits
            assert logits.dtype is getattr(torch, dtype)
            assert_close(logits, want)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_runs_packed(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    FAMILIES[name].build().save_pretrained(tmp_path / "model")
    resident = copy.deepcopy(getattr(transformers, FAMILIES[name].class_name).from_pretrained(tmp_path / "model"))
    manifest = chunk_into(tmp_path / "store", tmp_path / "model", ("int4",))
    packs = quantised(resident, manifest, tmp_path / "store", "int4")
    given = inputs(resident, 2)
    with torch.no_grad():
        want = resident(**given).logits
    with StreamingModel.open(str(tmp_path / "store"), cache_size=1) as model:
        assert_close(outputs(model, given)["logits"], want)
    assert packs, name
