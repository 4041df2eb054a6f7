"""Many prompts through a streaming model: each pass over the layers computes a token of every sequence.

Scheduling, prompt chunking and the paged KV cache are transformers' continuous batching
(`transformers.generation.continuous_batching`): a finished sequence makes place for the next prompt at once, and no
sequence is padded. An answer is therefore what the resident model gives under the same scheduler, with the same prompts
in the same order and the same limits on sequences, cache size and tokens per pass.
"""

import threading
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import lcm
from typing import Any, Self, TypeAlias, cast

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedTokenizerBase

from surfw.config import MIB, format_size
from surfw.errors import ConfigurationError, UnsupportedModelError
from surfw.models.assembly import ModelParts
from surfw.models.base import StreamingBaseModel
from surfw.models.inference import InferenceRequest, InferenceResult, encode_prompt, generation_config
from surfw.models.stopping import StopTexts, find_stops
from surfw.models.text_stream import TextStream, cut_at_stop
from surfw.runtime.kv_cache import kv_cost
from surfw.runtime.memory import find_default_budget

PAGE_TOKENS = 32
"""Tokens in a page of the KV cache."""

MOST_SEQUENCES = 64
"""Default limit of sequences that run together; with more, computing takes longer than reading weights."""

MOST_TOKENS = 512
"""Most tokens in a pass: one for each generating sequence, the rest for prompts."""

_LEAST_TOKENS = 32
"""The token limit of a pass is never lower than this, however little memory there is."""

_MASK_SHARE = 8
"""The attention mask takes at most 1/8 of a batch's memory; a pass has fewer tokens to stay below."""

_BESIDE_BYTES = 40 * MIB
"""Reserved in addition for compiled kernels, activations and allocator fragmentation.

Kernels are compiled for each number of tokens in a pass: 1,000 prompts kept 36 MB of kernels and fragmented free
blocks. In a small budget this is at most two thirds of the batch's memory, or one third while weights stream, where
fewer sequences mean that each weight is read more often. It is less if one sequence would not fit otherwise.
"""

SHARED = ("temperature", "top_p", "top_k", "seed")
"""Settings that all prompts of a run share, because their tokens are sampled together."""

_LEAST_CACHE_BYTES = 64 * MIB
"""Least memory that a batch may take if no budget is given, however little is free."""

_NO_TOKEN = -1
"""An end token id that no token has, for transformers' scheduler."""

_PATIENCE_SECONDS = 0.1
"""How long to wait for a prompt before checking whether the run is to end."""


OnTokens: TypeAlias = Callable[[int, list[int]], bool | None]
"""Called with a prompt's index and its new tokens; returns False to end that answer."""


@dataclass(frozen=True, kw_only=True)
class ManyResult:
    """The answer to one of many prompts, or an error.

    Attributes:
        index: index of the prompt, counted from 0 in input order.
        result: the answer; None if there is an error.
        error: why this prompt was not answered; other prompts are not affected.
    """

    index: int
    result: InferenceResult | None = None
    error: str | None = None


class Feed:
    """A bounded queue of prompts for a run; other threads fill it, the run's thread takes."""

    def __init__(self, most: int = 2 * MOST_SEQUENCES, on_room: Callable[[], None] = lambda: None) -> None:
        """Hold at most `most` prompts; `on_room` is called in the run's thread whenever prompts were taken."""
        self._most = most
        self._on_room = on_room
        self._waiting: deque[tuple[int, InferenceRequest]] = deque()
        self._changed = threading.Condition()
        self._is_closed = False

    def offer(self, index: int, request: InferenceRequest) -> bool:
        """Add a prompt; False if the queue is full."""
        with self._changed:
            if len(self._waiting) >= self._most:
                return False
            self._waiting.append((index, request))
            self._changed.notify_all()
            return True

    def put(self, index: int, request: InferenceRequest) -> bool:
        """Add a prompt, waiting while the queue is full; False if the feed was closed."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._waiting) < self._most or self._is_closed)
            return not self._is_closed and self.offer(index, request)

    def close(self) -> None:
        """Accept no more prompts; those in the queue are still taken."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    @property
    def has_ended(self) -> bool:
        """Whether the feed is closed and empty."""
        with self._changed:
            return self._is_closed and not self._waiting

    def take(self, most: int, *, wait_seconds: float) -> list[tuple[int, InferenceRequest]]:
        """Take up to `most` prompts; if none is waiting, wait `wait_seconds` for one."""
        with self._changed:
            if not self._waiting:
                self._changed.wait_for(lambda: self._waiting or self._is_closed, wait_seconds)
            taken = [self._waiting.popleft() for _ in range(min(most, len(self._waiting)))]
            self._changed.notify_all()
        if taken:
            self._on_room()
        return taken


@contextmanager
def feeding(feed: Feed, requests: Iterable[InferenceRequest]) -> Iterator[None]:
    """Fill a feed from a separate thread, so that reading prompts blocks nothing; re-raise what reading raises."""
    failure: list[BaseException] = []

    def fill() -> None:
        try:
            for index, request in enumerate(requests):
                if not feed.put(index, request):
                    return
        except BaseException as exc:  # noqa: BLE001 - it is raised below
            failure.append(exc)
        finally:
            feed.close()

    threading.Thread(target=fill, name="surfw-prompts", daemon=True).start()  # a pipe may block it forever
    try:
        yield
    finally:
        feed.close()
    if failure:
        raise failure[0]


@dataclass
class _Sequence:
    """A prompt that is being answered."""

    index: int
    request: InferenceRequest
    ids: list[int]
    stops: Sequence[str] = ()
    stopping: tuple[TextStream, StopTexts] | None = None
    told: int = 0  # how many of its tokens were reported

    @property
    def most_tokens(self) -> int:
        """The most tokens of prompt and answer together."""
        return len(self.ids) + self.request.max_new_tokens


def answer_many(
    model: StreamingBaseModel,
    parts: ModelParts,
    tokenizer: PreTrainedTokenizerBase | None,
    feed: Feed,
    *,
    shared: InferenceRequest,
    on_result: Callable[[ManyResult], None],
    on_tokens: OnTokens | None = None,
    most_sequences: int = MOST_SEQUENCES,
) -> None:
    """Answer prompts until their feed ends; this is one run of the model.

    Args:
        model: an open model that generates, without an encoder.
        parts: the parts of the model.
        tokenizer: the model's tokenizer; if None, requests must have `prompt_ids`.
        feed: the prompts; a request may differ from `shared` in all but the `SHARED` settings.
        shared: the sampling settings for all prompts; its prompt is ignored.
        on_result: called with each answer once it is complete.
        on_tokens: called with a prompt's index and its new tokens after every pass that produced some; returns False
            to end that answer.
        most_sequences: how many sequences run together, if the memory budget allows for their KV cache.

    Raises:
        UnsupportedModelError: the model cannot be batched continuously.
        SurfwError: weights could not be read.
    """
    expect_many(model)
    answering = _Answering(model, tokenizer, feed, shared, on_result=on_result, on_tokens=on_tokens)

    def run(_: Any) -> None:
        model.expect_open(parts.model)
        waiting: deque[_Sequence] = deque()
        while True:
            parts.engine.check()
            missing = most_sequences - len(waiting)
            waiting += answering.encode(feed.take(missing, wait_seconds=0 if waiting else _PATIENCE_SECONDS))
            if not waiting:
                if feed.has_ended:
                    return
                continue
            longest = max(waiting, key=lambda one: one.most_tokens)
            try:
                room = find_room(model, parts, most_sequences, longest.most_tokens)
            except ConfigurationError as exc:
                waiting.remove(longest)
                on_result(ManyResult(index=longest.index, error=str(exc)))
                continue
            try:
                with _Batch(model, shared, room) as batch:
                    answering.run(batch, waiting, parts.engine.check)
            finally:
                parts.kv.reserve_bytes(0)

    model.run(run)


def expect_many(model: StreamingBaseModel) -> None:
    """Check that a model can answer many prompts together.

    Raises:
        UnsupportedModelError: it cannot.
    """
    inner, name = model.model, model.manifest.name
    config = inner.config.get_text_config(decoder=True)
    if not inner.can_generate() or inner.config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{name} ({model.manifest.class_name}) is no model that only decodes; give it one prompt at a time"
        )
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if other := sorted(kinds - {"full_attention", "sliding_attention"}):
        raise UnsupportedModelError(
            f"{name} has layers of {other[0]}, which transformers does not batch continuously; give it one prompt at a "
            "time"
        )


@dataclass(frozen=True)
class _Room:
    """The size of a batch within the memory budget.

    Attributes:
        sequences: how many sequences run together.
        pages: KV cache pages of `PAGE_TOKENS` tokens each, for all sequences.
        tokens: the most tokens in a pass, including one for each sequence.
        most_tokens: the most tokens of a prompt and its answer together.
    """

    sequences: int
    pages: int
    tokens: int
    most_tokens: int


@dataclass(frozen=True)
class _Cost:
    """Memory that a batch takes in addition to weights, as a function of cache pages and tokens per pass.

    This follows transformers' layout. All sequences share one mask per kind of attention. A mask has a row for each
    token of the pass, and a column for each token that the cache can hold for that kind and for each token of the pass.

    Attributes:
        page_bytes: size of a page in all layers, plus the copy that attention makes of it in one layer, for every head.
        spare_pages: pages that the cache has in addition to the number requested.
        open_pages: pages that a sequence may have started but not filled.
        row_page_bytes: what a page adds to the mask rows of one token, in all masks.
        row_token_bytes: what a token of the pass adds to these rows.
    """

    page_bytes: int
    spare_pages: int
    open_pages: int
    row_page_bytes: int
    row_token_bytes: int

    def of_mask(self, pages: int, tokens: int) -> int:
        """Bytes of the masks."""
        return tokens * (pages * self.row_page_bytes + tokens * self.row_token_bytes)

    def of_all(self, pages: int, tokens: int) -> int:
        """Bytes of cache and masks."""
        pages += self.spare_pages
        return pages * self.page_bytes + self.of_mask(pages, tokens)

    def find_pages(self, free_bytes: int, tokens: int) -> int:
        """How many pages fit into `free_bytes`, with the masks for `tokens` per pass."""
        return (free_bytes - self.of_all(0, tokens)) // (self.page_bytes + tokens * self.row_page_bytes)


def find_room(model: StreamingBaseModel, parts: ModelParts, sequences: int, longest_tokens: int) -> _Room:
    """Size a batch and reserve its memory: what it needs, up to half of the budget above the model's least budget.

    It may take more than that half if the weights leave more free.

    Raises:
        ConfigurationError: not even one sequence fits.
    """
    parts.kv.reserve_bytes(0)
    engine, cost = parts.engine, _find_cost(model)
    each = -(-longest_tokens // PAGE_TOKENS) + cost.open_pages
    if (budget := engine.limit.budget_bytes) is None:  # `cache_size` limits layers: use what the machine has left
        free, beside = max(find_default_budget().budget_bytes, _LEAST_CACHE_BYTES), 0  # which excludes headroom already
    else:
        half, left = (budget - engine.least_budget_bytes) // 2, budget - engine.plan.peak_bytes
        free = max(half, left)
        most = free * 2 // 3 if left >= half else free // 3
        beside = max(0, min(_BESIDE_BYTES, most, free - cost.of_all(each, _LEAST_TOKENS)))
    tokens = MOST_TOKENS
    while True:
        room = min(min(sequences, tokens) * each, cost.find_pages(free - beside, tokens))
        is_small = cost.of_mask(room, tokens) <= free // _MASK_SHARE
        if tokens == _LEAST_TOKENS or (room >= each and (is_small or room // each > tokens // 2)):
            break
        tokens //= 2
    if room < each:
        least = cost.of_all(each, tokens)
        if budget is None:
            raise ConfigurationError(
                f"there is no room for the KV cache of a prompt and its answer of {longest_tokens} tokens, which takes "
                f"{format_size(least)}, and {format_size(free)} are free; ask for fewer tokens (max_new_tokens)"
            )
        needed = engine.least_budget_bytes + 2 * least
        raise ConfigurationError(
            f"{model.manifest.name} has no room for the KV cache of a prompt and its answer of {longest_tokens} "
            f"tokens within a memory budget of {format_size(budget)}; give {format_size(needed)} ({needed} bytes), or "
            "ask for fewer tokens (max_new_tokens)"
        )
    parts.kv.reserve_bytes(cost.of_all(room, tokens) + beside)
    return _Room(room // each, room, tokens, (room - cost.open_pages) * PAGE_TOKENS)


def _find_cost(model: StreamingBaseModel) -> _Cost:
    """Memory costs in `PagedAttentionCache`, where pages come in sectors, each usable by any kind of layer."""
    inner: Any = model.model
    dtype: torch.dtype = inner.dtype
    text = inner.config.get_text_config(decoder=True)
    kept = kv_cost(inner.config, dtype).new_token_bytes
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    copied = 3 * text.num_attention_heads * head * dtype.itemsize + 8
    kinds = Counter(getattr(text, "layer_types", None) or ["full_attention"]).values()
    layers, sector = sum(kinds), lcm(*kinds)  # in pages of a layer
    return _Cost(
        page_bytes=int(PAGE_TOKENS * (kept + copied)),
        spare_pages=2 if len(kinds) == 1 else -(-3 * sector // layers),  # two sectors and part of another
        open_pages=1 if len(kinds) == 1 else 1 - (-len(kinds) * sector // layers),  # a page, and a sector of each kind
        row_page_bytes=len(kinds) * dtype.itemsize * PAGE_TOKENS * layers // min(kinds),
        row_token_bytes=len(kinds) * dtype.itemsize,
    )


class _Batch:
    """Sequences that run together under transformers' scheduler; a context manager that restores the model."""

    def __init__(self, model: StreamingBaseModel, shared: InferenceRequest, room: _Room) -> None:
        """Set up the scheduler and the cache."""
        self.room = room
        self._inner = inner = cast("Any", model.model)
        self._running: dict[str, _Sequence] = {}
        config = generation_config(self._inner.generation_config, shared)
        _expect_processors(model, config)
        if config.eos_token_id is None:
            config.eos_token_id = _NO_TOKEN
        self._ends = config.eos_token_id
        self._attention = self._inner.config._attn_implementation  # noqa: SLF001 - there is no public name for it
        manager: Any = inner.init_continuous_batching(
            generation_config=config,
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=PAGE_TOKENS,
                num_blocks=room.pages,
                max_batch_tokens=room.tokens,
                max_requests_per_batch=room.sequences,
                auto_switch_to_flash=False,
                seed=shared.seed,
            ),
        )
        self._manager = manager
        try:
            self._processor = manager._create_batch_processor()  # noqa: SLF001 - start() uses another thread
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Self:
        """Return the batch."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Free the cache and restore the model's attention implementation."""
        self._processor = self._manager.batch_processor = None
        if self._inner.config._attn_implementation != self._attention:  # noqa: SLF001
            self._inner.set_attn_implementation(self._attention)

    def has_room(self) -> bool:
        """Whether one more sequence may run."""
        return len(self._running) < self.room.sequences

    def add(self, sequence: _Sequence, *, tells: bool) -> None:
        """Start a sequence; with `tells` or stop texts, its tokens are reported as they come."""
        request = sequence.request
        key = str(sequence.index)
        self._running[key] = sequence
        self._manager.add_request(
            sequence.ids,
            request_id=key,
            max_new_tokens=request.max_new_tokens,
            streaming=tells or bool(sequence.stops),
            eos_token_id=_NO_TOKEN if request.ignore_eos else self._ends,
        )

    def step(self) -> Iterator[tuple[_Sequence, list[int], bool]]:
        """Run one pass over the layers; yield each sequence with output, all of its tokens so far, and if it ended."""
        if not self._processor.prepare_next_batch():
            raise RuntimeError("transformers' scheduler found nothing to run among sequences that have not ended")
        self._processor._generation_step(self._inner)  # noqa: SLF001 - see above
        self._processor.update_batch()
        outputs = self._manager.output_router.output_queue
        while not outputs.empty():
            output = outputs.get_nowait()
            if (sequence := self._running.get(output.request_id)) is None:
                continue  # stopped by `stop`
            if output.error is not None:
                raise RuntimeError(f"transformers' scheduler gave a sequence up: {output.error}")
            if ended := output.is_finished():
                del self._running[output.request_id]
            yield sequence, output.generated_tokens, ended

    def stop(self, sequence: _Sequence) -> None:
        """Cancel a sequence, if it still runs."""
        if self._running.pop(str(sequence.index), None) is not None:
            self._manager.cancel_request(str(sequence.index))


def _expect_processors(model: StreamingBaseModel, config: GenerationConfig) -> None:
    """Check that continuous batching can apply every logits processor that the model's generation settings need."""
    inner: Any = model.model
    with warnings.catch_warnings(action="ignore"):  # warnings about the prompts it normally gets
        processors = inner._get_logits_processor(config)  # noqa: SLF001 - there is no public way to ask
    for processor in processors:
        if not getattr(processor, "supports_continuous_batching", False):
            raise UnsupportedModelError(
                f"{model.manifest.name} has generation settings that need a {type(processor).__name__}, which "
                "transformers cannot apply to many sequences of a continuous batch; give it one prompt at a time"
            )


class _Answering:
    """A run of many prompts."""

    def __init__(
        self,
        model: StreamingBaseModel,
        tokenizer: PreTrainedTokenizerBase | None,
        feed: Feed,
        shared: InferenceRequest,
        *,
        on_result: Callable[[ManyResult], None],
        on_tokens: OnTokens | None,
    ) -> None:
        self._model, self._tokenizer, self._feed, self._shared = model, tokenizer, feed, shared
        self._on_result, self._on_tokens = on_result, on_tokens

    def encode(self, taken: list[tuple[int, InferenceRequest]]) -> list[_Sequence]:
        """Encode prompts to token ids; report an error as the result of a prompt that cannot be encoded."""
        sequences = []
        for index, request in taken:
            if wrong := self._mistake(request):
                self._on_result(ManyResult(index=index, error=wrong))
                continue
            try:
                ids = encode_prompt(self._model, self._tokenizer, request)["input_ids"][0].tolist()
                stops = self._stops(request)
            except ConfigurationError as exc:
                self._on_result(ManyResult(index=index, error=str(exc)))
                continue
            if not ids:
                self._on_result(ManyResult(index=index, error="the prompt has no tokens"))
                continue
            sequence = _Sequence(index, request, ids, stops)
            if self._tokenizer is not None and stops:
                text = TextStream(self._tokenizer, lambda _: None, stops)
                sequence.stopping = (text, StopTexts(self._tokenizer, stops, text))
            sequences.append(sequence)
        return sequences

    def _mistake(self, request: InferenceRequest) -> str | None:
        """Why a request cannot run with the others; None if it can."""
        for name in SHARED:
            if getattr(request, name) != getattr(self._shared, name):
                return f"{name} is {getattr(request, name)}, but it is the same for all prompts of a run"
        return None

    def _stops(self, request: InferenceRequest) -> list[str]:
        """The stop texts of a request, as for a single prompt."""
        own = cast("Any", self._model.model).generation_config
        name = self._model.manifest.name
        return find_stops(own, request.stop, self._tokenizer, name, ignore_own=request.ignore_eos)

    def run(self, batch: _Batch, waiting: deque[_Sequence], check: Callable[[], None]) -> None:
        """Answer waiting and new prompts until the feed ends or the next prompt needs a larger cache.

        Args:
            batch: runs the sequences.
            waiting: sequences to run first; a sequence that does not fit stays here.
            check: raises if the run is to end.
        """
        running = 0
        while True:
            while batch.has_room():
                if not waiting:
                    waiting += self.encode(self._feed.take(1, wait_seconds=0 if running else _PATIENCE_SECONDS))
                if not waiting or waiting[0].most_tokens > batch.room.most_tokens:
                    break
                batch.add(waiting.popleft(), tells=self._on_tokens is not None)
                running += 1
            if running:
                for sequence, tokens, ended in batch.step():
                    running -= self._tell(batch, sequence, tokens, ended=ended)
            elif waiting or self._feed.has_ended:
                return
            else:
                check()

    def _tell(self, batch: _Batch, sequence: _Sequence, tokens: list[int], *, ended: bool) -> bool:
        """Report new tokens, and the result if the sequence has ended; return whether it has."""
        end = _find_end(sequence, tokens)
        tokens, is_over = tokens[:end], ended or end is not None
        new, sequence.told = tokens[sequence.told :], len(tokens)
        if self._on_tokens is not None and new:
            is_over |= self._on_tokens(sequence.index, new) is False
        if not is_over:
            return False
        text = str(self._tokenizer.decode(tokens, skip_special_tokens=True)) if self._tokenizer is not None else ""
        batch.stop(sequence)
        result = InferenceResult(
            text=cut_at_stop(text, sequence.stops), token_ids=list(tokens), prompt_tokens=len(sequence.ids)
        )
        self._on_result(ManyResult(index=sequence.index, result=result))
        return True


def _find_end(sequence: _Sequence, tokens: list[int]) -> int | None:
    """The length of a sequence up to the token that completes a stop text; None if no new token completes one."""
    if sequence.stopping is None:
        return None
    shown, stops = sequence.stopping
    for count in range(sequence.told + 1, len(tokens) + 1):
        shown.put(tokens[count - 1])
        if stops.is_over([*sequence.ids, *tokens[:count]]):
            return count
    return None
