"""From one model to another: what both have stays in memory, and every answer is that of the model asked."""

import asyncio
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from surfw import ConfigurationError, ModelChunker, ModelClosedError, StreamingModel, UnknownModelError
from surfw.models.lifetime import ModelLifetime
from surfw.runtime.run import Run
from tests.checkpoints import resident, save_llama

IDS = torch.arange(3, 12)[None]
LAYERS = 8


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and a fine-tune of it, which differs in two layers; and a stranger."""
    folder = tmp_path_factory.mktemp("checkpoints")
    save_llama(folder / "base", layers=LAYERS, hidden=128)
    shutil.copytree(folder / "base", folder / "tuned")
    weights = load_file(folder / "tuned/model.safetensors")
    for name in weights:
        if ".layers.2." in name or ".layers.5." in name:
            weights[name] = weights[name] * 1.5
    save_file(weights, folder / "tuned/model.safetensors", metadata={"format": "pt"})
    save_llama(folder / "stranger", layers=3, seed=7)
    return folder


@pytest.fixture(scope="module")
def store(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("switching") / "store"
    for folder in sorted(checkpoints.iterdir()):
        ModelChunker(folder, store).chunk_model_sync()
    return store


def expected(checkpoints: Path, name: str) -> Any:
    with torch.no_grad():
        return resident(checkpoints, name)(IDS).logits


def read(model: StreamingModel) -> tuple[Any, int]:
    """The logits, and the bytes that were fetched for them."""
    before = model.metrics.count("fetched_bytes")
    return model(input_ids=IDS).logits, model.metrics.count("fetched_bytes") - before


@pytest.mark.parametrize("layers", [1, 4, 7])
def test_answers_are_those_of_the_model_that_is_asked(checkpoints: Path, store: Path, layers: int) -> None:
    with StreamingModel.open(store, "base", cache_size=layers) as model:
        for name in ("base", "tuned", "base", "stranger", "tuned", "tuned", "base"):
            model.switch(name)
            assert model.manifest.name == name
            for _ in range(2):
                assert torch.equal(read(model)[0], expected(checkpoints, name))
        assert model.tokenizer is not None


def test_only_what_differs_is_fetched(checkpoints: Path, store: Path) -> None:
    with StreamingModel.open(store, "base", cache_size=LAYERS - 1, dtype="float64") as model:
        read(model)
        _, each = read(model)
        sizes = {chunk.name: chunk.payload_bytes for chunk in model.manifest.chunks}
        pinned = model.plan.pinned
        start = model.metrics.count("fetched_bytes")
        model.switch("tuned")
        assert model.plan.pinned == pinned
        read(model)
        differs = sum(size for name, size in sizes.items() if name.endswith((".2", ".5")) and name in pinned)
        streamed = sum(size for name, size in sizes.items() if name not in pinned)
        assert differs > 0
        assert model.metrics.count("fetched_bytes") - start <= differs + streamed + each


def test_models_that_are_open_together_hold_equal_layers_once(checkpoints: Path, store: Path) -> None:
    with (
        StreamingModel.open(store, "base", cache_size=LAYERS - 3) as base,
        StreamingModel.open(store, "tuned", cache_size=LAYERS - 3) as tuned,
    ):
        for model, name in ((base, "base"), (tuned, "tuned"), (base, "base")):
            assert torch.equal(read(model)[0], expected(checkpoints, name))
        places = [
            {name: id(engine.host[name].memory) for name in engine.resident() if name in engine.plan.pinned}
            for engine in (base._engine, tuned._engine)
        ]
        both = set(places[0]) & set(places[1])
        same = {name for name in both if places[0][name] == places[1][name]}
        assert same == {name for name in both if not name.endswith((".2", ".5"))}
        assert len(same) >= 3
        base.clear_cache()
        assert torch.equal(read(tuned)[0], expected(checkpoints, "tuned"))
        assert torch.equal(read(base)[0], expected(checkpoints, "base"))
        base.cache_size = 1  # its buffers may not join a ring
        for model, name in ((base, "base"), (tuned, "tuned"), (base, "base"), (tuned, "tuned")):
            assert torch.equal(read(model)[0], expected(checkpoints, name))


def test_a_model_that_cannot_be_opened_leaves_the_old_one(checkpoints: Path, store: Path) -> None:
    with StreamingModel.open(store, "base", cache_size=2) as model:
        model.speculate(prompt_lookup=3)
        with pytest.raises(UnknownModelError):
            model.switch("nothing")
        with pytest.raises(ConfigurationError, match="name is 3"):
            model.switch(3)  # type: ignore[arg-type]
        with pytest.raises(ConfigurationError, match="runs just now"):
            model.run(lambda _: model.switch("tuned"))
        assert model.guesses
        assert torch.equal(read(model)[0], expected(checkpoints, "base"))


def test_who_waited_for_the_model_of_before_does_not_get_the_one_of_now(
    checkpoints: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_asked = threading.Event()
    with StreamingModel.open(store, "base", cache_size=2) as model, ThreadPoolExecutor(1) as pool:
        hold = model._holding

        def holding(run: Run) -> Any:
            has_asked.set()
            return hold(run)

        monkeypatch.setattr(model, "_holding", holding)
        with model._busy:
            asked = pool.submit(model.run, lambda made: made(input_ids=IDS))
            has_asked.wait()
            model.switch("tuned")
        with pytest.raises(ModelClosedError, match="tuned has taken the place of the model that this was asked of"):
            asked.result()
        assert torch.equal(read(model)[0], expected(checkpoints, "tuned"))
        has_asked.clear()
        with model._busy:
            switched = pool.submit(model.switch, "stranger")
            has_asked.wait()
            model.switch("base")
            read(model)
            between = model._engine
        switched.result()
        assert between.resident() == [], "it was closed, as any model that gives its place to another"
        assert torch.equal(read(model)[0], expected(checkpoints, "stranger"))


def test_no_model_has_the_tokenizer_of_another_for_a_moment(store: Path) -> None:
    with StreamingModel.open(store, "base", cache_size=2) as model:
        assert model.tokenizer is model.tokenizer
        ModelLifetime._switch(model, "tuned")  # another thread may ask before its tokenizer was read
        assert model.tokenizer is not None
        assert model._known_tokenizer is not None
        assert model._known_tokenizer.parts is model._parts


def test_in_an_event_loop(checkpoints: Path, store: Path) -> None:
    async def run() -> None:
        async with StreamingModel(store, "base", memory_budget="1GB") as model:
            with pytest.raises(ConfigurationError, match="switch_async"):
                model.switch("tuned")
            await model.switch_async("tuned")
            found = await model.forward_async(input_ids=IDS)
            assert torch.equal(found.logits, expected(checkpoints, "tuned"))
            assert model.memory_budget == 10**9

    asyncio.run(run())
