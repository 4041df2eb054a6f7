"""An explanation matches the plan and its measurements, has no side effects, and names a model's limit."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from surfw.config import GB
from surfw.errors import ConfigurationError, ModelClosedError
from surfw.models import Explanation, StreamingModel, measure
from surfw.models.explain import explain_plan
from surfw.models.measure import Computing, Reading, measure_reading
from tests.servers import serve

IDS = torch.tensor([[5, 6, 7]])
SLOW, FAST = Reading(stored_bytes=1000, seconds=1.0), Reading(stored_bytes=1000, seconds=1e-9)


def check(one: Explanation, model: StreamingModel) -> None:
    """Check what holds for every explanation."""
    plan = model.plan
    assert one.model == model.manifest.name
    assert one.layers == len(model.layers)
    assert one.kept_layers == len(plan.pinned & set(model.layers))
    assert (one.pinned, one.pinned_bytes) == (len(plan.pinned), plan.pinned_bytes)
    assert (one.ring_buffers, one.ring_bytes) == (plan.ring_buffers, plan.ring_bytes)
    assert one.peak_bytes == plan.peak_bytes + one.reserved_bytes
    assert one.base_bytes > 50_000_000
    assert one.compute_seconds is not None
    assert one.compute_seconds > 0
    assert one.computing_ceiling == pytest.approx(1 / one.compute_seconds)
    if one.bytes_per_pass:
        assert one.bytes_per_second is not None
        assert one.measured_bytes
        assert one.reading_ceiling == pytest.approx(one.bytes_per_second / one.bytes_per_pass, rel=0.01)
        assert one.ceiling == min(one.reading_ceiling or 0, one.computing_ceiling)
    else:
        assert (one.reading_ceiling, one.more_bytes_per_pass, one.more_ceiling) == (None, None, None)
        assert (one.bottleneck, one.ceiling) == ("compute", one.computing_ceiling)


def test_where_everything_stays_computing_is_the_limit(store: Path) -> None:
    with StreamingModel.open(store, "llama") as model:
        found = model.explain()
        check(found, model)
        assert (found.limited_by, found.cache_layers, found.unit) == ("default", None, "tokens")
        assert found.budget_bytes == model.plan.budget_bytes
        assert found.kept_layers == found.layers == 4
        assert (found.ring_buffers, found.bytes_per_pass, found.bytes_per_second) == (0, 0, None)


def test_counted_layers_are_said_to_be_kept_and_one_gb_more_keeps_them_all(store: Path) -> None:
    with StreamingModel.open(store, "llama", cache_size=2) as model:
        found = model.explain()
        check(found, model)
        assert (found.limited_by, found.budget_bytes, found.cache_layers) == ("cache_layers", None, 2)
        assert found.kept_layers < found.layers
        assert 0 < found.bytes_per_pass <= model.plan.bytes_per_pass
        assert found.more_bytes_per_pass == 0
        assert found.more_ceiling == found.computing_ceiling


def test_a_given_budget_is_explained_with_the_room_that_the_kv_cache_takes(store: Path) -> None:
    with StreamingModel.open(store, "llama") as model:
        least = model.explain().least_budget_bytes
    with StreamingModel.open(store, "llama", memory_budget=least + 20_000) as model:
        without = model.explain()
        found = model.explain(prompt_tokens=3, new_tokens=7)
        check(found, model)
        assert found.limited_by == "memory_budget"
        assert without.reserved_bytes == 0 < found.reserved_bytes
        assert found.least_budget_bytes == least + found.reserved_bytes
        assert found.peak_bytes <= least + 20_000
        with pytest.raises(ConfigurationError, match="for the KV cache"):
            model.explain(prompt_tokens=30, new_tokens=4000)


def test_the_least_budget_is_just_enough(store: Path) -> None:
    with StreamingModel.open(store, "bert") as model:
        least = model.explain().least_budget_bytes
    with StreamingModel.open(store, "bert", memory_budget=least) as model:
        found = model.explain(prompt_tokens=9)
        check(found, model)
        assert (found.unit, found.reserved_bytes) == ("passes", 0)
    with pytest.raises(ConfigurationError, match=f"{least} bytes"):
        StreamingModel.open(store, "bert", memory_budget=least // 4)  # a local store may need slightly less


def test_one_gb_more_is_planned_and_not_guessed(store: Path) -> None:
    with StreamingModel.open(store, "llama", cache_size=1) as model:
        parts = model._open()
        slow = explain_plan(parts, Computing(seconds=0.5, share=1.0), SLOW)
        assert slow.reading_ceiling == pytest.approx(1000 / slow.bytes_per_pass, rel=0.01)
        assert (slow.bottleneck, slow.ceiling, slow.more_ceiling) == ("storage", slow.reading_ceiling, 2.0)
        fast = explain_plan(parts, Computing(seconds=0.5, share=0.25), FAST)
        assert (fast.bottleneck, fast.ceiling, fast.compute_share) == ("compute", 2.0, 0.25)
        unknown = explain_plan(parts, None, SLOW)
        assert (unknown.computing_ceiling, unknown.ceiling) == (None, unknown.reading_ceiling)
        limit = parts.engine.limit
        before = model.plan
        assert parts.engine.plan_with(type(limit)(budget_bytes=GB)).everything_fits
        assert model.plan is before


@pytest.mark.parametrize("name", ["t5", "electra-classifier", "deberta-outside-weights"])
def test_every_kind_of_model_is_measured(name: str, store: Path) -> None:
    with StreamingModel.open(store, name, cache_size=1) as model:
        found = model.explain(prompt_tokens=4)
        check(found, model)
        assert found.unit == ("tokens" if model.model.can_generate() else "passes")
        assert found.compute_share == 1


def test_advice_comes_from_the_plan_and_what_a_run_took(store: Path) -> None:
    with StreamingModel.open(store, "llama", cache_size=1) as model:
        found = model.advise(seconds_per_token=2.0, stall_share=0.9)
        assert found is not None
        limit = replace(model._open_here().engine.limit, budget_bytes=found.budget_bytes, cache_layers=None)
        more = model._open_here().engine.plan_with(limit)
        by_reading = more.ceiling(model.plan.bytes_per_pass / 2.0)
        assert found.tokens_per_second == pytest.approx(min(by_reading or 5.0, 5.0))  # computing takes 0.2 s
        assert found.tokens_per_second >= 0.75
        assert found.budget_bytes == model.plan.peak_bytes + model.plan.reserved_bytes + found.more_bytes
        assert model.advise(seconds_per_token=2.0, stall_share=0.4) is None  # computing limits it


def test_no_advice_where_nothing_is_read(store: Path) -> None:
    with StreamingModel.open(store, "llama") as model:
        assert model.advise(seconds_per_token=2.0, stall_share=0.9) is None


def test_the_progress_of_a_run(store: Path) -> None:
    with StreamingModel.open(store, "llama", cache_size=2) as model:
        before = model.progress()
        assert (before.layer, before.layers, before.run_seconds) == (0, 4, 0.0)
        assert before.kept_layers == len(model.plan.pinned & set(model.layers))
        seen: list[int] = []
        for name in ("model.layers.0", "model.layers.3"):
            model.model.get_submodule(name).register_forward_hook(lambda *_: seen.append(model.progress().layer))
        model(IDS)
        assert seen == [1, 4]
        after = model.progress()
        assert 0 <= after.stall_seconds < after.run_seconds
        assert after.fetched_bytes > 0
    with StreamingModel.open(store, "llama") as model:
        assert model.progress().kept_layers is None


def test_what_is_measured_is_not_counted_and_changes_no_result(store: Path) -> None:
    with StreamingModel.open(store, "llama", cache_size=1) as model:
        expected = model(input_ids=IDS).logits
    with StreamingModel.open(store, "llama", cache_size=1) as model:
        model.explain(new_tokens=3)
        assert model.get_inference_stats()["total_inferences"] == 0
        assert (model.get_cache_info()["hits"], model.get_cache_info()["misses"]) == (0, 0)
        assert torch.equal(model(input_ids=IDS).logits, expected)
        assert model.get_inference_stats()["total_inferences"] == 1


def test_over_a_server_reading_is_the_link(store: Path) -> None:
    with serve(store) as served, StreamingModel.open(served.url, "llama", cache_size=1) as model:
        found = model.explain()
        check(found, model)
        slow = explain_plan(model._open(), Computing(seconds=1e-9, share=1.0), SLOW)
        assert (found.source, slow.bottleneck) == (served.url, "link")


def test_reading_stops_when_it_has_been_enough(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with StreamingModel.open(store, "llama", cache_size=1) as model:
        parts = model._open()
        before = parts.client.source.fetched_bytes
        reading = measure_reading(parts)
        assert reading is not None
        assert reading.bytes_per_second > 0
        streamed = sum(parts.manifest.by_name[name].payload_bytes for name in model.plan.streamed)
        model.run(lambda _: None)
        whole = parts.client.source.fetched_bytes - before
        assert whole >= streamed
        monkeypatch.setattr(measure, "READ_BYTES", 1)
        again = parts.client.source.fetched_bytes
        reading = measure_reading(parts)
        assert reading is not None
        assert reading.bytes_per_second > 0
        assert parts.client.source.fetched_bytes - again < streamed


def test_a_pass_that_is_broken_off_is_scaled_up_from_the_layers_that_ran(store: Path) -> None:
    with StreamingModel.open(store, "llama", cache_size=1) as model:
        expected = model(input_ids=IDS).logits

        def enough(*_: object) -> None:
            assert model._current is not None
            model._current[0].interrupt(measure._Enough())

        hook = model.model.get_submodule("model.layers.2").register_forward_pre_hook(enough)
        found = model.explain()
        hook.remove()
        sizes = {chunk.name: chunk.payload_bytes for chunk in model.manifest.chunks}
        embedded = sizes["model.embed_tokens"]  # the head shares these weights
        ran = embedded + sum(sizes[name] for name in model.layers[:3])
        assert found.compute_share == pytest.approx(ran / (embedded + sum(sizes.values())))
        assert found.computing_ceiling == pytest.approx(1 / (found.compute_seconds or 0))
        assert torch.equal(model(input_ids=IDS).logits, expected)


def test_a_pass_has_a_time_limit(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with StreamingModel.open(store, "llama", cache_size=1) as model:

        def until_the_time_is_over(*_: object) -> None:
            assert model._current is not None
            assert isinstance(model._current[0]._stop.exception(timeout=60), measure._Enough)

        hook = model.model.get_submodule("model.layers.0").register_forward_pre_hook(until_the_time_is_over)
        monkeypatch.setattr(measure, "PASS_SECONDS", 0.0)
        found = model.explain()
        hook.remove()
        assert found.compute_share < 0.5
        assert (found.compute_seconds is None) == (found.compute_share == 0)
        assert found.reading_ceiling is not None


def test_in_an_event_loop_there_is_the_asynchronous_one(store: Path) -> None:
    async def main() -> Explanation:
        async with StreamingModel(store, "llama", cache_size=1) as model:
            with pytest.raises(ConfigurationError, match="explain_async"):
                model.explain()
            return await model.explain_async(new_tokens=2)

    assert asyncio.run(main()).bottleneck in {"storage", "compute"}


@pytest.mark.parametrize("wrong", [{"prompt_tokens": 0}, {"new_tokens": -1}, {"prompt_tokens": "3"}])
def test_wrong_numbers_are_refused(wrong: dict[str, int], store: Path) -> None:
    with (
        StreamingModel.open(store, "llama") as model,
        pytest.raises(ConfigurationError, match=f"^{next(iter(wrong))} is "),
    ):
        model.explain(**wrong)


def test_a_closed_model_explains_nothing(store: Path) -> None:
    with StreamingModel.open(store, "llama") as model:
        pass
    with pytest.raises(ModelClosedError):
        model.explain()
