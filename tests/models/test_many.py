"""Many prompts in a batch: the answers equal those of the resident model under transformers' continuous batching."""

import asyncio
import copy
import itertools
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching import ContinuousBatchingManager

from surfw import (
    ConfigurationError,
    InferenceRequest,
    ManyResult,
    ModelChunker,
    StreamingModel,
    UnsupportedModelError,
)
from surfw.config import parse_size
from surfw.models import many
from tests.checkpoints import resident, save_llama
from tests.exactness.families import FAMILIES, VOCABULARY

FAMILIES_TRIED = ("llama", "gpt2", "mistral", "gemma2", "qwen3", "phi")
NEW = 7


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    for name in FAMILIES_TRIED:
        torch.manual_seed(1)
        model = FAMILIES[name].build()
        model.generation_config.eos_token_id = 5
        model.save_pretrained(folder / name)
    kinds = ["sliding_attention"] * 7 + ["full_attention"] * 3
    uneven = {**FAMILIES["gemma2"].settings} | {"num_hidden_layers": len(kinds), "layer_types": kinds}
    torch.manual_seed(1)
    replace(FAMILIES["gemma2"], settings=uneven).build().save_pretrained(folder / "uneven")
    save_llama(folder / "texts")
    torch.manual_seed(1)
    FAMILIES["t5"].build().save_pretrained(folder / "t5")
    return folder


@pytest.fixture(scope="module")
def store(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("many") / "store"
    for folder in sorted(checkpoints.iterdir()):
        ModelChunker(folder, store).chunk_model_sync()
    return store


def prompts(count: int, longest: int = 40) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    return [torch.randint(6, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def reference(
    model: Any, asked: list[list[int]], *, sequences: int, pages: int, tokens: int = many.MOST_TOKENS
) -> list[list[int]]:
    """The answers of transformers' own loop with the resident model, with all prompts given at the start."""
    manager = copy.deepcopy(model).init_continuous_batching(
        generation_config=GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=5, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(
            page_size=many.PAGE_TOKENS, num_blocks=pages, max_batch_tokens=tokens,
            max_requests_per_batch=sequences, auto_switch_to_flash=False,
        ),
    )  # fmt: skip
    for index, ids in enumerate(asked):
        manager.add_request(ids, request_id=str(index), max_new_tokens=NEW, eos_token_id=5)
    manager.start()
    found: dict[str, list[int]] = {}
    while len(found) < len(asked):
        output = manager.get_result(timeout=10)
        assert output is not None
        assert output.error is None
        found[output.request_id] = output.generated_tokens
    manager.destroy()
    return [found[str(index)] for index in range(len(asked))]


def answers(model: StreamingModel, asked: Any, **options: Any) -> list[ManyResult]:
    async def collect() -> list[ManyResult]:
        return [one async for one in model.generate_many(asked, **options)]

    return sorted(asyncio.run(collect()), key=lambda one: one.index)


def tokens_of(results: list[ManyResult]) -> list[list[int]]:
    assert [one.index for one in results] == list(range(len(results)))
    found = []
    for one in results:
        assert one.result is not None, one.error
        found.append(one.result.token_ids)
    return found


@pytest.mark.parametrize(("name", "cache_size"), [("llama", None), *((name, 1) for name in FAMILIES_TRIED)])
def test_equal_to_the_resident_model_under_the_same_scheduler(
    name: str, cache_size: int | None, checkpoints: Path, store: Path
) -> None:
    asked = prompts(7)
    with StreamingModel(store, name, cache_size=cache_size) as model:
        mine = tokens_of(answers(model, asked, sequences=3, max_new_tokens=NEW))
        attention = model.model.config._attn_implementation
        again = model.generate(torch.tensor([asked[0]]), max_new_tokens=3)
    pages = 3 * (-(-(max(map(len, asked[:3])) + NEW) // many.PAGE_TOKENS) + 1)
    theirs = resident(checkpoints, name)
    assert mine == reference(theirs, asked, sequences=3, pages=pages)
    assert attention == theirs.config._attn_implementation
    assert torch.equal(again, theirs.generate(torch.tensor([asked[0]]), max_new_tokens=3))


def test_a_pass_over_the_layers_is_shared(store: Path) -> None:
    with StreamingModel(store, "llama", cache_size=1) as model:
        answers(model, prompts(1), max_new_tokens=NEW, ignore_eos=True)
        one = model.statistics()["cache"]["fetched_bytes"]
        answers(model, prompts(8), max_new_tokens=NEW, ignore_eos=True)
        eight = model.statistics()["cache"]["fetched_bytes"] - one
    assert eight <= one * 1.2


def test_no_pass_computes_padding(store: Path) -> None:
    """All passes together compute each prompt once, and each new token but the last."""
    asked, computed = prompts(40), 0
    with StreamingModel(store, "llama") as model:

        def count(_: object, args: tuple[torch.Tensor, ...], _output: object) -> None:
            nonlocal computed
            computed += args[0].numel()

        model.model.get_input_embeddings().register_forward_hook(count)
        found = tokens_of(answers(model, asked, sequences=6, max_new_tokens=NEW))
    assert computed == sum(map(len, asked)) + sum(len(tokens) - 1 for tokens in found)


def test_a_place_is_filled_again_at_once(store: Path) -> None:
    """Three short answers beside a long one need only one pass more than the long one."""
    asked = [InferenceRequest(prompt_ids=[7, 8, 9], max_new_tokens=most, ignore_eos=True) for most in (30, 10, 10, 10)]
    passes = 0
    with StreamingModel(store, "llama") as model:

        def count(*_: object) -> None:
            nonlocal passes
            passes += 1

        handle = model.model.register_forward_hook(count)
        found = answers(model, asked, sequences=2, ignore_eos=True)
        handle.remove()
    assert [len(tokens) for tokens in tokens_of(found)] == [30, 10, 10, 10]
    assert 30 <= passes <= 32


def test_prompts_may_come_as_they_please(store: Path) -> None:
    """The second prompt is only requested after the first is answered."""
    answered = asyncio.Event()

    async def ask() -> AsyncIterator[str | list[int]]:
        yield "Weights"
        await answered.wait()
        yield [7, 8, 9]

    async def collect(model: StreamingModel) -> list[ManyResult]:
        found = []
        async for one in model.generate_many(ask(), max_new_tokens=3):
            answered.set()
            found.append(one)
        return found

    with StreamingModel(store, "texts") as model:
        first, second = asyncio.run(collect(model))
        assert (first.index, second.index) == (0, 1)
        assert first.result is not None
        assert first.result.text == model.tokenizer.decode(first.result.token_ids, skip_special_tokens=True)


def test_tokens_are_told_as_they_come(store: Path) -> None:
    told: dict[int, list[int]] = {0: [], 1: []}
    with StreamingModel(store, "llama") as model:
        found = answers(
            model, prompts(2), max_new_tokens=NEW, on_tokens=lambda index, tokens: told[index].extend(tokens)
        )
        assert tokens_of(found) == [told[0], told[1]]
        ended, other = tokens_of(
            answers(model, prompts(2), max_new_tokens=NEW, ignore_eos=True, on_tokens=lambda index, _: index != 0)
        )
        assert (len(ended), len(other)) == (1, NEW)


def test_a_text_ends_a_sequence_and_is_not_part_of_it(store: Path) -> None:
    with StreamingModel(store, "texts") as model:
        (whole,) = answers(model, ["Weights"], max_new_tokens=40, ignore_eos=True)
        assert whole.result is not None
        stop = whole.result.text[8:11]
        ended, other = answers(
            model,
            [InferenceRequest(prompt="Weights", stop=[stop], max_new_tokens=40, ignore_eos=True), "Weights"],
            max_new_tokens=40,
            ignore_eos=True,
        )
    assert ended.result is not None
    assert ended.result.text == whole.result.text[: whole.result.text.index(stop)]
    assert len(ended.result.token_ids) < 40
    assert other.result is not None
    assert len(other.result.token_ids) == 40


def test_sampling_is_the_same_for_the_same_seed(store: Path) -> None:
    with StreamingModel(store, "llama") as model:
        first, second, greedy = (
            tokens_of(answers(model, prompts(3), max_new_tokens=NEW, ignore_eos=True, **options))
            for options in ({"temperature": 1.0, "seed": 3}, {"temperature": 1.0, "seed": 3}, {})
        )
    assert first == second
    assert first != greedy


def test_a_prompt_that_cannot_be_answered_leaves_the_others_alone(store: Path) -> None:
    asked = [
        [1, 2, VOCABULARY],
        [7, 8],
        InferenceRequest(prompt="no tokenizer"),
        InferenceRequest(prompt_ids=[7], temperature=0.5),
        [7] * 100,
        InferenceRequest(prompt="half of a pair: \ud83d"),
        InferenceRequest(prompt_ids=[7], max_new_tokens=10**9),
        [7],
    ]
    with StreamingModel(store, "llama", cache_size=1) as model:
        found = answers(model, asked, max_new_tokens=3, sequences=2)
    assert [one.error is None for one in found] == [False, True, False, False, True, False, False, True]
    errors = [one.error or "" for one in found]
    assert f"{VOCABULARY}" in errors[0]
    assert "no tokenizer" in errors[2]
    assert "temperature is 0.5, but it is the same for all prompts of a run" in errors[3]
    assert r"half of a surrogate pair, '\ud83d'" in errors[5]
    assert "no room for the KV cache of a prompt and its answer of 1000000001 tokens" in errors[6]
    with pytest.raises(ConfigurationError, match="half of a surrogate pair"):
        InferenceRequest(prompt="a", stop=["b", "\udc00"])


def test_a_cache_that_cannot_be_made_leaves_the_model_its_attention(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> None:
        raise MemoryError

    with StreamingModel(store, "llama", cache_size=1) as model:
        inner: Any = model.model
        inner.set_attn_implementation("eager")
        monkeypatch.setattr(ContinuousBatchingManager, "_create_batch_processor", fail)
        with pytest.raises(MemoryError):
            answers(model, [[7]])
        assert inner.config._attn_implementation == "eager"


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, int]]:
    """The limits of all batches that are made, with the bytes of transformers' cache and masks."""
    found: list[tuple[Any, int]] = []
    real = many._Batch.__init__

    def make(self: Any, model: StreamingModel, shared: InferenceRequest, room: Any) -> None:
        real(self, model, shared, room)
        processor = self._processor
        masks = processor.inputs_and_outputs.attention_mask.values()
        found.append((room, processor.cache.cache_tensor.nbytes + sum(one.nbytes for one in masks)))

    monkeypatch.setattr(many._Batch, "__init__", make)
    return found


@pytest.mark.parametrize(
    ("name", "budget", "sequences"),
    [
        ("llama", "1.2MB", 64),
        ("gemma2", "2MB", 64),
        ("gemma2", "8MB", 64),
        ("llama", "30MB", 300),
        ("uneven", "20MB", 64),
        ("uneven", "20MB", 1),
    ],
)
def test_budgets_are_kept_and_given_back(
    name: str, budget: str, sequences: int, store: Path, batches: list[tuple[Any, int]]
) -> None:
    with StreamingModel(store, name, memory_budget=budget) as model:
        engine = model._open_here().engine
        plan, seen = model.plan, set[tuple[int, int]]()
        model.model.register_forward_hook(lambda *_: seen.add((engine.limit.reserved_bytes, engine.plan.peak_bytes)))
        tokens_of(answers(model, prompts(12), max_new_tokens=NEW, sequences=sequences))
        assert engine.limit.reserved_bytes == 0
        assert model.plan == plan
    for reserved, weights in seen:
        assert reserved + weights <= parse_size(budget)
        assert all(0 < taken <= reserved for _, taken in batches)


def test_a_short_prompt_has_room_in_layers_of_every_kind(store: Path) -> None:
    """Layers of one kind share their pages, which are more than one prompt needs."""
    with StreamingModel(store, "uneven", memory_budget="20MB") as model:
        assert len(tokens_of(answers(model, [[7] * 10], max_new_tokens=NEW, sequences=1, ignore_eos=True))[0]) == NEW


def test_kernels_have_room_beside_a_batch(store: Path, batches: list[tuple[Any, int]]) -> None:
    with StreamingModel(store, "llama", memory_budget="64MB") as model:
        reserved = set[int]()
        model.model.register_forward_hook(lambda *_: reserved.add(model._open_here().engine.limit.reserved_bytes))
        tokens_of(answers(model, prompts(12), max_new_tokens=NEW))
    ((_, taken),) = batches
    assert min(reserved) >= taken + 30_000_000


def test_a_batch_within_a_small_budget_computes_fewer_tokens_in_a_pass(
    checkpoints: Path, store: Path, batches: list[tuple[Any, int]]
) -> None:
    """Because a mask of `MOST_TOKENS` rows would take the cache's memory."""
    asked = prompts(12)
    with StreamingModel(store, "llama", memory_budget="1.2MB") as model:
        mine = tokens_of(answers(model, asked, max_new_tokens=NEW))
    ((room, _),) = batches
    assert many._LEAST_TOKENS <= room.tokens < many.MOST_TOKENS
    theirs = reference(
        resident(checkpoints, "llama"), asked, sequences=room.sequences, pages=room.pages, tokens=room.tokens
    )
    assert mine == theirs


def test_a_prompt_without_room_in_the_budget_is_refused_alone(store: Path) -> None:
    asked = [*prompts(3), InferenceRequest(prompt_ids=[7], max_new_tokens=4000), *prompts(2)]
    with StreamingModel(store, "llama", memory_budget="1.2MB") as model:
        found = answers(model, asked, max_new_tokens=NEW)
    assert [one.error is None for one in found] == [True] * 3 + [False] + [True] * 2
    assert "no room for the KV cache of a prompt and its answer of 4001 tokens" in (found[3].error or "")


def test_models_that_cannot_run_so_are_refused(store: Path) -> None:
    with StreamingModel(store, "t5") as model, pytest.raises(UnsupportedModelError, match="only decodes"):
        answers(model, [[1]])
    with StreamingModel(store, "llama") as model:
        model.model.generation_config.repetition_penalty = 1.5
        with pytest.raises(UnsupportedModelError, match="RepetitionPenaltyLogitsProcessor"):
            answers(model, [[1]])


def test_a_reader_that_leaves_ends_the_run(store: Path) -> None:
    async def leave(model: StreamingModel) -> None:
        results = model.generate_many(itertools.repeat([7, 8]), max_new_tokens=2)
        async for _ in results:
            break
        await results.aclose()

    with StreamingModel(store, "llama") as model:
        asyncio.run(leave(model))
        model(torch.tensor([[1, 2]]))
