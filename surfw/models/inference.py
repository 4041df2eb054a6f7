"""One prompt through a streaming model: the request, how each kind of model runs it, and the result, as data.

Generation, sampling, chat templates and stopping are transformers' own. This module prints nothing.
"""

import copy
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from surfw import tracing
from surfw.errors import ConfigurationError, SurfwError
from surfw.models.base import StreamingBaseModel, to_device
from surfw.models.chat import encode_chat
from surfw.models.heads import encode_texts, expect_text_model, generates, no_text_alone, read_heads
from surfw.models.measure import SPARE_POSITIONS, most_positions
from surfw.models.options import expect_number
from surfw.models.read_ahead import expect_ids, no_tokenizer
from surfw.models.stopping import StopTexts, find_stops
from surfw.models.text_stream import TextStream, cut_at_stop

logger = logging.getLogger("surfw.models")

_INDEXED = ("decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id")
"""Settings whose token ids index the embeddings or the logits."""

_OF_SEVERAL = ("num_beams", "num_return_sequences")
"""Settings that produce several answers at a time."""

_SAMPLING = ("temperature", "top_p", "top_k", "seed")
"""Options that only generation uses."""


class GenerationOptions(TypedDict, total=False):
    """Options of a generation; see `InferenceRequest` for their meaning."""

    system: str | None
    raw: bool
    max_new_tokens: int
    temperature: float | None
    top_p: float | None
    top_k: int | None
    seed: int | None
    stop: Sequence[str]
    ignore_eos: bool


@dataclass(frozen=True, kw_only=True)
class InferenceRequest:
    """A prompt and the options to run it with.

    Attributes:
        prompt: the text; None if `prompt_ids` are given.
        prompt_ids: token ids, used unchanged.
        history: the messages before the prompt, each with `role` and `content`, for models with a chat template.
        system: a system message, for models with a chat template.
        raw: use the prompt unchanged, without the chat template.
        max_new_tokens: the most tokens to generate.
        temperature: sample with this temperature; 0 decodes greedily, and so does None unless `top_p` or `top_k` is
            given.
        top_p: sample from the smallest set of tokens with this total probability.
        top_k: sample from this many of the likeliest tokens.
        seed: seed of torch's random number generator, which all models of a process share.
        stop: texts that end the generation; neither they nor the rest of their last token are part of the text.
        ignore_eos: generate `max_new_tokens` tokens, ignoring the model's end tokens.
        pairs: second texts, for models that read two: documents to rank, choices, or the text that holds an answer.
        prompt_name: name of the model's own prompt to put before the text, for models that embed sentences.
    """

    prompt: str | None = None
    prompt_ids: Sequence[int] | None = None
    history: Sequence[Mapping[str, str]] = ()
    system: str | None = None
    raw: bool = False
    max_new_tokens: int = 128
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: Sequence[str] = ()
    ignore_eos: bool = False
    pairs: Sequence[str] = ()
    prompt_name: str | None = None

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigurationError: a value has the wrong type, or is out of bounds.
        """
        expect_number("max_new_tokens", self.max_new_tokens, 1)
        expect_number("temperature", self.temperature, 0, kind=int | float | None)
        expect_number("top_p", self.top_p, 0, 1, kind=int | float | None)
        expect_number("top_k", self.top_k, 1, kind=int | None)
        expect_number("seed", self.seed, 0, 2**63 - 1, kind=int | None)
        for name, texts in (("stop", self.stop), ("pairs", self.pairs)):
            if isinstance(texts, str) or not all(isinstance(one, str) and one for one in texts):
                raise ConfigurationError(f"{name} is {texts!a:.80}, expected a list of texts that are not empty")
        if halves := [one for one in self.stop if any("\ud800" <= character <= "\udfff" for character in one)]:
            raise ConfigurationError(f"stop has {halves[0]!a:.80}: half of a surrogate pair is no character")

    @property
    def samples(self) -> bool:
        """Whether tokens are sampled instead of chosen greedily."""
        return bool(self.temperature) or (
            self.temperature is None and (self.top_p is not None or self.top_k is not None)
        )


@dataclass(kw_only=True)
class InferenceResult:
    """The result of a request; times in seconds. Encoders give an `embedding` or `predictions`, other models tokens.

    `pooling` says how an embedding was made: its `modes` (such as `mean`), whether it is `normalised` to length 1, and
    where these settings come `from`. A prediction says what it is for (`position` and `token`, or the number of the
    `pair`), and has `candidates`, best first, each with `text` and `probability` or `score`.

    `decode_stall_share` is the fraction of the time from the first token to the last spent waiting for weights.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    ttft_seconds: float | None = None
    tpot_seconds: float | None = None
    tokens_per_second: float | None = None
    decode_stall_share: float | None = None
    embedding: list[float] | None = None
    pooling: dict[str, Any] | None = None
    predictions: list[dict[str, Any]] | None = None


class TokenClock(BaseStreamer):
    """Records when each token came, and passes it on to a text stream."""

    def __init__(self, text: TextStream | None, on_token: Callable[[int, float], None]) -> None:
        """Start the clock; the first `put` of `generate()` is the prompt, or the decoder's start token."""
        self.start = time.perf_counter()
        self.times: list[float] = []
        self._skip = True
        self._text = text
        self._on_token = on_token

    def put(self, value: torch.Tensor) -> None:
        """Take new tokens; the first call brings the prompt and is ignored."""
        if self._skip:
            self._skip = False
            return
        now = time.perf_counter() - self.start
        for token in value.reshape(-1).tolist():  # several at a time with speculation
            self.times.append(now)
            self._on_token(token, now)
            if self._text is not None:
                self._text.put(token)

    def end(self) -> None:
        """Flush the text; no more tokens come."""
        if self._text is not None:
            self._text.end()


def answer(
    model: StreamingBaseModel,
    tokenizer: PreTrainedTokenizerBase | None,
    request: InferenceRequest,
    *,
    inputs: dict[str, torch.Tensor] | None = None,
    past: Mapping[str, object] | None = None,
    on_text: Callable[[str], None] = lambda _: None,
    on_token: Callable[[int, float], None] = lambda _token, _seconds: None,
) -> InferenceResult:
    """Run a request.

    Args:
        model: an open model.
        tokenizer: its tokenizer; if None, the request must have `prompt_ids`.
        request: what to run.
        inputs: the result of `encode_prompt`, if it is known already.
        past: a KV cache that holds the beginning of the prompt, under the name of the forward's argument for it.
        on_text: called with each new piece of text.
        on_token: called with each new token id and the seconds since the start.

    Raises:
        ConfigurationError: the request does not fit the model.
        SurfwError: weights could not be read.
    """
    asked = model.model
    if inputs is None:
        inputs = encode_prompt(model, tokenizer, request)
    for remark in find_remarks(model, request, inputs["input_ids"].shape[-1]):
        logger.warning("%s", remark)
    callers_own: list[Exception] = []

    def noting(function: Callable[..., None]) -> Callable[..., None]:
        """Wrap a callback and record what it raises, so that it is not taken for an error of the model."""

        def call(*args: object) -> None:
            try:
                function(*args)
            except Exception as exc:
                callers_own.append(exc)
                raise

        return call

    try:
        model.expect_open(asked)
        if not generates(model):
            return _run_encoder(model, tokenizer, inputs, request.pairs)
        return _generate(
            model,
            tokenizer,
            request,
            inputs,
            past or {},
            asked=asked,
            on_text=noting(on_text),
            on_token=noting(on_token),
        )
    except (ValueError, IndexError, RuntimeError) as exc:
        if any(exc is one for one in callers_own):
            raise
        if (error := _explain(model, request, inputs["input_ids"].shape[-1], exc)) is not None:
            raise error from exc
        raise


def find_remarks(model: StreamingBaseModel, request: InferenceRequest, prompt_tokens: int) -> list[str]:
    """Warnings about options that have no effect and lengths beyond the model's positions, a sentence each."""
    name, remarks, answers = model.manifest.name, [], generates(model)
    given = [one for one in _SAMPLING if getattr(request, one) is not None]
    if given and not answers:
        verb = "changes" if len(given) == 1 else "change"
        remarks.append(f"{' and '.join(given)} {verb} nothing: {name} is an encoder, and generates no tokens")
    elif request.seed is not None and not request.samples:
        remarks.append("the seed changes nothing without sampling; give a temperature, top_p or top_k to sample")
    own = getattr(model.model, "generation_config", None) if answers else None
    remarks += [
        f"{name} asks for {setting} = {asked} in its own settings, and one answer is made, token by token; generate() "
        "from Python follows them"
        for setting in _OF_SEVERAL
        if (asked := getattr(own, setting, None) or 1) > 1
    ]
    if model.guesses and (request.stop or getattr(model.model.generation_config, "stop_strings", None)):
        remarks.append(f"{name} guesses no tokens ahead here: a stop text inside several at once would be missed")
    positions = most_positions(model.model.config.get_text_config(decoder=True))
    if positions is not None and prompt_tokens > positions:
        remarks.append(
            f"the prompt has {prompt_tokens} tokens, and {name} was made for {positions} (max_position_embeddings): "
            "expect nonsense, and shorten the prompt"
        )
    elif positions is not None and answers and prompt_tokens + request.max_new_tokens > positions:
        remarks.append(
            f"prompt and answer may have {prompt_tokens + request.max_new_tokens} tokens, and {name} was made for "
            f"{positions} (max_position_embeddings): expect nonsense beyond, or ask for fewer (max_new_tokens)"
        )
    return remarks


def _explain(
    model: StreamingBaseModel, request: InferenceRequest, prompt_tokens: int, exc: Exception
) -> SurfwError | None:
    """Turn an exception of transformers into a `SurfwError` if the request or the model caused it; else None."""
    if complaint := _complaint(model, request, prompt_tokens, exc):
        return ConfigurationError(complaint)
    return no_text_alone(model, exc) if isinstance(exc, IndexError) and not generates(model) else None


def _complaint(model: StreamingBaseModel, request: InferenceRequest, prompt_tokens: int, exc: Exception) -> str | None:
    """What is wrong with the request or the model's settings, given an exception of transformers; None if fine."""
    name, answers = model.manifest.name, generates(model)
    if isinstance(exc, ValueError):
        return f"{name} cannot generate like this: {exc}" if answers else None
    most = model.model.config.get_text_config(decoder=True).vocab_size - 1
    for setting in _INDEXED if answers else ():
        tokens = getattr(model.model.generation_config, setting, None)
        for token in tokens if isinstance(tokens, list) else [tokens]:
            if token is not None and not 0 <= token <= most:
                return f"{name} has the generation setting {setting} = {token}, expected 0 to {most}"
    new_tokens = request.max_new_tokens if answers else 0
    positions = most_positions(model.model.config.get_text_config())
    if positions is None or prompt_tokens + new_tokens + SPARE_POSITIONS <= positions:
        return None
    asked = f", and {new_tokens} new ones are asked for; ask for less" if new_tokens else "; shorten it"
    return f"{name} has positions for {positions} tokens, but the prompt has {prompt_tokens}{asked}"


def encode_prompt(
    model: StreamingBaseModel, tokenizer: PreTrainedTokenizerBase | None, request: InferenceRequest
) -> dict[str, torch.Tensor]:
    """Encode a prompt, applying the chat template, to input tensors of shape (1, tokens) and dtype int64.

    Raises:
        ConfigurationError: the request does not fit the model.
        UnsupportedModelError: the model takes no text, or needs more inputs than a text.
    """
    expect_text_model(model)
    _expect_texts(request)
    vocabulary = getattr(model.model.config.get_text_config(), "vocab_size", 1 << 31)  # models such as CANINE have none
    answers = generates(model)
    if answers and (request.pairs or request.prompt_name is not None):
        which = "--pair (pairs=)" if request.pairs else "--prompt-name (prompt_name=)"
        raise ConfigurationError(f"{model.manifest.name} generates text from one prompt; leave out {which}")
    if request.prompt_ids is not None:
        expect_ids(request.prompt_ids, vocabulary, model.manifest.name)
        ids = torch.tensor([list(request.prompt_ids)], dtype=torch.int64)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    elif tokenizer is None:
        raise no_tokenizer(model.manifest.name)
    elif tokenizer.chat_template and not request.raw and answers:
        system = [{"role": "system", "content": request.system}] if request.system else []
        messages = [*system, *request.history, {"role": "user", "content": request.prompt or ""}]
        inputs = encode_chat(tokenizer, messages, where=model.manifest.name)
    elif request.system:
        raise ConfigurationError(
            f"{model.manifest.name} has no chat template, so a system message has no place in its prompt"
        )
    elif not answers:
        inputs = encode_texts(
            model, tokenizer, request.prompt or "", request.pairs, request.prompt_name, raw=request.raw
        )
        expect_ids(inputs["input_ids"].flatten().tolist(), vocabulary, model.manifest.name)
        return inputs
    else:
        inputs = dict(tokenizer(request.prompt or "", return_tensors="pt"))
    expect_ids(inputs["input_ids"][0].tolist(), vocabulary, model.manifest.name)
    accepted = {"input_ids", "attention_mask", "token_type_ids"}
    return {name: value for name, value in inputs.items() if name in accepted}


def _expect_texts(request: InferenceRequest) -> None:
    """Check that texts can be encoded: JSON may contain half of a surrogate pair, which a tokenizer rejects.

    Raises:
        ConfigurationError: one of them cannot.
    """
    said = [content for message in request.history if isinstance(content := message.get("content"), str)]
    for text in filter(None, (request.prompt, request.system, *request.pairs, *said)):
        try:
            text.encode()
        except UnicodeEncodeError as exc:
            raise ConfigurationError(
                f"the prompt has half of a surrogate pair, {text[exc.start]!a}, which is no character; leave it out"
            ) from None


def continues_prompt(
    model: StreamingBaseModel, tokenizer: PreTrainedTokenizerBase | None, request: InferenceRequest
) -> bool:
    """Whether the generated text continues the prompt, rather than answering (chat) or transforming it (encoder)."""
    is_chat = tokenizer is not None and bool(tokenizer.chat_template) and not request.raw
    return generates(model) and not model.model.config.is_encoder_decoder and not is_chat


def _generate(
    streaming: StreamingBaseModel,
    tokenizer: PreTrainedTokenizerBase | None,
    request: InferenceRequest,
    inputs: dict[str, torch.Tensor],
    past: Mapping[str, object],
    *,
    asked: PreTrainedModel,
    on_text: Callable[[str], None],
    on_token: Callable[[int, float], None],
) -> InferenceResult:
    inputs.pop("token_type_ids", None)
    prompt_tokens = inputs["input_ids"].shape[1]
    stalled: list[float] = []

    def note(token: int, seconds: float) -> None:
        stalled.append(streaming.metrics.seconds("stall"))
        tracing.token()
        on_token(token, seconds)

    own: GenerationConfig = streaming.model.generation_config
    stops = find_stops(own, request.stop, tokenizer, streaming.manifest.name, ignore_own=request.ignore_eos)
    text = TextStream(tokenizer, on_text, stops) if tokenizer is not None else None
    clock = TokenClock(text, note)
    stopping = StoppingCriteriaList()
    if tokenizer is not None and text is not None and stops:
        stopping.append(StopTexts(tokenizer, stops, text))

    def generate(model: Any) -> list[int]:
        """Generate with the request's configuration; `generate()` takes unset values from the model's own settings."""
        streaming.expect_open(asked)
        config = model.generation_config = generation_config(own, request)
        if request.seed is not None:
            torch.manual_seed(request.seed)
        given = to_device(inputs, streaming.device)

        def run(guessing: Mapping[str, Any]) -> Any:
            return model.generate(
                generation_config=config, streamer=clock, stopping_criteria=stopping, **given, **past, **guessing
            )[0]

        try:
            size = prompt_tokens, request.max_new_tokens, 1
            tokens = streaming.generate_with(size, run, guesses=not past and not stopping)
        finally:
            model.generation_config = own
        new: list[int] = tokens[1 if model.config.is_encoder_decoder else prompt_tokens :].tolist()
        return new

    new = streaming.run(generate)
    took = time.perf_counter() - clock.start
    times = clock.times[-len(new) :] if new else []
    decoding = times[-1] - times[0] if times else 0.0
    return InferenceResult(
        text=cut_at_stop(str(tokenizer.decode(new, skip_special_tokens=True)), stops) if tokenizer is not None else "",
        token_ids=new,
        prompt_tokens=prompt_tokens,
        ttft_seconds=times[0] if times else None,
        tpot_seconds=decoding / (len(times) - 1) if len(times) > 1 else None,
        tokens_per_second=len(new) / took if new else None,
        decode_stall_share=min(1.0, (stalled[-1] - stalled[0]) / decoding) if decoding else None,
    )


def generation_config(own: GenerationConfig, request: InferenceRequest) -> GenerationConfig:
    """The model's own generation settings, changed to greedy decoding unless the request samples."""
    config = copy.deepcopy(own)
    config.max_new_tokens, config.max_length = request.max_new_tokens, None
    config.num_beams, config.num_return_sequences = 1, 1
    config.stop_strings = config.assistant_ensemble_weight = None  # the latter lets a draft change the answer
    config.return_dict_in_generate = False
    config.output_attentions = config.output_hidden_states = config.output_scores = config.output_logits = False
    config.do_sample = request.samples
    config.temperature = request.temperature if request.samples else None
    config.top_p = request.top_p if request.samples else None
    config.top_k = request.top_k if request.samples else None
    if request.ignore_eos:
        config.eos_token_id, config.min_length, config.min_new_tokens = None, None, None
        config.forced_eos_token_id = None
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if ends in ([], [None]):
        config.eos_token_id = config.exponential_decay_length_penalty = None  # which applies to the end token
    if config.pad_token_id is None:
        config.pad_token_id = ends[0] if ends and ends[0] is not None else 0
    return config


def _run_encoder(
    model: StreamingBaseModel,
    tokenizer: PreTrainedTokenizerBase | None,
    inputs: dict[str, torch.Tensor],
    pairs: Sequence[str],
) -> InferenceResult:
    """Run a model that generates no tokens and read its head's output."""
    start = time.perf_counter()
    found = read_heads(model, tokenizer, inputs, pairs)
    return InferenceResult(
        prompt_tokens=int(inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).sum()),
        ttft_seconds=time.perf_counter() - start,
        embedding=found.embedding,
        pooling=found.pooling,
        predictions=found.predictions,
    )
