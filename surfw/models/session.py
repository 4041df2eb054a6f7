"""Sessions: several users of one open model share its resident layers, its streamed layers and each pass.

Requests of all sessions go into one queue. Those with the same sampling settings run together through `generate_many`:
a request can join while others run, and one pass over the layers computes a token of each. Tokens are therefore those
of the resident model under transformers' continuous batching of the same requests; a request that runs alone may round
differently.

Everything here runs in one event loop, except the model itself, which runs in its own thread.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING, Any, Unpack, overload

from surfw.errors import ConfigurationError
from surfw.models.inference import GenerationOptions, InferenceRequest, InferenceResult
from surfw.models.many import SHARED, ManyResult
from surfw.models.stopping import find_stops
from surfw.models.text_stream import TextStream

if TYPE_CHECKING:
    from surfw.models.streaming import StreamingModel

TURN_SECONDS = 10.0
"""After this time, no new requests join while others with other sampling settings wait."""


class Asked:
    """A request with its progress: new tokens, then a result or an error."""

    def __init__(self, request: InferenceRequest) -> None:
        self.request = request
        self.result: InferenceResult | None = None
        self.error: BaseException | None = None
        self.is_wanted = True
        self._tokens: asyncio.Queue[list[int] | None] = asyncio.Queue()  # at most as long as the answer

    @property
    def sampling(self) -> tuple[Any, ...]:
        """The settings that must be equal for requests that run together."""
        return tuple(getattr(self.request, name) for name in SHARED)

    def tell(self, tokens: list[int]) -> None:
        """Add new tokens."""
        self._tokens.put_nowait(tokens)

    def end(self, result: InferenceResult | None, error: BaseException | None = None) -> None:
        """Complete the request with a result or an error."""
        self.result, self.error = result, error
        self._tokens.put_nowait(None)

    async def tokens(self) -> AsyncIterator[list[int]]:
        """Yield the tokens of each pass as they come.

        Raises:
            SurfwError: the request failed.
        """
        while (found := await self._tokens.get()) is not None:
            yield found
        if self.error is not None:
            raise self.error


class Line:
    """The queue of requests, and the task that runs them while there are any."""

    def __init__(self, model: "StreamingModel") -> None:
        """Run requests on this model, in the caller's event loop."""
        self._model = model
        self._waiting: list[Asked] = []
        self._running: dict[int, Asked] = {}
        self._changed = asyncio.Event()
        self._work: asyncio.Task[None] | None = None

    def add(self, asked: Asked) -> None:
        """Queue a request."""
        self._waiting.append(asked)
        self._changed.set()
        if self._work is None:
            self._work = asyncio.create_task(self._run())

    async def _run(self) -> None:
        try:
            while self._waiting:
                await self._turn(self._waiting[0].sampling)
        finally:
            self._work = None

    async def _turn(self, sampling: tuple[Any, ...]) -> None:
        """Answer requests with the same sampling until there are none, or after `TURN_SECONDS` others wait."""
        loop, until = asyncio.get_running_loop(), time.monotonic() + TURN_SECONDS
        self._running = {}
        shared: Any = dict(zip(SHARED, sampling, strict=True))

        def on_tokens(index: int, tokens: list[int]) -> bool:
            asked = self._running[index]
            loop.call_soon_threadsafe(asked.tell, tokens)
            return asked.is_wanted

        try:
            async for found in self._model.generate_many(
                self._requests(sampling, until), on_tokens=on_tokens, **shared
            ):
                self._end(found)
        except BaseException as exc:
            left, self._running = self._running, {}
            others = [one for one in self._waiting if one.sampling == sampling]
            for asked in [*left.values(), *others]:
                asked.end(None, exc if isinstance(exc, Exception) else asyncio.CancelledError())
            self._waiting = [one for one in self._waiting if one not in others]
            if not isinstance(exc, Exception):
                raise

    async def _requests(self, sampling: tuple[Any, ...], until: float) -> AsyncIterator[InferenceRequest]:
        """Yield queued requests with this sampling, as long as any are queued or running."""
        index = 0
        while time.monotonic() < until or all(one.sampling == sampling for one in self._waiting):
            mine = [one for one in self._waiting if one.sampling == sampling]
            for asked in mine:
                self._waiting.remove(asked)
                if asked.is_wanted:
                    self._running[index] = asked
                    index += 1
                    yield asked.request
            if not mine:
                if not self._running:
                    return
                self._changed.clear()
                await self._changed.wait()

    def _end(self, found: ManyResult) -> None:
        asked = self._running.pop(found.index)
        asked.end(found.result, None if found.error is None else ConfigurationError(found.error))
        self._changed.set()


class _Text:
    """Turns tokens into text, holding back the end where it may be the beginning of a stop text.

    Attributes:
        shown: number of characters returned so far.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self.shown = 0
        self._text = ""
        self._stream = TextStream(tokenizer, self._take)
        self._stop = stop
        self._held = max((len(one) for one in stop), default=1) - 1

    def _take(self, piece: str) -> None:
        self._text += piece

    def add(self, tokens: Sequence[int]) -> str:
        """Add tokens, and return the text that is certain now and was not returned yet."""
        for token in tokens:
            self._stream.put(token)
        ends = [place for one in self._stop if (place := self._text.find(one)) >= 0]
        piece = self._text[self.shown : max(self.shown, min([*ends, len(self._text) - self._held]))]
        self.shown += len(piece)
        return piece


class Session:
    """One of several users of a model; create it with `StreamingModel.session`."""

    def __init__(self, model: Any, add: Callable[[Any], None], options: Any) -> None:
        self._model: StreamingModel = model
        self._add = add
        self._options: GenerationOptions = options

    async def answer(self, prompt: str | list[int], **options: Unpack[GenerationOptions]) -> InferenceResult:
        """Return the whole answer to a text or to token ids.

        Args:
            prompt: a text or token ids.
            **options: see `StreamingModel.stream`; they override the session's own.

        Raises:
            ConfigurationError: the request does not fit the model, or an option is invalid.
            SurfwError: weights could not be read.
        """
        asked = self._ask(prompt, options)
        try:
            async for _ in asked.tokens():
                pass
        finally:
            asked.is_wanted = False
        assert asked.result is not None, "an answer without an error has a result"
        return asked.result

    @overload
    def stream(self, prompt: str, **options: Unpack[GenerationOptions]) -> AsyncGenerator[str, None]: ...
    @overload
    def stream(self, prompt: list[int], **options: Unpack[GenerationOptions]) -> AsyncGenerator[int, None]: ...

    async def stream(self, prompt: str | list[int], **options: Unpack[GenerationOptions]) -> AsyncGenerator[Any, None]:
        """Yield the answer as it comes: text for a text, token ids for token ids.

        A reader that is slow or stops does not block other sessions.

        Args:
            prompt: a text or token ids.
            **options: see `StreamingModel.stream`; they override the session's own.

        Raises:
            ConfigurationError: the request does not fit the model, or an option is invalid.
            SurfwError: weights could not be read.
        """
        asked = self._ask(prompt, options)
        text: _Text | None = None
        try:
            async for tokens in asked.tokens():
                if text is None and isinstance(prompt, str):  # not earlier: a switch may happen first
                    text = self._text(asked.request)
                for piece in tokens if text is None else [text.add(tokens)]:
                    if piece != "":
                        yield piece
            if text is not None and asked.result is not None and (rest := asked.result.text[text.shown :]):
                yield rest
        finally:
            asked.is_wanted = False

    def _text(self, request: InferenceRequest) -> _Text:
        """The text of an answer up to its stop texts: the request's, or the model's own."""
        own, tokenizer = self._model.model.generation_config, self._model.find_tokenizer()
        name = self._model.manifest.name
        return _Text(tokenizer, find_stops(own, request.stop, tokenizer, name, ignore_own=request.ignore_eos))

    def _ask(self, prompt: str | list[int], options: GenerationOptions) -> Asked:
        settings: GenerationOptions = {**self._options, **options}
        if isinstance(prompt, str):
            asked = Asked(InferenceRequest(prompt=prompt, **settings))
        else:
            asked = Asked(InferenceRequest(prompt_ids=prompt, **settings))
        self._add(asked)
        return asked
