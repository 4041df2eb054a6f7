"""Stop texts end a generation at the same token as in transformers, for one prompt and for many."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, event, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.generation import StopStringCriteria

from surfw import InferenceRequest, InferenceResult, ManyResult
from surfw.models import StreamingModel
from surfw.models.inference import answer
from surfw.models.stopping import StopTexts
from surfw.models.text_stream import INCOMPLETE, TextStream
from tests.models.test_streaming import opener


def byte_level() -> Any:
    """As in GPT-2, Llama 3, Qwen."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["</s>", *alphabet, "Ġa", "ab", "ba", "Ġ Ġ".replace(" ", ""), "ĊĊ"]
    tokenizer = Tokenizer(models.BPE(vocab={word: at for at, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def byte_fallback() -> Any:
    """As in Llama 2, Mistral, Gemma."""
    words = ["</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "ab", "▁▁", "<"]
    tokenizer = Tokenizer(models.BPE(vocab={word: at for at, word in enumerate(words)}, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


TOKENIZERS = {make.__name__: make() for make in (byte_level, byte_fallback)}
LIKELY = {
    kind: [at for word, at in made.get_vocab().items() if (len(word) != 1 and word[:3] != "<0x") or word in "ab<Ġ▁ĊÃ©"]
    + made.convert_tokens_to_ids(["<0x0A>", "<0x20>", "<0xC3>", "<0xA9>"] if kind == "byte_fallback" else [])
    for kind, made in TOKENIZERS.items()
}
"""The tokens of these characters, some of them parts of a character, and a special token that ends the answer."""
PLACES = st.lists(st.integers(0, 999), min_size=1, max_size=10)
STOPS = st.lists(
    st.one_of(st.text("ab \né<", min_size=1, max_size=4), st.sampled_from(["</s>", "a</s>b"])), min_size=1, max_size=3
)


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(places=PLACES, stops=STOPS, prompt_tokens=st.integers(0, 3))
def test_the_token_that_ends_it_is_that_of_transformers(
    kind: str, places: list[int], stops: list[str], prompt_tokens: int
) -> None:
    tokenizer, likely = TOKENIZERS[kind], LIKELY[kind]
    tokens = [tokenizer.convert_tokens_to_ids("b"), *(likely[place % len(likely)] for place in places)]
    assume(INCOMPLETE not in str(tokenizer.decode(tokens)))  # in this case, single bytes complete no text
    theirs = StopStringCriteria(tokenizer, stops)
    mine = StopTexts(tokenizer, stops, TextStream(tokenizer, lambda _: None))
    for end in range(prompt_tokens + 2, len(tokens) + 1):
        ids = torch.tensor([tokens[:end]])
        found = bool(mine(ids, None)[0])
        event(str(found))
        assert found == bool(theirs(ids, None)[0]), (tokenizer.convert_ids_to_tokens(tokens[:end]), stops)


@pytest.fixture
def llama(store: Path) -> Iterator[StreamingModel]:
    with StreamingModel.open(opener(store), "llama") as model:
        before = model.model.generation_config
        model.model.generation_config = copy.deepcopy(before)
        yield model
        model.model.generation_config = before


def ask(model: StreamingModel, **options: Any) -> tuple[InferenceResult, InferenceResult]:
    """The answers to a prompt alone, and beside others."""
    request = InferenceRequest(prompt_ids=[5, 9, 70], max_new_tokens=12, **options)
    tokenizer = model.tokenizer
    shown: list[str] = []
    alone = answer(model, tokenizer, request, on_text=shown.append)
    assert "".join(shown) == alone.text
    found: list[ManyResult] = []
    other = InferenceRequest(prompt_ids=[7, 8], max_new_tokens=14, ignore_eos=True)
    model.answer_many([other, request], on_result=found.append, sequences=2)
    long, beside = (one.result for one in sorted(found, key=lambda one: one.index))
    assert long is not None
    assert beside is not None
    assert len(long.token_ids) == 14
    return alone, beside


@pytest.mark.parametrize("is_own", [True, False])
def test_many_prompts_end_like_one(is_own: bool, llama: StreamingModel) -> None:
    """By the model's own stop texts, unless others are given, or its end tokens are ignored."""
    free, _ = ask(llama, ignore_eos=True)
    stop = free.text[5:8]
    llama.model.generation_config.stop_strings = [stop] if is_own else ["never"]
    for one in ask(llama, **{} if is_own else {"stop": [stop]}):
        assert one.text == free.text[: free.text.index(stop)]
        assert 0 < len(one.token_ids) < 12
        assert one.token_ids == free.token_ids[: len(one.token_ids)]
    if is_own:
        for one in (*ask(llama, ignore_eos=True), *ask(llama, stop=["never"])):
            assert one.token_ids == free.token_ids
