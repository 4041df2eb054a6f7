"""Turns tokens into text as they come: text that can no longer change is passed on at once.

A token may end within a character, which has up to four bytes, each possibly a token. Until the character is complete,
tokenizers put U+FFFD at the end of the text, and this is held back. A few old tokenizers remove spaces before
punctuation (`clean_up_tokenization_spaces`): with those, everything after the last space is held back.

A stop text and the rest of its last token are withheld; text that may be the beginning of a stop text is held back
until the next tokens decide.

Invariant: the concatenated pieces equal the decoded text of all tokens, up to the first stop text.
"""

from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

INCOMPLETE = "\ufffd"
"""What a tokenizer outputs for an incomplete character."""

_CONTEXT_TOKENS = 8


class TextStream:
    """Passes the text of tokens to a function, piece by piece."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None], stops: Sequence[str] = ()
    ) -> None:
        """Start without tokens; `stops` are texts that end the generation.

        Attributes:
            is_stopped: whether a stop text came.
        """
        self.is_stopped = False
        self._stops = stops
        self._tokenizer: Any = tokenizer
        self._on_text = on_text
        self._tokens: list[int] = []
        self._given = 0

    def put(self, token: int) -> None:
        """Add a token, and pass on the text that it completes."""
        self._tokens.append(token)
        text = self._decode()
        kept = cut_at_stop(text, self._stops)
        if len(kept) < len(text):
            self.is_stopped = True
            self._give(kept)
        elif not self.is_stopped:
            complete = text[: self._complete(text)]
            self._give(complete[: len(complete) - _beginning_of_stop(complete, self._stops)])

    def end(self) -> None:
        """Pass on what was held back; no more tokens come."""
        self._give(cut_at_stop(self._decode(), self._stops))

    def _decode(self) -> str:
        return str(self._tokenizer.decode(self._tokens, skip_special_tokens=True))

    def _complete(self, text: str) -> int:
        """The length of the part of a text that cannot change any more."""
        if getattr(self._tokenizer, "clean_up_tokenization_spaces", False):
            return text.rfind(" ") + 1
        return len(text.rstrip(INCOMPLETE))

    def _give(self, text: str) -> None:
        if len(text) > self._given:
            piece, self._given = text[self._given :], len(text)
            self._on_text(piece)


def cut_at_stop(text: str, stops: Sequence[str]) -> str:
    """Cut a text before the first stop text in it."""
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    return text[: min(found)] if found else text


def _beginning_of_stop(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of a text may be the beginning of a stop text."""
    lengths = (size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size]))
    return max(lengths, default=0)


def space_before(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], token: int) -> str:
    """Return the space between a prompt and the token that continues it, if the token's own text lacks it.

    SentencePiece tokenizers omit the space before the first word of a text.
    """
    untyped: Any = tokenizer
    context = list(prompt[-_CONTEXT_TOKENS:])
    before, after, alone = (
        str(untyped.decode(tokens, skip_special_tokens=True)) for tokens in (context, [*context, token], [token])
    )
    follows = after.removeprefix(before) if after.startswith(before) else ""
    return " " if follows.startswith(" ") and not alone.startswith(" ") else ""
