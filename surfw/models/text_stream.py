"""Tokens into text, as they come: whatever can no longer change is given at once.

A token may end within a character: that has up to four bytes, and each of them may be a token. Until it is complete,
tokenizers show U+FFFD at the end of the text, and that is held back. A few old tokenizers remove spaces before
punctuation (`clean_up_tokenization_spaces`): with those, all that follows the last space is held back.

A text that ends the generation is withheld, and with it the rest of its token: what may be its beginning waits for the
next tokens.

Invariant: the pieces put together are what the tokenizer makes of all tokens at once, up to the first such text.
"""

from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

INCOMPLETE = "\ufffd"
"""What a tokenizer shows of a character that is not complete."""

_CONTEXT_TOKENS = 8


class TextStream:
    """Gives the text of tokens to a function, piece by piece."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None], stops: Sequence[str] = ()
    ) -> None:
        """Begin with no token; `stops` are texts that end the generation.

        Attributes:
            is_stopped: whether one of them came.
        """
        self.is_stopped = False
        self._stops = stops
        self._tokenizer: Any = tokenizer
        self._on_text = on_text
        self._tokens: list[int] = []
        self._given = 0

    def put(self, token: int) -> None:
        """Take one more token, and give the text that is complete with it."""
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
        """Give what was held back; no more tokens come."""
        self._give(cut_at_stop(self._decode(), self._stops))

    def _decode(self) -> str:
        return str(self._tokenizer.decode(self._tokens, skip_special_tokens=True))

    def _complete(self, text: str) -> int:
        """Return how much of a text cannot change any more."""
        if getattr(self._tokenizer, "clean_up_tokenization_spaces", False):
            return text.rfind(" ") + 1
        return len(text.rstrip(INCOMPLETE))

    def _give(self, text: str) -> None:
        if len(text) > self._given:
            piece, self._given = text[self._given :], len(text)
            self._on_text(piece)


def cut_at_stop(text: str, stops: Sequence[str]) -> str:
    """The text before the first of those that end it."""
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    return text[: min(found)] if found else text


def _beginning_of_stop(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of a text may be the beginning of one that ends it."""
    lengths = (size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size]))
    return max(lengths, default=0)


def space_before(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], token: int) -> str:
    """Return the space between a prompt and the token that continues it, where the token's own text lacks it.

    Tokenizers of the SentencePiece kind leave out the space before the first word of a text.
    """
    untyped: Any = tokenizer
    context = list(prompt[-_CONTEXT_TOKENS:])
    before, after, alone = (
        str(untyped.decode(tokens, skip_special_tokens=True)) for tokens in (context, [*context, token], [token])
    )
    follows = after.removeprefix(before) if after.startswith(before) else ""
    return " " if follows.startswith(" ") and not alone.startswith(" ") else ""
