"""Switching between models: shared weights stay in memory, and each answer comes from the requested model."""

import asyncio
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from surfw import (
    ConfigurationError,
    IntegrityError,
    ModelChunker,
    ModelClosedError,
    StreamingModel,
    UnknownModelError,
)
from surfw.config import CodecChoice
from surfw.models.lifetime import ModelLifetime
from surfw.runtime import memory
from surfw.runtime.memory import MemoryLimit, claimed_bytes, headroom_bytes
from surfw.runtime.run import Run
from tests.checkpoints import resident, save_llama

IDS = torch.arange(3, 12)[None]
LAYERS = 8


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a fine-tune of it, which differs in two layers, and an unrelated model."""
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
    """Return the logits, and the bytes that were fetched for them."""
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


@pytest.mark.parametrize("codec", ["none", "lossless", "int4"])
def test_of_a_store_on_this_disk_only_what_differs_is_read(
    checkpoints: Path, tmp_path: Path, codec: CodecChoice
) -> None:
    """Plain and packed weights are mapped from this disk, others are in buffers."""
    for name in ("base", "tuned"):
        ModelChunker(checkpoints / name, tmp_path, codecs=(codec,)).chunk_model_sync()
    with StreamingModel.open(tmp_path, "tuned", memory_budget="1GB", codec=codec) as model:
        tuned = read(model)[0]
    with StreamingModel.open(tmp_path, "base", memory_budget="1GB", codec=codec) as model:
        read(model)
        assert model.plan.everything_fits
        assert bool(model._engine.mapped) == (codec != "lossless")
        before = memory_of(model)
        stored = {chunk.id: chunk.forms[0].stored_bytes for chunk in model.manifest.chunks}
        read_bytes = model._client.source.fetched_bytes
        model.switch("tuned")
        found = read(model)[0]
        differs = {chunk.name: chunk for chunk in model.manifest.chunks if chunk.id not in stored}
        assert set(differs) == {"model.layers.2", "model.layers.5"}
        differs_bytes = sum(chunk.forms[0].stored_bytes for chunk in differs.values())
        assert model._client.source.fetched_bytes - read_bytes == differs_bytes
        assert model.metrics.count("fetched_bytes") == sum(stored.values()) + differs_bytes
        after = memory_of(model)
        assert {name for name in after if after[name] is not before[name]} == set(differs)
        assert torch.equal(found, tuned)
        model.switch("base")
        model.switch("tuned")
        assert torch.equal(read(model)[0], tuned)


def memory_of(model: StreamingModel) -> dict[str, Any]:
    """The memory of each pinned chunk."""
    engine = model._engine
    return {name: engine.host[name].memory for name in engine.resident() if name in engine.plan.pinned}


def test_models_that_are_open_together_map_equal_layers_once(
    checkpoints: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default budget covers what is already in memory."""
    with StreamingModel.open(store, "base") as base:
        read(base)
        common = sum(size for name, size in base.plan.sizes.items() if not name.endswith((".2", ".5")))
        spare = 2 * base._engine.claimed_bytes - common  # for both, with their KV caches
        machine = MemoryLimit(Path("/proc/meminfo"), 2**31, 2**31 - headroom_bytes(2**31) - spare)
        monkeypatch.setattr(memory, "read_limits", lambda _: [machine])
        alone = claimed_bytes()
        with StreamingModel.open(store, "tuned") as tuned:
            assert torch.equal(read(tuned)[0], expected(checkpoints, "tuned"))
            assert tuned.plan.everything_fits
            both = [memory_of(one) for one in (base, tuned)]
            differs = {name for name in both[0] if both[0][name] is not both[1][name]}
            assert differs == {"model.layers.2", "model.layers.5"}
            assert base._engine.resident_bytes == tuned._engine.resident_bytes, "each counts all that it has"
            assert base._engine.anonymous_bytes == tuned._engine.anonymous_bytes == 0
            mapped_twice = sum(both[0][name].memory.nbytes for name in set(both[0]) - differs)
            assert claimed_bytes() == alone + tuned._engine.claimed_bytes - mapped_twice
            base.close()
            assert claimed_bytes() == tuned._engine.claimed_bytes
            assert torch.equal(read(tuned)[0], expected(checkpoints, "tuned"))


def test_what_was_changed_in_its_file_is_not_taken_over(checkpoints: Path, store: Path, tmp_path: Path) -> None:
    shutil.copytree(store, tmp_path / "store")
    with StreamingModel.open(tmp_path / "store", "base", memory_budget="1GB") as base:
        read(base)
        (location,) = base.manifest.by_name["model.layers.0"].forms[0].locations
        blob = tmp_path / "store" / location.object
        right = blob.read_bytes()
        with blob.open("r+b") as file:
            file.seek(location.start)
            file.write(bytes(byte ^ 1 for byte in right[location.start :][:64]))
        (tmp_path / "right").write_bytes(right)
        (tmp_path / "right").replace(blob)
        with StreamingModel.open(tmp_path / "store", "tuned", memory_budget="1GB") as tuned:
            assert torch.equal(read(tuned)[0], expected(checkpoints, "tuned"))
            with pytest.raises(IntegrityError, match=r"model\.layers\.0 was changed in"):
                read(base)


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
        base.cache_size = 1  # its buffers cannot be added to a ring
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
