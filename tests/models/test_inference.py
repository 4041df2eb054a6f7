"""One prompt through a model: tokens equal those of transformers, times those of the clock, and errors explain."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from surfw.errors import ConfigurationError
from surfw.models import StreamingModel, inference
from surfw.models.inference import InferenceRequest, InferenceResult, TokenClock, answer
from surfw.storage import open_backend
from surfw.storage.store_source import open_storage_source
from tests.checkpoints import resident

PROMPT = "Weights arrive while"


@pytest.fixture
def opened(store: Path) -> Iterator[Callable[[str], StreamingModel]]:
    """Opens models of the store by name; all are closed at the end."""
    models: list[StreamingModel] = []

    def open_model(name: str) -> StreamingModel:
        models.append(StreamingModel.open(lambda: open_storage_source(open_backend(store)), name))
        return models[-1]

    yield open_model
    for model in models:
        model.close()


@pytest.fixture
def llama(opened: Callable[[str], StreamingModel]) -> StreamingModel:
    return opened("llama")


@pytest.fixture
def tokenizer(llama: StreamingModel) -> PreTrainedTokenizerBase:
    found = llama.tokenizer
    assert found is not None
    return found


def greedy(checkpoints: Path, name: str, ids: list[int], count: int, **options: Any) -> list[int]:
    """What transformers generates."""
    given = torch.tensor([ids])
    model = resident(checkpoints, name)
    output = model.generate(
        given, attention_mask=torch.ones_like(given), max_new_tokens=count, do_sample=False, pad_token_id=0, **options
    )
    return [int(one) for one in output[0, 1 if model.config.is_encoder_decoder else len(ids) :]]


def test_a_prompt_is_continued_as_transformers_does(
    llama: StreamingModel, tokenizer: PreTrainedTokenizerBase, checkpoints: Path
) -> None:
    pieces: list[str] = []
    tokens: list[tuple[int, float]] = []
    result = answer(
        llama,
        tokenizer,
        InferenceRequest(prompt=PROMPT, max_new_tokens=9),
        on_text=pieces.append,
        on_token=lambda *token: tokens.append(token),
    )
    seconds = [when for _, when in tokens]
    assert [token for token, _ in tokens] == result.token_ids
    ids = AutoTokenizer.from_pretrained(checkpoints / "llama")(PROMPT).input_ids
    assert result.token_ids == greedy(checkpoints, "llama", ids, 9)
    assert result.prompt_tokens == len(ids)
    assert result.text == tokenizer.decode(result.token_ids, skip_special_tokens=True) == "".join(pieces)
    assert len(seconds) == len(result.token_ids)
    assert seconds == sorted(seconds)
    assert result.ttft_seconds == seconds[0]
    assert result.tpot_seconds == pytest.approx((seconds[-1] - seconds[0]) / (len(seconds) - 1))
    assert result.tokens_per_second is not None
    assert 0 < result.tokens_per_second <= len(seconds) / seconds[-1]


def test_ids_are_taken_as_they_are(llama: StreamingModel, checkpoints: Path) -> None:
    result = answer(llama, None, InferenceRequest(prompt_ids=[5, 9, 77], max_new_tokens=4))
    assert result.token_ids == greedy(checkpoints, "llama", [5, 9, 77], 4)
    assert (result.text, result.prompt_tokens) == ("", 3)


def test_an_encoder_and_decoder_generate(opened: Callable[[str], StreamingModel], checkpoints: Path) -> None:
    tokens: list[tuple[int, float]] = []
    request = InferenceRequest(prompt_ids=[5, 9, 77], max_new_tokens=4)
    result = answer(opened("t5"), None, request, on_token=lambda *token: tokens.append(token))
    seconds = [when for _, when in tokens]
    assert result.token_ids == greedy(checkpoints, "t5", [5, 9, 77], 4)
    assert result.prompt_tokens == 3
    assert len(seconds) == len(result.token_ids)  # the decoder's start token is not counted
    assert result.ttft_seconds == seconds[0]


def test_one_token_has_no_time_per_further_token(llama: StreamingModel) -> None:
    result = answer(llama, None, InferenceRequest(prompt_ids=[5], max_new_tokens=1))
    assert len(result.token_ids) == 1
    assert result.ttft_seconds is not None
    assert result.tpot_seconds is None


def test_generation_ends_at_the_models_end_unless_it_is_to_be_ignored(llama: StreamingModel) -> None:
    free = answer(llama, None, InferenceRequest(prompt_ids=[5, 9], max_new_tokens=6, ignore_eos=True))
    assert len(free.token_ids) == 6
    llama.model.generation_config.eos_token_id = free.token_ids[2]
    first = free.token_ids.index(free.token_ids[2])
    ended = answer(llama, None, InferenceRequest(prompt_ids=[5, 9], max_new_tokens=6))
    assert ended.token_ids == free.token_ids[: first + 1]
    again = answer(llama, None, InferenceRequest(prompt_ids=[5, 9], max_new_tokens=6, ignore_eos=True))
    assert again.token_ids == free.token_ids
    assert llama.model.generation_config.eos_token_id == free.token_ids[2]


def test_a_text_ends_the_generation(llama: StreamingModel, tokenizer: PreTrainedTokenizerBase) -> None:
    request = InferenceRequest(prompt=PROMPT, max_new_tokens=12, ignore_eos=True)
    free = answer(llama, tokenizer, request)
    stop = tokenizer.decode(free.token_ids[4:5])
    assert isinstance(stop, str)
    ended = answer(llama, tokenizer, InferenceRequest(prompt=PROMPT, max_new_tokens=12, ignore_eos=True, stop=[stop]))
    assert len(ended.token_ids) <= 5
    assert ended.token_ids == free.token_ids[: len(ended.token_ids)]
    assert ended.text == free.text[: free.text.index(stop)]


def test_a_seed_makes_a_sample_repeatable(llama: StreamingModel) -> None:
    def sample(seed: int) -> list[int]:
        return answer(
            llama, None, InferenceRequest(prompt_ids=[5], max_new_tokens=8, temperature=5.0, seed=seed, ignore_eos=True)
        ).token_ids

    assert sample(1) == sample(1)
    assert len({tuple(sample(seed)) for seed in range(4)}) > 1


@pytest.mark.parametrize(
    ("options", "samples"),
    [
        ({}, False), ({"temperature": 0.0}, False), ({"temperature": 0.7}, True), ({"top_p": 0.9}, True),
        ({"top_k": 5}, True), ({"temperature": 0.0, "top_k": 5}, False), ({"seed": 3}, False),
    ],
)  # fmt: skip
def test_what_makes_a_request_sample(options: dict[str, Any], samples: bool) -> None:
    assert InferenceRequest(prompt="x", **options).samples is samples


@pytest.mark.parametrize(
    ("request_of", "text"),
    [
        ({"prompt_ids": []}, "the prompt is empty; give at least one token"),
        ({"prompt_ids": [1, 300]}, "token id 300 is not in the vocabulary of llama: expected 0 to 299"),
        ({"prompt_ids": [-1]}, "token id -1 is not in the vocabulary of llama: expected 0 to 299"),
        ({"prompt_ids": [2**70]}, f"token id {2**70} is not in the vocabulary of llama: expected 0 to 299"),
        ({"prompt": "x"}, "llama has no tokenizer; give the prompt as token ids (--prompt-ids 1,2,3)"),
        ({"prompt_ids": [1], "stop": ["x"]}, "llama has no tokenizer, so no text can end its generation"),
    ],
)
def test_requests_that_do_not_fit_the_model(llama: StreamingModel, request_of: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        answer(llama, None, InferenceRequest(**request_of))
    assert str(caught.value) == text
    assert llama.statistics()["cache"]["hits"] == 0


def test_a_system_message_needs_a_chat_template(llama: StreamingModel, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(
        ConfigurationError, match="llama has no chat template, so a system message has no place in its prompt"
    ):
        answer(llama, tokenizer, InferenceRequest(prompt=PROMPT, system="Be brief."))


TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'system' and message.content == 'refuse' %}"
    "{{ raise_exception('no system messages') }}{% endif %}{{ message.role }}: {{ message.content }} {% endfor %}"
)


def test_a_chat_template_is_used_unless_the_prompt_is_raw(
    llama: StreamingModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.chat_template = TEMPLATE
    chat = answer(llama, tokenizer, InferenceRequest(prompt="Hi", system="Be brief.", max_new_tokens=1))
    assert chat.prompt_tokens == len(tokenizer("system: Be brief. user: Hi ").input_ids)
    raw = answer(llama, tokenizer, InferenceRequest(prompt="Hi", raw=True, max_new_tokens=1))
    assert raw.prompt_tokens == len(tokenizer("Hi").input_ids)
    with pytest.raises(
        ConfigurationError, match=r"the chat template of llama refuses the prompt \(TemplateError: no system"
    ):
        answer(llama, tokenizer, InferenceRequest(prompt="Hi", system="refuse"))


def test_a_prompt_that_is_longer_than_the_positions(opened: Callable[[str], StreamingModel]) -> None:
    bert = opened("bert")
    with pytest.raises(ConfigurationError, match="bert has positions for 64 tokens, but the prompt has 65; shorten it"):
        answer(bert, None, InferenceRequest(prompt_ids=[5] * 65))
    assert len(answer(bert, None, InferenceRequest(prompt_ids=[5] * 64)).embedding or []) == 64


def test_an_encoder_gives_the_mean_of_its_last_states(
    opened: Callable[[str], StreamingModel], checkpoints: Path
) -> None:
    bert = opened("bert")
    result = answer(bert, bert.tokenizer, InferenceRequest(prompt=PROMPT))
    inputs = AutoTokenizer.from_pretrained(checkpoints / "bert")(PROMPT, return_tensors="pt")
    with torch.no_grad():
        states = resident(checkpoints, "bert")(**inputs, output_hidden_states=True).hidden_states[-1]
    assert result.embedding == states[0].mean(0).tolist()
    assert result.predictions is None
    assert result.prompt_tokens == inputs["input_ids"].shape[1]
    assert result.token_ids == []


def test_a_mask_is_filled_with_the_likeliest_tokens(opened: Callable[[str], StreamingModel], checkpoints: Path) -> None:
    bert = opened("bert")
    result = answer(bert, bert.tokenizer, InferenceRequest(prompt="Weights [MASK] while the [MASK] runs."))
    tokenizer = AutoTokenizer.from_pretrained(checkpoints / "bert")
    inputs = tokenizer("Weights [MASK] while the [MASK] runs.", return_tensors="pt")
    with torch.no_grad():
        logits = resident(checkpoints, "bert")(**inputs).logits[0]
    places = [at for at, one in enumerate(inputs["input_ids"][0].tolist()) if one == tokenizer.mask_token_id]
    assert result.embedding is None
    assert result.predictions is not None
    assert [found["position"] for found in result.predictions] == places
    assert len(places) == 2
    for found in result.predictions:
        best = logits[found["position"]].softmax(-1).topk(5)
        assert [one["id"] for one in found["candidates"]] == best.indices.tolist()
        assert [one["probability"] for one in found["candidates"]] == best.values.tolist()
        assert found["candidates"][0]["text"] == str(tokenizer.decode(best.indices[0])).strip()


def test_a_classifier_names_its_labels(opened: Callable[[str], StreamingModel], checkpoints: Path) -> None:
    result = answer(opened("electra-classifier"), None, InferenceRequest(prompt_ids=[5, 9, 77]))
    with torch.no_grad():
        logits = resident(checkpoints, "electra-classifier")(torch.tensor([[5, 9, 77]])).logits[0]
    assert result.predictions is not None
    ((found),) = result.predictions
    assert {one["text"] for one in found["candidates"]} == {"LABEL_0", "LABEL_1"}
    assert [one["probability"] for one in found["candidates"]] == logits.softmax(-1).sort(
        descending=True
    ).values.tolist()


def test_the_clock_counts_new_tokens_only(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([10.0, 11.0, 13.0])
    monkeypatch.setattr(inference.time, "perf_counter", lambda: next(now))
    heard: list[tuple[int, float]] = []
    clock = TokenClock(None, lambda *token: heard.append(token))
    for token in ([[1, 2, 3]], [4], [5]):
        clock.put(torch.tensor(token))
    clock.end()
    assert clock.times == [1.0, 3.0]
    assert heard == [(4, 1.0), (5, 3.0)]


def test_an_answer_starts_empty() -> None:
    assert InferenceResult().token_ids == []
    assert InferenceResult().embedding is InferenceResult().predictions is None


@pytest.mark.parametrize("kind", [ValueError, IndexError, RuntimeError])
@pytest.mark.parametrize("which", ["on_text", "on_token"])
def test_an_exception_of_the_callers_own_comes_back_as_it_is(
    kind: type[Exception], which: str, llama: StreamingModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    mine = kind("mine")

    def fail(*_: object) -> None:
        raise mine

    request = InferenceRequest(prompt=PROMPT, max_new_tokens=5000)  # too many positions, which are not the cause
    with pytest.raises(kind) as caught:
        answer(llama, tokenizer, request, **{which: fail})
    assert caught.value is mine
    assert len(answer(llama, tokenizer, InferenceRequest(prompt=PROMPT, max_new_tokens=2)).token_ids) == 2


def test_stop_texts_and_outputs_of_the_model_s_own_settings(
    llama: StreamingModel, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    plain = answer(llama, tokenizer, InferenceRequest(prompt_ids=[5, 6], max_new_tokens=4))
    before = llama.model.generation_config
    own = copy.deepcopy(before)
    own.stop_strings, own.return_dict_in_generate, own.output_scores = ["no such text"], True, True
    llama.model.generation_config = own
    try:
        assert (
            answer(llama, tokenizer, InferenceRequest(prompt_ids=[5, 6], max_new_tokens=4)).token_ids == plain.token_ids
        )
        without = answer(llama, None, InferenceRequest(prompt_ids=[5, 6], max_new_tokens=4))
        assert without.token_ids == plain.token_ids
        assert caplog.messages == [
            "llama has texts that end a generation (stop_strings), which take a tokenizer: ignored"
        ]
    finally:
        llama.model.generation_config = before
