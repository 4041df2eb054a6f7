"""Many texts through an encoder, in batches of similar length, so that one pass over the layers reads many of them.

Results are those of the resident model for the same batch. Batches are padded on the right only if padding is certain
to be hidden by the attention mask; for any other model, all texts of a batch have the same length.
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
"""Keyword arguments of a model's forward."""

MOST_TOKENS = 2048
"""Most tokens in a pass, padding included, unless a single text has more."""

MOST_BYTES = 128 * MIB
"""Most memory for the activations and outputs of a batch, unless a single text takes more."""

AHEAD = 1024
"""Most texts waiting at a time; batches of similar length are formed from these."""

_LIKE = 0.85
"""The shortest text of a batch has at least this fraction of the longest one's tokens."""

_PATIENCE_SECONDS = 0.1
_GATHER_SECONDS = 0.02
"""How long to wait for more texts once there is one: reading them takes microseconds."""

_PADDED = {"input_ids", "attention_mask", "token_type_ids"}
"""Inputs that can be padded; a text with other inputs runs alone."""

_OF_TOKENS = {"last_hidden_state", "hidden_states", "prediction_logits", "start_logits", "end_logits"}
"""Outputs with a row per token, for any head."""

_OF_TEXTS = {"labels", "choice", "next"}
"""Heads whose logits are for a whole text."""


@dataclass(frozen=True)
class _Text:
    """An encoded text that waits for its batch."""

    index: int
    request: InferenceRequest
    inputs: Inputs

    @property
    def tokens(self) -> int:
        return self.inputs["input_ids"].shape[-1]

    @property
    def kind(self) -> tuple[str, ...] | None:
        """The key of texts that may share a batch: their input names; None if the text must run alone."""
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
        parts: the parts of the model.
        tokenizer: the model's tokenizer; if None, requests must have `prompt_ids`.
        feed: the texts.
        on_result: called with each result once it is complete.
        check: raises if the run is to end.
        most_texts: the most texts in a batch.

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
            if waiting and (not taken or len(waiting) >= AHEAD):  # else more may have arrived
                for result in encoding.take(waiting, most_texts):
                    on_result(result)
    finally:
        parts.kv.reserve_bytes(0)


class _Encoding:
    """A run of many texts."""

    def __init__(self, model: StreamingBaseModel, parts: ModelParts, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Determine the model's batching limits, and reserve memory for a batch."""
        self._model, self._tokenizer = model, tokenizer
        self._head = find_head(model.manifest.class_name)
        config: Any = model.model.config.get_text_config()
        own = getattr(config, "pad_token_id", None)
        found = getattr(tokenizer, "pad_token_id", None) if own is None else own
        self._padding = int(found or 0)
        self._is_single = self._head == "labels" and own is None  # such a head finds the end by the padding
        self._like = _LIKE if may_pad(model.model) else 1.0
        each = _bytes_per_token(config, model.model.dtype, puts_out_words=self._head == "mask")
        self._most_tokens = min(MOST_TOKENS, _set_aside(parts, MOST_TOKENS * each) // each)
        self._remarked: set[str] = set()

    def encode(self, request: InferenceRequest) -> Inputs:
        """Encode a text to the model's inputs.

        Raises:
            ConfigurationError: it cannot be encoded, or has no tokens.
        """
        inputs = encode_prompt(self._model, self._tokenizer, request)
        if not inputs["input_ids"].shape[-1]:
            raise ConfigurationError("the prompt has no tokens")
        inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
        return inputs

    def take(self, waiting: deque[_Text], most: int) -> Iterator[ManyResult]:
        """Remove a batch from the waiting texts and run it."""
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
        """Log the warnings of `find_remarks`, each only once."""
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
    """Whether masked padding on the right leaves the results of a text unchanged.

    This holds if tokens interact only through attention, as in models that use transformers' shared attention
    functions. A convolution would read neighbouring padding, and other kinds of layers the whole length.
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
    """Choose a batch for the text that has waited longest, preferring texts closest to its length.

    Args:
        lengths: lengths of the waiting texts in tokens, in order of arrival.
        most: the most texts in the batch.
        most_tokens: the most tokens in the batch, padding included, unless a single text has more.
        like: the shortest text has at least this fraction of the longest one's tokens.

    Returns:
        Indices of the batch's texts, including the first, in order of arrival.
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
    """Pad inputs of shape (1, tokens) on the right and join them into one batch of shape (texts, longest)."""
    longest = max(one["input_ids"].shape[1] for one in inputs)
    filled: dict[str, torch.Tensor] = {}
    for name in _PADDED.intersection(inputs[0]):
        value = padding if name == "input_ids" else 0
        rows = [torch.nn.functional.pad(one[name], (0, longest - one[name].shape[1]), value=value) for one in inputs]
        filled[name] = torch.cat(rows)
    return filled


def cut_row(output: Any, row: int, tokens: int, *, longest: int, head: str | None) -> SimpleNamespace:
    """The outputs for one text of a batch, without padding.

    Args:
        output: the model's output for the batch.
        row: the text's row in the batch.
        tokens: number of tokens in the text.
        longest: number of tokens in the batch's longest text.
        head: the model's head; see `heads.find_head`.
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
    """Estimate memory per token of a batch: activations of a layer, and the output of a vocabulary head."""
    width = getattr(config, "hidden_size", None) or getattr(config, "dim", None) or 1024
    numbers = 8 * width + 2 * (getattr(config, "intermediate_size", None) or 4 * width)
    if puts_out_words:
        numbers += 2 * getattr(config, "vocab_size", 0)  # and again as float32
        numbers += width * (1 + (getattr(config, "num_hidden_layers", None) or 0))
    return int(numbers) * max(4, dtype.itemsize)


def _set_aside(parts: ModelParts, wanted_bytes: int) -> int:
    """Reserve memory for a batch and return how much: at most `MOST_BYTES`, and what weights can spare."""
    parts.kv.reserve_bytes(0)
    engine, wanted = parts.engine, min(wanted_bytes, MOST_BYTES)
    if (budget := engine.limit.budget_bytes) is None:
        return wanted
    free = max((budget - engine.least_budget_bytes) // 2, budget - engine.plan.peak_bytes, 0)
    parts.kv.reserve_bytes(min(wanted, free))
    return min(wanted, free)
