"""A web service that streams tokens: one model for all requests, opened when the service starts.

    pip install fastapi uvicorn
    SURFW_SOURCE=ws://127.0.0.1:8765 uvicorn fastapi_app:app --app-dir examples
    curl -N 'http://127.0.0.1:8000/generate?prompt=Weight+streaming+is'

A client that disconnects stops its generation. A model runs one forward at a time, so requests take turns.
Without SURFW_SOURCE it serves the small model that comes with surfw, from a temporary store.
"""

import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import FastAPI, Query, Request
from fastapi.responses import StreamingResponse

from surfw import ModelChunker, Settings, StreamingModel, demo_checkpoint


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
            policy=settings.policy,
            retry=settings.retry,
            token=settings.token if source.startswith(("ws://", "wss://")) else None,
            ssl=settings.tls_for(source),
            disk_cache=settings.disk_cache,
            cache_dir=settings.cache_dir,
            offline=settings.offline or None,
            verify_key=settings.verify_key,
        ) as model:
            app.state.model = model
            yield


app = FastAPI(lifespan=lifespan)


@app.get("/generate")
async def generate(
    request: Request, prompt: str, max_new_tokens: Annotated[int, Query(ge=1, le=1000)] = 64
) -> StreamingResponse:
    """Stream the generated text."""
    return StreamingResponse(
        request.app.state.model.stream(prompt, max_new_tokens=max_new_tokens), media_type="text/plain; charset=utf-8"
    )


@app.get("/stats")
async def stats(request: Request) -> dict[str, object]:
    """Return statistics of the layer cache and of the runs."""
    model = request.app.state.model
    return {"cache": model.get_cache_info(), "inference": model.get_inference_stats()}
