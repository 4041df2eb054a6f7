"""Invalid arguments to any public name give one clear error before anything is done."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from surfw import (
    AdvancedWeightServer,
    ConfigurationError,
    FilesystemBackend,
    ModelChunker,
    RetryPolicy,
    S3Backend,
    StorageBackend,
    StorageError,
    StreamingBertModel,
    StreamingModel,
    WeightClient,
    WeightServer,
)
from tests.library.conftest import run
from tests.library.test_calls import IDS
from tests.servers import Served

URL = "ws://127.0.0.1:1"


class NoClass(StreamingModel):
    model_class = "LlamaForCausalLM"  # type: ignore[assignment]


CALLS: dict[str, tuple[Callable[[], Any], str]] = {
    "a model that is no name": (lambda: StreamingModel(URL, model=5), "model is 5, expected a model's name or None"),
    "a retry that is no policy": (lambda: StreamingModel(URL, retry=3), "retry is 3, expected a RetryPolicy or None"),
    "a timeout in words": (lambda: StreamingModel(URL, silence_timeout="a"), "silence_timeout is 'a', expected"),
    "a timeout below zero": (lambda: WeightClient(URL, connect_timeout=-1), "connect_timeout is -1; expected a number"),
    "a token that is no text": (lambda: StreamingModel(URL, token=5), "token is 5, expected a text or None"),
    "a dtype that is no name": (lambda: StreamingModel(URL, dtype=16), "dtype is 16, expected a dtype's name or None"),
    "a backend's class": (lambda: StreamingModel(FilesystemBackend), "not the class FilesystemBackend"),
    "a class that is a text": (lambda: NoClass(URL), "model_class is 'LlamaForCausalLM', expected a subclass of"),
    "both sizes": (lambda: StreamingBertModel("b", URL, 5, memory_budget="1GB"), "exclude each other"),
    "a budget in words": (
        lambda: StreamingModel(URL, memory_budget="much"),
        "memory_budget is 'much', expected a number of bytes, or a size such as '1.2GB'",
    ),
    "a budget without a unit": (
        lambda: StreamingModel(URL, memory_budget="1.5"),
        "memory_budget is '1.5', which is bytes; did you mean '1.5GB'",
    ),
    "a device's memory without a unit": (
        lambda: StreamingModel(URL, device="cuda", device_memory="1.5"),
        "device_memory is '1.5', which is bytes; did you mean '1.5GB'",
    ),
    "a budget of nothing": (lambda: StreamingModel(URL, memory_budget="0GB"), "memory_budget is '0GB', expected"),
    "half a byte": (lambda: StreamingModel(URL, memory_budget=0.5), "memory_budget is 0.5, expected"),
    "a policy of one's own": (
        lambda: StreamingBertModel("b", URL, policy="fifo"), "policy is 'fifo'; expected one of auto, lru",
    ),
    "a policy that is no name": (lambda: StreamingModel(URL, policy=5), "policy is 5; expected one of auto, lru"),
    "a port in words": (lambda: WeightServer(model_path="x", port="a"), "port is 'a', expected a whole number"),
    "half a port": (lambda: WeightServer(model_path="x", port=80.5), "port is 80.5, expected a whole number"),
    "a cache in words": (lambda: WeightServer(model_path="x", cache_size_mb="a"), "cache_size_mb is 'a', expected"),
    "a cache policy there is not": (
        lambda: WeightServer(model_path="x", cache_policy="fifo"), "cache_policy is 'fifo'; expected one of schedule",
    ),
    "a server's token that is no text": (lambda: WeightServer(model_path="x", token=5), "token is 5, expected a text"),
    "TLS that is no context": (lambda: WeightServer(model_path="x", ssl=True), "ssl is True, expected an"),
    "limits that are none": (lambda: WeightServer(model_path="x", limits=5), "limits is 5, expected WireLimits"),
    "no Redis": (lambda: AdvancedWeightServer(chunks_dir="x", redis_url=None), "redis_url is None, expected"),
    "a bucket that is a number": (lambda: S3Backend(5), "bucket_name is 5, expected a bucket's name"),
    "a prefix that is a number": (lambda: S3Backend("bucket", prefix=5), "prefix is 5, expected a text"),
    "a folder that is a URL": (lambda: FilesystemBackend("s3://bucket/x"), "s3://bucket/x is a URL, expected a folder"),
    "attempts in words": (lambda: RetryPolicy(attempts="a"), "attempts is 'a', expected a number"),
    "half an attempt": (lambda: RetryPolicy(attempts=1.5), "attempts is 1.5, expected a number"),
    "no model to chunk": (lambda: ModelChunker(None), "model_name is None, expected a hub id, a local directory"),
    "an empty name": (lambda: ModelChunker(""), "model_name is empty"),
    "a name that is a number": (lambda: ModelChunker("x", name=5), "name is 5, expected a text or None"),
    "a class that is no model": (
        lambda: ModelChunker("x", model_class=dict).chunk_model_sync(), "model_class is 'dict', expected a subclass",
    ),
    "a server as output": (
        lambda: ModelChunker("surfw/demo", output_dir="ws://x").chunk_model_sync(), "ws://x is the address of a server",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", CALLS)
def test_what_cannot_be_used_is_refused(what: str) -> None:
    call, message = CALLS[what]
    with pytest.raises(ConfigurationError) as caught:
        call()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": "a"}, "max_new_tokens is 'a', expected a number, 1 or more"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5"),
        ({"max_new_tokens": None}, "max_new_tokens is None"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0, expected a number, 1 or more"),
        ({"top_p": 7}, "top_p is 7, expected a number, from 0 to 1"),
        ({"top_k": 0}, "top_k is 0"),
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"seed": -4}, "seed is -4, expected a number, from 0 to"),
        ({"stop": "x"}, "stop is 'x', expected a list of texts"),
        ({"stop": [""]}, "stop is"),
    ],
)
def test_a_stream_refuses_options_out_of_bounds(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        StreamingModel(URL).stream("x", **options)
    assert str(caught.value).startswith(message)


def test_a_stream_refuses_other_prompts(server: Served) -> None:
    async def main() -> None:
        async with StreamingModel(server.url, "llama") as model:
            for prompt in (123, IDS):
                with pytest.raises(ConfigurationError, match="a prompt is a text or a list of token ids, not "):
                    model.stream(prompt)  # type: ignore[call-overload]
            for prompt in (["a"], [1.5]):
                with pytest.raises(ConfigurationError, match="token ids are whole numbers in a list"):
                    _ = [token async for token in model.stream(prompt)]  # type: ignore[call-overload]
            with pytest.raises(ConfigurationError, match="a layer is 'x', expected its number, counted from 0"):
                await model.warmup(["x"])  # type: ignore[list-item]

    run(main)


def test_an_encoder_does_not_generate(server: Served) -> None:
    with (
        StreamingModel.open(server.url, "bert") as model,
        pytest.raises(ConfigurationError, match=r"bert \(BertForMaskedLM\) does not generate; call it"),
    ):
        model.generate(IDS)


def test_another_class_is_refused_with_both_types(server: Served) -> None:
    class Llama(StreamingModel):
        model_class = LlamaForCausalLM

    with pytest.raises(Exception, match="bert has model type 'bert', but LlamaForCausalLM is for 'llama'"):
        Llama.open(server.url, "bert")


def test_keys_are_texts(tmp_path: Path) -> None:
    backend: Any = FilesystemBackend(tmp_path)
    with pytest.raises(StorageError, match="storage key 5 is refused: expected a text"):
        asyncio.run(backend.load(5))


def test_a_url_is_an_output_like_a_folder(tmp_path: Path) -> None:
    info = ModelChunker("surfw/demo", output_dir="memory://wrong-inputs").chunk_model_sync()
    assert info.store == "memory://wrong-inputs"
    assert not (Path.cwd() / "memory:").exists()


def test_clients_and_models_close_where_a_loop_runs(server: Served, store: Path) -> None:
    async def main() -> None:
        for source in (server.url, store):
            async with WeightClient(source) as client:
                model = await StreamingModel.open_async(client, "llama")
                other = await StreamingModel.open_async(client, "bert")
                model.close()
                await other.close_async()
            model = await StreamingModel.open_async(source, "llama")
            await model.forward_async(input_ids=IDS)
            model.close()

    run(main)


def test_a_method_that_is_not_asynchronous_is_named(tmp_path: Path) -> None:
    class Plain(StorageBackend):
        def load(self, key: str) -> bytes:  # type: ignore[override]
            return b"{}"

        def save(self, key: str, data: Any) -> None:  # type: ignore[override]
            pass

        def exists(self, key: str) -> bool:  # type: ignore[override]
            return False

        def list(self, prefix: str = "") -> list[str]:  # type: ignore[override]
            return []

    with pytest.raises(StorageError, match=r"Plain\.load gave bytes, .* write it as 'async def load'"):
        StreamingModel.open(Plain())
