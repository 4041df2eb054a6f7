"""Speculative decoding: answers stay the same, right guesses are counted, and memory is bounded."""

import asyncio
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from surfw import ConfigurationError, ModelChunker, StreamingModel, SurfwError
from surfw.metrics import Metrics
from surfw.models import speculation
from surfw.models.inference import InferenceRequest, answer
from surfw.models.pace import Pace
from surfw.runtime.plan import ResidencyPlan
from tests.checkpoints import resident, save_llama
from tests.exactness.families import FAMILIES

NEW = 24
PROMPT = [9, 8, 7, 9, 8, 7, 9, 8]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    save_llama(folder / "big", hidden=128)
    save_llama(folder / "small", layers=1)
    save_llama(folder / "deep", hidden=128, layers=40)
    for name in ("gpt2", "t5"):
        torch.manual_seed(1)
        FAMILIES[name].build().save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def store(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("speculation") / "store"
    for folder in sorted(checkpoints.iterdir()):
        codecs = ("none", "int8") if folder.name in {"big", "deep"} else ("none",)
        ModelChunker(folder, store, codecs=codecs).chunk_model_sync()
    return store


@pytest.fixture
def big(store: Path) -> Iterator[StreamingModel]:
    with StreamingModel.open(store, "big", cache_size=1) as model:
        yield model


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speculate in every pass but the first two, whatever it costs."""
    monkeypatch.setattr(Pace, "wants_guesses", property(lambda self: len(self._plain) >= 2))


def generate(model: Any, **options: Any) -> list[int]:
    ids = torch.tensor([PROMPT])
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, pad_token_id=0, **options
    )
    return [int(one) for one in found[0, len(PROMPT) :]]


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("name", ["big", "gpt2"])
def test_prompt_lookup_gives_the_plain_answer(checkpoints: Path, store: Path, name: str) -> None:
    plain = generate(resident(checkpoints, name))
    assert plain == generate(resident(checkpoints, name), prompt_lookup_num_tokens=4)
    with StreamingModel.open(store, name, cache_size=1) as model:
        model.speculate(prompt_lookup=4)
        assert generate(model) == plain
        facts = model.statistics()["speculation"]
        assert facts is not None
        assert facts["kind"] == "prompt_lookup"
        assert facts["guessed_tokens"] >= facts["accepted_tokens"] >= 0
        assert facts["passes"] + facts["accepted_tokens"] <= NEW
        model.speculate()
        assert generate(model) == plain
        assert model.statistics()["speculation"] is None


@pytest.mark.usefixtures("always")
def test_a_draft_that_says_the_same_is_always_right(checkpoints: Path, store: Path, big: StreamingModel) -> None:
    with StreamingModel.open(store, "big") as draft:
        big.speculate(draft=draft)
        assert generate(big, min_new_tokens=NEW) == generate(resident(checkpoints, "big"), min_new_tokens=NEW)
        facts = big.statistics()["speculation"]
    assert facts is not None
    assert facts["acceptance"] == 1.0
    assert facts["draft"] == "big"
    assert facts["passes"] < NEW / 2


@pytest.mark.usefixtures("always")
def test_another_draft_changes_no_token(checkpoints: Path, big: StreamingModel) -> None:
    plain = generate(resident(checkpoints, "big"))
    big.speculate(draft="small")
    assert generate(big) == plain
    found = answer(big, None, InferenceRequest(prompt_ids=PROMPT, max_new_tokens=NEW))
    assert found.token_ids == plain
    assert len(found.token_ids) == len(plain)
    big.model.generation_config.assistant_ensemble_weight = 0.01  # the draft's opinion decides
    assert generate(big) == plain
    assert answer(big, None, InferenceRequest(prompt_ids=PROMPT, max_new_tokens=NEW)).token_ids == plain


@pytest.mark.usefixtures("always")
def test_each_token_is_told_once_and_in_order(big: StreamingModel) -> None:
    big.speculate(draft="self:int8")

    async def collect() -> list[int]:
        return [one async for one in big.stream(PROMPT, max_new_tokens=NEW)]

    assert asyncio.run(collect()) == generate(big)


def test_a_draft_counts_in_the_budget(store: Path) -> None:
    with StreamingModel.open(store, "big", memory_budget="32MB") as model:
        model.speculate(draft="self:int8")
        ids = torch.tensor([PROMPT])
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, pad_token_id=0)
        draft = model._speculation._draft
        assert draft is not None
        plans = [model.plan, draft.plan]
        assert sum(one.peak_bytes + one.reserved_bytes for one in plans) <= 32_000_000
        assert model.plan.budget_bytes == 32_000_000 - plans[1].peak_bytes - plans[1].reserved_bytes
        assert draft.plan.everything_fits
        assert draft.plan.reserved_bytes > 0
        assert model.memory_budget == 32_000_000
        model.speculate(prompt_lookup=3)
        assert model.plan.budget_bytes == 32_000_000
        with pytest.raises(Exception, match="is closed"):
            draft(ids)


def test_a_draft_that_does_not_pay_gives_its_memory_back(
    checkpoints: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = generate(resident(checkpoints, "deep"))
    seen: list[list[ResidencyPlan]] = []
    with StreamingModel.open(store, "deep", memory_budget="32MB") as model:
        model.speculate(draft="self:int8")
        own = model._own_draft
        assert own is not None
        assert own.model.plan.everything_fits

        def rest(rest: Callable[[], None] = own.rest) -> None:
            seen.append([model.plan, own.model.plan])
            held.append(own.model._engine.resident())
            rest()
            seen.append([model.plan, own.model.plan])
            held.append(own.model._engine.resident())

        held: list[list[str]] = []
        monkeypatch.setattr(own, "rest", rest)
        monkeypatch.setattr(Pace, "wants_guesses", property(lambda self: len(self._plain) >= 2))
        monkeypatch.setattr(Pace, "has_switched_off", property(lambda self: self._in_a_row > 0))
        assert generate(model) == plain
        facts = model.statistics()["speculation"]
        assert facts is not None
        assert facts["guessed_passes"] == 1
        before, after = seen
        assert len(held[0]) > 40
        assert len(held[1]) < 10, "its layers have left memory before the model gets it"
        assert (after[0].budget_bytes or 0) > (before[0].budget_bytes or 0)
        assert all(sum(one.peak_bytes + one.reserved_bytes for one in plans) <= 32_000_000 for plans in seen)
        assert model.plan.budget_bytes == model.memory_budget == 32_000_000, "after the generation, it has all"
        with pytest.raises(SurfwError, match="is closed"):
            own.model(torch.tensor([PROMPT]))
        model.memory_budget = "31MB"
        assert generate(model) == plain
        assert model.plan.budget_bytes == 31_000_000
        assert model.statistics()["speculation"] == facts
        assert facts["switched_off"]
        model.speculate(draft="self:int8")
        assert (model.plan.budget_bytes or 0) < 31_000_000


def test_what_was_given_back_under_pressure_is_not_taken_again_from_a_draft(store: Path) -> None:
    with StreamingModel.open(store, "deep", memory_budget="32MB") as model:
        model.speculate(draft="self:int8")
        before = model.plan.budget_bytes or 0
        assert model._engine.shrink(1_000_000) is not None
        given = before - (model._engine.limit.budget_bytes or 0)
        assert given > 0
        model.speculate()
        assert model.memory_budget == 32_000_000 - given


class Memory:
    """The memory of a draft without which the model would read half as much."""

    def __init__(self) -> None:
        self.is_given_back = False

    def share(self, prompt_tokens: int, new_tokens: int) -> None:
        self.is_given_back = False

    def reading_without(self) -> float:
        return 0.5

    def rest(self) -> None:
        self.is_given_back = True


@pytest.mark.parametrize(
    ("stalled", "tokens", "pays"),
    [
        (1.0, 2, False),  # two tokens per pass are faster than plain passes now, but not faster than without the draft
        (1.0, 4, True),
        (0.2, 2, True),  # the model is compute-bound, so reading less would not help
    ],
)
def test_a_draft_has_to_win_against_a_model_that_has_its_memory(
    big: StreamingModel, stalled: float, tokens: int, pays: bool
) -> None:
    metrics, memory = Metrics(), Memory()
    guessing = speculation.Speculation(metrics, prompt_lookup=1, own=memory)  # type: ignore[arg-type]
    guessed = 0

    def generate(_: Any) -> None:
        nonlocal guessed
        for _ in range(40):
            guesses = 4 if guessing.wants_guesses() else 0
            guessed += guesses > 0
            metrics.add_seconds("stall", stalled)
            guessing.note(1.3 if guesses else 1.0, tokens=tokens if guesses else 1, guesses=guesses)

    guessing.begin(1, 1)
    guessing.run(big.model, generate)
    assert (guessed == 38) is pays
    assert memory.is_given_back is not pays
    assert guessing.facts()["switched_off"] is not pays
    assert guessing.begin(1, 1) is pays


def test_a_draft_that_does_not_fit_is_refused_and_nothing_changes(store: Path) -> None:
    with StreamingModel.open(store, "big", memory_budget="32MB") as model:
        least = model._engine.least_budget_bytes
    with StreamingModel.open(store, "big", memory_budget=least + 1000) as model:
        with pytest.raises(
            ConfigurationError,
            match=r"^the draft cannot .* that big leaves of .*: both need over ",
        ):
            model.speculate(draft="small")
        assert model.plan.budget_bytes == least + 1000
        assert model.statistics()["speculation"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_lookup": 0}, "prompt_lookup is 0"),
        ({"prompt_lookup": 3, "draft": "small"}, "exclude each other"),
        ({"draft": "self:int4"}, "not as int4"),
        ({"draft": "self:int3"}, "the draft is 'self:int3', expected self:int8 or self:int4"),
        ({"draft": "gpt2"}, "vocabulary of"),
        ({"draft": "t5"}, "does not generate as"),
        ({"draft": 3}, "draft is 3"),
    ],
)
def test_what_cannot_guess_is_refused(big: StreamingModel, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        big.speculate(**options)
    assert generate(big)


def test_stop_texts_are_found_without_guesses(big: StreamingModel) -> None:
    request = InferenceRequest(prompt="Weights", max_new_tokens=NEW)
    whole = answer(big, big.tokenizer, request)
    stop = whole.text[3:5]
    big.speculate(draft="self:int8")
    found = answer(big, big.tokenizer, InferenceRequest(prompt="Weights", max_new_tokens=NEW, stop=[stop]))
    assert found.token_ids == whole.token_ids[: len(found.token_ids)]
    assert found.text == whole.text.partition(stop)[0], "the stop text is no part of the answer"
    facts = big.statistics()["speculation"]
    assert facts is not None
    assert facts["guessed_tokens"] == 0


def drive(pace: Pace, *, plain: float, guessed: float, tokens: Iterator[int], passes: int) -> tuple[float, int, int]:
    """What a generation takes: seconds, tokens, and passes with guesses."""
    seconds, count, guesses = 0.0, 0, 0
    for _ in range(passes):
        if pace.wants_guesses:
            given, took = next(tokens), guessed
            guesses += 1
        else:
            given, took = 1, plain
        pace.note(took, tokens=given, guesses=4 if took == guessed else 0)
        seconds, count = seconds + took, count + given
    return seconds, count, guesses


@pytest.mark.parametrize("guessed", [1.05, 1.5, 2.0])
@pytest.mark.parametrize("passes", [64, 500, 4000])
def test_guesses_that_are_never_right_cost_little(guessed: float, passes: int) -> None:
    seconds, tokens, guesses = drive(Pace(), plain=1.0, guessed=guessed, tokens=itertools.repeat(1), passes=passes)
    assert guesses > 0
    assert seconds / tokens < 1.035


def test_guesses_that_are_right_go_on() -> None:
    seconds, tokens, guesses = drive(Pace(), plain=1.0, guessed=1.5, tokens=itertools.repeat(4), passes=200)
    assert guesses >= 190
    assert seconds / tokens < 0.4


def test_a_text_that_becomes_easier_is_noticed() -> None:
    pace = Pace()
    drive(pace, plain=1.0, guessed=1.2, tokens=itertools.repeat(1), passes=60)
    assert pace.has_switched_off
    _, _, guesses = drive(pace, plain=1.0, guessed=1.2, tokens=itertools.repeat(5), passes=100)
    assert guesses >= 40
    assert not pace.has_switched_off


def test_a_gain_long_ago_does_not_pay_for_losses() -> None:
    pace = Pace()
    drive(pace, plain=1.0, guessed=1.2, tokens=itertools.repeat(5), passes=1000)
    _, _, guesses = drive(pace, plain=1.0, guessed=2.0, tokens=itertools.repeat(1), passes=20)
    assert guesses <= 6


def test_what_a_draft_guesses_at_first_is_left_as_it_was(store: Path, big: StreamingModel) -> None:
    with StreamingModel.open(store, "small") as draft:
        big.speculate(draft=draft)
        generate(big)
        assert draft.model.generation_config.num_assistant_tokens is None
        assert speculation._MAKER not in vars(big.model)
