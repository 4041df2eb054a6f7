"""Stop texts: which ones apply, and which token completes one.

A token ends a generation as with transformers' `StopStringCriteria`: special tokens count as text, and a stop text may
begin in the prompt. That class scans the whole vocabulary first, which takes a second for 100,000 tokens; here, the
last few tokens are decoded instead, with and without the newest.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteria

from surfw.errors import ConfigurationError
from surfw.models.text_stream import INCOMPLETE, TextStream

logger = logging.getLogger("surfw.models")

_CHARACTER_BYTES = 4
"""The most bytes of a character, each of which may be a token."""


class StopTexts(StoppingCriteria):
    """Ends a generation at the token that completes a stop text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], shown: TextStream) -> None:
        """Look for `texts`, also in the text of `shown`, where the tokenizer may have removed spaces."""
        self._tokenizer: Any = tokenizer
        self._texts = texts
        self._shown = shown
        self._window = max(len(text.encode()) for text in texts) + 2 * _CHARACTER_BYTES

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Return whether each sequence ends; `input_ids` has the shape (1, tokens)."""
        is_over = self.is_over(input_ids[0, -self._window :].tolist())
        return torch.full((input_ids.shape[0],), is_over, device=input_ids.device)

    def is_over(self, tokens: Sequence[int]) -> bool:
        """Whether the last token of prompt and answer completes a stop text; `shown` must have received it already."""
        recent = list(tokens[-self._window :])
        after = self._decode(recent)
        if self._shown.is_stopped:
            return True
        known = len(self._decode(recent[:-1]).rstrip(INCOMPLETE))
        return any(after.find(text, max(0, known - len(text) + 1)) >= 0 for text in self._texts)

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=False))


def find_stops(
    own: GenerationConfig,
    asked: Sequence[str],
    tokenizer: PreTrainedTokenizerBase | None,
    name: str,
    *,
    ignore_own: bool,
) -> list[str]:
    """The stop texts of a generation: the requested ones, or else the model's own (`stop_strings`).

    Raises:
        ConfigurationError: stop texts are requested, but there is no tokenizer.
    """
    if asked and tokenizer is None:
        raise ConfigurationError(f"{name} has no tokenizer, so no text can end its generation")
    stops = getattr(own, "stop_strings", None) or []
    if asked or ignore_own or not stops:
        return list(asked)
    if tokenizer is None:
        logger.warning("%s has texts that end a generation (stop_strings), which take a tokenizer: ignored", name)
        return []
    return [stops] if isinstance(stops, str) else list(stops)
