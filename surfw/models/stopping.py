"""Texts that end a generation: whose they are, and which token completes one.

A token ends it as with transformers' `StopStringCriteria`: special tokens are text too, and what the prompt began
counts. That class goes through the whole vocabulary first, a second for 100,000 tokens; here, the last few tokens are
made into text, with and without the newest.
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
"""A character has no more, and each may be a token."""


class StopTexts(StoppingCriteria):
    """Ends a generation with the token that completes one of some texts."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], shown: TextStream) -> None:
        """Watch for `texts`, also in what is `shown`, from which the tokenizer may have cleaned spaces."""
        self._tokenizer: Any = tokenizer
        self._texts = texts
        self._shown = shown
        self._window = max(len(text.encode()) for text in texts) + 2 * _CHARACTER_BYTES

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Say of each sequence whether it ends; `input_ids` has the shape (1, tokens)."""
        is_over = self.is_over(input_ids[0, -self._window :].tolist())
        return torch.full((input_ids.shape[0],), is_over, device=input_ids.device)

    def is_over(self, tokens: Sequence[int]) -> bool:
        """Whether the last token of prompt and answer, which `shown` has seen, completes one of the texts."""
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
    """The texts that end a generation: those asked for, or else those of the model's own settings (`stop_strings`).

    Raises:
        ConfigurationError: some are asked for, but there is no tokenizer to see them.
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
