"""A streaming model equals the resident one, fails cleanly, and closes completely."""

import contextlib
import json
import logging
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from surfw.errors import (
    ConfigurationError,
    IntegrityError,
    ModelClosedError,
    NotAStoreError,
    StorageError,
    UnknownModelError,
)
from surfw.models import StreamingModel
from surfw.runtime.absent import AbsentParameter
from surfw.source import ChunkSource
from surfw.storage import FilesystemBackend, open_backend
from surfw.storage.store_source import StorageSource, open_storage_source
from tests.checkpoints import resident

IDS = torch.tensor([[5, 9, 77, 3, 120]])


def opener(store: Path) -> Callable[[], Any]:
    return lambda: open_storage_source(open_backend(store))


def logits(model: Any, name: str) -> torch.Tensor:
    more = {"decoder_input_ids": IDS[:, :2]} if name == "t5" else {}
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS, **more).logits
    return found


@pytest.mark.parametrize("name", ["llama", "bert", "t5", "electra-classifier", "deberta-outside-weights"])
@pytest.mark.parametrize("cache_layers", [1, None])
def test_logits_are_those_of_the_resident_model(
    store: Path, checkpoints: Path, name: str, cache_layers: int | None
) -> None:
    expected = logits(resident(checkpoints, name), name)
    with StreamingModel.open(opener(store), name, cache_size=cache_layers) as model:
        for _ in range(2):
            assert torch.equal(logits(model, name), expected)


def test_deberta_uses_its_relative_positions_outside_of_their_module(
    store: Path, checkpoints: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level(logging.WARNING, "surfw"),
        StreamingModel.open(opener(store), "deberta-outside-weights", cache_size=1) as model,
    ):
        table = model.model.deberta.encoder.rel_embeddings.weight
        assert isinstance(table, AbsentParameter)
        expected = resident(checkpoints, "deberta-outside-weights").deberta.encoder.rel_embeddings.weight
        assert table.shape == expected.shape
        assert torch.equal(table + 0, expected)
    assert caplog.records == []  # it is small, and would stay in memory anyway


def test_generation_is_transformers_own(store: Path, checkpoints: Path) -> None:
    expected = resident(checkpoints, "llama").generate(IDS, max_new_tokens=6, do_sample=False)
    with StreamingModel.open(opener(store), "llama", cache_size=2) as model:
        assert torch.equal(model.generate(IDS, max_new_tokens=6, do_sample=False), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "fp16", "float32", "auto"])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_another_dtype_is_that_of_from_pretrained(store: Path, checkpoints: Path, name: str, dtype: str) -> None:
    wanted = {"bfloat16": torch.bfloat16, "fp16": torch.float16}.get(dtype, torch.float32)
    model = resident(checkpoints, name, dtype=wanted)
    expected = logits(model, name)
    with StreamingModel.open(opener(store), name, cache_size=1, dtype=dtype) as streaming:
        assert {n: p.dtype for n, p in streaming.model.named_parameters(remove_duplicate=False)} == {
            n: p.dtype for n, p in model.named_parameters(remove_duplicate=False)
        }
        assert torch.equal(logits(streaming, name), expected)


def test_what_was_done_is_told_in_numbers(store: Path) -> None:
    with StreamingModel.open(opener(store), "llama") as model:
        model(input_ids=IDS)
        first = model.statistics()
        model(input_ids=IDS)
        second = model.statistics()
        uses = len(model.manifest.order)
        chunks = len(model.manifest.chunks)
        payload = model.manifest.payload_bytes
    assert first["cache"]["misses"] == first["cache"]["prefetched"] + first["cache"]["stalls"] == chunks
    assert first["cache"]["hits"] == uses - chunks == 1  # the tied head finds the embeddings
    assert first["cache"]["fetched_bytes"] == second["cache"]["fetched_bytes"] == payload
    assert second["cache"]["hits"] == 2 * uses - chunks
    assert second["cache"]["hit_rate"] == (2 * uses - chunks) / (2 * uses)
    assert second["cache"]["resident_bytes"] >= payload
    assert second["time"]["compute_seconds"] > 0
    assert set(second["fetch_latency_seconds"]) == {"p50", "p95"}
    json.dumps(second)


def test_at_most_the_kept_layers_and_one_more_are_in_memory(store: Path) -> None:
    with StreamingModel.open(opener(store), "llama", cache_size=1) as model:
        assert model.plan.buffers == 2
        model(input_ids=IDS)
        layer = model.plan.streamed["model.layers.0"]
        pinned = len(model.plan.pinned)
        assert (
            model.statistics()["cache"]["resident_bytes"] <= model.plan.pinned_bytes + (2 + pinned) * 4096 + 2 * layer
        )


def test_only_the_manifest_is_read_before_the_model_is_open(store: Path) -> None:
    reads: list[str] = []

    class Watched(FilesystemBackend):
        async def load(self, key: str) -> bytes:
            reads.append(key)
            return await super().load(key)

    with StreamingModel.open(lambda: open_storage_source(Watched(store)), "llama") as model:
        assert reads == ["surfw.json", "models/llama.json"]
        assert model.manifest.name == "llama"
        assert model.read_file("tokenizer.json").startswith(b"{")


def test_closing_leaves_transformers_model_without_weights_and_without_hooks(store: Path) -> None:
    model = StreamingModel.open(opener(store), "llama", cache_size=1)
    model(input_ids=IDS)
    model.close()
    model.close()
    for module in model.model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert {parameter.device.type for parameter in model.model.parameters()} == {"meta"}
    assert not any(isinstance(parameter, AbsentParameter) for parameter in model.model.parameters())
    for use in (lambda: model(input_ids=IDS), lambda: model.generate(IDS)):
        with pytest.raises(ModelClosedError, match="llama is closed; open it again"):
            use()


class NoFiles(FilesystemBackend):
    """Its files can only be read through the backend."""

    def local_path(self, key: str) -> None:
        return None


class FailsOnce(NoFiles):
    """Its first read of a weight fails."""

    failed = False

    async def read_into(self, key: str, start: int, destination: memoryview) -> None:
        if not self.failed:
            self.failed = True
            raise StorageError("the disk sneezed")
        await super().read_into(key, start, destination)


def test_a_source_that_fails_once_fails_one_forward_at_most(store: Path, checkpoints: Path) -> None:
    expected = logits(resident(checkpoints, "llama"), "llama")
    backend = FailsOnce(store)
    with StreamingModel.open(lambda: open_storage_source(backend), "llama", cache_size=1) as model:
        with contextlib.suppress(StorageError):  # unless the failed chunk was prefetched, and is loaded again
            logits(model, "llama")
        assert backend.failed
        for _ in range(2):
            assert torch.equal(logits(model, "llama"), expected)


def test_a_damaged_chunk_fails_every_forward(store: Path, tmp_path: Path) -> None:
    class Damaged(NoFiles):
        async def read_into(self, key: str, start: int, destination: memoryview) -> None:
            await super().read_into(key, start, destination)
            destination[0] ^= 1

    with StreamingModel.open(lambda: open_storage_source(Damaged(store)), "llama") as model:
        for _ in range(2):
            with pytest.raises(IntegrityError, match="is damaged: block 0 has BLAKE3"):
                model(input_ids=IDS)


def test_an_interrupt_leaves_a_model_that_works(store: Path, checkpoints: Path) -> None:
    expected = logits(resident(checkpoints, "llama"), "llama")

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with StreamingModel.open(opener(store), "llama", cache_size=1) as model:
        for _ in range(3):
            handle = model.model.model.layers[1].mlp.register_forward_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                model(input_ids=IDS)
            handle.remove()
        assert all(isinstance(parameter, AbsentParameter) for parameter in model.model.parameters())
        assert torch.equal(logits(model, "llama"), expected)


def test_forwards_of_several_threads_run_one_after_another(store: Path, checkpoints: Path) -> None:
    expected = logits(resident(checkpoints, "bert"), "bert")
    found: list[bool] = []
    start = threading.Barrier(3)
    with StreamingModel.open(opener(store), "bert", cache_size=1) as model:

        def run() -> None:
            start.wait()
            found.extend(torch.equal(logits(model, "bert"), expected) for _ in range(3))

        threads = [threading.Thread(target=run) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [True] * 9


def test_two_forwards_never_run_at_once(store: Path) -> None:
    meeting, met = threading.Barrier(2), []

    def meet(*_: Any) -> None:
        with contextlib.suppress(threading.BrokenBarrierError):
            meeting.wait(0.3)
            met.append(threading.current_thread().name)

    with StreamingModel.open(opener(store), "bert") as model:
        model.model.register_forward_pre_hook(meet)
        threads = [threading.Thread(target=model, kwargs={"input_ids": IDS}) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert met == []


class Tracked(StorageSource):
    """Records when it is closed."""

    closed = 0

    async def close(self) -> None:
        Tracked.closed += 1
        await super().close()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"model": "nothing"}, UnknownModelError),
        ({"model": None}, UnknownModelError),
        ({"model": "llama", "dtype": "int4"}, ConfigurationError),
    ],
)
def test_a_model_that_cannot_be_opened_leaves_nothing_open(
    store: Path, options: dict[str, Any], error: type[Exception]
) -> None:
    async def open_tracked() -> ChunkSource:
        return Tracked(FilesystemBackend(store))

    Tracked.closed = 0
    with pytest.raises(error):
        StreamingModel.open(open_tracked, **options)
    assert Tracked.closed == 1


def test_a_source_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(NotAStoreError):
        StreamingModel.open(opener(tmp_path), "llama")


def test_a_source_that_cannot_be_closed_still_ends_the_thread(store: Path) -> None:
    class Stubborn(StorageSource):
        async def close(self) -> None:
            await super().close()
            raise StorageError("will not close")

    async def open_stubborn() -> ChunkSource:
        return Stubborn(FilesystemBackend(store))

    with pytest.raises(StorageError, match="will not close"):
        StreamingModel.open(open_stubborn, "nothing")
    model = StreamingModel.open(open_stubborn, "bert")
    with pytest.raises(StorageError, match="will not close"):
        model.close()


def test_the_plan_follows_the_budget(store: Path) -> None:
    with StreamingModel.open(opener(store), "llama", memory_budget=10**9) as model:
        assert model.plan.everything_fits
    with pytest.raises(ConfigurationError) as caught:
        StreamingModel.open(opener(store), "llama", memory_budget=1)
    found = re.fullmatch(
        r"a memory budget of 1 B is too small for llama, which needs [^(]* \((\d+) bytes\) at least[,;] .*",
        str(caught.value),
    )
    assert found is not None
    least = int(found[1])
    for budget, dtype in ((least, None), (least + 300_000, "bfloat16")):
        with StreamingModel.open(opener(store), "llama", memory_budget=budget, dtype=dtype) as model:
            assert model.plan.peak_bytes <= budget
            for _ in range(2):
                model(input_ids=IDS)
                assert model.statistics()["cache"]["resident_bytes"] + model.plan.overhead_bytes <= budget
    with pytest.raises(ConfigurationError, match=rf"is too small for llama, which needs .* \({least} bytes\) at least"):
        StreamingModel.open(opener(store), "llama", memory_budget=least // 4)
