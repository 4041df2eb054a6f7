"""A generation's maximum length is derived from the arguments of generate(), as in transformers."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from surfw.models.kv_reserve import generation_size

IDS = torch.ones(2, 7, dtype=torch.long)


def size(*args: Any, model_config: dict[str, Any] | None = None, encoder: bool = False, **kwargs: Any) -> Any:
    """The maximum length of a call on a model with these generation settings."""
    model = SimpleNamespace(
        config=SimpleNamespace(is_encoder_decoder=encoder), generation_config=GenerationConfig(**model_config or {})
    )
    return generation_size(model, args, kwargs)


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"max_new_tokens": 5}, (7, 5, 2)),
        ({"max_new_tokens": 0}, (7, 0, 2)),
        ({"max_length": 30}, (7, 23, 2)),
        ({"max_length": 3}, (7, 0, 2)),
        ({"max_new_tokens": 5, "max_length": 300}, (7, 5, 2)),
        ({"max_new_tokens": None, "max_length": 9}, (7, 2, 2)),
        ({}, (7, 20, 2)),
        ({"max_new_tokens": 5, "num_beams": 4}, (7, 5, 8)),
        ({"max_new_tokens": 5, "num_beams": 4, "num_return_sequences": 3}, (7, 5, 8)),
        ({"max_new_tokens": 5, "do_sample": True, "num_return_sequences": 3}, (7, 5, 6)),
        ({"generation_config": GenerationConfig(max_new_tokens=11, num_beams=2)}, (7, 11, 4)),
        ({"generation_config": GenerationConfig(max_new_tokens=11, num_beams=2), "max_new_tokens": 3}, (7, 3, 4)),
    ],
)
def test_keywords_come_before_the_settings_given(kwargs: dict[str, Any], expected: tuple[int, int, int]) -> None:
    assert size(IDS, **kwargs) == size(input_ids=IDS, **kwargs) == size(inputs=IDS, **kwargs) == expected


def test_what_nobody_gives_is_the_models() -> None:
    own = {"max_new_tokens": 50, "num_beams": 3}
    assert size(IDS, model_config=own) == (7, 50, 6)
    assert size(IDS, model_config=own, num_beams=1) == (7, 50, 2)
    assert size(IDS, model_config=own, generation_config=GenerationConfig(num_beams=2)) == (7, 50, 4)
    assert size(IDS, model_config={"max_length": 40}, generation_config=GenerationConfig()) == (7, 33, 2)


def test_an_encoders_prompt_does_not_count_towards_the_length() -> None:
    assert size(IDS, encoder=True, max_length=30) == (7, 30, 2)
    assert size(IDS, encoder=True) == (7, 20, 2)
    assert size(IDS, encoder=True, max_new_tokens=4, num_beams=2) == (7, 4, 4)


def test_a_prompt_of_embeddings_and_none_at_all() -> None:
    assert size(inputs_embeds=torch.zeros(3, 9, 16), max_new_tokens=4) == (9, 4, 3)
    assert size(max_new_tokens=4) == (1, 4, 1)


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default:UserWarning")
@pytest.mark.parametrize(
    "call",
    [
        {"max_new_tokens": 6},
        {"max_length": 12},
        {},
        {"generation_config": GenerationConfig(max_length=15)},
        {"generation_config": GenerationConfig(num_beams=2)},
        {"max_new_tokens": 6, "num_beams": 3, "num_return_sequences": 2},
    ],
)
@pytest.mark.parametrize("own", [{}, {"max_new_tokens": 9}, {"max_length": 18}])
def test_a_real_generation_is_as_large_as_was_told(call: dict[str, Any], own: dict[str, Any]) -> None:
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32,
        max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=0, **own)
    rows: list[int] = []
    model.register_forward_pre_hook(lambda _, args, kwargs: rows.append(kwargs["input_ids"].shape[0]), with_kwargs=True)
    prompt_tokens, new_tokens, sequences = generation_size(model, (IDS,), call)
    tokens = model.generate(IDS, do_sample=False, **call)
    assert (prompt_tokens, new_tokens) == (7, tokens.shape[1] - 7)
    assert sequences == max(rows)
