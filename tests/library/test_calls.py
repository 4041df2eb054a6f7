"""Every call in the documentation works as written there, with a real server in another process."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoTokenizer, TextStreamer

from surfw import (
    AdvancedWeightServer,
    ConfigurationError,
    FilesystemBackend,
    ModelChunker,
    NotAStoreError,
    StreamingBaseModel,
    StreamingBertModel,
    StreamingGPTModel,
    StreamingLlamaModel,
    StreamingModel,
    StreamingT5Model,
    UnsupportedModelError,
    WeightClient,
    WeightServer,
)
from surfw.manifest import parse_stored_manifest
from tests.checkpoints import resident
from tests.library.conftest import run
from tests.peers import until
from tests.servers import Served

IDS = torch.tensor([[5, 9, 77, 3, 120]])
MASK = torch.ones_like(IDS)


def logits(checkpoints: Path, name: str, **inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = resident(checkpoints, name)(input_ids=IDS, attention_mask=MASK, **inputs).logits
    return found


def test_a_model_is_chunked_into_a_folder(checkpoints: Path, here: Path) -> None:
    model_name = str(checkpoints / "bert")

    async def main() -> None:
        chunker = ModelChunker(model_name, output_dir="./chunks")
        info = await chunker.chunk_model()
        assert (info.name, info.class_name, info.dtype) == ("bert", "BertForMaskedLM", "float32")
        assert (info.layers, info.store) == (3, str(here / "chunks"))
        assert info.chunks > info.layers
        assert info.payload_bytes == sum(one.numel() * 4 for one in resident(checkpoints, "bert").parameters())

    run(main)
    assert (here / "chunks" / "models" / "bert.json").is_file()


def test_the_folder_is_named_by_default(checkpoints: Path, here: Path) -> None:
    info = ModelChunker(str(checkpoints / "bert")).chunk_model_sync()
    assert info.store == str(here / "chunks")
    assert parse_stored_manifest((here / "chunks" / "models" / "bert.json").read_bytes(), where="here").name == "bert"


def test_a_model_is_chunked_into_a_backend(checkpoints: Path, here: Path) -> None:
    model_name = str(checkpoints / "bert")

    async def main() -> None:
        backend = FilesystemBackend(base_dir="./chunks/bert-tiny")
        assert (here / "chunks" / "bert-tiny").is_dir()
        chunker = ModelChunker(model_name, storage_backend=backend)
        info = await chunker.chunk_model()
        assert info.store == str(here / "chunks" / "bert-tiny")
        assert await backend.exists("models/bert.json")
        assert info.digest == (await ModelChunker(model_name, "./other").chunk_model()).digest

    run(main)


def test_a_folder_and_a_backend_exclude_each_other(here: Path) -> None:
    with pytest.raises(ConfigurationError, match="output_dir and storage_backend exclude each other"):
        ModelChunker("x", "./chunks", storage_backend=FilesystemBackend("./chunks"))


def test_chunking_tells_its_progress(checkpoints: Path, tmp_path: Path) -> None:
    told: list[tuple[int, str]] = []
    chunker = ModelChunker(
        checkpoints / "llama", tmp_path, name="org/mine", dtype="bfloat16", progress=lambda *one: told.append(one)
    )
    info = chunker.chunk_model_sync()
    assert (info.name, info.dtype) == ("org/mine", "bfloat16")
    assert sum(count for count, _ in told) == info.payload_bytes
    assert {name for _, name in told} >= {"model.layers.0", "lm_head"}


def test_a_server_serves_a_backend(store: Path) -> None:
    async def main() -> None:
        backend = FilesystemBackend(base_dir=store)
        server = WeightServer(storage_backend=backend, host="127.0.0.1", port=0, cache_size_mb=200)
        await server.start()
        assert await asyncio.to_thread(names, server.url) == ["bert", "gpt2", "llama", "t5"]
        stats, health = server.stats(), await server.health()
        assert stats["cache"]["capacity_bytes"] == 200_000_000
        assert stats["storage"]["healthy"]
        assert health["live"]
        assert health["ready"]
        await server.stop()
        async with server:
            assert await asyncio.to_thread(names, server.url) == ["bert", "gpt2", "llama", "t5"]
        forever = asyncio.create_task(server.serve_forever())
        await until(lambda: server.port != 0)
        await server.stop()
        await forever

    run(main)


def names(url: str) -> list[str]:
    with WeightClient(url) as client:
        return client.models()


def test_a_server_serves_a_path(store: Path) -> None:
    async def main() -> None:
        async with WeightServer(model_path=store, port=0, cache_size_mb=200) as server:
            model = await StreamingModel.open_async(server.url, model="bert")
            assert (await model.forward_async(input_ids=IDS)).logits.shape[:2] == IDS.shape
            await model.close_async()

    run(main)


def test_an_advanced_server_has_a_place_for_redis(store: Path, redis_url: str) -> None:
    async def main() -> None:
        chunks_dir = str(store)
        async with AdvancedWeightServer(
            chunks_dir=chunks_dir, redis_url=redis_url, cache_size_mb=1000, port=0
        ) as server:
            assert await asyncio.to_thread(names, server.url) == ["bert", "gpt2", "llama", "t5"]
            assert server.stats()["redis"]["reachable"]
            assert server.stats()["cache"]["capacity_bytes"] == 1_000_000_000

    run(main)


FAMILIES = {
    "bert": StreamingBertModel,
    "gpt2": StreamingGPTModel,
    "t5": StreamingT5Model,
    "llama": StreamingLlamaModel,
}


@pytest.mark.parametrize("model_name", FAMILIES)
def test_a_family_runs_asynchronously(model_name: str, server: Served, checkpoints: Path) -> None:
    more = {"decoder_input_ids": IDS[:, :2]} if model_name == "t5" else {}
    expected = logits(checkpoints, model_name, **more)

    async def main() -> None:
        model = FAMILIES[model_name](model_name, websocket_uri=server.url, cache_size=5)
        assert model.get_cache_info()["cached_components"] == []
        assert await model.warmup([0, 1, 2]) == model.layers[:3]
        assert set(model.layers[:3]) <= set(model.get_cache_info()["cached_components"])
        output = await model.forward_async(input_ids=IDS, attention_mask=MASK, enable_prefetch=True, **more)
        assert isinstance(output, transformers.utils.ModelOutput)
        assert torch.equal(output.logits, expected)
        assert await model.prefetch_next_layers(current_layer=2, prefetch_count=2) == [
            model.layers[index % len(model.layers)] for index in range(3, 3 + min(2, len(model.layers) - 1))
        ]
        output = await model.forward_async(input_ids=IDS, attention_mask=MASK, enable_prefetch=False, **more)
        assert torch.equal(output.logits, expected)
        await model.close_async()

    run(main)


@pytest.mark.parametrize("model_name", FAMILIES)
def test_a_family_runs_synchronously(model_name: str, server: Served, checkpoints: Path) -> None:
    more = {"decoder_input_ids": IDS[:, :2]} if model_name == "t5" else {}
    with FAMILIES[model_name](model_name, websocket_uri=server.url) as model:
        assert model.cache_size == min(5, len(model.plan.sizes) - len(model.plan.fixed))
        output = model(input_ids=IDS, attention_mask=MASK, **more)
        assert torch.equal(output.logits, logits(checkpoints, model_name, **more))


def test_a_family_refuses_another_one(server: Served) -> None:
    with (
        pytest.raises(
            UnsupportedModelError, match="llama is a LlamaForCausalLM of type 'llama', but StreamingBertModel"
        ),
        StreamingBertModel("llama", websocket_uri=server.url),
    ):
        pass


def test_a_family_opens_like_any_other(server: Served) -> None:
    with StreamingLlamaModel.open(server.url, model="llama", memory_budget="1GB") as model:
        assert model.plan.everything_fits


def test_the_address_is_that_of_a_server_on_this_machine() -> None:
    model = StreamingBertModel("bert-base-uncased")
    assert repr(model) == "<StreamingBertModel bert-base-uncased of ws://localhost:8765, not open yet>"


def test_any_architecture_opens(server: Served, checkpoints: Path) -> None:
    with StreamingModel.open(
        server.url, model="llama", cache_size=2, prefetch=True, device="cpu", token=None, ssl=None
    ) as model:
        assert type(model.model) is transformers.LlamaForCausalLM
        assert torch.equal(model(input_ids=IDS).logits, logits(checkpoints, "llama"))
    with StreamingModel.open(server.url, model="llama", memory_budget="500MB") as model:
        assert torch.equal(model(input_ids=IDS).logits, logits(checkpoints, "llama"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_size": 2, "memory_budget": "1GB"}, "cache_size 2 and memory_budget 1GB exclude each other"),
        ({"cache_size": 0}, "a cache of 0 layers is too small"),
        ({"cache_size": True}, "a cache of True layers"),
        ({"memory_budget": 0}, "memory_budget is 0, expected a number of bytes"),
        ({"memory_budget": "much"}, "memory_budget is 'much', expected a number of bytes"),
        ({"device": "mps"}, "device 'mps' cannot be used yet; expected 'cpu', 'cuda' or 'auto'"),
        ({"device_memory": "8GB"}, "the device is the CPU; name another one"),
        ({"device": "toaster"}, "device 'toaster' is not a device"),
        ({"on_missing": "guess"}, "on_missing is 'guess'; expected one of error, uninitialized"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused_before_anything_is_opened(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        StreamingModel.open("ws://127.0.0.1:1", model="llama", **options)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (5, "a source is a server's address, a store's folder or URL, or a StorageBackend, not int"),
        ("", "the source is empty"),
    ],
)
def test_what_is_no_source(source: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        StreamingModel.open(source)


def test_a_source_of_ones_own_is_opened_by_a_coroutine_function() -> None:
    with pytest.raises(TypeError, match="await"):
        StreamingModel.open(lambda: 5)  # type: ignore[arg-type]


def test_a_token_is_for_servers(store: Path) -> None:
    with pytest.raises(ConfigurationError, match="token and ssl are for servers"):
        StreamingModel.open(store, token="secret")


def test_a_store_is_a_source(store: Path, tmp_path: Path) -> None:
    for source in (store, str(store), FilesystemBackend(store)):
        with StreamingModel.open(source, model="bert") as model:
            assert model.manifest.name == "bert"
    with pytest.raises(NotAStoreError, match=r"is neither a surfw store .* nor a checkpoint"):
        StreamingModel.open(tmp_path)
    (tmp_path / ".metadata").touch()
    with pytest.raises(
        NotAStoreError, match=r"saved, which are not run or served as they are; chunk them: surfw chunk FOL"
    ):
        StreamingModel.open(tmp_path)


def test_opening_never_blocks_a_running_loop(server: Served) -> None:
    async def main() -> None:
        with pytest.raises(
            ConfigurationError, match=r"would block the event loop; use 'await StreamingModel\.open_async"
        ):
            StreamingModel.open(server.url, model="llama")
        model = StreamingLlamaModel("llama", websocket_uri=server.url)
        for use in (model.__enter__, lambda: model(input_ids=IDS), lambda: model.model, lambda: model.generate(IDS)):
            with pytest.raises(ConfigurationError, match=r"use 'await StreamingLlamaModel\.open_async"):
                use()
        model = await StreamingModel.open_async(server.url, model="llama")
        assert model(input_ids=IDS).logits.shape[:2] == IDS.shape  # an open model leaves such calls to the caller
        await model.close_async()

    run(main)


def test_a_model_generates(server: Served, checkpoints: Path) -> None:
    expected = resident(checkpoints, "llama").generate(IDS, attention_mask=MASK, max_new_tokens=8, do_sample=False)
    with StreamingLlamaModel("llama", server.url) as model:
        assert torch.equal(model.generate(IDS, attention_mask=MASK, max_new_tokens=8, do_sample=False), expected)

    async def main() -> None:
        async with StreamingLlamaModel("llama", server.url) as model:
            found = await model.generate_async(IDS, attention_mask=MASK, max_new_tokens=8, do_sample=False)
            assert torch.equal(found, expected)

    run(main)


def test_a_model_generates_with_a_streamer(server: Served, checkpoints: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(checkpoints / "llama")
    said: list[str] = []

    class Collect(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            said.append(text)

    with StreamingModel.open(server.url, model="llama") as model:
        output = model.generate(
            IDS, attention_mask=MASK, max_new_tokens=8, do_sample=False, streamer=Collect(tokenizer, skip_prompt=True)
        )
    assert "".join(said) == tokenizer.decode(output[0, IDS.shape[1] :])


def test_a_prompt_is_streamed_as_text_and_ids_as_ids(server: Served, checkpoints: Path) -> None:
    prompt = "Weights arrive"
    tokenizer: Any = AutoTokenizer.from_pretrained(checkpoints / "llama")
    inputs = tokenizer(prompt, return_tensors="pt")
    output = resident(checkpoints, "llama").generate(
        inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=30, do_sample=False
    )
    new = output[0, inputs.input_ids.shape[1] :].tolist()

    async def main() -> None:
        async with StreamingModel(server.url, model="llama", cache_size=2) as model:
            pieces = [token async for token in model.stream(prompt, max_new_tokens=30)]
            assert "".join(pieces) == tokenizer.decode(new, skip_special_tokens=True)
            assert "" not in pieces
            assert [one async for one in model.stream(inputs.input_ids[0].tolist(), max_new_tokens=30)] == new
            assert model.get_inference_stats()["total_inferences"] == 2

    run(main)


def test_a_stream_refuses_what_does_not_fit(server: Served) -> None:
    async def main() -> None:
        async with StreamingModel(server.url, model="bert") as model:
            with pytest.raises(ConfigurationError, match=r"bert \(BertForMaskedLM\) does not generate; call it"):
                _ = [token async for token in model.stream("Weights")]
            with pytest.raises(ConfigurationError, match=r"stream\(\) has no option 'loud'; it takes ignore_eos, "):
                model.stream("Weights", loud=True)

    run(main)


def test_the_numbers_of_a_model(server: Served) -> None:
    with StreamingBaseModel.open(server.url, model="llama", cache_size=100) as model:
        empty = model.get_inference_stats()
        assert empty["total_inferences"] == empty["avg_inference_time"] == empty["cache_hit_rate"] == 0
        for _ in range(2):
            model(input_ids=IDS)
        info, stats = model.get_cache_info(), model.get_inference_stats()
        assert set(info) == {"hits", "misses", "hit_rate", "cached_components", "cache_size", "memory_usage_mb"}
        chunks = len(model.manifest.chunks)
        assert (info["hits"], info["misses"], info["hit_rate"]) == (chunks, chunks, 0.5)
        assert sorted(info["cached_components"]) == sorted(model.manifest.by_name)
        assert info["cache_size"] == model.cache_size == len(model.plan.sizes) - len(model.plan.fixed)
        assert info["memory_usage_mb"] >= model.manifest.payload_bytes / 1e6
        assert set(stats) == {
            "cache_hit_rate", "avg_inference_time", "total_inferences", "stall_seconds", "fetch_seconds",
            "compute_seconds",
        }  # fmt: skip
        assert stats["total_inferences"] == 2
        assert stats["cache_hit_rate"] == 0.5
        assert stats["avg_inference_time"] * 2 == pytest.approx(
            stats["stall_seconds"] + stats["compute_seconds"], rel=0.5
        )
        assert stats["fetch_seconds"] > 0
        model.clear_cache()
        info = model.get_cache_info()
        assert (info["cached_components"], info["memory_usage_mb"]) == ([], 0)
        assert info["hits"] == chunks
        model.cache_size = 5
        assert model.cache_size == 5
        model(input_ids=IDS)
        assert len([name for name in model.get_cache_info()["cached_components"] if name in model.plan.streamed]) <= 6


def test_warming_up_takes_what_there_is_room_for(server: Served) -> None:
    async def main() -> None:
        async with StreamingLlamaModel("llama", server.url, cache_size=2) as model:
            assert len(await model.warmup([0, 1, 2, 3, 4])) == 3  # one more than are kept may be in flight
            for layers, message in (([0, 6], "llama has no layer 6; it has 6, counted from 0"), ([-1], "no layer -1")):
                with pytest.raises(ConfigurationError, match=message):
                    await model.warmup(layers)
            for current, count in ((6, 1), (-1, 1), (0, -1)):
                with pytest.raises(ConfigurationError, match="cannot prefetch"):
                    await model.prefetch_next_layers(current_layer=current, prefetch_count=count)
            assert await model.prefetch_next_layers(current_layer=5, prefetch_count=2) == model.layers[:2]

    run(main)


def test_a_client_is_shared(server: Served, checkpoints: Path) -> None:
    with WeightClient(server.url) as client:
        assert client.models() == ["bert", "gpt2", "llama", "t5"]
        with StreamingModel.open(client, model="llama") as llama, StreamingModel.open(client, model="bert") as bert:
            assert torch.equal(llama(input_ids=IDS).logits, logits(checkpoints, "llama"))
            assert torch.equal(bert(input_ids=IDS).logits, logits(checkpoints, "bert"))
            assert server.stats()["clients"] == 1
        assert client.models() == ["bert", "gpt2", "llama", "t5"]
        with pytest.raises(ConfigurationError, match="token belongs to the WeightClient; give it there"):
            StreamingModel.open(client, model="llama", token="x")
