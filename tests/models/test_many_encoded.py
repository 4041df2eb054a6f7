"""Many texts through an encoder: batches of similar length, and the resident model's results for the same batches."""

import asyncio
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from surfw import ManyResult, StreamingModel
from surfw.models.inference import InferenceRequest, answer
from surfw.models.many_encoded import _LIKE, MOST_TOKENS, choose_batch, pad
from tests.checkpoints import resident


def answers(model: StreamingModel, asked: Any, **options: Any) -> list[ManyResult]:
    async def collect() -> list[ManyResult]:
        return [one async for one in model.generate_many(asked, **options)]

    return sorted(asyncio.run(collect()), key=lambda one: one.index)


def test_embeddings_are_those_of_the_resident_model_for_the_same_batch(store: Path, checkpoints: Path) -> None:
    asked = [[9, 8, 7, 6, 5, 4, 3], [5, 6], [9, 9, 9, 9, 9, 9, 3, 3]]
    with StreamingModel.open(store, "bert", cache_size=1) as model:
        answers(model, asked)
        start = model.metrics.count("fetched_bytes")
        found = answers(model, asked)
        before = model.metrics.count("fetched_bytes")
        alone = [answer(model, None, InferenceRequest(prompt_ids=one)).embedding for one in asked]
        assert model.metrics.count("fetched_bytes") - before > before - start, "two batches read less than three texts"
    reference = resident(checkpoints, "bert")
    for batch in ([0, 2], [1]):
        inputs = pad(
            [
                {"input_ids": torch.tensor([asked[one]]), "attention_mask": torch.ones(1, len(asked[one]), dtype=int)}
                for one in batch
            ],
            0,
        )
        states = reference(**inputs, output_hidden_states=True).hidden_states[-1]
        for row, one in enumerate(batch):
            length = len(asked[one])
            result = found[one].result
            assert result is not None
            assert result.prompt_tokens == length
            expected = (states[row] * inputs["attention_mask"][row, :, None]).sum(0) / length
            assert torch.equal(torch.tensor(result.embedding), expected.detach())
            torch.testing.assert_close(torch.tensor(result.embedding), torch.tensor(alone[one]))


def test_masks_and_labels_are_answered_as_alone(store: Path) -> None:
    with StreamingModel.open(store, "bert") as model:
        texts = ["Weights [MASK] while", "A layer", "the [MASK] computes before"]
        found = [one.result for one in answers(model, texts)]
        for text, result in zip(texts, found, strict=True):
            alone = answer(model, model.tokenizer, InferenceRequest(prompt=text))
            assert result is not None
            assert (result.predictions is None) == ("[MASK]" not in text)
            if alone.predictions is not None:
                mine = [[one["id"] for one in place["candidates"]] for place in result.predictions or []]
                assert mine == [[one["id"] for one in place["candidates"]] for place in alone.predictions]
    with StreamingModel.open(store, "electra-classifier") as model:
        found = [one.result for one in answers(model, [[5, 6, 7], [8, 9, 10, 11]])]
        for ids, result in zip([[5, 6, 7], [8, 9, 10, 11]], found, strict=True):
            assert result is not None
            alone = answer(model, None, InferenceRequest(prompt_ids=ids)).predictions
            assert alone is not None
            assert result.predictions is not None
            assert len(result.predictions) == len(alone)


def test_a_text_that_cannot_be_encoded_is_its_own_error(store: Path) -> None:
    with StreamingModel.open(store, "bert") as model:
        found = answers(model, [[5, 6], [10**6], [5] * 65, [5] * 64])
    assert [one.error is not None for one in found] == [False, True, True, False]
    assert "positions for 64 tokens, but the prompt has 65; shorten it" in str(found[2].error)


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=60), st.integers(1, 20))
def test_every_text_is_in_one_batch_and_little_is_padding(lengths: list[int], most: int) -> None:
    waiting, batches = deque(range(len(lengths))), []
    while waiting:
        chosen = choose_batch([lengths[one] for one in waiting], most)
        assert chosen[0] == 0, "the one that has waited longest is among them"
        batches.append([waiting[place] for place in chosen])
        for place in reversed(chosen):
            del waiting[place]
    assert sorted(one for batch in batches for one in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[one] for one in batch)
        assert 1 <= len(batch) <= most
        assert len(batch) == 1 or longest * len(batch) <= MOST_TOKENS
        assert sum(lengths[one] for one in batch) >= _LIKE * longest * len(batch)


@pytest.mark.parametrize("padding", [0, 7])
def test_texts_are_filled_up_on_the_right(padding: int) -> None:
    made = pad(
        [{"input_ids": torch.tensor([[1, 2, 3]]), "attention_mask": torch.tensor([[1, 1, 1]])},
         {"input_ids": torch.tensor([[4]]), "attention_mask": torch.tensor([[1]])}],
        padding,
    )  # fmt: skip
    assert made["input_ids"].tolist() == [[1, 2, 3], [4, padding, padding]]
    assert made["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
