"""Experts on demand from all places: killed servers, disk caches, checkpoints in place; with adapters and prompts."""

import asyncio
import copy
import functools
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from surfw import ModelClosedError, RetryPolicy, WeightClient
from surfw.chunking import prepare_adapter, prepare_model, read_base, write_model
from surfw.chunking.in_place import write_in_place
from surfw.errors import SurfwError, UnsupportedModelError, WireError
from surfw.manifest import Chunk, Manifest
from surfw.models import StreamingModel
from surfw.runtime.simulated import SimulatedDevice
from surfw.storage import open_backend
from tests.adapters import save_adapter, with_peft
from tests.exactness.families import MIXTURES, VOCABULARY
from tests.exactness.test_device import device_engine
from tests.exactness.test_families import assert_equal, inputs, outputs
from tests.servers import Served, serve

IDS = torch.arange(3, VOCABULARY)[None, :40]
CALM = RetryPolicy(attempts=3, first_delay_seconds=0.01)
HASTY = RetryPolicy(attempts=40, first_delay_seconds=0.05, backoff=1)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home per test, so that no test uses the expert usage saved by another."""
    monkeypatch.setenv("SURFW_HOME", str(tmp_path / "home"))


class Place:
    """A folder of checkpoints, and a store with all of them, made when needed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.store = folder, folder / "store"

    @functools.cached_property
    def backend(self) -> Any:
        return open_backend(self.store)

    @functools.cache  # noqa: B019 - it lives as long as the tests
    def resident(self, name: str) -> Any:
        """A family's model in memory; its checkpoint is at `folder / name`."""
        torch.manual_seed(0)
        MIXTURES[name].build().save_pretrained(self.folder / name)
        return copy.deepcopy(getattr(transformers, MIXTURES[name].class_name).from_pretrained(self.folder / name))

    @functools.cache  # noqa: B019 - it lives as long as the tests
    def manifest(self, name: str) -> Manifest:
        self.resident(name)
        with prepare_model(str(self.folder / name), name=name) as prepared:
            return asyncio.run(write_model(prepared, self.backend))

    @functools.cache  # noqa: B019 - it lives as long as the tests
    def logits(self, name: str) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = self.resident(name)(input_ids=IDS).logits
        return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("everywhere"))


def before_expert(streaming: StreamingModel, number: int, act: Callable[[], object]) -> None:
    """Do something after this many requests for experts, while the next one is in progress."""
    pool = streaming._engine.experts
    load, seen = pool._loader.load, 0

    async def watched(chunk: Chunk, *args: Any, **kwargs: Any) -> int:
        nonlocal seen
        seen += chunk.kind == "expert"
        coming = asyncio.ensure_future(load(chunk, *args, **kwargs))
        if chunk.kind == "expert" and seen == number:
            await asyncio.sleep(0)
            act()
        return await coming

    pool._loader.load = watched  # type: ignore[method-assign]


def kill(served: Served) -> None:
    served.process.kill()
    served.process.wait(20)


@torch.no_grad()
def test_a_server_that_is_killed_among_experts_is_one_error_and_nothing_is_wrong_afterwards(place: Place) -> None:
    place.manifest("qwen3-moe")
    with (
        serve(place.store) as served,
        StreamingModel.open(
            served.url, "qwen3-moe", memory_budget=least_budget(place.store, "qwen3-moe"), retry=CALM
        ) as streaming,
    ):
        before_expert(streaming, 5, lambda: kill(served))
        with pytest.raises(WireError) as told:
            streaming(input_ids=IDS)
        assert str(told.value).isprintable()
        with serve(place.store, "--port", served.url.rpartition(":")[2]):
            assert torch.equal(streaming(input_ids=IDS).logits, place.logits("qwen3-moe"))
        pool = streaming._engine.experts
        assert pool.resident_bytes <= streaming.plan.expert_bytes
        assert not pool._used


@torch.no_grad()
def test_an_expert_that_nobody_could_load_does_not_seem_to_be_there(place: Place) -> None:
    place.manifest("qwen3-moe")
    with (
        WeightClient(str(place.store)) as client,
        StreamingModel.open(client, "qwen3-moe", prefetch=False) as streaming,
    ):
        streaming(input_ids=IDS[:, :1])
        client.close()
        for _ in range(2):
            with pytest.raises(ModelClosedError, match="client"):
                streaming(input_ids=IDS)


@torch.no_grad()
@pytest.mark.parametrize("number", [1, 9, 20])
def test_a_server_that_is_killed_and_started_again_costs_nothing_but_time(number: int, place: Place) -> None:
    place.manifest("qwen3-moe")
    with ExitStack() as servers:
        served = servers.enter_context(serve(place.store))

        def replace() -> None:
            kill(served)
            servers.enter_context(serve(place.store, "--port", served.url.rpartition(":")[2]))

        with StreamingModel.open(
            served.url, "qwen3-moe", memory_budget=least_budget(place.store, "qwen3-moe"), retry=HASTY
        ) as streaming:
            before_expert(streaming, number, replace)
            assert torch.equal(streaming(input_ids=IDS).logits, place.logits("qwen3-moe"))
        assert served.process.poll() is not None


@torch.no_grad()
def test_of_two_servers_one_is_killed_among_experts(place: Place) -> None:
    place.manifest("qwen3-moe")
    with serve(place.store) as first, serve(place.store) as second:
        sources = [first.url, second.url]
        with StreamingModel.open(sources, "qwen3-moe", retry=CALM) as streaming:
            before_expert(streaming, 5, lambda: kill(first))
            assert torch.equal(streaming(input_ids=IDS).logits, place.logits("qwen3-moe"))


@torch.no_grad()
def test_a_disk_cache_has_the_experts_and_an_offline_run_says_which_one_is_missing(
    place: Place, tmp_path: Path
) -> None:
    manifest = place.manifest("qwen3-moe")
    cache: dict[str, Any] = {"disk_cache": "1GB", "cache_dir": tmp_path / "cache"}
    with serve(place.store) as served:
        for offline in (False, True):
            with StreamingModel.open(served.url, "qwen3-moe", offline=offline, **cache) as streaming:
                assert torch.equal(streaming(input_ids=IDS).logits, place.logits("qwen3-moe"))
                streaming.clear_cache()
    damaged = manifest.experts["model.layers.1.mlp.experts"].chunks[3]
    (file,) = (tmp_path / "cache").rglob(f"*{damaged.forms[0].digest}*")
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    with (
        StreamingModel.open(served.url, "qwen3-moe", offline=True, **cache) as streaming,
        pytest.raises(SurfwError, match=r"layers\.1\.mlp\.experts\[3\]"),
    ):
        streaming(input_ids=IDS)
    with StreamingModel.open(str(place.store), "qwen3-moe", **cache) as streaming:
        assert torch.equal(streaming(input_ids=IDS).logits, place.logits("qwen3-moe"))


@torch.no_grad()
@pytest.mark.parametrize("name", MIXTURES)
def test_a_checkpoint_that_stays_where_it_is_has_the_experts_of_a_copy(name: str, place: Place, tmp_path: Path) -> None:
    copied = place.manifest(name)
    with prepare_model(str(place.folder / name), name=name) as prepared:
        manifest = asyncio.run(write_in_place(prepared, open_backend(tmp_path / "store")))
    assert [chunk.id for chunk in manifest.chunks] == [chunk.id for chunk in copied.chunks]
    budget = least_budget(tmp_path / "store", name)
    with serve(tmp_path / "store") as served:
        for source in (str(tmp_path / "store"), str(place.folder / name), served.url):
            with StreamingModel.open(source, memory_budget=budget) as streaming:
                assert torch.equal(streaming(input_ids=IDS).logits, place.logits(name)), source
                assert streaming.statistics()["experts"] is not None


@torch.no_grad()
@pytest.mark.parametrize("saved", [None, ["experts"]], ids=["attention", "experts"])
def test_an_adapter_of_a_mixture_gives_what_peft_gives(saved: list[str] | None, place: Place, tmp_path: Path) -> None:
    place.manifest("qwen3-moe")
    base, name = place.folder / "qwen3-moe", f"saves-{len(saved or [])}"
    adapter = save_adapter(base, tmp_path / name, r=4, target_modules=["q_proj", "v_proj"], modules_to_save=saved)
    chunk_adapter(adapter, place)
    with StreamingModel.open(str(place.store), name) as streaming:
        assert torch.equal(streaming(input_ids=IDS).logits, with_peft(base, adapter)(input_ids=IDS).logits)
        assert streaming.statistics()["experts"] is not None


def test_an_adapter_of_experts_is_refused_by_name(place: Place, tmp_path: Path) -> None:
    place.manifest("qwen3-moe")
    base = place.folder / "qwen3-moe"
    adapter = save_adapter(base, tmp_path / "low", r=4, target_modules=[], target_parameters=["experts.down_proj"])
    with pytest.raises(UnsupportedModelError, match="target_parameters"):
        chunk_adapter(adapter, place)


def chunk_adapter(adapter: Path, place: Place) -> Manifest:
    base = asyncio.run(read_base(place.backend, "qwen3-moe"))
    with prepare_adapter(str(adapter), base, place.backend) as prepared:
        return asyncio.run(write_model(prepared, place.backend))


@pytest.mark.parametrize("name", ["qwen3-moe", "gpt-oss"])
def test_many_prompts_take_the_union_of_their_experts(name: str, place: Place) -> None:
    place.manifest(name)
    asked = [[7, 8, 9], [10, 11], [12], [13, 14, 15, 16]]

    async def answer(streaming: StreamingModel) -> dict[int, list[int]]:
        return {one.index: one.result.token_ids async for one in streaming.generate_many(asked, max_new_tokens=5)}

    with StreamingModel.open(str(place.store), name, memory_budget=least_budget(place.store, name) + 400_000) as model:
        found = asyncio.run(answer(model))
        experts = model.statistics()["experts"]
    for index, prompt in enumerate(asked):
        ids = torch.tensor([prompt])
        alone = place.resident(name).generate(ids, max_new_tokens=5, do_sample=False)
        assert found[index] == alone[0, len(prompt) :].tolist()
    assert experts is not None
    tokens = sum(map(len, asked)) + 4 * len(asked)
    assert experts["hits"] + experts["loads"] < tokens * 3 * 2, "each once in a pass, not once a token"


@pytest.mark.parametrize("name", ["qwen3-moe", "deepseek-v3", "gpt-oss", "llama4"])
def test_on_a_device_experts_come_from_host_memory_within_both_budgets(name: str, place: Place) -> None:
    place.manifest(name)
    resident = place.resident(name)
    expected = [outputs(resident, inputs(resident, batch)) for batch in (1, 2)]
    with StreamingModel.open(str(place.store), name, device="simulated", cache_size=1) as probe:
        engine = device_engine(probe)
        least, host = engine.least_budget_bytes, engine.below.least_budget_bytes
    for options in ({}, {"device_memory": least + 100_000, "memory_budget": host}):
        with StreamingModel.open(str(place.store), name, device="simulated", **options) as streaming:
            engine = device_engine(streaming)
            for batch, want in zip((1, 2), expected, strict=True):
                assert_equal(outputs(streaming, inputs(resident, batch)), want, f"{name}, {options}, batch {batch}")
            device = engine.device
            assert isinstance(device, SimulatedDevice)
            assert device.peak_bytes <= (engine.limit.budget_bytes or engine.plan.peak_bytes)
            assert engine.below.resident_bytes <= engine.below.plan.peak_bytes
        assert device.in_use_bytes == 0


@torch.no_grad()
def test_nothing_is_written_to_experts_that_a_kernel_multiplies_by_zero(place: Place) -> None:
    place.manifest("llama4")
    for _ in range(2):
        with StreamingModel.open(str(place.store), "llama4") as streaming:
            pool = streaming._engine.experts
            assert pool.read_whole == set(streaming.manifest.experts)
            assert not pool._loads, "although the second run knows what the first one has used"
            assert torch.equal(streaming(input_ids=IDS).logits, place.logits("llama4"))
            assert max(map(max, pool.counts().values())) > 1


def least_budget(store: Path | str, name: str, **options: Any) -> int:
    with StreamingModel.open(str(store), name, **options) as streaming:
        return streaming.explain(prompt_tokens=IDS.shape[1]).least_budget_bytes + 100_000
