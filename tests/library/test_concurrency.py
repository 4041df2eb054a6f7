"""Models run beside the event loop and each other, can be stopped at any time, and leave nothing behind."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from surfw import (
    ConfigurationError,
    ModelChunker,
    ModelClosedError,
    ModelError,
    RetryPolicy,
    StreamingModel,
    WeightClient,
)
from surfw.runtime.absent import AbsentParameter
from surfw.storage import FilesystemBackend
from tests.library.conftest import run
from tests.library.test_calls import IDS, MASK, logits, resident
from tests.servers import Served
from tests.toys import Gate, Pause

LOOP_SECONDS = 0.05


def is_as_it_was(model: Any) -> bool:
    """Whether transformers' model has neither hooks nor weights of ours."""
    clean = not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    return clean and all(one.is_meta and not isinstance(one, AbsentParameter) for one in model.parameters())


def run_once(model: StreamingModel, *, asynchronous: bool) -> Any:
    """Run one forward, synchronously or not."""
    return asyncio.run(model.forward_async(input_ids=IDS)) if asynchronous else model(input_ids=IDS)


def at_layer(model: StreamingModel, index: int, do: Callable[[], object]) -> Any:
    """Do something whenever a layer is about to run."""
    return model.model.model.layers[index].register_forward_pre_hook(lambda *_: (do(), None)[1])


def test_forwards_of_two_models_overlap(server: Served, checkpoints: Path) -> None:
    meeting = threading.Barrier(2)

    async def main() -> None:
        async with StreamingModel(server.url, "llama") as one, StreamingModel(server.url, "llama") as other:
            for model in (one, other):
                at_layer(model, 2, lambda: meeting.wait(60))  # passed only if both are in their forward
            outputs = await asyncio.gather(one.forward_async(input_ids=IDS), other.forward_async(input_ids=IDS))
            assert all(torch.equal(output.logits, logits(checkpoints, "llama")) for output in outputs)

    run(main)


def test_forwards_of_one_model_run_one_after_another(server: Served, checkpoints: Path) -> None:
    inside = most = 0

    def enter(*_: Any) -> None:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)

    def leave(*_: Any) -> None:
        nonlocal inside
        inside -= 1

    async def main() -> None:
        async with StreamingModel(server.url, "llama", cache_size=1) as model:
            model.model.register_forward_pre_hook(enter)
            model.model.register_forward_hook(leave)
            outputs = await asyncio.gather(
                *(model.forward_async(input_ids=IDS) for _ in range(4)),
                *(asyncio.to_thread(model, input_ids=IDS) for _ in range(4)),
            )
            assert all(torch.equal(output.logits, logits(checkpoints, "llama")) for output in outputs)

    run(main)
    assert most == 1


async def longest_silence(work: Callable[[], Awaitable[object]]) -> float:
    """The longest time in seconds for which the loop was blocked during the work."""
    longest, last, done = 0.0, time.perf_counter(), False

    async def beat() -> None:
        nonlocal longest, last
        while not done:
            await asyncio.sleep(0)
            now = time.perf_counter()
            longest, last = max(longest, now - last), now

    heart = asyncio.create_task(beat())
    await work()
    done = True
    await heart
    return longest


def test_the_loop_goes_on_while_a_model_computes(server: Served) -> None:
    """The best of several rounds counts: other programs may block the loop, but surfw would block it in each round."""

    async def main() -> None:
        async with StreamingModel(server.url, "llama", cache_size=1) as model:

            async def work() -> None:
                at_layer(model, 3, lambda: time.sleep(0.2))  # a layer that takes long
                await model.forward_async(input_ids=IDS)
                await model.warmup()
                _ = [token async for token in model.stream([5, 9, 77], max_new_tokens=3, ignore_eos=True)]
                model.model.model.layers[3]._forward_pre_hooks.popitem()

            silences = [await longest_silence(work)]
            while len(silences) < 20 and min(silences) >= LOOP_SECONDS:
                silences.append(await longest_silence(work))
            assert min(silences) < LOOP_SECONDS

    run(main)


def test_other_threads_compute_with_the_same_number_of_threads(server: Served, checkpoints: Path) -> None:
    before = torch.get_num_threads()
    seen: list[int] = []

    async def main() -> None:
        async with StreamingModel(server.url, "llama") as model:
            at_layer(model, 0, lambda: seen.append(torch.get_num_threads()))
            output = await model.forward_async(input_ids=IDS)
            assert torch.equal(output.logits, logits(checkpoints, "llama"))

    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            run(main)
    finally:
        torch.set_num_threads(before)
    assert seen == [1, 2]


@pytest.mark.parametrize("where", ["another thread", "the loop", "without blocking the loop"])
def test_closing_in_the_middle_of_a_forward(where: str, server: Served) -> None:
    inside = threading.Event()

    async def main() -> None:
        model = await StreamingModel.open_async(server.url, "llama", cache_size=1)
        after: list[int] = []

        def pause() -> None:
            inside.set()
            assert model._closing.wait(60)

        handles = [at_layer(model, 2, pause), at_layer(model, 4, lambda: after.append(1))]
        forward = asyncio.create_task(model.forward_async(input_ids=IDS))
        assert await asyncio.to_thread(inside.wait, 60)
        if where == "the loop":
            model.close()
        elif where == "another thread":
            closer = threading.Thread(target=model.close)
            closer.start()
            await asyncio.to_thread(closer.join, 60)
        else:
            await model.close_async()
        with pytest.raises(ModelClosedError, match="llama was closed while it ran"):
            await forward
        assert after == []
        for handle in handles:
            handle.remove()
        assert is_as_it_was(model.model)
        for use in (lambda: model(input_ids=IDS), lambda: model.generate(IDS)):
            with pytest.raises(ModelClosedError, match="llama is closed; open it again"):
                use()
        for work in (model.forward_async(input_ids=IDS), model.warmup([0])):
            with pytest.raises(ModelClosedError, match="llama is closed; open it again"):
                await work
        model.close()

    run(main)


def test_closing_while_a_forward_waits_for_its_weights(store: Path) -> None:
    reading, never = threading.Event(), threading.Event()

    class Slow(FilesystemBackend):
        def local_path(self, key: str) -> None:
            return None

        async def read_into(self, key: str, start: int, destination: memoryview) -> None:
            reading.set()
            await asyncio.Event().wait()
            never.set()

    async def main() -> None:
        model = await StreamingModel.open_async(Slow(store), "llama", prefetch=False)  # only the forward reads
        forward = asyncio.create_task(model.forward_async(input_ids=IDS))
        assert await asyncio.to_thread(reading.wait, 60)
        await model.close_async()
        with pytest.raises(ModelClosedError, match="llama was closed while it ran"):
            await forward
        assert is_as_it_was(model.model)

    run(main)
    assert not never.is_set()


def test_a_hook_may_close_the_model_it_runs_in(server: Served) -> None:
    for asynchronous in (False, True):
        model = StreamingModel.open(server.url, "llama", cache_size=1)
        handle = at_layer(model, 2, model.close)
        with pytest.raises(ModelClosedError, match="llama was closed while it ran"):
            run_once(model, asynchronous=asynchronous)
        handle.remove()
        assert is_as_it_was(model.model)


def test_a_task_that_is_cancelled_ends_its_forward(server: Served, checkpoints: Path) -> None:
    pause, after = Pause(), []

    async def main() -> None:
        async with StreamingModel(server.url, "llama", cache_size=1) as model:
            handles = [at_layer(model, 2, pause), at_layer(model, 4, lambda: after.append(1))]
            forward = asyncio.create_task(model.forward_async(input_ids=IDS))
            waiting = asyncio.create_task(model.forward_async(input_ids=IDS))
            assert await asyncio.to_thread(pause.reached.wait, 60)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            forward.cancel()
            await asyncio.sleep(0)
            pause.go_on.set()
            with pytest.raises(asyncio.CancelledError):
                await forward
            assert after == []
            for handle in handles:
                handle.remove()
            output = await model.forward_async(input_ids=IDS)
            assert torch.equal(output.logits, logits(checkpoints, "llama"))
            assert model.get_inference_stats()["total_inferences"] == 1
            inner = model.model
        assert is_as_it_was(inner)

    run(main)


def test_opening_that_is_cancelled_leaves_nothing(store: Path) -> None:
    reading = threading.Event()

    class Slow(FilesystemBackend):
        async def load(self, key: str) -> bytes:
            reading.set()
            await asyncio.sleep(0.1)
            return await super().load(key)

    async def main() -> None:
        opening = asyncio.create_task(StreamingModel.open_async(Slow(store), "llama"))
        assert await asyncio.to_thread(reading.wait, 60)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening

    run(main)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_exception_in_a_hook_is_the_callers(asynchronous: bool, server: Served, checkpoints: Path) -> None:
    def fail() -> None:
        raise ZeroDivisionError("on purpose")

    with StreamingModel.open(server.url, "llama", cache_size=1) as model:
        for _ in range(2):
            handle = at_layer(model, 3, fail)
            with pytest.raises(ZeroDivisionError, match="on purpose"):
                run_once(model, asynchronous=asynchronous)
            handle.remove()
            assert torch.equal(model(input_ids=IDS).logits, logits(checkpoints, "llama"))
        inner = model.model
    assert is_as_it_was(inner)


def test_closing_a_stream_stops_the_generation(server: Served) -> None:
    steps = []

    async def main() -> None:
        async with StreamingModel(server.url, "llama", cache_size=2) as model:
            at_layer(model, 0, lambda: steps.append(1))
            stream = model.stream([5, 9, 77], max_new_tokens=400, ignore_eos=True)
            assert isinstance(await anext(stream), int)
            await stream.aclose()
            made = len(steps)
            assert made < 100
            with contextlib.suppress(asyncio.CancelledError):
                reader = asyncio.create_task(_read(model))
                await asyncio.sleep(0)
                reader.cancel()
                await reader
            await model.forward_async(input_ids=IDS)

    run(main)


async def _read(model: StreamingModel) -> list[int]:
    return [token async for token in model.stream([5, 9, 77], max_new_tokens=400, ignore_eos=True)]


def test_a_stream_is_never_far_ahead_of_its_reader(server: Served) -> None:
    async def main() -> None:
        async with StreamingModel(server.url, "llama") as model:
            made: list[int] = []
            at_layer(model, 0, lambda: made.append(1))
            read = 0
            async for _ in model.stream([5, 9, 77], max_new_tokens=60, ignore_eos=True):
                read += 1
                await asyncio.sleep(0.001)
                assert len(made) <= read + 18
            assert read == 60

    run(main)


@pytest.mark.parametrize("sizes", [[1, 6, 2, 8, 1], [3, 1, 3, 1]])
def test_the_cache_may_change_its_size_while_a_model_generates(
    sizes: list[int], server: Served, checkpoints: Path
) -> None:
    expected = resident(checkpoints, "llama").generate(IDS, attention_mask=MASK, max_new_tokens=24, do_sample=False)

    with StreamingModel.open(server.url, "llama", cache_size=4) as model:
        turns = iter(sizes * 100)
        handles = [at_layer(model, index, lambda: setattr(model, "cache_size", next(turns))) for index in (1, 4)]
        stop = threading.Event()

        def shake() -> None:
            while not stop.wait(0.002):  # otherwise it would hold the lock most of the time
                for size in sizes:
                    model.cache_size = size
                model.clear_cache()
                model.get_cache_info()

        shaker = threading.Thread(target=shake)
        shaker.start()
        try:
            found = model.generate(IDS, attention_mask=MASK, max_new_tokens=24, do_sample=False)
        finally:
            stop.set()
            shaker.join()
        assert torch.equal(found, expected)
        for handle in handles:
            handle.remove()
        model.cache_size = 1
        model(input_ids=IDS)
        streamed = [name for name in model.get_cache_info()["cached_components"] if name in model.plan.streamed]
        assert len(streamed) <= 2


def test_two_models_and_two_threads_over_one_client(server: Served, checkpoints: Path) -> None:
    expected = {name: logits(checkpoints, name) for name in ("llama", "bert")}
    found: list[bool] = []
    with WeightClient(server.url) as client:
        opened = {name: StreamingModel.open(client, name, cache_size=1) for name in expected}
        start = threading.Barrier(4)

        def use(name: str) -> None:
            start.wait(60)
            for _ in range(5):
                found.append(torch.equal(opened[name](input_ids=IDS, attention_mask=MASK).logits, expected[name]))

        threads = [threading.Thread(target=use, args=(name,)) for name in ("llama", "bert") * 2]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for model in opened.values():
            model.close()
    assert found == [True] * 20


def test_closing_a_shared_client_stops_its_models(store: Path) -> None:
    client = WeightClient(store)
    model = StreamingModel.open(client, "llama", cache_size=1)
    client.close()
    with pytest.raises(ModelError, match="closed"):
        model(input_ids=IDS)
    model.close()
    with pytest.raises(ModelClosedError, match=r"the client of .* is closed; open it again"):
        client.models()


class Held(FilesystemBackend):
    """Reads of weights wait until the test releases them, and end only then, like reads of a thread."""

    def __init__(self, store: Path) -> None:
        super().__init__(store)
        self.gate = Gate(stubborn=True)

    def local_path(self, key: str) -> None:
        return None

    async def read_into(self, key: str, start: int, destination: memoryview) -> None:
        await self.gate.passes("any")
        await super().read_into(key, start, destination)


def test_layers_are_fetched_while_the_model_runs(server: Served) -> None:
    pause = Pause()

    async def main() -> None:
        async with StreamingModel(server.url, "llama") as model:
            at_layer(model, 0, pause)
            forward = asyncio.create_task(model.forward_async(input_ids=IDS))
            assert await asyncio.to_thread(pause.reached.wait, 60)
            assert await model.prefetch_next_layers(current_layer=2, prefetch_count=2) == model.layers[3:5]
            assert await model.warmup([5]) == model.layers[5:]
            assert not forward.done()
            pause.go_on.set()
            await forward

    run(main)


def test_a_run_that_waits_for_its_turn_can_be_cancelled(server: Served) -> None:
    pause = Pause()

    async def main() -> None:
        async with StreamingModel(server.url, "llama") as model:
            at_layer(model, 0, pause)
            other = asyncio.create_task(asyncio.to_thread(model, input_ids=IDS))
            assert await asyncio.to_thread(pause.reached.wait, 60)
            queued = asyncio.create_task(model.forward_async(input_ids=IDS))
            await asyncio.sleep(0)
            queued.cancel()
            with pytest.raises(asyncio.CancelledError):
                await queued
            assert not other.done()
            pause.go_on.set()
            await other

    run(main)


def test_opening_ends_when_it_is_cancelled_or_closed_though_it_would_try_for_long() -> None:
    patient = RetryPolicy(attempts=1000, first_delay_seconds=60)

    async def main() -> None:
        opening = asyncio.create_task(StreamingModel.open_async("ws://127.0.0.1:1", "llama", retry=patient))
        await asyncio.sleep(0.1)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        model = StreamingModel("ws://127.0.0.1:1", "llama", retry=patient)
        warming = asyncio.create_task(model.warmup())
        while model._current is None:  # noqa: ASYNC110 - it has no event
            await asyncio.sleep(0.01)
        await model.close_async()
        with pytest.raises(ModelClosedError, match="llama is closed; open it again"):
            await warming
        async with WeightClient("ws://127.0.0.1:1", retry=patient) as client:
            asking = asyncio.create_task(client.models_async())
            await asyncio.sleep(0.1)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking

    run(main)


def test_clearing_and_closing_while_layers_are_fetched(store: Path) -> None:
    async def main() -> None:
        backend = Held(store)
        model = await StreamingModel.open_async(backend, "llama", prefetch=False)
        warming = asyncio.create_task(model.warmup([0, 1]))
        await asyncio.to_thread(backend.gate.wait_for, "any")
        model.clear_cache()
        backend.gate.open("any")
        assert await warming == []  # the cleared chunks are gone
        assert await model.warmup([0, 1]) == model.layers[:2]
        await model.close_async()

        backend = Held(store)
        model = await StreamingModel.open_async(backend, "llama", prefetch=False)
        warming = asyncio.create_task(model.warmup([0, 1]))
        await asyncio.to_thread(backend.gate.wait_for, "any")
        closing = asyncio.create_task(model.close_async())
        assert await asyncio.to_thread(backend.gate.cancelled.wait, 60)
        backend.gate.open("any")
        await closing
        with pytest.raises(ModelClosedError, match="llama was closed while its layers were fetched"):
            await warming

    run(main)


def test_a_stream_leaves_the_settings_of_other_generations_alone(server: Served) -> None:
    async def main() -> None:
        async with StreamingModel(server.url, "llama") as model:
            inputs = {"input_ids": IDS, "attention_mask": MASK, "max_new_tokens": 6}
            expected = await model.generate_async(**inputs)

            async def sample() -> None:
                for seed in range(6):
                    options = {"temperature": 5.0, "seed": seed, "max_new_tokens": 6, "ignore_eos": True}
                    _ = [token async for token in model.stream([5, 9, 77], **options)]

            sampling = asyncio.create_task(sample())
            others = [await asyncio.to_thread(model.generate, **inputs) for _ in range(12)]
            await sampling
            assert all(torch.equal(one, expected) for one in others)

    run(main)


def test_what_would_block_the_loop_is_refused(server: Served) -> None:
    async def main() -> None:
        model = StreamingModel(server.url, "llama")
        await model.warmup([0])
        with pytest.raises(ConfigurationError, match="the tokenizer here would block the event loop; use"):
            _ = model.tokenizer
        with pytest.raises(ConfigurationError, match="reading a file here would block the event loop"):
            model.read_file("tokenizer.json")
        await model.close_async()
        async with StreamingModel(server.url, "llama") as model:
            assert model.tokenizer("Weights").input_ids
        async with WeightClient(server.url) as client:
            with pytest.raises(ConfigurationError, match=r"use 'await client\.models_async"):
                client.models()
            assert await client.models_async() == ["bert", "gpt2", "llama", "t5"]
        with pytest.raises(ConfigurationError, match="chunking a model here would block"):
            ModelChunker("x").chunk_model_sync()

    run(main)


def test_a_model_that_is_forgotten_complains(store: Path) -> None:
    model = StreamingModel.open(store, "bert")
    parts, client = model._parts, model._client
    assert parts is not None
    forgotten = [model]
    del model
    with pytest.warns(ResourceWarning, match=r"StreamingModel bert of .* was never closed"):
        forgotten.clear()
    parts.close()
    client.close()
