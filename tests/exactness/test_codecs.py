"""In whatever form and from wherever weights are read, a model computes the bits of the resident one."""

import asyncio
import copy
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers

from surfw.chunking import prepare_model, write_model
from surfw.config import CodecChoice
from surfw.manifest import Manifest
from surfw.models import StreamingModel
from surfw.storage import open_backend
from tests.checkpoints import save_llama
from tests.exactness.test_real_bert import checkpoint
from tests.servers import Served, serve

DTYPES = {"bfloat16": 0.72, "float16": 0.90, "float32": 0.88}
"""The largest relative size of coded layers with random weights, including norms."""

IDS = torch.tensor([[1, 17, 42, 101, 7]])


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA whose layers have several frames, in each dtype."""
    folder = tmp_path_factory.mktemp("codecs")
    save_llama(folder / "float32", layers=3, hidden=640)
    model = transformers.LlamaForCausalLM.from_pretrained(folder / "float32")
    for name in ("bfloat16", "float16"):
        copy.deepcopy(model).to(getattr(torch, name)).save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def store(checkpoints: Path) -> Path:
    """A store with both forms of each, and `coded-NAME` with only the coded one."""
    path = checkpoints / "store"
    for name in DTYPES:
        for prefix, codecs in (("", ("none", "lossless")), ("coded-", ("lossless",))):
            with prepare_model(str(checkpoints / name), name=prefix + name) as prepared:
                asyncio.run(write_model(prepared, open_backend(path), codecs=codecs))
    return path


@pytest.fixture(scope="module")
def server(store: Path) -> Iterator[Served]:
    """A server for the store."""
    with serve(store) as served:
        yield served


@cache
def least_budget(store: Path, name: str) -> int:
    """The smallest budget that a model runs with."""
    with StreamingModel.open(str(store), name) as model:
        return model.explain().least_budget_bytes


CASES = [
    *((name, codec, "store") for name in DTYPES for codec in ("none", "lossless", "auto")),
    *((name, "lossless", "server") for name in DTYPES),
    ("bfloat16", "auto", "server"),
    *(
        (f"coded-{name}", "auto", place)
        for name, place in (("bfloat16", "store"), ("float32", "store"), ("float16", "server"))
    ),
]


@pytest.mark.parametrize(("name", "codec", "place"), CASES)
def test_streamed_equals_resident(
    name: str, codec: CodecChoice, place: str, checkpoints: Path, store: Path, server: Served
) -> None:
    source = server.url if place == "server" else str(store)
    folder = checkpoints / name.removeprefix("coded-")
    resident = copy.deepcopy(transformers.LlamaForCausalLM.from_pretrained(folder))
    with torch.no_grad():
        logits = resident(IDS).logits
        tokens = resident.generate(IDS, max_new_tokens=4, do_sample=False)
    for options in ({"cache_size": 1}, {"cache_size": 2, "prefetch": False}, {}):
        with StreamingModel.open(source, name, codec=codec, **options) as model:
            for _ in range(2):
                assert torch.equal(model(IDS).logits, logits)
            assert torch.equal(model.generate(IDS, max_new_tokens=4, do_sample=False), tokens)
            decoded_bytes = model.statistics()["cache"]["decoded_bytes"]
            if codec != "auto":
                assert (decoded_bytes > 0) == (codec == "lossless" or name.startswith("coded-"))
            state = model.model.state_dict()["model.layers.1.mlp.up_proj.weight"]
            assert torch.equal(state, resident.model.layers[1].mlp.up_proj.weight)
    with StreamingModel.open(source, name, codec=codec, memory_budget=least_budget(store, name)) as model:
        assert torch.equal(model(IDS).logits, logits)


@pytest.mark.parametrize("name", DTYPES)
def test_layers_take_fewer_bytes_and_keep_their_names(name: str, store: Path) -> None:
    both, coded = (asyncio.run(_manifest(store, prefix + name)) for prefix in ("", "coded-"))
    layers = [chunk for chunk in both.chunks if chunk.kind == "layer"]
    for chunk in layers:
        assert [form.codec for form in chunk.forms] == ["none", "lossless"]
        assert chunk.forms[1].stored_bytes <= DTYPES[name] * chunk.payload_bytes
    assert [chunk.id for chunk in coded.chunks] == [chunk.id for chunk in both.chunks]
    assert {form.codec for chunk in coded.chunks for form in chunk.forms} == {"lossless"}
    assert all(
        form.codec == "none" or form.stored_bytes < 0.9 * c.payload_bytes for c in both.chunks for form in c.forms
    )


async def _manifest(store: Path, name: str) -> Manifest:
    from surfw.storage import Store

    return await Store(open_backend(store)).manifest(name)


@pytest.mark.parametrize("codec", ["none", "lossless"])
def test_real_bert_is_bit_equal(codec: CodecChoice, tmp_path: Path) -> None:
    store = tmp_path / "store"
    with prepare_model(str(checkpoint()), name="minilm") as prepared:
        asyncio.run(write_model(prepared, open_backend(store), codecs=("none", "lossless")))
    resident = copy.deepcopy(transformers.AutoModel.from_pretrained(checkpoint()).eval())
    ids = torch.tensor([[101, 2023, 2003, 1037, 3231, 102]])
    with torch.no_grad():
        expected = resident(ids)
    with StreamingModel.open(str(store), "minilm", codec=codec, cache_size=2) as model:
        seen = model(ids)
    assert torch.equal(seen.last_hidden_state, expected.last_hidden_state)
    assert torch.equal(seen.pooler_output, expected.pooler_output)
