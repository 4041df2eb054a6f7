"""Models that generate no tokens: their inputs for a text, and their head's output in readable form.

transformers' tables (`MODEL_FOR_…_MAPPING_NAMES`) tell which head a class has; the fields of its output tell how to
read it. Unknown heads are refused. The mean of the hidden states, which any model could give, is used only if there is
no head.
"""

import inspect
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedTokenizerBase
from transformers.models.auto import modeling_auto

from surfw.errors import ConfigurationError, SurfwError, UnsupportedModelError
from surfw.models.base import StreamingBaseModel, to_device
from surfw.models.chat import encode_chat
from surfw.models.readings import READERS, Reading, Seen, find_masks
from surfw.models.sentences import SentenceSettings, encode_sentence, pool, read_sentences

logger = logging.getLogger("surfw.models")

_HEADS = {
    "mask": ("MASKED_LM", "ForMaskedLM"),
    "labels": ("SEQUENCE_CLASSIFICATION", "ForSequenceClassification"),
    "tokens": ("TOKEN_CLASSIFICATION", "ForTokenClassification"),
    "span": ("QUESTION_ANSWERING", "ForQuestionAnswering"),
    "choice": ("MULTIPLE_CHOICE", "ForMultipleChoice"),
    "next": ("NEXT_SENTENCE_PREDICTION", "ForNextSentencePrediction"),
}
"""For each head, transformers' table of the classes that have it, and the name suffix of other such classes."""

_NEEDS_SECOND = {
    "span": "the text that holds the answer",
    "choice": "each of the choices",
    "next": "the sentence that may follow",
}
"""What the second text is, for heads that need one."""

_known: WeakKeyDictionary[Any, SentenceSettings | None] = WeakKeyDictionary()  # keyed by transformers models
"""Cached results of `find_sentences`."""

_NOT_INPUTS = {"offset_mapping", "in_second", "prompt_tokens"}
"""Information about a text that is not an input of the model."""


def generates(streaming: StreamingBaseModel) -> bool:
    """Whether a model generates tokens: it can, and its files do not make it a sentence embedder."""
    return streaming.model.can_generate() and find_sentences(streaming) is None


def find_sentences(streaming: StreamingBaseModel) -> SentenceSettings | None:
    """A model's sentence embedding settings; None if its files have none."""
    model = streaming.model  # another object after `switch`
    if model not in _known:
        _known[model] = read_sentences(streaming.manifest, streaming.read_file)
    return _known[model]


def find_head(class_name: str) -> str | None:
    """The head of a class, a key of `_HEADS`; None if it has none of them."""
    for kind, (table, ending) in _HEADS.items():
        names: Iterable[Any] = getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES").values()
        if class_name.endswith(ending) or any(
            class_name in (one if isinstance(one, tuple) else (one,)) for one in names
        ):
            return kind
    return None


def expect_text_model(streaming: StreamingBaseModel) -> None:
    """Refuse a model that is known to need more inputs than a text.

    Raises:
        UnsupportedModelError: it does.
    """
    made = streaming.model
    if made.main_input_name != "input_ids":
        raise _for_python(streaming, f"takes {made.main_input_name}, not text", f"{made.main_input_name}=…")
    if made.config.is_encoder_decoder and not made.can_generate() and find_head(streaming.manifest.class_name) is None:
        raise _for_python(
            streaming,
            "is an encoder and a decoder without a head, and takes the beginning of an answer besides a text",
            "input_ids=…, decoder_input_ids=…",
        )


def encode_texts(
    streaming: StreamingBaseModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    pairs: Sequence[str],
    prompt_name: str | None,
    *,
    raw: bool,
) -> dict[str, torch.Tensor]:
    """Encode the inputs of a model that generates no tokens.

    Args:
        streaming: the model.
        tokenizer: the model's tokenizer.
        text: the first text.
        pairs: second texts, each of which is read with the first.
        prompt_name: name of the prompt to put before the text, for models that embed sentences; None for the default.
        raw: skip the chat template.

    Returns:
        Tensors of shape (texts, tokens), or (1, texts, tokens) for choices; and the entries named in `_NOT_INPUTS`.

    Raises:
        ConfigurationError: the model reads no second text, needs one, or has no such prompt.
    """
    name, sentences = streaming.manifest.name, find_sentences(streaming)
    head = None if sentences else find_head(streaming.manifest.class_name)
    if prompt_name is not None and sentences is None:
        raise ConfigurationError(f"{name} has no prompts of its own; give no name of one (prompt_name, --prompt-name)")
    most = _most_pairs(streaming.manifest.class_name, head)
    if most is not None and len(pairs) > most:
        most_read = f"reads one text{' and a second one' * most}; give no {'third' if most else 'second'} one"
        raise ConfigurationError(f"{name} {most_read} (pairs, --pair)")
    if not pairs and head in _NEEDS_SECOND:
        raise ConfigurationError(
            f"{name} ({streaming.manifest.class_name}) reads two texts: give {_NEEDS_SECOND[head]} too (pairs, --pair)"
        )
    if sentences is not None:
        inputs, cut = encode_sentence(tokenizer, streaming.model.config, sentences, text, prompt_name, where=name)
        if cut:
            logger.warning(
                "%s reads %d tokens of a text: the %d after them are left out", name, inputs["input_ids"].shape[1], cut
            )
        return inputs
    if not pairs:
        return dict(tokenizer(text, return_tensors="pt"))
    several = len(pairs) > 1
    if head == "labels" and tokenizer.chat_template and not raw and not several:  # a reward model, which judges answers
        said = [{"role": "user", "content": text}, {"role": "assistant", "content": pairs[0]}]
        return encode_chat(tokenizer, said, where=name, is_asked=False)
    if several and None in {tokenizer.pad_token_id, getattr(streaming.model.config, "pad_token_id", None)}:
        raise ConfigurationError(
            f"{name} has no token to fill up shorter texts with, so it reads one pair at a time (pairs, --pair)"
        )
    untyped: Any = tokenizer
    spans = {"return_offsets_mapping": True} if head == "span" and tokenizer.is_fast else {}
    read = untyped([text] * len(pairs), list(pairs), return_tensors="pt", padding=several, **spans)
    inputs = dict(read)
    if spans:
        inputs["in_second"] = torch.tensor([[part == 1 for part in read.sequence_ids(at)] for at in range(len(pairs))])
    return {key: value[None] for key, value in inputs.items()} if head == "choice" else inputs


def _most_pairs(class_name: str, head: str | None) -> int | None:
    """The most second texts that a model takes; None for any number."""
    if head == "labels" or head in _NEEDS_SECOND:
        return None
    return 1 if class_name.endswith("ForPreTraining") else 0


def read_heads(
    streaming: StreamingBaseModel,
    tokenizer: PreTrainedTokenizerBase | None,
    inputs: Mapping[str, torch.Tensor],
    pairs: Sequence[str] = (),
) -> Reading:
    """Run a model that generates no tokens, and read its head's output.

    Raises:
        UnsupportedModelError: its head is unknown, or it needs more inputs than a text.
        SurfwError: weights could not be read.
    """
    return read_output(streaming, tokenizer, inputs, pairs, run_heads(streaming, tokenizer, inputs))


def run_heads(
    streaming: StreamingBaseModel, tokenizer: PreTrainedTokenizerBase | None, inputs: Mapping[str, torch.Tensor]
) -> Any:
    """Run a model that generates no tokens and return its output; for a sentence embedder, only its hidden states.

    Raises:
        UnsupportedModelError: it needs more inputs than a text.
        SurfwError: weights could not be read.
    """
    if find_sentences(streaming) is not None:
        return SimpleNamespace(last_hidden_state=_run_base(streaming, inputs))
    is_mask = find_head(streaming.manifest.class_name) == "mask"
    needs_states = is_mask and not all(find_masks(tokenizer, row[None]) for row in inputs["input_ids"])
    return _run(streaming, inputs, output_hidden_states=needs_states or None)


def read_output(
    streaming: StreamingBaseModel,
    tokenizer: PreTrainedTokenizerBase | None,
    inputs: Mapping[str, torch.Tensor],
    pairs: Sequence[str],
    output: Any,
) -> Reading:
    """Read the output of `run_heads` for a text with these inputs.

    Raises:
        UnsupportedModelError: the head is unknown.
    """
    if (sentences := find_sentences(streaming)) is not None:
        return _embed(sentences, inputs, output.last_hidden_state)
    head = find_head(streaming.manifest.class_name)
    seen = Seen(streaming=streaming, tokenizer=tokenizer, inputs=inputs, pairs=pairs, head=head, output=output)
    for read in READERS:
        if (found := read(seen)) is not None:
            return found
    given = ", ".join(key for key, value in vars(output).items() if value is not None)
    raise _for_python(streaming, f"gives {given}, which surfw has no words for", "**inputs")


def _run(streaming: StreamingBaseModel, inputs: Mapping[str, torch.Tensor], **options: Any) -> Any:
    """Run the model's forward; for a model of texts and images, only its text part."""

    def work(model: Any) -> Any:
        features = getattr(model, "get_text_features", None)
        call = features or model
        given = _accepted(features or model.forward, inputs)
        found = call(**to_device(given, streaming.device), return_dict=True, **({} if features else options))
        if features is None:
            return found
        return SimpleNamespace(text_embeds=getattr(found, "pooler_output", found))

    if streaming.manifest.config.get("model_type", "").startswith("siglip"):  # trained with texts padded to 64 tokens
        raise _for_python(streaming, "reads texts filled up to a fixed length", "**inputs")
    try:
        return streaming.run(work)
    except SurfwError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as exc:
        raise no_text_alone(streaming, exc) from exc


def _accepted(forward: Callable[..., Any], inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inputs that a forward accepts: some tokenizers return more than their model reads."""
    parameters = inspect.signature(forward).parameters
    return {name: value for name, value in inputs.items() if name in parameters and name not in _NOT_INPUTS}


def _run_base(streaming: StreamingBaseModel, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The last hidden states of a model without its head; with an encoder and a decoder, those of the encoder."""

    def work(model: Any) -> Any:
        base = model.get_encoder() if model.config.is_encoder_decoder else model.base_model
        given = to_device(_accepted(base.forward, inputs), streaming.device)
        uncached = {"use_cache": False} if "use_cache" in inspect.signature(base.forward).parameters else {}
        return base(**given, return_dict=True, **uncached).last_hidden_state

    found: torch.Tensor = streaming.run(work)
    return found


def _embed(settings: SentenceSettings, inputs: Mapping[str, torch.Tensor], states: torch.Tensor) -> Reading:
    """Compute the embedding of a sentence from its hidden states."""
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).to(states.device)
    ignored = int(inputs["prompt_tokens"]) if "prompt_tokens" in inputs else 0
    vector = pool(states, mask, settings, ignored)
    how = {"modes": list(settings.modes), "normalised": settings.normalises, "from": "modules.json"}
    return Reading(embedding=vector[0].float().tolist(), pooling=how)


def no_text_alone(streaming: StreamingBaseModel, exc: Exception) -> UnsupportedModelError:
    """The error for a model that needs other inputs than a text; the model's own exception shows which."""
    said = " ".join(str(exc).split())[:200]
    return _for_python(streaming, f"does not run on a text alone ({type(exc).__name__}: {said})", "**inputs")


def _for_python(streaming: StreamingBaseModel, what: str, arguments: str) -> UnsupportedModelError:
    manifest = streaming.manifest
    return UnsupportedModelError(
        f"{manifest.name} ({manifest.class_name}) {what}; use it from Python, as a StreamingModel: model({arguments})"
    )
