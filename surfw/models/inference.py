"""One prompt through a streaming model: the request, how each kind of model runs it, and the result, as data.

Generation, sampling, chat templates and stopping are transformers' own. Nothing is rendered here.
"""

import copy
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from surfw.errors import ConfigurationError, UnsupportedModelError
from surfw.models.base import StreamingBaseModel, to_device
from surfw.models.chat import encode_chat
from surfw.models.measure import SPARE_POSITIONS
from surfw.models.options import expect_number
from surfw.models.read_ahead import expect_ids, no_tokenizer
from surfw.models.text_stream import TextStream

logger = logging.getLogger("surfw.models")

_INDEXED = ("decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id")
"""Settings whose tokens are looked up in the embeddings, or in the logits."""

_SAMPLING = ("temperature", "top_p", "top_k", "seed")
"""What only a generation takes."""

_TOP_PREDICTIONS = 5


class GenerationOptions(TypedDict, total=False):
    """What may be asked of a generation; see `InferenceRequest` for what each means."""

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
    """What to run.

    Attributes:
        prompt: the text; None if `prompt_ids` are given.
        prompt_ids: token ids, taken as they are.
        history: the messages before the prompt, each with `role` and `content`, for models with a chat template.
        system: a system message, for models with a chat template.
        raw: give the prompt as it is, without the chat template.
        max_new_tokens: the most tokens to generate.
        temperature: sample with this temperature; None or 0 for greedy decoding, unless `top_p` or `top_k` is given.
        top_p: sample from the smallest set of tokens with this probability.
        top_k: sample from this many tokens.
        seed: of torch's random numbers, which all models of a process share.
        stop: texts that end the generation.
        ignore_eos: generate `max_new_tokens`, whatever the model says of an end.
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
        if isinstance(self.stop, str) or not all(isinstance(one, str) and one for one in self.stop):
            raise ConfigurationError(f"stop is {self.stop!a:.80}, expected a list of texts that are not empty")

    @property
    def samples(self) -> bool:
        """Whether tokens are sampled, not chosen greedily."""
        return bool(self.temperature) or (
            self.temperature is None and (self.top_p is not None or self.top_k is not None)
        )


@dataclass(kw_only=True)
class InferenceResult:
    """The result of a request; times in seconds. Encoders give an `embedding` or `predictions`, the others tokens.

    `decode_stall_share` is the part of the time from the first token to the last that was spent waiting for weights.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    ttft_seconds: float | None = None
    tpot_seconds: float | None = None
    tokens_per_second: float | None = None
    decode_stall_share: float | None = None
    embedding: list[float] | None = None
    predictions: list[dict[str, Any]] | None = None


class TokenClock(BaseStreamer):
    """Notes when each token came, and passes it on to a stream of text."""

    def __init__(self, text: TextStream | None, on_token: Callable[[int, float], None]) -> None:
        """Start the clock; `generate()` puts the prompt first, or the decoder's start."""
        self.start = time.perf_counter()
        self.times: list[float] = []
        self._skip = True
        self._text = text
        self._on_token = on_token

    def put(self, value: torch.Tensor) -> None:
        """The tokens of a pass, or first of all the prompt."""
        if self._skip:
            self._skip = False
            return
        now = time.perf_counter() - self.start
        for token in value.reshape(-1).tolist():  # several, where guesses were right
            self.times.append(now)
            self._on_token(token, now)
            if self._text is not None:
                self._text.put(token)

    def end(self) -> None:
        """No more tokens."""
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
        tokenizer: its tokenizer; None needs `prompt_ids`.
        request: what to run.
        inputs: what `encode_prompt` made of it, if that is known already.
        past: a KV cache that holds the beginning of the prompt, by the name the model's forward has for it.
        on_text: called with the text as it comes.
        on_token: called with each new token id, and the seconds since the start.

    Raises:
        ConfigurationError: the request does not fit the model.
        SurfwError: weights could not be read.
    """
    if inputs is None:
        inputs = encode_prompt(model, tokenizer, request)
    for remark in find_remarks(model, request, inputs["input_ids"].shape[1]):
        logger.warning("%s", remark)
    callers_own: list[Exception] = []

    def noting(function: Callable[..., None]) -> Callable[..., None]:
        """The caller's function; what it raises is not the model's, and is passed on as it is."""

        def call(*args: object) -> None:
            try:
                function(*args)
            except Exception as exc:
                callers_own.append(exc)
                raise

        return call

    try:
        if not model.model.can_generate():
            inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
            return encode_batch(model, tokenizer, inputs)[0]
        return _generate(
            model, tokenizer, request, inputs, past or {}, on_text=noting(on_text), on_token=noting(on_token)
        )
    except (ValueError, IndexError, RuntimeError) as exc:
        if any(exc is one for one in callers_own):
            raise
        if complaint := _complaint(model, request, inputs["input_ids"].shape[1], exc):
            raise ConfigurationError(complaint) from exc
        raise


def find_remarks(model: StreamingBaseModel, request: InferenceRequest, prompt_tokens: int) -> list[str]:
    """What of a request changes nothing, or goes beyond what the model was made for: a sentence each."""
    name, remarks = model.manifest.name, []
    given = [one for one in _SAMPLING if getattr(request, one) is not None]
    if given and not model.model.can_generate():
        verb = "changes" if len(given) == 1 else "change"
        remarks.append(f"{' and '.join(given)} {verb} nothing: {name} is an encoder, and generates no tokens")
    elif request.seed is not None and not request.samples:
        remarks.append("the seed changes nothing without sampling; give a temperature, top_p or top_k to sample")
    if model.guesses and (request.stop or getattr(model.model.generation_config, "stop_strings", None)):
        remarks.append(f"{name} guesses no tokens ahead here: a stop text inside several at once would be missed")
    positions = getattr(model.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if positions is not None and prompt_tokens > positions:
        remarks.append(
            f"the prompt has {prompt_tokens} tokens, and {name} was made for {positions} (max_position_embeddings): "
            "expect nonsense, and shorten the prompt"
        )
    elif positions is not None and model.model.can_generate() and prompt_tokens + request.max_new_tokens > positions:
        remarks.append(
            f"prompt and answer may have {prompt_tokens + request.max_new_tokens} tokens, and {name} was made for "
            f"{positions} (max_position_embeddings): expect nonsense beyond, or ask for fewer (max_new_tokens)"
        )
    return remarks


def _complaint(model: StreamingBaseModel, request: InferenceRequest, prompt_tokens: int, exc: Exception) -> str | None:
    """What is wrong with a request or a model's settings, given an exception of transformers; None if nothing is."""
    name, generates = model.manifest.name, model.model.can_generate()
    if isinstance(exc, ValueError):
        return f"{name} cannot generate like this: {exc}" if generates else None
    most = model.model.config.get_text_config(decoder=True).vocab_size - 1
    for setting in _INDEXED if generates else ():
        tokens = getattr(model.model.generation_config, setting, None)
        for token in tokens if isinstance(tokens, list) else [tokens]:
            if token is not None and not 0 <= token <= most:
                return f"{name} has the generation setting {setting} = {token}, expected 0 to {most}"
    new_tokens = request.max_new_tokens if generates else 0
    positions = getattr(model.model.config.get_text_config(), "max_position_embeddings", None)
    if positions is None or prompt_tokens + new_tokens + SPARE_POSITIONS <= positions:
        return None
    return (
        f"{name} has positions for {positions} tokens, but the prompt has {prompt_tokens}, and {new_tokens} new ones "
        "are asked for; ask for less"
    )


def encode_prompt(
    model: StreamingBaseModel, tokenizer: PreTrainedTokenizerBase | None, request: InferenceRequest
) -> dict[str, torch.Tensor]:
    """The model's inputs, chat template included, as tensors of shape (1, tokens) and dtype int64.

    Raises:
        ConfigurationError: the request does not fit the model.
        UnsupportedModelError: the model takes no text.
    """
    if model.model.main_input_name != "input_ids":
        raise UnsupportedModelError(
            f"{model.manifest.name} takes {model.model.main_input_name}, not text; "
            "use it from Python, as a StreamingModel"
        )
    vocabulary = model.model.config.get_text_config().vocab_size
    if request.prompt_ids is not None:
        expect_ids(request.prompt_ids, vocabulary, model.manifest.name)
        ids = torch.tensor([list(request.prompt_ids)], dtype=torch.int64)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    elif tokenizer is None:
        raise no_tokenizer(model.manifest.name)
    elif tokenizer.chat_template and not request.raw and model.model.can_generate():
        system = [{"role": "system", "content": request.system}] if request.system else []
        messages = [*system, *request.history, {"role": "user", "content": request.prompt or ""}]
        inputs = encode_chat(tokenizer, messages, where=model.manifest.name)
    elif request.system:
        raise ConfigurationError(
            f"{model.manifest.name} has no chat template, so a system message has no place in its prompt"
        )
    else:
        inputs = dict(tokenizer(request.prompt or "", return_tensors="pt"))
    expect_ids(inputs["input_ids"][0].tolist(), vocabulary, model.manifest.name)
    accepted = {"input_ids", "attention_mask", "token_type_ids"}
    return {name: value for name, value in inputs.items() if name in accepted}


def continues_prompt(
    model: StreamingBaseModel, tokenizer: PreTrainedTokenizerBase | None, request: InferenceRequest
) -> bool:
    """Whether the text that is generated goes on where the prompt ends; it answers it in a chat, or translates it."""
    is_chat = tokenizer is not None and bool(tokenizer.chat_template) and not request.raw
    return model.model.can_generate() and not model.model.config.is_encoder_decoder and not is_chat


def _generate(
    streaming: StreamingBaseModel,
    tokenizer: PreTrainedTokenizerBase | None,
    request: InferenceRequest,
    inputs: dict[str, torch.Tensor],
    past: Mapping[str, object],
    *,
    on_text: Callable[[str], None],
    on_token: Callable[[int, float], None],
) -> InferenceResult:
    if request.stop and tokenizer is None:
        raise ConfigurationError(f"{streaming.manifest.name} has no tokenizer, so no text can end its generation")
    inputs.pop("token_type_ids", None)
    prompt_tokens = inputs["input_ids"].shape[1]
    stalled: list[float] = []

    def note(token: int, seconds: float) -> None:
        stalled.append(streaming.metrics.seconds("stall"))
        on_token(token, seconds)

    clock = TokenClock(TextStream(tokenizer, on_text) if tokenizer is not None else None, note)

    def generate(model: Any) -> list[int]:
        """As the request says, and in no other way: what is left open would be taken from the model's own settings."""
        own = model.generation_config
        stops = list(request.stop) or getattr(own, "stop_strings", None)
        stopping = {"stop_strings": stops, "tokenizer": tokenizer} if stops else {}
        config = model.generation_config = generation_config(own, request)
        if request.seed is not None:
            torch.manual_seed(request.seed)
        given = to_device(inputs, streaming.device)

        def run(guessing: Mapping[str, Any]) -> Any:
            return model.generate(generation_config=config, streamer=clock, **given, **past, **stopping, **guessing)[0]

        try:
            size = prompt_tokens, request.max_new_tokens, 1
            tokens = streaming.generate_with(size, run, guesses=not past and not stops)
        finally:
            model.generation_config = own
        new: list[int] = tokens[1 if model.config.is_encoder_decoder else prompt_tokens :].tolist()
        return new

    new = streaming.run(generate)
    took = time.perf_counter() - clock.start
    times = clock.times[-len(new) :] if new else []
    decoding = times[-1] - times[0] if times else 0.0
    return InferenceResult(
        text=str(tokenizer.decode(new, skip_special_tokens=True)) if tokenizer is not None else "",
        token_ids=new,
        prompt_tokens=prompt_tokens,
        ttft_seconds=times[0] if times else None,
        tpot_seconds=decoding / (len(times) - 1) if len(times) > 1 else None,
        tokens_per_second=len(new) / took if new else None,
        decode_stall_share=min(1.0, (stalled[-1] - stalled[0]) / decoding) if decoding else None,
    )


def generation_config(own: GenerationConfig, request: InferenceRequest) -> GenerationConfig:
    """The model's own generation settings, made greedy unless sampling is asked for."""
    config = copy.deepcopy(own)
    config.max_new_tokens, config.max_length = request.max_new_tokens, None
    config.num_beams, config.num_return_sequences = 1, 1
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
        config.eos_token_id = config.exponential_decay_length_penalty = None  # which is put on the end's token
    if config.pad_token_id is None:
        config.pad_token_id = ends[0] if ends and ends[0] is not None else 0
    return config


def encode_batch(
    model: StreamingBaseModel, tokenizer: PreTrainedTokenizerBase | None, inputs: dict[str, torch.Tensor]
) -> list[InferenceResult]:
    """Fill-mask, classification, or the mean of the last hidden states over each prompt's tokens.

    Args:
        model: an open encoder.
        tokenizer: its tokenizer.
        inputs: of shape (prompts, tokens), filled up on the right where the attention mask is 0.
    """
    logits_wanted = "Masked" in model.manifest.class_name or "Classification" in model.manifest.class_name
    start = time.perf_counter()
    arguments: dict[str, Any] = dict(inputs)
    output = model(**arguments, output_hidden_states=not hasattr(model.model, "pooler") or None, return_dict=True)
    took = time.perf_counter() - start
    logits = getattr(output, "logits", None) if logits_wanted else None
    results = []
    for row, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
        result = InferenceResult(prompt_tokens=length, ttft_seconds=took)
        if logits is not None:
            ids, found = inputs["input_ids"][row : row + 1, :length], logits[row : row + 1].float()
            result.predictions = _predictions(model, tokenizer, ids, found if found.dim() == 2 else found[:, :length])
        if result.predictions is None:
            last = getattr(output, "last_hidden_state", None)
            states = output.hidden_states[-1] if last is None else last
            mask = inputs["attention_mask"][row : row + 1, :, None].to(states.device, states.dtype)
            result.embedding = ((states[row : row + 1] * mask).sum(1) / mask.sum(1))[0].float().tolist()
        results.append(result)
    return results


def _predictions(
    model: StreamingBaseModel, tokenizer: PreTrainedTokenizerBase | None, ids: torch.Tensor, logits: torch.Tensor
) -> list[dict[str, Any]] | None:
    """The likeliest tokens at each mask, or the likeliest labels; None where neither fits."""
    config = model.model.config
    if "Masked" in model.manifest.class_name:
        mask = tokenizer.mask_token_id if tokenizer is not None else None
        places = (ids[0] == mask).nonzero()[:, 0].tolist() if mask is not None else []
        if not places or tokenizer is None:
            return None
        return [{"position": place, "candidates": _top(logits[0, place], tokenizer.decode)} for place in places]
    labels: Any = config.id2label
    if logits.dim() == 2:
        return [{"candidates": _top(logits[0], labels.__getitem__)}]
    return [{"position": at, "candidates": _top(row, labels.__getitem__)} for at, row in enumerate(logits[0])]


def _top(logits: torch.Tensor, name: Callable[[int], Any]) -> list[dict[str, Any]]:
    best = logits.softmax(-1).topk(min(_TOP_PREDICTIONS, logits.shape[-1]))
    found = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [{"id": index, "text": str(name(index)).strip(), "probability": value} for index, value in found]
