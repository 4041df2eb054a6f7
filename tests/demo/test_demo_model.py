"""The model in the package: small, and fluent enough to show that streaming works.

Everything is read from `surfw/demo` with plain transformers. No exact text is expected: bf16 products may round
differently on another CPU.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
DEMO = REPOSITORY / "surfw" / "demo"
CORPUS = REPOSITORY / "examples" / "demo_model" / "corpus"
PROMPTS = ("Weight streaming is", "The server", "What is a chunk?")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO, local_files_only=True)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(DEMO, local_files_only=True)


@pytest.fixture(scope="module")
def answers(model: Any, tokenizer: Any) -> dict[str, torch.Tensor]:
    """The new tokens after each prompt, at most 120: int64 [new tokens]."""
    return {prompt: continued(model, tokenizer, prompt, 120) for prompt in PROMPTS}


def continued(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int) -> torch.Tensor:
    encoded = tokenizer(prompt, return_tensors="pt")
    tokens: torch.Tensor = model.generate(**encoded, max_new_tokens=max_new_tokens)[0]
    return tokens[encoded["input_ids"].shape[1] :]


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.lower())


def test_the_weights_are_small_bf16_and_streamed_in_several_layers(model: Any) -> None:
    weights = DEMO / "model.safetensors"
    assert weights.stat().st_size < 4_000_000
    with safe_open(weights, framework="pt") as stored:
        assert {stored.get_slice(name).get_dtype() for name in stored.keys()} == {"BF16"}  # noqa: SIM118 - not a dict
    assert model.dtype == torch.bfloat16
    assert model.config.num_hidden_layers >= 6


def test_the_head_is_tied_and_stored_once(model: Any) -> None:
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with safe_open(DEMO / "model.safetensors", framework="pt") as stored:
        assert "lm_head.weight" not in stored.keys()  # noqa: SIM118 - not a dict


def test_generation_is_greedy_and_knows_its_end(model: Any, tokenizer: Any) -> None:
    config = model.generation_config
    assert not config.do_sample
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (
        tokenizer.pad_token_id,
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
    )


def test_no_configuration_asks_for_code() -> None:
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        assert "auto_map" not in json.loads((DEMO / name).read_text("utf-8"))


def test_the_training_facts_name_the_corpus_as_it_is() -> None:
    facts = json.loads((DEMO / "TRAINING.json").read_text("utf-8"))
    assert facts["weight_bytes"] == (DEMO / "model.safetensors").stat().st_size
    learned = {name: digest for name, digest in facts["corpus"]["sha256"].items() if name != "README.md"}
    assert learned == {path.name: sha256(path.read_bytes().strip()).hexdigest() for path in CORPUS.glob("*.txt")}


@pytest.mark.parametrize(
    "text", ["Weight streaming is", "  two  spaces\n\tand a tab", "Größe: 1 ≤ 2 → 層 🌊", "x" * 300]
)
def test_the_tokenizer_gives_any_text_back(tokenizer: Any, text: str) -> None:
    tokens = tokenizer.encode(text)
    assert tokens[0] == tokenizer.bos_token_id
    assert tokenizer.decode(tokens, skip_special_tokens=True) == text


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_second_run_gives_the_same_tokens(
    model: Any, tokenizer: Any, answers: dict[str, torch.Tensor], prompt: str
) -> None:
    assert torch.equal(continued(model, tokenizer, prompt, 48), answers[prompt][:48])


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_continuation_is_made_of_the_words_of_the_corpus(
    tokenizer: Any, answers: dict[str, torch.Tensor], prompt: str
) -> None:
    known = {word for path in CORPUS.glob("*.txt") for word in words_of(path.read_text("utf-8"))}
    text = tokenizer.decode(answers[prompt][:48], skip_special_tokens=True)
    words = words_of(text)
    assert len(words) >= 10
    assert sum(word in known for word in words) >= 0.9 * len(words), text


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_continuation_does_not_run_in_circles(tokenizer: Any, answers: dict[str, torch.Tensor], prompt: str) -> None:
    words = words_of(tokenizer.decode(answers[prompt], skip_special_tokens=True))
    fours = Counter(zip(words, words[1:], words[2:], words[3:], strict=False))
    assert max(fours.values()) <= 2, fours.most_common(3)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_an_answer_ends_by_itself_with_a_sentence(
    tokenizer: Any, answers: dict[str, torch.Tensor], prompt: str
) -> None:
    assert answers[prompt][-1] == tokenizer.eos_token_id
    assert tokenizer.decode(answers[prompt], skip_special_tokens=True)[-1] in ".!?"
