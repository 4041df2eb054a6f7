"""A model that is open: transformers' model without weights, and the engine and hooks that bring them."""

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from surfw.config import OnMissing, expect, format_size
from surfw.errors import ConfigurationError, ModelClosedError
from surfw.manifest import Manifest
from surfw.metrics import Metrics
from surfw.models.client import SourceThread
from surfw.models.opening import cast_dtypes, open_skeleton
from surfw.runtime.buffers import buffer_capacity
from surfw.runtime.engine import Engine
from surfw.runtime.hooks import StreamingHooks
from surfw.runtime.loader import Loader
from surfw.runtime.memory import default_budget_bytes
from surfw.runtime.residency import ResidencyPlan, plan_residency
from surfw.runtime.run import Run
from surfw.skeleton.dtypes import parse_dtype

_LOOK_SECONDS = 0.05
"""How often a run that waits for its turn looks whether it is still wanted."""


@dataclass(frozen=True, kw_only=True)
class OpenSettings:
    """How a model is opened; see `StreamingBaseModel` for what each means."""

    cache_size: int | None
    budget_bytes: int | None
    prefetch: bool
    dtype: str | None
    on_missing: OnMissing
    model_class: type[PreTrainedModel] | None
    owns_client: bool


class OpenedModel:
    """One model over one client. Runs one forward at a time; everything else may be called from any thread meanwhile.

    Attributes:
        model: transformers' own model, in evaluation mode.
        manifest: what the source says of it.
        layers: names of the chunks that are layers, in the order they run.
    """

    def __init__(self, client: SourceThread, manifest: Manifest, settings: OpenSettings, metrics: Metrics) -> None:
        """Build the model, and begin to fetch what it needs first."""
        self.manifest = manifest
        self.client = client
        self._owns_client = settings.owns_client
        self._metrics = metrics
        dtype = None if settings.dtype in {None, "auto"} else parse_dtype(str(settings.dtype))
        skeleton = open_skeleton(manifest, dtype, model_class=settings.model_class, on_missing=settings.on_missing)
        self.model: PreTrainedModel = skeleton.model
        loader = Loader(client.source, manifest, cast_dtypes(manifest, skeleton))
        plan = _plan(manifest, loader, settings)
        self.layers = [name for name in _in_order(manifest) if manifest.by_name[name].kind == "layer"]
        self._engine = Engine(manifest, plan, loader, client.io, metrics, prefetch=settings.prefetch)
        self._hooks = StreamingHooks(skeleton, manifest, self._engine)
        self._running = threading.RLock()  # held while the model runs
        self._state = threading.Lock()  # guards the two below; never held for long
        self._current: tuple[Run, int] | None = None
        self._closing = threading.Event()
        self._closed = False
        self._engine.warm()

    @contextmanager
    def running(self, run: Run, *, prefetch: bool = True) -> Iterator[PreTrainedModel]:
        """Run the model: alone, without gradients, counted, and interrupted by `run.interrupt` or `close`.

        Raises:
            ModelClosedError: it is closed, or was closed meanwhile.
        """
        with self._alone(run):
            with self._state:
                if self._closing.is_set():
                    raise self._closed_error("is closed; open it again")
                outer, self._current = self._current, (run, threading.get_ident())
            start = time.perf_counter()
            try:
                with self._engine.running(run, prefetch=prefetch), self._metrics.span("forward"), torch.no_grad():
                    yield self.model
                self._metrics.latency("inference").observe(time.perf_counter() - start)
            except BaseException:
                self._hooks.recover()
                raise
            finally:
                with self._state:
                    self._current = outer
                    close_now = self._closing.is_set() and outer is None
                if close_now:
                    self._finish()

    @contextmanager
    def _alone(self, run: Run) -> Iterator[None]:
        """Wait for one's turn to run the model, unless the run is interrupted before it comes."""
        while not self._running.acquire(timeout=_LOOK_SECONDS):
            run.check()
        try:
            yield
        finally:
            self._running.release()

    @property
    def closed(self) -> bool:
        """Whether it is closed, or is about to be."""
        return self._closing.is_set()

    @property
    def plan(self) -> ResidencyPlan:
        """What stays in memory."""
        return self._engine.plan

    @property
    def resident(self) -> list[str]:
        """Names of the chunks in memory, least recently used first."""
        return self._engine.resident()

    @property
    def resident_bytes(self) -> int:
        """Memory of all buffers that hold a chunk or receive one."""
        return self._engine.resident_bytes

    def fetch_layers(self, indices: Sequence[int]) -> "list[tuple[str, Future[None]]]":
        """Start to fetch layers, counted from 0 in the order they run, as many as there is room for.

        Raises:
            ConfigurationError: there is no such layer.
            ModelClosedError: the model is closed.
        """
        if self._closing.is_set():
            raise self._closed_error("is closed; open it again")
        for index in indices:
            expect("a layer", index, int, "its number, counted from 0")
            if not 0 <= index < len(self.layers):
                raise ConfigurationError(
                    f"{self.manifest.name} has no layer {index}; it has {len(self.layers)}, counted from 0"
                )
        names = list(dict.fromkeys(self.layers[index] for index in indices))
        return list(zip(names, self._engine.fetch(names), strict=False))

    def resize(self, cache_size: int) -> None:
        """Keep another number of layers from now on."""
        self._engine.resize(cache_size)

    def clear(self) -> None:
        """Forget every chunk that is not in use."""
        self._engine.clear()

    def read_file(self, path: str) -> bytes:
        """A tokenizer file of the model."""
        return self.client.run(lambda source: source.file(self.manifest, path))

    def close(self) -> bool:
        """Stop what runs, and leave transformers' model as it was: without weights and hooks.

        Waits for the forward that runs, if there is one; it ends with `ModelClosedError` at its next layer. Called from
        within that forward, it closes the model at the forward's end.

        Returns:
            Whether it is closed now.
        """
        with self._state:
            self._closing.set()
            current = self._current
        if current is not None:
            run, thread = current
            run.interrupt(self._closed_error("was closed while it ran"))
            if thread == threading.get_ident():
                return False
        with self._running:
            self._finish()
        return True

    def _finish(self) -> None:
        if not self._closed:
            self._closed = True
            with ExitStack() as last:
                if self._owns_client:
                    last.callback(self.client.close)
                last.callback(self._engine.close)
                self._hooks.detach()

    def _closed_error(self, what: str) -> ModelClosedError:
        return ModelClosedError(f"{self.manifest.name} {what}")


def _plan(manifest: Manifest, loader: Loader, settings: OpenSettings) -> ResidencyPlan:
    budget = settings.budget_bytes
    decides_itself = settings.cache_size is None and budget is None
    plan = plan_residency(
        {chunk.name: chunk.kind for chunk in manifest.chunks},
        {chunk.name: buffer_capacity(loader.buffer_bytes(chunk)) for chunk in manifest.chunks},
        manifest.order,
        cache_layers=settings.cache_size,
        budget_bytes=default_budget_bytes() if decides_itself else budget,
        scratch_bytes=loader.scratch_bytes,
    )
    if budget is not None and plan.peak_bytes > budget:
        raise ConfigurationError(
            f"a memory budget of {format_size(budget)} is too small for the weights of {manifest.name}, which need "
            f"{format_size(plan.peak_bytes)} ({plan.peak_bytes} bytes) at least; give that or more"
        )
    return plan


def find_manifest(client: SourceThread, name: str | None) -> Manifest:
    """The manifest of the model with this name, in full or a unique last part, or of the only one there is.

    Raises:
        UnknownModelError: the source has no such model.
        SurfwError: the source cannot be reached.
    """
    full = client.run(lambda source: source.resolve(name))
    return client.run(lambda source: source.manifest(full))


def _in_order(manifest: Manifest) -> list[str]:
    """The chunks in the order of their first use."""
    return list(dict.fromkeys(name for use in manifest.order for name in use.chunks))
