"""Many texts through an encoder: batches of like length, so that one pass over the layers reads many of them.

What comes of a text is what the resident model gives in the same batch. A batch is filled up on the right only where
padding is behind an attention mask for certain; any other model gets texts of one length, and computes no padding.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, TypeAlias

import torch
from transformers import PreTrainedTokenizerBase

from surfw.config import MIB
from surfw.errors import ConfigurationError
from surfw.models.assembly import ModelParts
from surfw.models.base import StreamingBaseModel
from surfw.models.heads import find_head, read_output, run_heads
from surfw.models.inference import InferenceRequest, InferenceResult, answer, encode_prompt, find_remarks
from surfw.models.many import Feed, ManyResult

logger = logging.getLogger("surfw.models")

Inputs: TypeAlias = dict[str, torch.Tensor]
"""Arguments of a forward."""

MOST_TOKENS = 2048
"""So many are computed in a pass, padding included, unless one text has more."""

MOST_BYTES = 128 * MIB
"""So much memory a batch takes for what the model puts out and passes on, unless one text takes more."""

AHEAD = 1024
"""So many texts may wait, that those of like length are found among them."""

_LIKE = 0.85
"""The shortest text of a batch has at least this part of the longest one's tokens."""

_PATIENCE_SECONDS = 0.1
_GATHER_SECONDS = 0.02
"""So long more texts are waited for once there is one: reading them takes microseconds."""

_PADDED = {"input_ids", "attention_mask", "token_type_ids"}
"""Inputs that are filled up; a text that has others goes alone."""

_OF_TOKENS = {"last_hidden_state", "hidden_states", "prediction_logits", "start_logits", "end_logits"}
"""Outputs with a row for each token, whatever the head."""

_OF_TEXTS = {"labels", "choice", "next"}
"""Heads whose logits are of a whole text."""


@dataclass(frozen=True)
class _Text:
    """A text that waits."""

    index: int
    request: InferenceRequest
    inputs: Inputs

    @property
    def tokens(self) -> int:
        return self.inputs["input_ids"].shape[-1]

    @property
    def kind(self) -> tuple[str, ...] | None:
        """What it has in common with those it may go together with; None if it goes alone."""
        padded = {name: one for name, one in self.inputs.items() if name != "prompt_tokens"}
        is_plain = set(padded) <= _PADDED and all(one.shape == (1, self.tokens) for one in padded.values())
        return tuple(sorted(padded)) if is_plain and len(self.request.pairs) < 2 else None


def encode_many(
    model: StreamingBaseModel,
    parts: ModelParts,
    tokenizer: PreTrainedTokenizerBase | None,
    feed: Feed,
    *,
    on_result: Callable[[ManyResult], None],
    check: Callable[[], None],
    most_texts: int,
) -> None:
    """Encode texts until their feed ends.

    Args:
        model: an open model that generates no tokens.
        parts: of it.
        tokenizer: its tokenizer; None needs `prompt_ids`.
        feed: of the texts.
        on_result: called with each result as it is complete.
        check: raises if the run is to end.
        most_texts: how many run together.

    Raises:
        SurfwError: weights could not be read.
    """
    encoding = _Encoding(model, parts, tokenizer)
    waiting: deque[_Text] = deque()
    try:
        while waiting or not feed.has_ended:
            check()
            wait_seconds = _GATHER_SECONDS if waiting else _PATIENCE_SECONDS
            taken = feed.take(AHEAD - len(waiting), wait_seconds=wait_seconds)
            for index, request in taken:
                try:
                    waiting.append(_Text(index, request, encoding.encode(request)))
                except ConfigurationError as exc:
                    on_result(ManyResult(index=index, error=str(exc)))
            if waiting and (not taken or len(waiting) >= AHEAD):  # else more may be there by now
                for result in encoding.take(waiting, most_texts):
                    on_result(result)
    finally:
        parts.kv.reserve_bytes(0)


class _Encoding:
    """A run of many texts."""

    def __init__(self, model: StreamingBaseModel, parts: ModelParts, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """See what the model allows, and have as much memory set aside as a batch may take."""
        self._model, self._tokenizer = model, tokenizer
        self._head = find_head(model.manifest.class_name)
        config: Any = model.model.config.get_text_config()
        own = getattr(config, "pad_token_id", None)
        found = getattr(tokenizer, "pad_token_id", None) if own is None else own
        self._padding = int(found or 0)
        self._is_single = self._head == "labels" and own is None  # such a head finds a text's end by its padding
        self._like = _LIKE if may_pad(model.model) else 1.0
        each = _bytes_per_token(config, model.model.dtype, puts_out_words=self._head == "mask")
        self._most_tokens = min(MOST_TOKENS, _set_aside(parts, MOST_TOKENS * each) // each)
        self._remarked: set[str] = set()

    def encode(self, request: InferenceRequest) -> Inputs:
        """A text as token ids.

        Raises:
            ConfigurationError: it cannot be encoded, or has no tokens.
        """
        inputs = encode_prompt(self._model, self._tokenizer, request)
        if not inputs["input_ids"].shape[-1]:
            raise ConfigurationError("the prompt has no tokens")
        inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
        return inputs

    def take(self, waiting: deque[_Text], most: int) -> Iterator[ManyResult]:
        """Take a batch out of the texts that wait, and encode it."""
        first = waiting[0]
        if first.kind is None or self._is_single:
            yield self._alone(waiting.popleft())
            return
        places = [place for place, one in enumerate(waiting) if one.kind == first.kind]
        lengths = [waiting[place].tokens for place in places]
        chosen = [places[at] for at in choose_batch(lengths, most, most_tokens=self._most_tokens, like=self._like)]
        batch = [waiting[place] for place in chosen]
        for place in sorted(chosen, reverse=True):
            del waiting[place]
        yield from self._together(batch)

    def _together(self, batch: Sequence[_Text]) -> Iterator[ManyResult]:
        if len(batch) == 1:
            yield self._alone(batch[0])
            return
        inputs = pad([one.inputs for one in batch], self._padding)
        try:
            output = run_heads(self._model, self._tokenizer, inputs)
        except (IndexError, RuntimeError):  # one of them is longer than the model has positions
            yield from map(self._alone, batch)
            return
        longest = inputs["input_ids"].shape[1]
        for row, one in enumerate(batch):
            self._remark(one)
            own = cut_row(output, row, one.tokens, longest=longest, head=self._head)
            reading = read_output(self._model, self._tokenizer, one.inputs, one.request.pairs, own)
            yield ManyResult(index=one.index, result=InferenceResult(prompt_tokens=one.tokens, **vars(reading)))

    def _remark(self, one: _Text) -> None:
        """Log what changes nothing, or goes beyond what the model was made for; the same once."""
        for remark in find_remarks(self._model, one.request, one.tokens):
            if remark not in self._remarked and len(self._remarked) < AHEAD:
                self._remarked.add(remark)
                logger.warning("%s", remark)

    def _alone(self, one: _Text) -> ManyResult:
        try:
            result = answer(self._model, self._tokenizer, one.request, inputs=one.inputs)
        except ConfigurationError as exc:
            return ManyResult(index=one.index, error=str(exc))
        return ManyResult(index=one.index, result=result)


def may_pad(model: Any) -> bool:
    """Whether padding on the right, behind an attention mask, changes no token of a text.

    So it is where each layer only attends, as those do that transformers' shared attention functions compute. A
    convolution would read what stands beside a token, and other kinds of layers the whole length.
    """
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ["full_attention"])
    return (
        bool(getattr(model, "_supports_sdpa", False))
        and not model.config.is_encoder_decoder
        and not hasattr(model, "get_text_features")
        and kinds <= {"full_attention", "sliding_attention"}
        and not any(isinstance(one, torch.nn.Conv1d) for one in model.modules())
    )


def choose_batch(
    lengths: Sequence[int], most: int, *, most_tokens: int = MOST_TOKENS, like: float = _LIKE
) -> list[int]:
    """Which texts go with the one that has waited longest: those of like length, the nearest first.

    Args:
        lengths: of the texts that wait, in tokens, in the order they came.
        most: how many texts may go together.
        most_tokens: how many tokens they may have, padding included, unless one has more.
        like: the shortest has at least this part of the longest one's tokens.

    Returns:
        Their places, the first one's included, in the order they came.
    """
    first = lengths[0]
    by_distance = sorted(range(len(lengths)), key=lambda place: abs(lengths[place] - first))
    chosen: list[int] = []
    shortest = longest = first
    for place in by_distance:
        low, high = min(shortest, lengths[place]), max(longest, lengths[place])
        if low < like * high or len(chosen) >= most or (chosen and high * (len(chosen) + 1) > most_tokens):
            break
        chosen.append(place)
        shortest, longest = low, high
    return sorted(chosen)


def pad(inputs: Sequence[Inputs], padding: int) -> Inputs:
    """One batch of several, each of shape (1, tokens): filled up on the right, to shape (texts, longest)."""
    longest = max(one["input_ids"].shape[1] for one in inputs)
    filled: dict[str, torch.Tensor] = {}
    for name in _PADDED.intersection(inputs[0]):
        value = padding if name == "input_ids" else 0
        rows = [torch.nn.functional.pad(one[name], (0, longest - one[name].shape[1]), value=value) for one in inputs]
        filled[name] = torch.cat(rows)
    return filled


def cut_row(output: Any, row: int, tokens: int, *, longest: int, head: str | None) -> SimpleNamespace:
    """What a model puts out for one text of a batch, without padding.

    Args:
        output: of the batch.
        row: of the text.
        tokens: of the text.
        longest: tokens of the longest one.
        head: of the model.
    """

    def cut(name: str, value: Any) -> Any:
        if isinstance(value, tuple | list):
            return [cut(name, one) for one in value]
        if not isinstance(value, torch.Tensor) or not value.dim():
            return value
        own = value[row : row + 1]
        is_of_tokens = name in _OF_TOKENS or (name == "logits" and head not in _OF_TEXTS)
        return own[:, :tokens] if is_of_tokens and own.dim() > 1 and own.shape[1] == longest else own

    return SimpleNamespace(**{name: cut(name, value) for name, value in _fields(output).items()})


def _fields(output: Any) -> Mapping[str, Any]:
    return output if isinstance(output, Mapping) else vars(output)


def _bytes_per_token(config: Any, dtype: torch.dtype, *, puts_out_words: bool) -> int:
    """About what a token takes while a batch is computed: in a layer, and, with a head for words, at the end of all."""
    width = getattr(config, "hidden_size", None) or getattr(config, "dim", None) or 1024
    numbers = 8 * width + 2 * (getattr(config, "intermediate_size", None) or 4 * width)
    if puts_out_words:
        numbers += 2 * getattr(config, "vocab_size", 0)  # and again as float32
        numbers += width * (1 + (getattr(config, "num_hidden_layers", None) or 0))
    return int(numbers) * max(4, dtype.itemsize)


def _set_aside(parts: ModelParts, wanted_bytes: int) -> int:
    """Leave memory of the budget for a batch, at most half of what weights do not need at least; returns how much."""
    parts.kv.reserve_bytes(0)
    engine, wanted = parts.engine, min(wanted_bytes, MOST_BYTES)
    if (budget := engine.limit.budget_bytes) is None:
        return wanted
    free = max((budget - engine.least_budget_bytes) // 2, budget - engine.plan.peak_bytes, 0)
    parts.kv.reserve_bytes(min(wanted, free))
    return min(wanted, free)
