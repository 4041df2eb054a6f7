"""A conversation with a model: its messages, and the KV cache that holds what the model has read of them.

The prompt of a turn is the whole conversation, as the chat template renders it; without a template it is one text, in
which what the person says begins on a new line, and each answer goes on with it. `generate()` is given that prompt and
the cache of the turns before, and goes on where the cache ends. The cache holds exactly the tokens that `_Memory` says,
and these begin the prompt: where a template rewrites the past, or the tokenizer joins what stood on both sides of a
border, it is cropped to the tokens that both have, and where it cannot be cropped, a new one is made.
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
"""Layers of caches that take several tokens after others. Recurrent states, for one, take one at a time."""

Ending = Literal["end", "length", "positions", "stopped"]
"""Why an answer ended: by itself, at the most tokens it may have, at the model's last position, or because somebody
stopped it."""


@dataclass(kw_only=True)
class Turn(InferenceResult):
    """The answer of a turn; `prompt_tokens` are those of the whole conversation before it.

    Attributes:
        cached_tokens: of the prompt, how many the KV cache held already.
        ending: why it ended.
    """

    cached_tokens: int = 0
    ending: Ending = "end"


@dataclass(frozen=True, kw_only=True)
class ConversationFacts:
    """How long a conversation is.

    Attributes:
        turns: messages that were answered.
        tokens: of all that was said, in the chat template where there is one.
        cached_tokens: of those, what the KV cache holds; 0 where the next turn reads all of them again.
        positions: tokens that the model has positions for; None if there is no bound.
        kv_cache_bytes: memory that the KV cache takes.
    """

    turns: int
    tokens: int
    cached_tokens: int
    positions: int | None
    kv_cache_bytes: int


class _Stopped(Exception):  # noqa: N818 - nothing went wrong
    """Somebody stopped the answer."""


class Conversation:
    """A conversation with one open model.

    The tokens of a turn are those that `generate()` gives with the resident model, when it is given the same
    `past_key_values` in the same turns: bit for bit. A new `generate()` of the whole conversation reads it in one go,
    which may round otherwise, as any other way to cut up a prompt may.

    `ask` is called from one thread at a time; `stop` may be called from any other meanwhile.
    """

    def __init__(self, model: StreamingModel, **options: Unpack[GenerationOptions]) -> None:
        """Begin without messages.

        Args:
            model: an open model.
            **options: as of `StreamingModel.stream`; `raw` goes on without the chat template.

        Raises:
            ConfigurationError: an option cannot be used, or the model has no tokenizer.
            UnsupportedModelError: the model holds no conversation.
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
        self.system = self._request.system  # which is checked

    @property
    def has_template(self) -> bool:
        """Whether messages are put into a chat template."""
        return bool(self._tokenizer.chat_template) and not self._request.raw

    @property
    def system(self) -> str | None:
        """The system message; a new one counts from the next turn on, for the whole conversation.

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
        """Forget all messages, and give the memory of the KV cache back. The system message stays."""
        with self._lock:
            self.messages.clear()
            self._tokens = 0
            self._memory = _Memory()

    def stop(self) -> None:
        """Stop the answer that is being given, if there is one: at the next layer, and without waiting for it."""
        if (run := self._run) is not None:
            run.interrupt(_Stopped())

    def facts(self) -> ConversationFacts:
        """How long it is."""
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
        """Say something, and wait for the answer. What was said of a stopped one is part of the conversation.

        A character of which an answer has only the beginning is left out of its message.

        After an error, and after an answer that was stopped before its first token, the conversation is as it was.

        Args:
            text: what to say.
            on_text: called with the answer as it comes.
            on_token: called with each new token id, and the seconds since the start.

        Raises:
            ConfigurationError: the conversation is longer than the model's positions or its memory allow, or its chat
                template refuses it; or another model has taken the place of the one that it is with (`switch`).
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
        """Why an answer ended that nobody stopped."""
        if len(result.token_ids) < request.max_new_tokens or result.token_ids[-1] in self._ends:
            return "end"
        return "length" if request.max_new_tokens == self._request.max_new_tokens else "positions"

    def _content(self, turn: Turn, prompt_ids: Sequence[int]) -> str:
        """The message of an answer: no half of a character, and in one text with the prompt the space between them."""
        text = turn.text.rstrip(INCOMPLETE)
        if self.has_template or not text:
            return text
        return space_before(self._tokenizer, prompt_ids, turn.token_ids[0]) + text

    def _encode(self, text: str) -> tuple[InferenceRequest, dict[str, torch.Tensor]]:
        """The turn's request, and the model's inputs: the whole conversation.

        Raises:
            ConfigurationError: it has more tokens than the model has positions.
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
    """What a model has read of a conversation.

    Attributes:
        cache: transformers' KV cache; None if there is none that could go on.
        token_ids: the tokens that the cache holds.
    """

    def __init__(self) -> None:
        """Nothing is read yet."""
        self.cache: Any = None
        self.token_ids: list[int] = []
        self._adapter: str | None = None

    def read_with(self, adapter: str | None) -> None:
        """Forget what was read with another adapter than this one: it would have been read otherwise."""
        if adapter != self._adapter:
            self._crop(0)
        self._adapter = adapter

    def keep_beginning_of(self, ids: Sequence[int]) -> int:
        """Keep what begins these ids, and of them all but the last, which the model has to read; returns how many."""
        self._crop(min(_count_equal(self.token_ids, ids), len(ids) - 1))
        return len(self.token_ids)

    def past(self, model: torch.nn.Module) -> dict[str, Any]:
        """Return the cache by the name that the model's forward has for it; nothing, if there is none."""
        return {} if self.cache is None else {cache_name(model): self.cache}

    @contextmanager
    def watching(self, model: torch.nn.Module, prompt_ids: Sequence[int], new_ids: Sequence[int]) -> Iterator[None]:
        """Take the cache out of the model's forwards; when they have ended, however they did, note what it holds.

        Args:
            model: transformers' model.
            prompt_ids: what it is given.
            new_ids: what it has generated, when the forwards have ended.
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
        """Note what the cache holds after forwards of these ids, the last of which may not have come to its end."""
        lengths = _lengths(self.cache)
        self.token_ids = list(ids)
        self._crop(min(lengths, default=0) if max(lengths, default=0) <= len(ids) else 0)

    def _crop(self, count: int) -> None:
        """Keep so many tokens of the cache; if that is not possible, none."""
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
    except Exception:  # noqa: BLE001 - what else ends the run is not ours
        return False
    return False


def _lengths(cache: Any) -> list[int]:
    """How many tokens each layer of a cache has taken; none for a cache that cannot go on with several at once."""
    if type(cache) is not DynamicCache or any(type(layer) not in _GOES_ON for layer in cache.layers):
        return []
    layers: list[Any] = cache.layers
    return [layer.get_seq_length() for layer in layers if not isinstance(layer, DummyLayer)]


def _count_equal(one: Sequence[int], other: Sequence[int]) -> int:
    """How many elements two sequences have in common, from the first on."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (left, right) in pairs if left != right), min(len(one), len(other)))


def _as_text(messages: Sequence[dict[str, str]]) -> str:
    """A conversation without a template: each answer goes on with its message, which begins on a new line."""
    text = ""
    for message in messages:
        text += "\n" * (message["role"] == "user" and bool(text)) + message["content"]
    return text
