"""`StreamingModel`: any transformers model whose weights arrive while it runs, with its tokenizer and its text."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, overload

from transformers import PreTrainedTokenizerBase

from surfw.errors import ConfigurationError
from surfw.models.base import StreamingBaseModel
from surfw.models.inference import Request, answer
from surfw.models.tokenizer import open_tokenizer
from surfw.runtime.run import current_run

_AHEAD = 16
"""How many pieces of text a generation may be ahead of who reads them."""


class StreamingModel(StreamingBaseModel):
    """Any model of transformers over a source of weights; see `StreamingBaseModel` for opening and running it."""

    _tokenizer: PreTrainedTokenizerBase | None = None
    _tokenizer_read = False

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The model's tokenizer, read at the first use; None if it has none.

        Raises:
            IntegrityError: a file is not what the manifest promises.
            UnsupportedModelError: transformers cannot make a tokenizer of the files.
        """
        if not self._tokenizer_read:
            self._tokenizer = open_tokenizer(self.manifest, self.read_file)
            self._tokenizer_read = True
        return self._tokenizer

    @overload
    def stream(self, prompt: str, **options: Any) -> AsyncIterator[str]: ...
    @overload
    def stream(self, prompt: Sequence[int], **options: Any) -> AsyncIterator[int]: ...

    def stream(self, prompt: str | Sequence[int], **options: Any) -> AsyncIterator[Any]:
        """Generate beside the event loop, and give the answer as it comes.

        When whoever reads it stops, or falls behind, so does the generation.

        Args:
            prompt: a text, for text; or token ids, for token ids.
            **options: `max_new_tokens`, `temperature`, `top_p`, `top_k`, `seed`, `stop`, `ignore_eos`, `system`, `raw`;
                see `Request`.

        Raises:
            ConfigurationError: the model does not generate, or an option does not fit it.
            SurfwError: weights could not be had.
        """
        try:
            if isinstance(prompt, str):
                return self._stream(Request(prompt=prompt, **options), is_text=True)
            return self._stream(Request(prompt_ids=prompt, **options), is_text=False)
        except TypeError as exc:
            raise ConfigurationError(f"stream() cannot take these options: {exc}") from exc

    async def _stream(self, request: Request, *, is_text: bool) -> AsyncIterator[Any]:
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Any](_AHEAD)

        def give(piece: Any) -> None:
            run = current_run.get()
            assert run is not None, "generations of a stream run in the model's thread"
            handed_over = asyncio.run_coroutine_threadsafe(queue.put(piece), loop)
            try:
                run.wait_for(handed_over)
            except BaseException:
                handed_over.cancel()
                raise

        work = asyncio.create_task(self._in_thread(lambda: self._generate_for(request, give, is_text=is_text)))
        try:
            while (piece := await _next(queue, work)) is not None:
                yield piece
            await work
        finally:
            work.cancel()
            await asyncio.wait([work])
            if not work.cancelled():
                work.exception()  # whoever stopped reading does not look at it

    def _generate_for(self, request: Request, give: Callable[[Any], None], *, is_text: bool) -> None:
        if not self.model.can_generate():
            raise ConfigurationError(
                f"{self.manifest.name} ({self.manifest.class_name}) does not generate; call it, or use forward_async"
            )
        tokenizer = self.tokenizer if is_text or request.stop else None
        if is_text:
            answer(self, tokenizer, request, on_text=lambda text: give(text) if text else None)
        else:
            answer(self, tokenizer, request, on_token=lambda token, _: give(token))


async def _next(queue: "asyncio.Queue[Any]", work: "asyncio.Task[None]") -> Any:
    """The next piece; None once there are no more."""
    getting = asyncio.create_task(queue.get())
    try:
        await asyncio.wait([getting, work], return_when=asyncio.FIRST_COMPLETED)
        return getting.result() if getting.done() else None
    finally:
        getting.cancel()
