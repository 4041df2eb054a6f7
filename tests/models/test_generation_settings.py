"""A model's own generation settings apply as in transformers, except those that give more than one answer."""

import copy
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from surfw.models import StreamingModel
from surfw.models.from_manifest import _configure_generation
from surfw.models.inference import InferenceRequest, answer
from tests.checkpoints import resident
from tests.models.test_streaming import opener

PROMPT = [5, 9, 5, 9, 5, 9, 5]
OUTPUTS = {
    "return_dict_in_generate": True, "output_scores": True, "output_logits": True, "output_attentions": True,
    "output_hidden_states": True,
}  # fmt: skip
SAMPLING = {
    "do_sample": True,
    "temperature": 0.3,
    "top_p": 0.5,
    "top_k": 5,
    "min_p": 0.1,
    "typical_p": 0.5,
    "top_h": 0.3,
}


@pytest.fixture
def llama(store: Path) -> Iterator[StreamingModel]:
    with StreamingModel.open(opener(store), "llama") as model:
        yield model


@pytest.mark.parametrize(
    ("settings", "same_as"),
    [
        (SAMPLING, {}),
        (OUTPUTS, {}),
        ({"max_length": 5}, {}),
        ({"prompt_lookup_num_tokens": 2}, {}),
        ({"prefill_chunk_size": 2}, {}),
        ({"use_cache": False}, {}),
        ({"num_beams": 4, "length_penalty": 2.0, "early_stopping": True}, {}),
        ({"num_beams": 2, "num_return_sequences": 2}, {}),
        ({"no_repeat_ngram_size": 2, "repetition_penalty": 1.3}, None),
        ({"guidance_scale": 2.0}, None),
        ({"sequence_bias": [[[5], 3.0]], "bad_words_ids": [[7]]}, None),
        ({"forced_bos_token_id": 9, "forced_eos_token_id": 10}, None),
        ({"suppress_tokens": [5], "begin_suppress_tokens": [6], "encoder_repetition_penalty": 1.2}, None),
    ],
    ids=str,
)
def test_own_settings(
    settings: dict[str, Any], same_as: dict[str, Any] | None, llama: StreamingModel, checkpoints: Path
) -> None:
    """Decoding is always greedy: settings for sampling, beams and outputs have no effect, all others do."""
    made = resident(checkpoints, "llama")
    fixed = settings if same_as is None else same_as
    ids = torch.tensor([PROMPT])
    expected = made.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=2, **fixed
    )
    own = llama.model.generation_config
    llama.model.generation_config = GenerationConfig(**own.to_dict() | settings)
    tokens: list[int] = []
    try:
        result = answer(
            llama, llama.tokenizer, InferenceRequest(prompt_ids=PROMPT, max_new_tokens=8),
            on_token=lambda token, _: tokens.append(token),
        )  # fmt: skip
    finally:
        llama.model.generation_config = own
    assert result.token_ids == expected[0, len(PROMPT) :].tolist() == tokens


@pytest.mark.parametrize(("name", "asked"), [("num_beams", 4), ("num_return_sequences", 3)])
def test_what_is_not_followed_is_said(
    name: str, asked: int, llama: StreamingModel, caplog: pytest.LogCaptureFixture
) -> None:
    own = llama.model.generation_config
    llama.model.generation_config = copy.deepcopy(own)
    setattr(llama.model.generation_config, name, asked)
    try:
        answer(llama, None, InferenceRequest(prompt_ids=PROMPT, max_new_tokens=1))
    finally:
        llama.model.generation_config = own
    (said,) = caplog.messages
    assert said == (
        f"llama asks for {name} = {asked} in its own settings, and one answer is made, token by token; generate() from "
        "Python follows them"
    )


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("penalty_alpha", 0.6),
        ("dola_layers", "low"),
        ("force_words_ids", [[5]]),
        ("diversity_penalty", 0.5),
        ("use_mtp", True),
    ],
)
@pytest.mark.parametrize("place", ["generation_config.json", "config.json"])
def test_decoding_that_transformers_moved_out_is_dropped_with_a_line(
    place: str, setting: str, value: Any, llama: StreamingModel, caplog: pytest.LogCaptureFixture
) -> None:
    own, manifest = llama.model.generation_config, copy.copy(llama.manifest)
    in_file = place == "generation_config.json"
    object.__setattr__(manifest, "generation_config", {setting: value} if in_file else None)
    try:
        with caplog.at_level(logging.WARNING, "surfw"):
            _configure_generation(llama.model, {setting: value} if in_file else {}, manifest, {setting: value})
        assert getattr(llama.model.generation_config, setting, None) is None
    finally:
        llama.model.generation_config = own
    assert caplog.messages == [
        f"llama: ignored in its generation settings, because no file may choose it: {setting}: {value}"
    ]
