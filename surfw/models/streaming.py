"""`StreamingModel`: any transformers model over a source of weights, with its tokenizer and streams of text or tokens.

The four family classes are the same, but take the model's name first and have a default server address.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self, TypeAlias, Unpack, overload
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

from surfw.config import DEFAULT_PORT
from surfw.errors import ConfigurationError, SurfwError, UnsupportedModelError
from surfw.manifest import ModelFile
from surfw.models.assembly import ModelParts
from surfw.models.base import StreamingBaseModel
from surfw.models.client import Source
from surfw.models.heads import generates
from surfw.models.inference import GenerationOptions, InferenceRequest, answer
from surfw.models.many import MOST_SEQUENCES, Feed, ManyResult, OnTokens, answer_many, feeding
from surfw.models.many_encoded import encode_many
from surfw.models.options import ModelOptions, OpenOptions, expect_number
from surfw.models.session import Line, Session
from surfw.models.tokenizer import open_tokenizer
from surfw.runtime.run import Run, current_run
from surfw.threads import refuse_event_loop

_AHEAD = 16
"""How many pieces of output a generation may be ahead of its reader."""

DEFAULT_URI = f"ws://localhost:{DEFAULT_PORT}"
DEFAULT_CACHE_SIZE = 5

Prompt: TypeAlias = str | Sequence[int] | InferenceRequest
"""A text, token ids, or either with its own settings."""

_OPTIONS = set(GenerationOptions.__annotations__)


@dataclass(frozen=True)
class _KnownTokenizer:
    """The tokenizer that was read or the error, the parts of the model it was read for, and its files."""

    parts: ModelParts
    tokenizer: PreTrainedTokenizerBase | SurfwError | None
    files: tuple[ModelFile, ...]


class StreamingModel(StreamingBaseModel):
    """Any transformers model over a source of weights; see `StreamingBaseModel` for opening and running it."""

    _known_tokenizer: _KnownTokenizer | None = None
    _lines: "WeakKeyDictionary[asyncio.AbstractEventLoop, Line] | None" = None

    @property
    def tokenizer(self) -> Any:
        """The model's transformers tokenizer; read at the first use, or when the model is opened asynchronously.

        Raises:
            UnsupportedModelError: the model has none, or transformers cannot build one from its files.
            IntegrityError: a file does not match the manifest.
            ConfigurationError: reading it here would block an event loop.
        """
        found = self.find_tokenizer()
        if found is None:
            raise UnsupportedModelError(
                f"{self.manifest.name} has no tokenizer; make one yourself, and give the model token ids"
            )
        return found

    def find_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """Like `tokenizer`, but return None if the model has none."""
        known = self._known_tokenizer
        if known is None or known.parts is not self._parts:
            refuse_event_loop("reading the tokenizer", "'async with' or 'open_async' to open the model, which read it")
            known = self._read_tokenizer()
        if isinstance(known.tokenizer, SurfwError):
            raise known.tokenizer
        return known.tokenizer

    def _read_tokenizer(self) -> _KnownTokenizer:
        """Read the tokenizer: that of the applied adapter if it has one, else the model's."""
        parts = self._open()
        base, adapter = parts.manifest, parts.adapters.manifest
        owner = adapter if adapter is not None and adapter.files else base
        found: PreTrainedTokenizerBase | SurfwError | None
        try:
            found = open_tokenizer(replace(base, files=owner.files), partial(self._read_file_of, owner))
        except SurfwError as exc:
            found = exc
        known = _KnownTokenizer(parts, found, owner.files)
        if parts is self._parts:  # else the model was switched in the meantime
            self._known_tokenizer = known
        return known

    def _on_adapter(self) -> None:
        """Read the tokenizer again if its files differ with the current adapter."""
        adapter, known = self._open().adapters.manifest, self._known_tokenizer
        files = adapter.files if adapter is not None and adapter.files else self.manifest.files
        if known is not None and files != known.files:
            self._read_tokenizer()

    def _switch(self, name: str) -> None:
        super()._switch(name)
        self._read_tokenizer()

    async def __aenter__(self) -> Self:
        """Open the model, if it is not open, and read its tokenizer, without blocking the event loop."""
        await super().__aenter__()
        if self._known_tokenizer is None:
            await self._in_thread(self._read_tokenizer)
        return self

    @overload
    def stream(self, prompt: str, **options: Unpack[GenerationOptions]) -> AsyncGenerator[str, None]: ...
    @overload
    def stream(self, prompt: Sequence[int], **options: Unpack[GenerationOptions]) -> AsyncGenerator[int, None]: ...

    def stream(self, prompt: str | Sequence[int], **options: Unpack[GenerationOptions]) -> AsyncGenerator[Any, None]:
        """Generate without blocking the event loop, and yield the answer as it comes.

        If the reader falls behind, the generation waits for it, and every other run of this model waits until the
        stream has ended or is closed (`aclose`).

        Args:
            prompt: a text, to yield text; or token ids, to yield token ids.
            **options: `max_new_tokens` (128); `temperature`, `top_p`, `top_k` and `seed`, see `InferenceRequest`;
                `stop`, texts that end the answer; `ignore_eos`, to continue after the model's end token; `system`, a
                system message, and `raw`, for models with a chat template.

        Raises:
            ConfigurationError: the model does not generate, or an option does not fit it.
            SurfwError: weights could not be read.
        """
        if unknown := sorted(set(options) - _OPTIONS):
            raise ConfigurationError(f"stream() has no option {unknown[0]!r}; it takes {', '.join(sorted(_OPTIONS))}")
        return self._stream(_request(prompt, options))

    async def generate_many(
        self,
        prompts: Iterable[Prompt] | AsyncIterable[Prompt],
        *,
        sequences: int = MOST_SEQUENCES,
        on_tokens: Callable[[int, list[int]], bool | None] | None = None,
        **options: Unpack[GenerationOptions],
    ) -> AsyncGenerator[ManyResult, None]:
        """Answer many prompts together, and yield each answer once it is complete, without blocking the event loop.

        Each pass over the layers computes a token for every sequence, so while weights stream, many answers take hardly
        longer than one; a finished sequence makes place for the next prompt. Token ids are those of the resident model
        under transformers' continuous batching of the same prompts. An encoder reads texts of similar length in one
        pass, and gives what the resident model gives for the same batch.

        Args:
            prompts: texts, lists of token ids, or `InferenceRequest`s with their own `max_new_tokens`, `stop`,
                `ignore_eos`, `system` and `raw`; consumed as sequences finish.
            sequences: the most sequences that run together; fewer if the memory budget is too small for their KV
                cache.
            on_tokens: called in the model's thread with a prompt's index and its new tokens, as they come; returns
                False to end that answer.
            **options: see `stream`. Sampling options apply to all prompts, the others to those that are not an
                `InferenceRequest`.

        Raises:
            UnsupportedModelError: the model generates from an encoder, or transformers cannot batch it.
            ConfigurationError: an option is invalid. An error in one prompt is reported as its result.
            SurfwError: weights could not be read.
        """
        expect_number("sequences", sequences, 1)
        InferenceRequest(prompt_ids=(0,), **options)  # or say what of them is wrong
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[ManyResult](_AHEAD)
        has_room = asyncio.Event()

        def tell() -> None:
            loop.call_soon_threadsafe(has_room.set)

        feed = Feed(2 * sequences, tell)

        async def fill() -> None:
            try:
                index = 0
                async for prompt in _each(prompts):
                    request = _request(prompt, options)
                    has_room.clear()
                    while not feed.offer(index, request):
                        await has_room.wait()
                        has_room.clear()
                    index += 1
            finally:
                feed.close()

        def run() -> None:
            self._answer_many(feed, options, on_result=_giver(loop, queue), on_tokens=on_tokens, sequences=sequences)

        filling, work = asyncio.create_task(fill()), asyncio.create_task(self._in_thread(run))
        try:
            while (result := await _next(queue, work)) is not None:
                yield result
            await work
            await filling  # raises if `prompts` failed
        finally:
            filling.cancel()
            work.cancel()
            await asyncio.wait([filling, work])
            for task in (filling, work):
                if not task.cancelled():
                    task.exception()

    def session(self, **options: Unpack[GenerationOptions]) -> Session:
        """Return a session of this model; concurrent requests of its sessions run together in each pass.

        Sessions share resident layers and the passes over streamed ones. Token ids are those of `generate_many`. Call
        this in an event loop; sessions share passes only within the same loop.

        Args:
            **options: see `stream`; defaults for the session's requests.

        Raises:
            ConfigurationError: an option is invalid, or no event loop runs here.
        """
        InferenceRequest(prompt_ids=(0,), **options)  # or say what of them is wrong
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            raise ConfigurationError(
                "a session belongs to an event loop, and none runs here; use 'async def'"
            ) from None
        if self._lines is None:
            self._lines = WeakKeyDictionary()
        return Session(self, self._lines.setdefault(loop, Line(self)).add, options)

    def answer_many(
        self,
        prompts: Iterable[Prompt],
        *,
        on_result: Callable[[ManyResult], None],
        sequences: int = MOST_SEQUENCES,
        on_tokens: Callable[[int, list[int]], bool | None] | None = None,
        **options: Unpack[GenerationOptions],
    ) -> None:
        """Like `generate_many`, but in this thread; prompts are read in another one.

        Args:
            prompts: see `generate_many`.
            on_result: called with each answer once it is complete.
            sequences: see `generate_many`.
            on_tokens: see `generate_many`.
            **options: see `generate_many`.
        """
        expect_number("sequences", sequences, 1)
        feed = Feed(2 * sequences)
        with feeding(feed, (_request(prompt, options) for prompt in prompts)):
            self._answer_many(feed, options, on_result=on_result, on_tokens=on_tokens, sequences=sequences)

    def _answer_many(
        self,
        feed: Feed,
        options: GenerationOptions,
        *,
        on_result: Callable[[ManyResult], None],
        on_tokens: OnTokens | None,
        sequences: int,
    ) -> None:
        parts, tokenizer = self._open_here(), self.find_tokenizer()
        if not generates(self):
            self._encode_many(feed, on_result, sequences)
            return
        answer_many(
            self, parts, tokenizer, feed, shared=InferenceRequest(prompt_ids=(0,), **options),
            on_result=on_result, on_tokens=on_tokens, most_sequences=sequences,
        )  # fmt: skip

    def _encode_many(self, feed: Feed, on_result: Callable[[ManyResult], None], most_texts: int) -> None:
        run = current_run.get() or Run()
        outer = current_run.set(run)  # each pass uses this run, too
        try:
            with self._holding(run):
                encode_many(
                    self, self._open_here(), self.find_tokenizer(), feed, on_result=on_result, check=run.check,
                    most_texts=most_texts,
                )  # fmt: skip
        finally:
            current_run.reset(outer)

    async def _stream(self, request: InferenceRequest) -> AsyncGenerator[Any, None]:
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Any](_AHEAD)
        give = _giver(loop, queue)
        work = asyncio.create_task(self._in_thread(lambda: self._generate_for(request, give)))
        try:
            while (piece := await _next(queue, work)) is not None:
                yield piece
            await work
        finally:
            work.cancel()
            await asyncio.wait([work])
            if not work.cancelled():
                work.exception()  # mark it as retrieved: the reader has stopped

    def _generate_for(self, request: InferenceRequest, give: Callable[[Any], None]) -> None:
        self._expect_generation()
        is_text = request.prompt is not None
        stops = request.stop or getattr(self.model.generation_config, "stop_strings", None)
        tokenizer = self.find_tokenizer() if is_text or stops else None
        if is_text:
            answer(self, tokenizer, request, on_text=lambda text: give(text) if text else None)
        else:
            answer(self, tokenizer, request, on_token=lambda token, _: give(token))


def _request(prompt: Prompt, options: GenerationOptions) -> InferenceRequest:
    """Make a request from a prompt and options; return an `InferenceRequest` unchanged."""
    if isinstance(prompt, InferenceRequest):
        return prompt
    if not isinstance(prompt, str | Sequence):
        raise ConfigurationError(f"a prompt is a text or a list of token ids, not {type(prompt).__name__}")
    if isinstance(prompt, str):
        return InferenceRequest(prompt=prompt, **options)
    return InferenceRequest(prompt_ids=prompt, **options)


async def _each(prompts: Iterable[Prompt] | AsyncIterable[Prompt]) -> AsyncIterator[Prompt]:
    """Iterate over a plain or an asynchronous iterable."""
    if isinstance(prompts, AsyncIterable):
        async for prompt in prompts:
            yield prompt
    else:
        for prompt in prompts:
            yield prompt


def _giver(loop: asyncio.AbstractEventLoop, queue: "asyncio.Queue[Any]") -> Callable[[Any], None]:
    """Return a function that puts items into the queue from the model's thread, waiting while the queue is full."""

    def give(piece: Any) -> None:
        run = current_run.get()
        assert run is not None, "generations of a stream run in the model's thread"
        # Wait as part of the run, which closing the stream interrupts.
        handed_over = asyncio.run_coroutine_threadsafe(queue.put(piece), loop)
        try:
            run.wait_for(handed_over)
        except BaseException:
            handed_over.cancel()
            raise

    return give


async def _next(queue: "asyncio.Queue[Any]", work: "asyncio.Task[None]") -> Any:
    """Wait for the next piece; None once there are no more."""
    getting = asyncio.create_task(queue.get())
    try:
        await asyncio.wait([getting, work], return_when=asyncio.FIRST_COMPLETED)
        return getting.result() if getting.done() else None
    finally:
        getting.cancel()


class _Family(StreamingModel):
    """Constructor of the family classes, which only refuse models of other families and otherwise change nothing."""

    def __init__(
        self,
        model_name: str | None = None,
        websocket_uri: Source = DEFAULT_URI,
        cache_size: int | None = None,
        *,
        memory_budget: int | str | None = None,
        device_memory: int | str | None = None,
        **options: Unpack[ModelOptions],
    ) -> None:
        """Store the settings; the first use opens the model.

        Args:
            model_name: the model's name at the source; None if it has only one.
            websocket_uri: the server, or any other source that `StreamingModel` takes.
            cache_size: number of layers to keep in memory; default 5, unless a budget is given.
            memory_budget: instead of `cache_size`, the most memory for weights.
            device_memory: instead of `cache_size`, the most device memory for weights and KV cache.
            **options: see `StreamingBaseModel`.
        """
        if cache_size is None and memory_budget is None and device_memory is None:
            cache_size = DEFAULT_CACHE_SIZE
        super().__init__(
            websocket_uri, model_name, cache_size=cache_size, memory_budget=memory_budget,
            device_memory=device_memory, **options,
        )  # fmt: skip

    @classmethod
    def _over(cls, source: Source, model: str | None, **options: Unpack[OpenOptions]) -> Self:
        return cls(model, source, **options)


class StreamingBertModel(_Family):
    """A model of the BERT family: BERT, RoBERTa, DistilBERT, ALBERT, ELECTRA and similar models."""

    model_types = frozenset(
        {"bert", "roberta", "xlm-roberta", "distilbert", "albert", "electra", "camembert", "mobilebert", "modernbert"}
    )


class StreamingGPTModel(_Family):
    """A model of the GPT family: GPT-2, GPT-Neo, GPT-J, GPT-NeoX and similar models."""

    model_types = frozenset({"openai-gpt", "gpt2", "gpt_neo", "gptj", "gpt_neox", "gpt_bigcode", "gpt_oss"})


class StreamingT5Model(_Family):
    """A model of the T5 family: T5, mT5, UMT5."""

    model_types = frozenset({"t5", "mt5", "umt5"})


class StreamingLlamaModel(_Family):
    """A model of the LLaMA family: LLaMA, and its close relatives Mistral and Qwen."""

    model_types = frozenset({"llama", "mistral", "ministral", "qwen2", "qwen3"})
