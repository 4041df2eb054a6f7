"""Readers that turn a head's output into readable form; each recognises one head by its class and output fields.

Probabilities are those of transformers' pipelines: softmax over labels, the logistic function of each label if several
may apply, and the score itself if there is one label.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from surfw.models.base import StreamingBaseModel
from surfw.models.sentences import SentenceSettings, pool

_TOP = 5
_MOST_ANSWER_TOKENS = 15
"""As in transformers' question answering pipeline."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A head's result: an embedding and how it was made, or predictions; see `InferenceResult`."""

    embedding: list[float] | None = None
    pooling: dict[str, Any] | None = None
    predictions: list[dict[str, Any]] | None = None


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A completed forward: its inputs, from `heads.encode_texts`, and its output."""

    streaming: StreamingBaseModel
    tokenizer: PreTrainedTokenizerBase | None
    inputs: Mapping[str, torch.Tensor]
    pairs: Sequence[str]
    head: str | None
    output: Any

    @property
    def ids(self) -> torch.Tensor:
        """Token ids."""
        return self.inputs["input_ids"]

    @property
    def logits(self) -> torch.Tensor:
        """The head's logits, in float32."""
        found: torch.Tensor = self.output.logits.float()
        return found

    def word(self, at: int) -> dict[str, Any]:
        """The position and text of a token of the first text."""
        text = {} if self.tokenizer is None else {"token": str(self.tokenizer.decode([int(self.ids[0, at])])).strip()}
        return {"position": at} | text


def _read_mask(seen: Seen) -> Reading | None:
    """The likeliest tokens at each mask; without a mask, the mean of the hidden states."""
    if seen.head != "mask":
        return None
    masks = find_masks(seen.tokenizer, seen.ids)
    if not masks:
        return _mean(seen, seen.output.hidden_states[-1], "there is no mask in the text")
    return Reading(predictions=_fill(seen, seen.logits, masks))


def _read_labels(seen: Seen) -> Reading | None:
    """The likeliest labels of each text: probabilities, or the raw score if there is one label."""
    if seen.head != "labels" or seen.logits.dim() != 2:
        return None
    return Reading(
        predictions=[_numbered(seen, at) | {"candidates": _labels(seen, row)} for at, row in enumerate(seen.logits)]
    )


def _read_tokens(seen: Seen) -> Reading | None:
    """The likeliest labels of each token."""
    if seen.head != "tokens" or seen.logits.dim() != 3:
        return None
    found = [seen.word(at) | {"candidates": _labels(seen, row)} for at, row in enumerate(seen.logits[0])]
    return Reading(predictions=found)


def _read_span(seen: Seen) -> Reading | None:
    """The likeliest answers in the second text: start and end probabilities multiplied, for ends not before starts."""
    start, end = getattr(seen.output, "start_logits", None), getattr(seen.output, "end_logits", None)
    if seen.head != "span" or start is None or end is None or "in_second" not in seen.inputs:
        return None
    found = []
    for at, text in enumerate(seen.pairs):
        inside = seen.inputs["in_second"][at]
        first, last = (one[at].float().cpu().masked_fill(~inside, float("-inf")).softmax(-1) for one in (start, end))
        both = torch.outer(first, last).triu().tril(_MOST_ANSWER_TOKENS - 1)
        best = both.flatten().topk(min(_TOP, int(inside.sum())))
        answers = []
        for place, probability in zip(best.indices.tolist(), best.values.tolist(), strict=True):
            begin = int(seen.inputs["offset_mapping"][at, place // len(last), 0])
            stop = int(seen.inputs["offset_mapping"][at, place % len(last), 1])
            answers.append({"text": text[begin:stop], "start": begin, "end": stop, "probability": probability})
        found.append(_numbered(seen, at) | {"candidates": answers})
    return Reading(predictions=found)


def _read_choice(seen: Seen) -> Reading | None:
    """The choices, the likeliest first."""
    if seen.head != "choice" or seen.logits.shape != (1, len(seen.pairs)):
        return None
    return Reading(predictions=[{"candidates": _likeliest(seen.logits[0], seen.pairs.__getitem__, len(seen.pairs))}])


def _read_next(seen: Seen) -> Reading | None:
    """Whether each second text follows the first one."""
    if seen.head != "next" or seen.logits.dim() != 2:
        return None
    found = [_numbered(seen, at) | {"candidates": _follows(row)} for at, row in enumerate(seen.logits)]
    return Reading(predictions=found)


def _read_pretraining(seen: Seen) -> Reading | None:
    """Both pretraining heads of BERT and similar models: masks, and whether the second text follows the first."""
    words, follows = (getattr(seen.output, name, None) for name in ("prediction_logits", "seq_relationship_logits"))
    if words is None:
        return None
    if follows is None:
        follows = getattr(seen.output, "sop_logits", None)
    found = _fill(seen, words.float(), find_masks(seen.tokenizer, seen.ids))
    if follows is not None:
        found.append({"candidates": _follows(follows[0].float())})
    return Reading(predictions=found)


def _read_replaced(seen: Seen) -> Reading | None:
    """For each token, the probability that it was replaced, as ELECTRA is trained to detect."""
    logits = getattr(seen.output, "logits", None)
    if (
        not seen.streaming.manifest.class_name.endswith("ForPreTraining")
        or logits is None
        or logits.shape != seen.ids.shape
    ):
        return None
    chances = logits[0].float().sigmoid().tolist()
    return Reading(
        predictions=[
            seen.word(at) | {"candidates": [{"id": 1, "text": "replaced", "probability": chance}]}
            for at, chance in enumerate(chances)
        ]
    )


def _read_vector(seen: Seen) -> Reading | None:
    """A vector that the model itself computes for a text: a projection, or DPR's pooler output."""
    vector, how = getattr(seen.output, "text_embeds", None), "projection"
    if vector is None and getattr(seen.output, "last_hidden_state", None) is None:
        vector, how = getattr(seen.output, "pooler_output", None), "pooler"
    if vector is None or vector.dim() != 2:
        return None
    return Reading(embedding=vector[0].float().tolist(), pooling={"modes": [how], "normalised": False, "from": "model"})


def _read_states(seen: Seen) -> Reading | None:
    """The mean of the last hidden states, for a model without a head."""
    states = getattr(seen.output, "last_hidden_state", None)
    has_head = seen.head is not None or getattr(seen.output, "logits", None) is not None
    return None if has_head or states is None or states.dim() != 3 else _mean(seen, states, "there is no modules.json")


READERS: Sequence[Callable[[Seen], Reading | None]] = (
    _read_mask, _read_labels, _read_tokens, _read_span, _read_choice, _read_next, _read_pretraining, _read_replaced,
    _read_vector, _read_states,
)  # fmt: skip


def _mean(seen: Seen, states: torch.Tensor, why: str) -> Reading:
    mask = seen.inputs.get("attention_mask", torch.ones_like(seen.ids)).to(states.device)
    vector = pool(states, mask, SentenceSettings(modes=("mean",)))
    return Reading(embedding=vector[0].float().tolist(), pooling={"modes": ["mean"], "normalised": False, "from": why})


def find_masks(tokenizer: PreTrainedTokenizerBase | None, ids: torch.Tensor) -> list[int]:
    """The positions of masks in a text."""
    mask = tokenizer.mask_token_id if tokenizer is not None else None
    return (ids[0] == mask).nonzero()[:, 0].tolist() if mask is not None and ids.dim() == 2 else []


def _fill(seen: Seen, logits: torch.Tensor, masks: Sequence[int]) -> list[dict[str, Any]]:
    assert seen.tokenizer is not None or not masks, "the tokenizer found the masks"
    decode: Any = seen.tokenizer and seen.tokenizer.decode
    return [{"position": at, "candidates": _likeliest(logits[0, at], decode)} for at in masks]


def _follows(logits: torch.Tensor) -> list[dict[str, Any]]:
    """Whether the second text follows, in the order of the head's outputs."""
    return _likeliest(logits, ("follows", "does not follow").__getitem__)


def _labels(seen: Seen, logits: torch.Tensor) -> list[dict[str, Any]]:
    config: Any = seen.streaming.model.config
    kind = getattr(config, "problem_type", None)
    if kind == "regression" or len(logits) == 1:
        return [
            {"id": at, "text": str(config.id2label[at]), "score": value} for at, value in enumerate(logits.tolist())
        ]
    name = config.id2label.__getitem__
    if kind == "multi_label_classification":
        return _best(logits.sigmoid(), name)
    return _likeliest(logits, name)


def _likeliest(logits: torch.Tensor, name: Callable[[int], Any], most: int = _TOP) -> list[dict[str, Any]]:
    return _best(logits.softmax(-1), name, most)


def _best(chances: torch.Tensor, name: Callable[[int], Any], most: int = _TOP) -> list[dict[str, Any]]:
    best = chances.topk(min(most, len(chances)))
    found = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [{"id": index, "text": str(name(index)).strip(), "probability": value} for index, value in found]


def _numbered(seen: Seen, at: int) -> dict[str, Any]:
    """Which second text a prediction is for, if there are several."""
    return {"pair": at} if len(seen.pairs) > 1 else {}
