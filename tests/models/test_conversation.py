"""Every turn of a conversation gives the tokens of a fresh generation, and the model reads only new tokens."""

import asyncio
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from surfw.chunking import prepare_model, write_model
from surfw.errors import ConfigurationError, UnsupportedModelError
from surfw.models import StreamingModel
from surfw.models.conversation import Conversation, Turn
from surfw.runtime.kv_cache import cache_name
from surfw.storage import open_backend
from surfw.storage.store_source import open_storage_source
from tests.checkpoints import resident, save_bert, save_llama
from tests.exactness.families import FAMILIES

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
FORGETFUL = (
    "{% for m in messages %}{{ m.role }}: {{ m.content if m.role == 'user' else 'said something' }}\n{% endfor %}"
    "assistant: "
)
SAID = ["Weights arrive", "while the model runs.", "A layer is fetched"]
WINDOW = 24
MODELS = {
    "gpt2": {"n_positions": 256},
    "mistral": {"sliding_window": WINDOW},
    "gemma2": {"sliding_window": WINDOW, "max_position_embeddings": 256},
    "qwen3": {"max_position_embeddings": 256},
    "mixtral-experts": {"max_position_embeddings": 256},
    "bloom": {},
    "mamba": {},
}
"""Models without a chat template, in the order of `FAMILIES`, with the settings that are changed."""


def save_other(path: Path, name: str, settings: dict[str, Any]) -> None:
    """Save a model of another family with the LLaMA's tokenizer."""
    save_llama(path)
    family = FAMILIES[name]
    config = getattr(transformers, family.class_name).config_class
    torch.manual_seed(1)
    made = getattr(transformers, family.class_name)(
        config(**{**family.settings, "vocab_size": 300, "eos_token_id": None, "bos_token_id": None, **settings})
    )
    made.save_pretrained(path)


def save_metaspace(path: Path) -> None:
    """Save a LLaMA with a SentencePiece-like tokenizer, whose tokens are words with the preceding space."""
    save_llama(path, vocab_size=300, eos_token_id=None)
    words = {f"\u2581w{n}": n for n in range(299)}
    tokenizer = Tokenizer(models.WordLevel({**words, "<unk>": 299}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(path)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("conversation")
    save_llama(folder / "llama", max_position_embeddings=256)
    (folder / "llama" / "chat_template.jinja").write_text(TEMPLATE)
    save_llama(folder / "forgetful")
    (folder / "forgetful" / "chat_template.jinja").write_text(FORGETFUL)
    for name, settings in MODELS.items():
        save_other(folder / name, name, settings)
    save_metaspace(folder / "metaspace")
    save_bert(folder / "bert")
    save_other(folder / "t5", "t5", {})
    return folder


@pytest.fixture(scope="module")
def store(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("conversation-store") / "store"
    for folder in sorted(checkpoints.iterdir()):
        with prepare_model(str(folder)) as prepared:
            asyncio.run(write_model(prepared, open_backend(path)))
    return path


@pytest.fixture
def opened(store: Path) -> Iterator[Callable[..., StreamingModel]]:
    """Opens models of the store by name; all are closed at the end."""
    made: list[StreamingModel] = []

    def open_model(name: str, **options: Any) -> StreamingModel:
        made.append(StreamingModel.open(lambda: open_storage_source(open_backend(store)), name, **options))
        return made[-1]

    yield open_model
    for model in made:
        model.close()


def fresh(checkpoints: Path, name: str, ids: list[int], count: int) -> list[int]:
    """What transformers generates from the whole conversation."""
    given = torch.tensor([ids])
    output = resident(checkpoints, name).generate(
        given, attention_mask=torch.ones_like(given), max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    return [int(one) for one in output[0, len(ids) :]]


def rendered(checkpoints: Path, name: str, messages: list[dict[str, str]]) -> list[int]:
    tokenizer: Any = AutoTokenizer.from_pretrained(checkpoints / name)
    if tokenizer.chat_template:
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"])
    text = ""
    for message in messages:
        text += ("\n" if text and message["role"] == "user" else "") + message["content"]
    return list(tokenizer(text).input_ids)


def expect_fresh(checkpoints: Path, name: str, conversation: Conversation, said: str, count: int = 6) -> Turn:
    """Check that the next turn equals a fresh generation from the whole conversation."""
    messages = [*conversation.messages, {"role": "user", "content": said}]
    ids = rendered(checkpoints, name, messages)
    turn = conversation.ask(said)
    assert turn.prompt_tokens == len(ids)
    assert turn.token_ids == fresh(checkpoints, name, ids, count)
    assert conversation.messages == [*messages, {"role": "assistant", "content": turn.text.rstrip("\ufffd")}]
    return turn


def test_a_turn_gives_what_a_new_generation_gives(opened: Callable[..., StreamingModel], checkpoints: Path) -> None:
    conversation = Conversation(opened("llama", cache_size=2), max_new_tokens=6)
    turns = [expect_fresh(checkpoints, "llama", conversation, said) for said in SAID]
    assert turns[0].cached_tokens == 0
    for before, turn in pairwise(turns):
        assert before.prompt_tokens <= turn.cached_tokens < turn.prompt_tokens
    assert conversation.facts().turns == 3


@pytest.mark.parametrize("name", MODELS)
def test_without_a_template_all_goes_on_as_one_text(
    name: str, opened: Callable[..., StreamingModel], checkpoints: Path
) -> None:
    conversation = Conversation(opened(name), max_new_tokens=6)
    assert not conversation.has_template
    turns = [expect_fresh(checkpoints, name, conversation, said) for said in [*SAID, *SAID]]
    facts = conversation.facts()
    assert facts.tokens == turns[-1].prompt_tokens + len(turns[-1].token_ids)
    known = [turn.cached_tokens > 0 for turn in turns]
    assert turns[-1].prompt_tokens > 2 * WINDOW
    if name == "mamba":
        assert not any(known), "a recurrent state takes one token at a time"
        assert (facts.cached_tokens, facts.kv_cache_bytes) == (0, 0)
    elif "sliding_window" not in MODELS[name]:  # there, a token border moved by the tokenizer invalidates the cache
        assert known == [False, True, True, True, True, True]


def test_bit_for_bit_what_the_resident_model_gives_in_the_same_turns(
    opened: Callable[..., StreamingModel], checkpoints: Path
) -> None:
    conversation = Conversation(opened("llama", cache_size=2), max_new_tokens=6)
    model = resident(checkpoints, "llama")
    cache: Any = transformers.DynamicCache(config=model.config)
    for said in SAID:
        ids = rendered(checkpoints, "llama", [*conversation.messages, {"role": "user", "content": said}])
        turn = conversation.ask(said)
        if over := cache.get_seq_length() - turn.cached_tokens:
            cache.crop(-over)
        given = torch.tensor([ids])
        output = model.generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=6, do_sample=False, pad_token_id=0,
            **{cache_name(model): cache},
        )  # fmt: skip
        assert output[0, len(ids) :].tolist() == turn.token_ids
        for ours, theirs in zip(conversation._memory.cache.layers, cache.layers, strict=True):
            assert torch.equal(ours.keys, theirs.keys)
            assert torch.equal(ours.values, theirs.values)


def test_a_template_that_rewrites_the_past(opened: Callable[..., StreamingModel], checkpoints: Path) -> None:
    conversation = Conversation(opened("forgetful"), max_new_tokens=6)
    turns = [expect_fresh(checkpoints, "forgetful", conversation, said) for said in SAID]
    assert 0 < turns[1].cached_tokens <= turns[0].prompt_tokens
    assert turns[0].prompt_tokens < turns[2].cached_tokens <= turns[1].prompt_tokens


def test_a_stopped_answer_is_part_of_the_conversation(opened: Callable[..., StreamingModel], checkpoints: Path) -> None:
    conversation = Conversation(opened("llama"), max_new_tokens=6)
    seen: list[int] = []

    def stop(token: int, _: float) -> None:
        seen.append(token)
        if len(seen) == 3:
            conversation.stop()

    ids = rendered(checkpoints, "llama", [{"role": "user", "content": SAID[0]}])
    turn = conversation.ask(SAID[0], on_token=stop)
    assert (turn.ending, turn.token_ids) == ("stopped", seen)
    assert turn.token_ids == fresh(checkpoints, "llama", ids, 6)[:3]
    assert conversation.messages[-1] == {"role": "assistant", "content": turn.text}
    assert turn.ttft_seconds is not None
    after = expect_fresh(checkpoints, "llama", conversation, SAID[1])
    assert after.cached_tokens > 0


@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("turns_before", [0, 4])
def test_an_answer_that_is_stopped_in_the_middle_of_a_pass(
    name: str, turns_before: int, opened: Callable[..., StreamingModel], checkpoints: Path
) -> None:
    model = opened(name)
    conversation = Conversation(model, max_new_tokens=6)
    for said in [*SAID, *SAID][:turns_before]:
        conversation.ask(said)
    before = list(conversation.messages)
    made: Any = model.model
    with made.model.layers[1].register_forward_pre_hook(lambda *_: conversation.stop()):
        turn = conversation.ask("and then?")
    assert (turn.ending, turn.text, turn.token_ids) == ("stopped", "", [])
    assert conversation.messages == before, "nothing was said"
    expect_fresh(checkpoints, name, conversation, SAID[1])


def test_stopping_what_does_not_run_changes_nothing(opened: Callable[..., StreamingModel], checkpoints: Path) -> None:
    conversation = Conversation(opened("llama"), max_new_tokens=6)
    conversation.stop()
    assert expect_fresh(checkpoints, "llama", conversation, SAID[0]).ending in {"length", "end"}
    conversation.stop()
    expect_fresh(checkpoints, "llama", conversation, SAID[1])


def test_an_error_leaves_the_conversation_as_it_was(opened: Callable[..., StreamingModel], checkpoints: Path) -> None:
    conversation = Conversation(opened("llama"), max_new_tokens=6)
    conversation.ask(SAID[0])
    before = list(conversation.messages)

    def fail(*_: object) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        conversation.ask(SAID[1], on_token=fail)
    assert conversation.messages == before
    expect_fresh(checkpoints, "llama", conversation, SAID[2])


def test_a_conversation_that_is_longer_than_the_positions(opened: Callable[..., StreamingModel]) -> None:
    conversation = Conversation(opened("llama"), max_new_tokens=40)
    while conversation.ask("Weights arrive while the model runs. ").prompt_tokens < 200:
        pass
    before = list(conversation.messages)
    with pytest.raises(ConfigurationError, match=r"the conversation has \d+ tokens with this message, and llama has"):
        conversation.ask("A layer is fetched. " * 20)
    assert conversation.messages == before
    conversation.reset()
    assert (conversation.messages, conversation.facts().tokens, conversation.facts().kv_cache_bytes) == ([], 0, 0)
    assert conversation.ask("Weights arrive").text


def test_an_answer_ends_where_the_positions_do(opened: Callable[..., StreamingModel]) -> None:
    conversation = Conversation(opened("llama"), max_new_tokens=1000, ignore_eos=True)
    turn = conversation.ask("Weights arrive")
    assert turn.prompt_tokens + len(turn.token_ids) == 256
    assert turn.ending == "positions"
    short = Conversation(opened("llama"), max_new_tokens=3, ignore_eos=True)
    assert short.ask("Weights arrive").ending == "length"


def test_the_space_before_an_answer_is_part_of_one_text(opened: Callable[..., StreamingModel]) -> None:
    model = opened("metaspace")
    conversation = Conversation(model, max_new_tokens=6)
    first = conversation.ask("w1 w2 w3")
    assert not first.text.startswith(" "), "as such tokenizers have it"
    assert conversation.messages[-1]["content"] == f" {first.text}"
    assert conversation.ask("w4 w5").cached_tokens > first.prompt_tokens


def test_half_a_character_is_no_part_of_the_conversation(opened: Callable[..., StreamingModel]) -> None:
    model = opened("llama")
    tokenizer: Any = model.tokenizer
    conversation = Conversation(model, max_new_tokens=200, temperature=1, seed=1, ignore_eos=True)
    seen: list[int] = []

    def stop(token: int, _: float) -> None:
        seen.append(token)
        text = tokenizer.decode(seen, skip_special_tokens=True)
        if text.endswith("\ufffd") and text.rstrip("\ufffd"):
            conversation.stop()

    turn = conversation.ask(SAID[0], on_token=stop)
    assert turn.ending == "stopped"
    assert tokenizer.decode(turn.token_ids, skip_special_tokens=True).endswith("\ufffd")
    assert turn.text
    assert not turn.text.endswith("\ufffd")
    assert conversation.messages[-1]["content"] == turn.text


def test_memory_for_the_whole_conversation(opened: Callable[..., StreamingModel]) -> None:
    """The budget is slightly larger than the first turn needs."""
    free = opened("llama")
    probe = Conversation(free, max_new_tokens=6)
    per_token = probe.ask(SAID[0]) and probe.facts().kv_cache_bytes // probe.facts().cached_tokens
    model = opened("llama", memory_budget=free.statistics()["cache"]["resident_bytes"] + 120 * per_token)
    conversation = Conversation(model, max_new_tokens=6)
    conversation.ask(SAID[0])
    first = model.plan.reserved_bytes
    conversation.ask(SAID[1])
    assert model.plan.reserved_bytes > first > 0
    facts = conversation.facts()
    assert facts.kv_cache_bytes == facts.cached_tokens * per_token <= model.plan.reserved_bytes


def test_a_conversation_that_does_not_fit_the_budget(opened: Callable[..., StreamingModel]) -> None:
    conversation = Conversation(opened("forgetful", memory_budget="600kB"), max_new_tokens=6)
    conversation.ask(SAID[0])
    before = list(conversation.messages)
    with pytest.raises(ConfigurationError, match=r"a memory budget of 600\.0 kB .* is too small for forgetful"):
        conversation.ask("x " * 900)
    assert conversation.messages == before
    assert conversation.ask(SAID[1]).text


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        (
            "bert",
            UnsupportedModelError,
            r"bert \(BertForMaskedLM\) does not generate text, so there is no conversation",
        ),
        ("t5", UnsupportedModelError, r"t5 \(T5ForConditionalGeneration\) turns one text into another, so there is no"),
    ],
)
def test_models_that_hold_no_conversation(
    name: str, error: type[Exception], said: str, opened: Callable[..., StreamingModel]
) -> None:
    with pytest.raises(error, match=said):
        Conversation(opened(name))


def test_a_model_without_a_tokenizer(opened: Callable[..., StreamingModel], monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened("llama")
    monkeypatch.setattr(model, "find_tokenizer", lambda: None)
    with pytest.raises(ConfigurationError, match="llama has no tokenizer, so there is no conversation with it"):
        Conversation(model)


def test_a_conversation_is_with_one_model(opened: Callable[..., StreamingModel], checkpoints: Path) -> None:
    model = opened("llama")
    conversation = Conversation(model, max_new_tokens=6)
    conversation.ask(SAID[0])
    model.switch("forgetful")  # its KV cache has the same shape
    with pytest.raises(ConfigurationError, match="with llama, and forgetful has taken its place"):
        conversation.ask(SAID[1])
    model.switch("llama")
    assert expect_fresh(checkpoints, "llama", conversation, SAID[1]).cached_tokens > 0


def test_a_system_message(opened: Callable[..., StreamingModel], checkpoints: Path) -> None:
    conversation = Conversation(opened("llama"), system="Be brief.", max_new_tokens=6)
    system = {"role": "system", "content": "Be brief."}
    ids = rendered(checkpoints, "llama", [system, {"role": "user", "content": SAID[0]}])
    assert conversation.ask(SAID[0]).token_ids == fresh(checkpoints, "llama", ids, 6)
    conversation.system = None
    expect_fresh(checkpoints, "llama", conversation, SAID[1])
    with pytest.raises(ConfigurationError, match="gpt2 takes no system message: the model has no chat template"):
        Conversation(opened("gpt2"), system="Be brief.")
    with pytest.raises(ConfigurationError, match="llama takes no system message: the conversation is raw"):
        Conversation(opened("llama"), system="Be brief.", raw=True)


def test_text_comes_as_it_is_generated(opened: Callable[..., StreamingModel]) -> None:
    model = opened("llama")
    conversation = Conversation(model, max_new_tokens=6)
    tokenizer: PreTrainedTokenizerBase = model.tokenizer
    for said in SAID:
        pieces: list[str] = []
        tokens: list[int] = []
        turn = conversation.ask(said, on_text=pieces.append, on_token=lambda token, _, to=tokens: to.append(token))
        assert tokens == turn.token_ids
        assert "".join(pieces) == turn.text == tokenizer.decode(tokens, skip_special_tokens=True)
