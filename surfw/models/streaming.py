"""`StreamingModel`: any transformers model whose weights arrive while it runs."""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any, Self

import torch
from transformers import PreTrainedModel

from surfw.errors import ConfigurationError
from surfw.manifest import Manifest
from surfw.metrics import Metrics, hit_rate
from surfw.models.opening import cast_dtypes, open_skeleton
from surfw.runtime.engine import Engine
from surfw.runtime.hooks import StreamingHooks
from surfw.runtime.io_thread import IoThread
from surfw.runtime.loader import Loader
from surfw.runtime.residency import plan_residency
from surfw.skeleton.dtypes import parse_dtype
from surfw.source import ChunkSource

OpenSource = Callable[[], Any]
"""Makes a coroutine that opens a `ChunkSource`; it runs on the model's own event loop."""


class StreamingModel:
    """A transformers model over a source of weights. Call it, or `generate()` with it, as with the resident model.

    Attributes:
        model: transformers' own model, in evaluation mode.
        manifest: what the source says of it.
        plan: what stays in memory.
        metrics: counters `hits`, `prefetched`, `stalls`; spans `stall`, `forward`; latency `fetch`.
    """

    def __init__(
        self,
        io: IoThread,
        source: ChunkSource,
        manifest: Manifest,
        *,
        cache_layers: int | None,
        budget_bytes: int | None,
        dtype: str | None,
    ) -> None:
        """Use `StreamingModel.open`."""
        self.manifest = manifest
        self.metrics = Metrics()
        self.source = source
        self._io = io
        self._lock = threading.RLock()
        self._closed = False
        skeleton = open_skeleton(manifest, None if dtype in {None, "auto"} else parse_dtype(str(dtype)))
        self.model: PreTrainedModel = skeleton.model
        loader = Loader(source, manifest, cast_dtypes(manifest, skeleton))
        self.plan = plan_residency(
            {chunk.name: chunk.kind for chunk in manifest.chunks},
            {chunk.name: loader.buffer_bytes(chunk) for chunk in manifest.chunks},
            manifest.order,
            cache_layers=cache_layers,
            budget_bytes=budget_bytes,
        )
        self._engine = Engine(manifest, self.plan, loader, io, self.metrics)
        self._hooks = StreamingHooks(skeleton, manifest, self._engine)
        self._engine.warm()

    @classmethod
    def open(
        cls,
        open_source: OpenSource,
        model: str | None = None,
        *,
        cache_layers: int | None = None,
        budget_bytes: int | None = None,
        dtype: str | None = None,
    ) -> Self:
        """Open a model; only its manifest is read before this returns.

        Args:
            open_source: opens the source of the weights.
            model: its name, in full or a unique last part; None for the only one there is.
            cache_layers: how many layers are kept in memory; one more may be in flight. Default: as many as fit.
            budget_bytes: without `cache_layers`, what weights may take; without both, all are kept.
            dtype: run in this dtype, as `from_pretrained(dtype=…)` would; default: the one it is stored in.

        Raises:
            UnknownModelError: the source has no such model.
            SurfwError: the source cannot be reached, or the model cannot be built.
        """
        with ExitStack() as opened:
            io = IoThread()
            opened.callback(io.close)
            source: ChunkSource = io.run(open_source())
            opened.callback(lambda: io.run(source.close()))
            manifest = io.run(source.manifest(io.run(source.resolve(model))))
            ready = cls(io, source, manifest, cache_layers=cache_layers, budget_bytes=budget_bytes, dtype=dtype)
            opened.pop_all()
        return ready

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One forward pass; arguments and result are those of the transformers model."""
        with self._running():
            return self.model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate with transformers' own `generate()`; arguments and result are its."""
        with self._running():
            generate: Any = self.model.generate
            return generate(*args, **kwargs)

    @contextmanager
    def _running(self) -> Iterator[None]:
        """One run of the model at a time, counted. An interrupt runs no hooks of torch: what they do is done here."""
        if self._closed:
            raise ConfigurationError(f"{self.manifest.name} is closed; open it again")
        with self._lock, self.metrics.span("forward"):
            try:
                yield
            except BaseException:
                self._hooks.recover()
                raise

    def read_file(self, path: str) -> bytes:
        """A tokenizer file of the model."""
        return self._io.run(self.source.file(self.manifest, path))

    def statistics(self) -> dict[str, Any]:
        """Counters of the cache and the split of the time, as plain data."""
        hits, ahead, stalls = (self.metrics.count(name) for name in ("hits", "prefetched", "stalls"))
        stall_seconds = self.metrics.seconds("stall")
        return {
            "cache": {
                "hits": hits,
                "misses": ahead + stalls,
                "prefetched": ahead,
                "stalls": stalls,
                "hit_rate": hit_rate(hits, ahead + stalls),
                "resident_bytes": self._engine.resident_bytes,
                "fetched_bytes": self.source.fetched_bytes,
            },
            "time": {
                "stall_seconds": stall_seconds,
                "compute_seconds": max(0.0, self.metrics.seconds("forward") - stall_seconds),
            },
            "fetch_latency_seconds": self.metrics.latency("fetch").percentiles(50, 95),
        }

    def close(self) -> None:
        """Stop fetching, close the source, and leave the transformers model as it was: without weights.

        Closing twice is fine.
        """
        if self._closed:
            return
        self._closed = True
        self._hooks.detach()
        self._engine.close()
        try:
            self._io.run(self.source.close())
        finally:
            self._io.close()

    def __enter__(self) -> Self:
        """Enter the context."""
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        """Close."""
        self.close()
