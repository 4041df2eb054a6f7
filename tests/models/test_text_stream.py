"""Text is delivered as soon as it cannot change any more, and is complete in the end."""

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from surfw.models.text_stream import TextStream, space_before


class Bytes:
    """A tokenizer with one token per byte, like the byte fallback of BPE and SentencePiece."""

    clean_up_tokenization_spaces = False

    def decode(self, tokens: list[int], *, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return bytes(tokens).decode(errors="replace")


class Words:
    """One token per word, with a mark for the preceding space, which the first word of a text lacks."""

    def __init__(self, *words: str, cleans: bool = False) -> None:
        self._words = words
        self.clean_up_tokenization_spaces = cleans

    def decode(self, tokens: list[int], *, skip_special_tokens: bool) -> str:
        text = "".join(self._words[token] for token in tokens).replace("_", " ").removeprefix(" ")
        return text.replace(" .", ".") if self.clean_up_tokenization_spaces else text


def pieces(tokenizer: Any, tokens: list[int]) -> list[str]:
    found: list[str] = []
    stream = TextStream(tokenizer, found.append)
    for token in tokens:
        stream.put(token)
    stream.end()
    return found


def test_a_character_comes_when_it_is_whole() -> None:
    assert pieces(Bytes(), list("aé語🚀.".encode())) == ["a", "é", "語", "🚀", "."]


def test_what_never_becomes_whole_comes_at_the_end() -> None:
    assert pieces(Bytes(), [*b"a", 0xE8, 0xAA]) == ["a", "\ufffd"]
    assert pieces(Bytes(), [0xE8, *b"b"]) == ["\ufffdb"]


@given(st.lists(st.integers(0, 255), max_size=24))
def test_the_pieces_are_the_whole(tokens: list[int]) -> None:
    found = pieces(Bytes(), tokens)
    assert "".join(found) == bytes(tokens).decode(errors="replace")
    assert "" not in found


STOPS = st.lists(st.text("ab é", min_size=1, max_size=3), min_size=1, max_size=3)


@given(st.text("ab é", max_size=12), STOPS, st.booleans())
@example(" aa", ["a", " aa"], False)
def test_nothing_of_a_text_that_ends_it_is_given(text: str, stops: list[str], goes_on: bool) -> None:
    found: list[str] = []
    stream = TextStream(Bytes(), found.append, stops)  # type: ignore[arg-type]  # all that is asked of a tokenizer
    for byte in text.encode():
        stream.put(byte)
        if stream.is_stopped and not goes_on:
            break
    stream.end()
    # A generation ends with the token that completes one of them, even if others have begun earlier.
    beginnings = (text[:end] for end in range(len(text) + 1))
    ended = next((so_far for so_far in beginnings if any(stop in so_far for stop in stops)), text)
    expected = min((ended.partition(stop)[0] for stop in stops), key=len)
    assert "".join(found) == expected
    assert stream.is_stopped == (expected != text)
    assert "" not in found


def test_what_may_begin_the_end_waits() -> None:
    found: list[str] = []
    stream = TextStream(Words("_one", "_two", "th", "re"), found.append, ["two three"])  # type: ignore[arg-type]
    for token, so_far in ((0, "one"), (1, "one "), (2, "one twoth"), (1, "one twoth "), (0, "one twoth two one")):
        stream.put(token)
        assert "".join(found) == so_far


def test_each_token_comes_at_once() -> None:
    words = Words("_one", "_two", "th")
    assert pieces(words, [0, 2, 1, 0, 2]) == ["one", "th", " two", " one", "th"]


def test_spaces_that_may_still_go_are_held_back() -> None:
    assert pieces(Words("_one", "_two", "_.", cleans=True), [0, 1, 2, 0]) == ["one ", "two. ", "one"]


@pytest.mark.parametrize(
    ("tokenizer", "prompt", "token", "space"),
    [
        (Words("_one", "_two", "th"), [0], 1, " "),
        (Words("_one", "_two", "th"), [0], 2, ""),
        (Bytes(), list(b"one"), ord(" "), ""),
        (Bytes(), list(b"one"), ord("t"), ""),
    ],
)
def test_the_space_between_a_prompt_and_its_continuation(
    tokenizer: Any, prompt: list[int], token: int, space: str
) -> None:
    assert space_before(tokenizer, prompt, token) == space
