"""Many texts through an encoder: batches of like length, so that little of a pass is padding.

Each batch is one pass over the layers. An embedding is what the resident model gives for the same batch: the texts of
like length that came together, filled up to the longest on the right, with an attention mask.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from transformers import PreTrainedTokenizerBase

from surfw.errors import ConfigurationError
from surfw.models.base import StreamingBaseModel
from surfw.models.inference import InferenceRequest, encode_batch, encode_prompt
from surfw.models.many import Feed, ManyResult
from surfw.models.measure import SPARE_POSITIONS

Inputs: TypeAlias = dict[str, torch.Tensor]
"""Arguments of a forward."""

MOST_TOKENS = 2048
"""So many tokens are computed in a pass, padding included, unless one text has more."""

_LIKE = 0.85
"""The shortest text of a batch has at least this part of the longest one's tokens."""

_PATIENCE_SECONDS = 0.1
_GATHER_SECONDS = 0.02
"""So long more texts are waited for once there is one: reading them takes microseconds."""


def encode_many(
    model: StreamingBaseModel,
    tokenizer: PreTrainedTokenizerBase | None,
    feed: Feed,
    *,
    on_result: Callable[[ManyResult], None],
    check: Callable[[], None],
    most_sequences: int,
) -> None:
    """Encode texts until their feed ends; the model is busy as long.

    Args:
        model: an open encoder.
        tokenizer: its tokenizer; None needs `prompt_ids`.
        feed: of the texts.
        on_result: called with each result as it is complete.
        check: raises if the run is to end.
        most_sequences: how many run together.

    Raises:
        SurfwError: weights could not be read.
    """
    waiting: deque[tuple[int, Inputs]] = deque()
    while True:
        check()
        wait_seconds = _GATHER_SECONDS if waiting else _PATIENCE_SECONDS
        taken = feed.take(2 * most_sequences - len(waiting), wait_seconds=wait_seconds)
        for index, request in taken:
            try:
                waiting.append((index, _encode(model, tokenizer, request)))
            except ConfigurationError as exc:
                on_result(ManyResult(index=index, error=str(exc)))
        if taken and len(waiting) < 2 * most_sequences:
            continue  # more may be there by now
        if not waiting:
            if feed.has_ended:
                return
            continue
        lengths = [inputs["input_ids"].shape[1] for _, inputs in waiting]
        chosen = choose_batch(lengths, most_sequences)
        batch = [waiting[place] for place in chosen]
        for place in sorted(chosen, reverse=True):
            del waiting[place]
        for result in _run(model, tokenizer, batch):
            on_result(result)


def _run(
    model: StreamingBaseModel, tokenizer: PreTrainedTokenizerBase | None, batch: Sequence[tuple[int, Inputs]]
) -> Iterator[ManyResult]:
    """The results of a batch; a text that the model has no positions for is its own error alone."""
    try:
        results = encode_batch(model, tokenizer, pad([inputs for _, inputs in batch], _padding(model, tokenizer)))
    except (IndexError, RuntimeError) as exc:
        longest = max(inputs["input_ids"].shape[1] for _, inputs in batch)
        most = _positions(model)
        if most is None or longest + SPARE_POSITIONS <= most:
            raise
        if len(batch) == 1:
            name = model.manifest.name
            error = (
                f"the prompt has {longest} tokens, and {name} has positions for {most}, some for its own use ({exc})"
            )
            yield ManyResult(index=batch[0][0], error=error)
        else:
            for one in batch:
                yield from _run(model, tokenizer, [one])
        return
    for (index, _), result in zip(batch, results, strict=True):
        yield ManyResult(index=index, result=result)


def choose_batch(lengths: Sequence[int], most: int) -> list[int]:
    """Which texts go with the one that has waited longest: those of like length, the nearest first.

    Args:
        lengths: of the texts that wait, in tokens, in the order they came.
        most: how many texts may go together.

    Returns:
        Their places, the first one's included, in the order they came.
    """
    first = lengths[0]
    by_distance = sorted(range(len(lengths)), key=lambda place: abs(lengths[place] - first))
    chosen: list[int] = []
    shortest = longest = first
    for place in by_distance:
        low, high = min(shortest, lengths[place]), max(longest, lengths[place])
        if low < _LIKE * high or len(chosen) >= most or (chosen and high * (len(chosen) + 1) > MOST_TOKENS):
            break
        chosen.append(place)
        shortest, longest = low, high
    return sorted(chosen)


def pad(inputs: Sequence[Inputs], padding: int) -> Inputs:
    """One batch of several, each of shape (1, tokens): filled up on the right, to shape (texts, longest)."""
    longest = max(one["input_ids"].shape[1] for one in inputs)
    filled: dict[str, torch.Tensor] = {}
    for name in inputs[0]:
        value = padding if name == "input_ids" else 0
        rows: list[Any] = [
            torch.nn.functional.pad(one[name], (0, longest - one[name].shape[1]), value=value) for one in inputs
        ]
        filled[name] = torch.cat(rows)
    return filled


def _positions(model: StreamingBaseModel) -> int | None:
    """How many tokens the model has positions for, those for its own use counted; None if it does not say."""
    return getattr(model.model.config.get_text_config(), "max_position_embeddings", None)


def _padding(model: StreamingBaseModel, tokenizer: PreTrainedTokenizerBase | None) -> int:
    """The token that texts are filled up with, which the attention mask hides."""
    known = getattr(model.model.config.get_text_config(), "pad_token_id", None)
    found = getattr(tokenizer, "pad_token_id", None) if known is None else known
    return int(found or 0)


def _encode(model: StreamingBaseModel, tokenizer: PreTrainedTokenizerBase | None, request: InferenceRequest) -> Inputs:
    inputs = encode_prompt(model, tokenizer, request)
    tokens = inputs["input_ids"].shape[1]
    most = _positions(model)
    if not tokens:
        raise ConfigurationError("the prompt has no tokens")
    if most is not None and tokens > most:
        raise ConfigurationError(f"the prompt has {tokens} tokens, and {model.manifest.name} has positions for {most}")
    inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
    return inputs
