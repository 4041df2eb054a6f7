"""Mixtures of experts give the bits of the resident model, and read only the experts that routers choose."""

import asyncio
import copy
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from surfw.chunking import prepare_model, write_model
from surfw.errors import ConfigurationError, IntegrityError, ModelError
from surfw.manifest import Chunk, Manifest
from surfw.models import StreamingModel
from surfw.storage import Store, open_backend
from surfw.storage.expert_usage import read_usage
from tests.exactness.families import MIXTURES, VOCABULARY
from tests.exactness.test_families import assert_equal, inputs, outputs
from tests.servers import Served, serve

KV_BYTES = 100_000


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty store."""
    path = tmp_path_factory.mktemp("experts") / "store"
    asyncio.run(Store(open_backend(path)).create())
    return path


@pytest.fixture(scope="module")
def server(store: Path) -> Iterator[Served]:
    """A server for the store; models chunked later become visible."""
    with serve(store) as served:
        yield served


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home per test, so that no test uses the expert usage saved by another."""
    monkeypatch.setenv("SURFW_HOME", str(tmp_path / "home"))


def chunked(name: str, folder: Path, store: Path) -> tuple[Any, Manifest]:
    """A family's model in memory, and in the store, unless it is there already."""
    torch.manual_seed(0)
    MIXTURES[name].build().save_pretrained(folder)
    resident = copy.deepcopy(getattr(transformers, MIXTURES[name].class_name).from_pretrained(folder))
    with prepare_model(str(folder), name=name) as prepared:
        return resident, asyncio.run(write_model(prepared, open_backend(store)))


@pytest.mark.parametrize("name", MIXTURES)
def test_every_mixture_equals_the_resident_model(name: str, store: Path, server: Served, tmp_path: Path) -> None:
    resident, manifest = chunked(name, tmp_path, store)
    experts = [chunk for chunk in manifest.chunks if chunk.kind == "expert"]
    assert len(experts) in {16, 24}
    expected = [outputs(resident, inputs(resident, batch)) for batch in (1, 2)]
    for source in (server.url, str(store)):
        with StreamingModel.open(source, name) as streaming:
            least = streaming.explain(prompt_tokens=32).least_budget_bytes + KV_BYTES
        between = least + 5 * experts[0].payload_bytes
        for budget in (least, between, None):
            with StreamingModel.open(source, name, memory_budget=budget) as streaming:
                for batch, want in zip((1, 2), expected, strict=True):
                    given = inputs(resident, batch)
                    assert_equal(outputs(streaming, given), want, f"{name} from {source}, {budget}, batch {batch}")
                    assert streaming._engine.experts.resident_bytes <= streaming.plan.expert_bytes
                assert streaming.plan.peak_bytes <= (budget or 2**60)


def one_token(token: int) -> torch.Tensor:
    return torch.tensor([[token]])


@torch.no_grad()
def test_a_token_costs_what_is_shared_and_its_experts(store: Path, server: Served, tmp_path: Path) -> None:
    resident, manifest = chunked("qwen3-moe", tmp_path, store)
    shared = sum(chunk.payload_bytes for chunk in manifest.chunks if chunk.kind != "expert")
    experts = manifest.payload_bytes - shared
    with StreamingModel.open(server.url, "qwen3-moe") as streaming:
        streaming(input_ids=one_token(5))  # the manifest was sent, too
        for token in (7, 8, 9):
            streaming.clear_cache()
            before = server.stats()["bytes_sent"]
            logits = streaming(input_ids=one_token(token)).logits
            assert torch.equal(logits, resident(input_ids=one_token(token)).logits)
            assert server.stats()["bytes_sent"] - before == shared + experts * 2 // 8


@torch.no_grad()
def test_what_stays_is_not_read_again(store: Path, server: Served, tmp_path: Path) -> None:
    resident, manifest = chunked("qwen3-moe", tmp_path, store)
    one = next(chunk.payload_bytes for chunk in manifest.chunks if chunk.kind == "expert")
    with StreamingModel.open(server.url, "qwen3-moe") as streaming:
        least = streaming.explain().least_budget_bytes
    shared = sum(chunk.payload_bytes for chunk in manifest.chunks if chunk.kind != "expert")
    with StreamingModel.open(server.url, "qwen3-moe", memory_budget=least + shared + 4 * one) as streaming:
        streaming(input_ids=one_token(5), use_cache=False)
        assert not streaming.plan.streamed, "all that is shared stays"
        assert streaming.plan.expert_bytes < streaming.plan.all_expert_bytes
        count, before = streaming._engine.metrics.count, server.stats()["bytes_sent"]
        hits, loads = count("expert_hits"), count("expert_loads")
        for token in (7, 8, 9, 7, 8, 9):
            want = resident(input_ids=one_token(token)).logits
            assert torch.equal(streaming(input_ids=one_token(token), use_cache=False).logits, want)
        hits, loads = count("expert_hits") - hits, count("expert_loads") - loads
        assert hits + loads == 6 * 3 * 2  # tokens, layers, experts of each
        assert 0 < loads < 6 * 3 * 2
        assert server.stats()["bytes_sent"] - before == loads * one


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", [name for name in MIXTURES if name != "llama4"])
@torch.no_grad()
def test_no_kernel_touches_an_expert_that_is_absent(
    name: str, implementation: str, store: Path, tmp_path: Path
) -> None:
    """Absent experts are NaN here, which would spread to all results computed with them.

    Llama 4 multiplies all experts, with inputs that are zero for those that were not chosen.
    """
    resident, _ = chunked(name, tmp_path, store)
    resident.set_experts_implementation(implementation)
    given = inputs(resident, 1)["input_ids"][:, :2]
    spoiled = 0

    def spoil(module: torch.nn.Module, args: Any) -> None:
        nonlocal spoiled
        chosen = set(args[1].unique().tolist())
        for stack in module._parameters.values():
            assert stack is not None
            for index in set(range(8)) - chosen:
                stack.data[index] = torch.nan
                spoiled += 1

    with StreamingModel.open(str(store), name) as streaming:
        streaming.model.set_experts_implementation(implementation)
        for path in streaming.manifest.experts:
            streaming.model.get_submodule(path).register_forward_pre_hook(spoil)
        assert torch.equal(streaming(input_ids=given).logits, resident(input_ids=given).logits)
    assert spoiled >= 16


@torch.no_grad()
def test_a_damaged_expert_is_an_error_once_it_is_chosen(tmp_path: Path) -> None:
    resident, manifest = chunked("qwen3-moe", tmp_path / "model", tmp_path / "store")
    for chunk in manifest.experts["model.layers.1.mlp.experts"].chunks[2:]:
        (at,) = chunk.forms[0].locations
        file = tmp_path / "store" / at.object
        data = bytearray(file.read_bytes())
        data[at.start + 100] ^= 1
        file.write_bytes(data)
    seen = set[int]()
    with StreamingModel.open(str(tmp_path / "store"), memory_budget=None) as streaming:
        for token in range(3, 60):
            want = resident(input_ids=one_token(token)).logits
            with suppress(IntegrityError):
                assert torch.equal(streaming(input_ids=one_token(token)).logits, want)
                seen.add(token)
        assert len(seen) < len(range(3, 60))
        with pytest.raises(IntegrityError, match=r"model\.layers\.1\.mlp\.experts\[[2-7]\]"):
            streaming(input_ids=torch.arange(3, 60)[None])


def test_a_budget_that_is_too_small_names_what_is_needed(store: Path, tmp_path: Path) -> None:
    _, manifest = chunked("qwen3-moe", tmp_path, store)
    with StreamingModel.open(str(store), "qwen3-moe") as streaming:
        least = streaming.explain().least_budget_bytes
    layer = sum(chunk.payload_bytes for chunk in manifest.experts["model.layers.0.mlp.experts"].chunks)
    assert least > layer
    with pytest.raises(ConfigurationError, match=rf"\({least} bytes\) at least|\({least} bytes\) from any"):
        StreamingModel.open(str(store), "qwen3-moe", memory_budget=layer)


@torch.no_grad()
def test_weights_that_are_looked_at_are_whole(store: Path, tmp_path: Path) -> None:
    resident, _ = chunked("mixtral", tmp_path, store)
    with StreamingModel.open(str(store), "mixtral") as streaming:
        streaming(input_ids=torch.arange(3, VOCABULARY)[None, :3])
        for name, want in resident.state_dict().items():
            if "experts" in name:
                held = streaming.model.get_parameter(name)
                assert held.shape == want.shape
                assert torch.equal(held + 0, want)
        model = streaming.model
    assert model.get_parameter("model.layers.0.mlp.experts.gate_up_proj").is_meta


@torch.no_grad()
@pytest.mark.parametrize("right", [0.0, 1.0])
def test_guesses_change_no_bit(right: float, store: Path, tmp_path: Path) -> None:
    resident, manifest = chunked("qwen3-moe", tmp_path, store)
    one = next(chunk.payload_bytes for chunk in manifest.chunks if chunk.kind == "expert")
    with StreamingModel.open(str(store), "qwen3-moe") as streaming:
        least = streaming.explain().least_budget_bytes
    with StreamingModel.open(str(store), "qwen3-moe", memory_budget=least + 3 * one + KV_BYTES) as streaming:
        pool = streaming._engine.experts
        for load in list(pool._loads.values()):  # from the measurements of explain()
            load.result()
        before = streaming._engine.metrics.count("expert_bytes")
        for token in range(3, 40):
            pool._right = right  # whether guesses are used
            want = resident(input_ids=one_token(token)).logits
            assert torch.equal(streaming(input_ids=one_token(token), use_cache=False).logits, want)
            assert pool.resident_bytes <= streaming.plan.expert_bytes
        experts = streaming.statistics()["experts"]
        assert experts is not None
        tokens = 36 if right else 3  # all but the first, or every eighth: wrong guesses are mostly not used
        assert experts["guesses"] == tokens * 2 * 2, "of the two routers that another layer runs before"
        assert 0 < experts["foreseen"] < experts["guesses"]
        loaded = (experts["fetched_bytes"] - before) // one
        assert (loaded > experts["loads"]) is bool(right), "what was guessed was loaded, or not"


@torch.no_grad()
def test_a_run_that_is_interrupted_while_an_expert_comes(store: Path, tmp_path: Path) -> None:
    resident, _ = chunked("qwen3-moe", tmp_path, store)
    with StreamingModel.open(str(store), "qwen3-moe") as streaming:
        pool = streaming._engine.experts
        load, reached = pool._loader.load, threading.Event()

        async def stuck(chunk: Chunk, *args: Any, **kwargs: Any) -> int:
            if chunk.kind == "expert":
                reached.set()
                await asyncio.sleep(3600)
            return await load(chunk, *args, **kwargs)

        def interrupt() -> None:
            reached.wait()
            streaming._engine._run.interrupt(ModelError("that is enough"))

        pool._loader.load = stuck  # type: ignore[method-assign]
        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(ModelError, match="that is enough"):
            streaming(input_ids=one_token(7))
        thread.join()
        pool._loader.load = load  # type: ignore[method-assign]
        assert torch.equal(streaming(input_ids=one_token(7)).logits, resident(input_ids=one_token(7)).logits)


def test_experts_that_begin_to_come_while_a_smaller_plan_is_adopted(store: Path, tmp_path: Path) -> None:
    """Loads begin on the event loop's thread, at any time."""

    class Begins(Future[None]):
        def cancel(self) -> bool:
            pool._waiting.clear()  # all waiting loads have begun now
            return super().cancel()

    chunked("qwen3-moe", tmp_path, store)
    with StreamingModel.open(str(store), "qwen3-moe") as streaming:
        pool = streaming._engine.experts
        path = next(iter(pool._stacks))
        coming = pool.table.admit([(path, 0), (path, 1), (path, 2)]).load
        assert len(coming) == 3
        loads: dict[Any, Any] = {key: Begins() for key in coming}
        pool._loads |= loads
        pool._waiting |= dict.fromkeys(coming, pool._warm_turns)
        pool.adopt(replace(streaming.plan, expert_bytes=0))
        assert all(load.cancelled() for load in loads.values())
        assert not pool.resident()


@torch.no_grad()
def test_a_second_run_begins_with_the_experts_of_the_first(store: Path, tmp_path: Path) -> None:
    resident, manifest = chunked("qwen3-moe", tmp_path / "model", store)
    with StreamingModel.open(str(store), "qwen3-moe") as streaming:
        for _ in range(3):
            streaming(input_ids=one_token(7))
        used = set(streaming._engine.experts.resident())
    assert len(used) == 6
    usage = read_usage(manifest)
    assert usage is not None
    assert usage.tokens == 3
    assert usage.concentration() == 1.0
    with StreamingModel.open(str(store), "qwen3-moe") as streaming:
        pool = streaming._engine.experts
        for load in list(pool._loads.values()):
            load.result()
        assert set(pool.resident()) == used
        assert torch.equal(streaming(input_ids=one_token(7)).logits, resident(input_ids=one_token(7)).logits)
        experts = streaming.statistics()["experts"]
        assert experts is not None
        assert (experts["hits"], experts["loads"]) == (6, 0)
