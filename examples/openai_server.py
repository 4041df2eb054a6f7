"""A server with OpenAI's API; concurrent requests share each pass over the layers.

    pip install fastapi uvicorn
    SURFW_SOURCE=ws://127.0.0.1:8765 uvicorn openai_server:app --app-dir examples
    curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \
        -d '{"model": "demo", "prompt": "Weight streaming is", "max_tokens": 32}'

It has `/v1/models`, `/v1/completions` and `/v1/chat/completions`; the last two support `"stream": true`. Requests with
the same temperature, top_p and seed run in one batch; others are queued. A client that disconnects frees its slot.
Without SURFW_SOURCE it serves the small model that comes with surfw, from a temporary store.
"""

import asyncio
import json
import logging
import tempfile
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Literal

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, Field

from surfw import InferenceRequest, ManyResult, ModelChunker, Settings, StreamingModel, SurfwError, demo_checkpoint

logger = logging.getLogger("uvicorn.error")

MOST_WAITING = 256
"""The longest queue; further requests are refused, so that none waits forever."""

TURN_SECONDS = 10.0
"""The time after which queued requests with other sampling settings are run next."""


class Sampling(BaseModel):
    """The fields that both kinds of requests share."""

    model: str = ""
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=0)
    stop: str | list[str] | None = None
    stream: bool = False
    n: Literal[1] = 1


class Completion(Sampling):
    """A request to `/v1/completions`."""

    prompt: str


class Message(BaseModel):
    """A message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str


class Chat(Sampling):
    """A request to `/v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)


class Answer:
    """An answer in progress: `tokens` yields new tokens, then None; `result` is set at the end."""

    def __init__(self, request: InferenceRequest) -> None:
        """Create the answer to a request."""
        self.request = request
        self.tokens: asyncio.Queue[list[int] | None] = asyncio.Queue()  # one token per pass, so it stays short
        self.result: ManyResult | None = None
        self.failure: str | None = None  # an error of the model, not of this request
        self.is_wanted = True

    @property
    def sampling(self) -> tuple[Any, ...]:
        """The settings that all requests of a batch must share."""
        return self.request.temperature, self.request.top_p, self.request.seed


class Batcher:
    """Runs queued requests in batches, as many at a time as fit."""

    def __init__(self, model: StreamingModel) -> None:
        """Use an open model."""
        self.model = model
        self._waiting: list[Answer] = []
        self._running: dict[int, Answer] = {}
        self._changed = asyncio.Event()

    def add(self, answer: Answer) -> None:
        """Queue a request."""
        self._waiting = [one for one in self._waiting if one.is_wanted]
        if len(self._waiting) >= MOST_WAITING:
            raise HTTPException(429, "too many requests wait already; try again later")
        self._waiting.append(answer)
        self._changed.set()

    async def run(self) -> None:
        """Answer requests until cancelled."""
        while True:
            while not self._waiting:
                self._changed.clear()
                await self._changed.wait()
            await self._turn(self._waiting[0].sampling)

    async def _turn(self, sampling: tuple[Any, ...]) -> None:
        """Answer requests with the same sampling settings until none is left, or others have waited long enough."""
        temperature, top_p, seed = sampling
        loop, until = asyncio.get_running_loop(), time.monotonic() + TURN_SECONDS
        self._running = {}

        async def requests() -> AsyncIterator[InferenceRequest]:
            index = 0
            while time.monotonic() < until or all(one.sampling == sampling for one in self._waiting):
                answer = next((one for one in self._waiting if one.sampling == sampling), None)
                if answer is not None:
                    self._waiting.remove(answer)
                    if answer.is_wanted:
                        self._running[index] = answer
                        index += 1
                        yield answer.request
                elif not self._running:
                    return
                else:
                    self._changed.clear()
                    await self._changed.wait()

        def on_tokens(index: int, tokens: list[int]) -> bool:
            answer = self._running[index]
            loop.call_soon_threadsafe(answer.tokens.put_nowait, tokens)
            return answer.is_wanted

        try:
            results = self.model.generate_many(
                requests(), on_tokens=on_tokens, temperature=temperature, top_p=top_p, seed=seed
            )
            async for result in results:
                answer = self._running.pop(result.index)
                answer.result = result
                answer.tokens.put_nowait(None)
                self._changed.set()
        except Exception as exc:
            logger.warning("the model failed: %s", exc, exc_info=not isinstance(exc, SurfwError))
            same = [one for one in self._waiting if one.sampling == sampling]
            self._waiting = [one for one in self._waiting if one.sampling != sampling]
            for answer in [*self._running.values(), *same]:
                answer.failure = str(exc)
                answer.tokens.put_nowait(None)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Keep the model open while the service runs."""
    settings = Settings.load()  # from SURFW_* variables, and the file named by SURFW_CONFIG
    with tempfile.TemporaryDirectory() as store:
        if settings.source is None:
            await ModelChunker(demo_checkpoint(), output_dir=store).chunk_model()
        source = settings.source or store
        async with StreamingModel(
            source,
            settings.model,
            cache_size=settings.cache_layers,
            memory_budget=settings.memory_budget,
            codec=settings.codec,
            retry=settings.retry,
            token=settings.token if source.startswith(("ws://", "wss://")) else None,
        ) as model:
            app.state.batcher = batcher = Batcher(model)
            running = asyncio.create_task(batcher.run())
            yield
            running.cancel()
            await asyncio.wait([running])


app = FastAPI(lifespan=lifespan)


@app.exception_handler(HTTPException)
async def tell(_: Request, exc: HTTPException) -> JSONResponse:
    """Report an error in OpenAI's format."""
    return JSONResponse({"error": {"message": exc.detail, "code": exc.status_code}}, exc.status_code)


@app.get("/v1/models")
async def models() -> dict[str, Any]:
    """List the one model."""
    name = app.state.batcher.model.manifest.name
    return {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "surfw"}]}


@app.post("/v1/completions")
async def completions(asked: Completion, http: Request) -> Any:
    """Continue a prompt."""
    return await respond(asked, http, "text_completion", prompt=asked.prompt, raw=True)


@app.post("/v1/chat/completions")
async def chat_completions(asked: Chat, http: Request) -> Any:
    """Answer a chat; a model without a chat template gets only the last message, unchanged."""
    *history, last = [message.model_dump() for message in asked.messages]
    template = app.state.batcher.model.tokenizer.chat_template
    return await respond(
        asked, http, "chat.completion", prompt=last["content"], history=history if template else (), raw=not template
    )


async def respond(asked: Sampling, http: Request, kind: str, **prompt: Any) -> Any:
    """Answer a request, as a whole or as a stream."""
    batcher: Batcher = app.state.batcher
    name = batcher.model.manifest.name
    if asked.model not in {"", name}:
        raise HTTPException(404, f"there is no model {asked.model!r}; this server has {name}")
    stops = asked.stop or batcher.model.model.generation_config.stop_strings or ()
    try:
        request = InferenceRequest(
            **prompt,
            max_new_tokens=asked.max_completion_tokens or asked.max_tokens or 256,
            temperature=asked.temperature,
            top_p=asked.top_p,
            seed=asked.seed,
            stop=[stops] if isinstance(stops, str) else stops,
        )
    except SurfwError as exc:
        raise HTTPException(400, str(exc)) from exc
    answer = Answer(request)
    batcher.add(answer)
    common = {"id": f"cmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
    if asked.stream:
        return StreamingResponse(stream(answer, kind, common), media_type="text/event-stream")
    try:
        while await answer.tokens.get() is not None:
            if await http.is_disconnected():
                return Response(status_code=499)  # the client is gone
    finally:
        answer.is_wanted = False
    result = finished(answer)
    new = len(result.token_ids)
    usage = {
        "prompt_tokens": result.prompt_tokens,
        "completion_tokens": new,
        "total_tokens": result.prompt_tokens + new,
    }
    return common | {
        "object": kind,
        "choices": [choice(kind, result.text, reason(answer), is_whole=True)],
        "usage": usage,
    }


async def stream(answer: Answer, kind: str, common: dict[str, Any]) -> AsyncIterator[str]:
    """Yield server-sent events, one per piece of text."""
    tokenizer, ids, shown = app.state.batcher.model.tokenizer, [], ""
    kind_of_piece = "chat.completion.chunk" if kind == "chat.completion" else kind

    def event(text: str, why: str | None) -> str:
        return f"data: {json.dumps(common | {'object': kind_of_piece, 'choices': [choice(kind, text, why)]})}\n\n"

    try:
        while (tokens := await answer.tokens.get()) is not None:
            ids += tokens
            text = tokenizer.decode(ids, skip_special_tokens=True)
            held = max((len(one) for one in answer.request.stop), default=1) - 1  # a stop text may begin here
            text = text[: len(text) - held]
            if not text.endswith("\ufffd") and len(text) > len(shown):
                yield event(text[len(shown) :], None)
                shown = text
        try:
            result = finished(answer)
        except HTTPException as exc:
            yield f"data: {json.dumps({'error': {'message': exc.detail, 'code': exc.status_code}})}\n\n"
            return
        if rest := result.text[len(shown) :]:
            yield event(rest, None)
        yield event("", reason(answer))
        yield "data: [DONE]\n\n"
    finally:
        answer.is_wanted = False


def finished(answer: Answer) -> Any:
    """Return the result of an answer that has ended, or raise its error."""
    if answer.failure is not None:
        raise HTTPException(503, answer.failure)
    assert answer.result is not None
    if answer.result.result is None:
        raise HTTPException(400, answer.result.error)
    return answer.result.result


def reason(answer: Answer) -> str:
    """Return OpenAI's reason for the end of an answer."""
    return "length" if len(finished(answer).token_ids) >= answer.request.max_new_tokens else "stop"


def choice(kind: str, text: str, why: str | None, *, is_whole: bool = False) -> dict[str, Any]:
    """Format a text as the `choices` entry of either kind of answer."""
    if kind == "text_completion":
        return {"index": 0, "text": text, "finish_reason": why, "logprobs": None}
    message = {"role": "assistant", "content": text}
    return {"index": 0, "message" if is_whole else "delta": message, "finish_reason": why}
