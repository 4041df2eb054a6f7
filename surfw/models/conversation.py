"""A conversation with a model: its messages, and the KV cache that holds what the model has read of them.

The prompt of a turn is the whole conversation, as the chat template renders it. Without a template it is one text, in
which each user message begins on a new line and each answer continues its message. `generate()` gets that prompt and
the cache of the previous turns, and continues where the cache ends.

Invariant: the cache holds exactly the tokens in `_Memory.token_ids`, and these are a prefix of the prompt. If a
template rewrites earlier messages, or the tokenizer merges tokens across a turn boundary, the cache is cropped to the
common prefix; if it cannot be cropped, it is replaced.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, Unpack

import torch
from transformers import DynamicCache, DynamicLayer, PreTrainedTokenizerBase
from transformers.cache_utils import DummyLayer, DynamicSlidingWindowLayer

from surfw.errors import ConfigurationError, UnsupportedModelError
from surfw.models.inference import (
    GenerationOptions,
    InferenceRequest,
    InferenceResult,
    answer,
    encode_prompt,
)
from surfw.models.measure import most_positions
from surfw.models.streaming import StreamingModel
from surfw.models.text_stream import INCOMPLETE, space_before
from surfw.runtime.kv_cache import cache_bytes, cache_name, output_cache
from surfw.runtime.run import Run, current_run

_GOES_ON = (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer)
"""Cache layers that can take several tokens after earlier ones; recurrent states, for example, take one at a time."""

Ending = Literal["end", "length", "positions", "stopped"]
"""Why an answer ended: by itself, at `max_new_tokens`, at the model's last position, or by `stop`."""


@dataclass(kw_only=True)
class Turn(InferenceResult):
    """The answer of a turn; `prompt_tokens` counts the whole conversation before it.

    Attributes:
        cached_tokens: number of prompt tokens that were already in the KV cache.
        ending: why the answer ended.
    """

    cached_tokens: int = 0
    ending: Ending = "end"


@dataclass(frozen=True, kw_only=True)
class ConversationFacts:
    """The length of a conversation.

    Attributes:
        turns: number of answered messages.
        tokens: number of tokens so far, including the chat template if there is one.
        cached_tokens: how many of these the KV cache holds; 0 if the next turn reads all of them again.
        positions: the model's number of positions; None if there is no bound.
        kv_cache_bytes: memory of the KV cache.
    """

    turns: int
    tokens: int
    cached_tokens: int
    positions: int | None
    kv_cache_bytes: int


class _Stopped(Exception):  # noqa: N818 - nothing went wrong
    """`Conversation.stop` was called."""


class Conversation:
    """A conversation with one open model.

    The tokens of a turn are exactly those of the resident model's `generate()`, given the same `past_key_values` in the
    same turns. A new `generate()` of the whole conversation reads it in one pass, which may round differently, as any
    other way to split a prompt may.

    `ask` is called from one thread at a time; `stop` may be called from any thread during it.
    """

    def __init__(self, model: StreamingModel, **options: Unpack[GenerationOptions]) -> None:
        """Start a conversation without messages.

        Args:
            model: an open model.
            **options: see `StreamingModel.stream`; `raw` skips the chat template.

        Raises:
            ConfigurationError: an option is invalid, or the model has no tokenizer.
            UnsupportedModelError: the model does not generate text, or generates it from an encoder.
        """
        name, made = model.manifest.name, model.model
        if not made.can_generate() or made.config.is_encoder_decoder or made.main_input_name != "input_ids":
            what = "turns one text into another" if made.can_generate() else "does not generate text"
            raise UnsupportedModelError(
                f"{name} ({model.manifest.class_name}) {what}, so there is no conversation with it; use 'surfw infer'"
            )
        tokenizer = model.find_tokenizer()
        if tokenizer is None:
            raise ConfigurationError(
                f"{name} has no tokenizer, so there is no conversation with it; use 'surfw infer --prompt-ids 1,2,3'"
            )
        self.messages: list[dict[str, str]] = []
        self._model = model
        self._name, self._identity = name, model.manifest.identity
        self._tokenizer: PreTrainedTokenizerBase = tokenizer
        self._request = InferenceRequest(prompt="", **options)
        self._tokens = 0
        self._memory = _Memory()
        self._run: Run | None = None
        self._lock = threading.Lock()
        self.system = self._request.system  # the setter checks it

    @property
    def has_template(self) -> bool:
        """Whether messages are put into a chat template."""
        return bool(self._tokenizer.chat_template) and not self._request.raw

    @property
    def system(self) -> str | None:
        """The system message; a new one applies from the next turn on, to the whole conversation.

        Raises:
            ConfigurationError: the model has no chat template.
        """
        return self._request.system

    @system.setter
    def system(self, text: str | None) -> None:
        if text and not self.has_template:
            why = "the conversation is raw" if self._tokenizer.chat_template else "the model has no chat template"
            raise ConfigurationError(f"{self._model.manifest.name} takes no system message: {why}")
        self._request = replace(self._request, system=text or None)

    def reset(self) -> None:
        """Drop all messages and free the KV cache; the system message stays."""
        with self._lock:
            self.messages.clear()
            self._tokens = 0
            self._memory = _Memory()

    def stop(self) -> None:
        """Stop an answer in progress at the next layer, without waiting for it to end."""
        if (run := self._run) is not None:
            run.interrupt(_Stopped())

    def facts(self) -> ConversationFacts:
        """The length of the conversation."""
        return ConversationFacts(
            turns=sum(message["role"] == "user" for message in self.messages),
            tokens=self._tokens,
            cached_tokens=len(self._memory.token_ids),
            positions=self._positions,
            kv_cache_bytes=cache_bytes(self._memory.cache),
        )

    def ask(
        self,
        text: str,
        *,
        on_text: Callable[[str], None] = lambda _: None,
        on_token: Callable[[int, float], None] = lambda _token, _seconds: None,
    ) -> Turn:
        """Send a message and wait for the answer; the text of a stopped answer is part of the conversation.

        An incomplete character at the end of an answer is left out of its message.

        After an error, or if the answer was stopped before its first text, the conversation is unchanged.

        Args:
            text: the message.
            on_text: called with each new piece of the answer.
            on_token: called with each new token id and the seconds since the start.

        Raises:
            ConfigurationError: the conversation exceeds the model's positions or the memory budget, its chat template
                refuses it, or the model was replaced by another (`switch`).
            SurfwError: weights could not be read.
        """
        if (now := self._model.manifest).identity != self._identity:
            raise ConfigurationError(
                f"this conversation is with {self._name}, and {now.name} has taken its place; begin another one"
            )
        with self._lock:
            self._run = run = current_run.get() or Run()
            outer = current_run.set(run)
            try:
                return self._answer(text, run, on_text=on_text, on_token=on_token)
            finally:
                current_run.reset(outer)
                self._run = None

    def _answer(
        self, text: str, run: Run, *, on_text: Callable[[str], None], on_token: Callable[[int, float], None]
    ) -> Turn:
        times: list[float] = []
        produced: list[int] = []

        def note(token: int, seconds: float) -> None:
            produced.append(token)
            times.append(seconds)
            on_token(token, seconds)

        prompt_ids: list[int] = []
        cached_tokens = 0
        try:
            request, inputs = self._encode(text)
            prompt_ids = inputs["input_ids"][0].tolist()
            self._memory.read_with(self._model.adapter)
            cached_tokens = self._memory.keep_beginning_of(prompt_ids)
            with self._memory.watching(self._model.model, prompt_ids, produced):
                result = answer(
                    self._model, self._tokenizer, request,
                    inputs=inputs, past=self._memory.past(self._model.model), on_text=on_text, on_token=note,
                )  # fmt: skip
        except Exception:
            if not _is_stopped(run):
                raise
            turn = Turn(
                text=str(self._tokenizer.decode(produced, skip_special_tokens=True)).rstrip(INCOMPLETE),
                token_ids=produced,
                prompt_tokens=len(prompt_ids),
                ttft_seconds=times[0] if times else None,
                tpot_seconds=(times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None,
                tokens_per_second=len(times) / times[-1] if times else None,
                cached_tokens=cached_tokens,
                ending="stopped",
            )
        else:
            turn = Turn(**vars(result), cached_tokens=cached_tokens, ending=self._why_ended(result, request))
        if turn.ending != "stopped" or turn.text:
            content = self._content(turn, prompt_ids)
            self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": content}]
            self._tokens = turn.prompt_tokens + len(turn.token_ids)
        return turn

    def _why_ended(self, result: InferenceResult, request: InferenceRequest) -> Ending:
        """Why an answer ended that was not stopped."""
        if len(result.token_ids) < request.max_new_tokens or result.token_ids[-1] in self._ends:
            return "end"
        return "length" if request.max_new_tokens == self._request.max_new_tokens else "positions"

    def _content(self, turn: Turn, prompt_ids: Sequence[int]) -> str:
        """The message of an answer: no incomplete character; without a template, with the space the tokenizer drops."""
        text = turn.text.rstrip(INCOMPLETE)
        if self.has_template or not text:
            return text
        return space_before(self._tokenizer, prompt_ids, turn.token_ids[0]) + text

    def _encode(self, text: str) -> tuple[InferenceRequest, dict[str, torch.Tensor]]:
        """Encode the whole conversation; return the turn's request and the model's inputs.

        Raises:
            ConfigurationError: the conversation has more tokens than the model has positions.
        """
        if self.has_template:
            request = replace(self._request, prompt=text, history=self.messages)
        else:
            request = replace(self._request, prompt=_as_text([*self.messages, {"role": "user", "content": text}]))
        inputs = encode_prompt(self._model, self._tokenizer, request)
        if self._positions is None:
            return request, inputs
        tokens = inputs["input_ids"].shape[1]
        if tokens >= self._positions:
            raise ConfigurationError(
                f"the conversation has {tokens} tokens with this message, and {self._model.manifest.name} has "
                f"positions for {self._positions}; begin a new one, or say less"
            )
        return replace(request, max_new_tokens=min(request.max_new_tokens, self._positions - tokens)), inputs

    @property
    def _positions(self) -> int | None:
        return most_positions(self._model.model.config.get_text_config(decoder=True))

    @property
    def _ends(self) -> Sequence[int | None]:
        """The tokens that end an answer."""
        ends = None if self._request.ignore_eos else getattr(self._model.model.generation_config, "eos_token_id", None)
        return ends if isinstance(ends, list) else [ends]


class _Memory:
    """The part of a conversation that the model has read.

    Attributes:
        cache: transformers' KV cache; None if no cache can be continued.
        token_ids: the tokens in the cache.
    """

    def __init__(self) -> None:
        self.cache: Any = None
        self.token_ids: list[int] = []
        self._adapter: str | None = None

    def read_with(self, adapter: str | None) -> None:
        """Drop a cache that was computed with another adapter."""
        if adapter != self._adapter:
            self._crop(0)
        self._adapter = adapter

    def keep_beginning_of(self, ids: Sequence[int]) -> int:
        """Crop the cache to the common prefix with `ids`, except the last id, which must be read; return its size."""
        self._crop(min(_count_equal(self.token_ids, ids), len(ids) - 1))
        return len(self.token_ids)

    def past(self, model: torch.nn.Module) -> dict[str, Any]:
        """Return the cache under the forward's argument name for it; an empty dict if no cache is kept."""
        return {} if self.cache is None else {cache_name(model): self.cache}

    @contextmanager
    def watching(self, model: torch.nn.Module, prompt_ids: Sequence[int], new_ids: Sequence[int]) -> Iterator[None]:
        """Capture the cache from the model's forwards; when they end, even by an error, record which tokens it holds.

        Args:
            model: the transformers model.
            prompt_ids: the prompt.
            new_ids: the generated tokens, complete when the body ends.
        """

        def note(_module: torch.nn.Module, _args: Any, output: object) -> None:
            self.cache = output_cache(output)

        hook = model.register_forward_hook(note)
        try:
            yield
        finally:
            hook.remove()
            self._settle([*prompt_ids, *new_ids])

    def _settle(self, ids: Sequence[int]) -> None:
        """Record what the cache holds after forwards of these ids; the last forward may have been interrupted."""
        lengths = _lengths(self.cache)
        self.token_ids = list(ids)
        self._crop(min(lengths, default=0) if max(lengths, default=0) <= len(ids) else 0)

    def _crop(self, count: int) -> None:
        """Crop the cache to `count` tokens; if that is impossible, drop it."""
        try:
            for layer in self.cache.layers if count else ():
                if not isinstance(layer, DummyLayer) and (more := layer.get_seq_length() - count) > 0:
                    layer.crop(-more)
        except RuntimeError:  # a sliding window has moved on
            count = 0
        if not count:
            self.cache = None
        self.token_ids = self.token_ids[:count]


def _is_stopped(run: Run) -> bool:
    try:
        run.check()
    except _Stopped:
        return True
    except Exception:  # noqa: BLE001 - the run was ended by something else
        return False
    return False


def _lengths(cache: Any) -> list[int]:
    """The number of tokens in each layer of a cache; empty if the cache cannot be continued with several tokens."""
    if type(cache) is not DynamicCache or any(type(layer) not in _GOES_ON for layer in cache.layers):
        return []
    layers: list[Any] = cache.layers
    return [layer.get_seq_length() for layer in layers if not isinstance(layer, DummyLayer)]


def _count_equal(one: Sequence[int], other: Sequence[int]) -> int:
    """The length of the common prefix of two sequences."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (left, right) in pairs if left != right), min(len(one), len(other)))


def _as_text(messages: Sequence[dict[str, str]]) -> str:
    """Render a conversation without a template: user messages begin on a new line, and answers continue them."""
    text = ""
    for message in messages:
        text += "\n" * (message["role"] == "user" and bool(text)) + message["content"]
    return text
