"""Streamed over the wire, every family gives the bits of the resident model, whatever is kept in memory."""

import asyncio
import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from surfw.chunking import prepare_model, write_model
from surfw.manifest import Manifest
from surfw.models import StreamingModel
from surfw.storage import open_backend
from tests.exactness.families import FAMILIES, VOCABULARY
from tests.servers import Served, serve

NEW_TOKENS = 5


@pytest.fixture(autouse=True, scope="module")
def two_threads() -> Iterator[None]:
    """Compute with two threads, which split products; other tests use one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty store."""
    path = tmp_path_factory.mktemp("exactness") / "store"
    asyncio.run(_create(path))
    return path


async def _create(path: Path) -> None:
    from surfw.storage import Store

    await Store(open_backend(path)).create()


@pytest.fixture(scope="module")
def server(store: Path) -> Iterator[Served]:
    """A server for the store; models chunked later become visible."""
    with serve(store) as served:
        yield served


@pytest.mark.parametrize("name", FAMILIES)
def test_streamed_equals_resident(name: str, store: Path, server: Served, tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = FAMILIES[name].build()
    for vector in (one for one in made.parameters() if one.dim() == 1):
        torch.nn.init.normal_(vector, mean=1.0, std=0.1)  # otherwise they are shared with other open models
    made.save_pretrained(tmp_path)
    resident = copy.deepcopy(getattr(transformers, FAMILIES[name].class_name).from_pretrained(tmp_path))
    manifest = asyncio.run(write_model(prepare_model(str(tmp_path), name=name), open_backend(store)))
    expected = [outputs(resident, inputs(resident, batch)) for batch in (1, 2)]
    for cache_layers in (1, 2, None):
        before = server.stats()["bytes_sent"]
        with StreamingModel.open(server.url, name, cache_size=cache_layers) as streaming:
            assert not streaming.model.training
            for batch, want in zip((1, 2), expected, strict=True):
                given = inputs(resident, batch)
                first = outputs(streaming, given)
                assert_equal(first, want, f"{name}, cache {cache_layers}, batch {batch}")
                assert_equal(outputs(streaming, given), first, f"{name}, a second time")
            cache = streaming.statistics()["cache"]
        sent = server.stats()["bytes_sent"] - before - len(manifest.public().encode())
        assert_really_streamed(manifest, cache_layers, sent, cache)
    with StreamingModel.open(server.url, name, cache_size=1, device="simulated") as streaming:
        assert_equal(outputs(streaming, inputs(resident, 1)), expected[0], f"{name}, on a simulated device")


def inputs(model: PreTrainedModel, batch: int) -> dict[str, torch.Tensor]:
    """Seeded token ids of shape (batch, 9), and for encoder-decoders decoder ids of shape (batch, 5)."""
    generator = torch.Generator().manual_seed(batch)
    given = {"input_ids": torch.randint(3, VOCABULARY, (batch, 9), generator=generator)}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = torch.randint(3, VOCABULARY, (batch, 5), generator=generator)
    return given


@torch.no_grad()
def outputs(model: Any, given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Logits of a forward, and the greedy tokens where the model generates."""
    found = {"logits": model(**given).logits}
    inner = model.model if isinstance(model, StreamingModel) else model
    if inner.can_generate():
        prompt = {name: value for name, value in given.items() if not name.startswith("decoder")}
        found["tokens"] = model.generate(
            **prompt, max_new_tokens=NEW_TOKENS, do_sample=False, num_beams=1, eos_token_id=None
        )
    return found


def assert_equal(seen: Mapping[str, torch.Tensor], want: Mapping[str, torch.Tensor], what: str) -> None:
    """Bit for bit."""
    assert seen.keys() == want.keys()
    for key in want:
        assert seen[key].dtype == want[key].dtype, what
        assert torch.equal(seen[key], want[key]), f"{what}: {key} differs"


def assert_really_streamed(manifest: Manifest, cache_layers: int | None, sent: int, cache: Mapping[str, int]) -> None:
    """The server's counter proves that layers were sent again and again, or once if all are kept."""
    if cache_layers is None:
        assert sent == manifest.payload_bytes == cache["fetched_bytes"]
        return
    layers = [chunk.payload_bytes for chunk in manifest.chunks if chunk.kind == "layer"]
    passes = 4  # two batches, each at least twice
    if len(layers) > cache_layers + 1:
        assert sent >= passes * (sum(layers) - (cache_layers + 1) * max(layers))
        assert cache["prefetched"] + cache["stalls"] > len(manifest.chunks)
    assert cache["misses"] == cache["prefetched"] + cache["stalls"]
