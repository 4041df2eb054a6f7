"""A model that is open: transformers' model without weights, and the engine and hooks that bring them."""

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PreTrainedModel

from surfw.config import OnMissing, Policy, expect
from surfw.errors import ConfigurationError, ModelClosedError
from surfw.manifest import Manifest
from surfw.metrics import Metrics
from surfw.models.client import SourceThread
from surfw.models.needs import ROWS_BYTES, find_phases, model_needs
from surfw.models.opening import cast_dtypes, open_skeleton
from surfw.models.room import GenerationRoom
from surfw.runtime.engine import Engine
from surfw.runtime.hooks import StreamingHooks
from surfw.runtime.loader import Loader
from surfw.runtime.memory import MemoryClaim, deciding, find_default_budget, rss_bytes
from surfw.runtime.plan import Limit, ResidencyPlan
from surfw.runtime.rows import StreamedTables, tables_of
from surfw.runtime.run import Run
from surfw.skeleton.dtypes import parse_dtype
from surfw.skeleton.shared import runs

logger = logging.getLogger("surfw.models")

LimitedBy = Literal["memory_budget", "cache_layers", "default"]
"""Where the limit of a model's memory comes from; `default` is what memory there was when it was opened."""


@dataclass(frozen=True, kw_only=True)
class OpenSettings:
    """How a model is opened; see `StreamingBaseModel` for what each means."""

    cache_size: int | None
    budget_bytes: int | None
    prefetch: bool
    dtype: str | None
    on_missing: OnMissing
    policy: Policy
    model_class: type[PreTrainedModel] | None
    owns_client: bool


class OpenedModel:
    """One model over one client. Runs one forward at a time; everything else may be called from any thread meanwhile.

    Attributes:
        model: transformers' own model, in evaluation mode.
        manifest: what the source says of it.
        layers: names of the chunks that are layers, in the order they run.
        base_bytes: resident memory of the process before the first of the model's weights came.
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
        dtypes = cast_dtypes(manifest, skeleton)
        loader = Loader(client.source, manifest, dtypes)
        units = tables_of(skeleton, manifest)
        self.layers = [name for name in _in_order(manifest) if manifest.by_name[name].kind == "layer"]
        needs = model_needs(manifest, dtypes, units, buffered_bytes=client.source.buffered_bytes)
        with deciding:
            self._engine = Engine(
                manifest,
                needs,
                _limit(settings),
                loader,
                io=client.io,
                metrics=metrics,
                phases=find_phases(manifest, skeleton),
                tables=units,
                rows_bytes=ROWS_BYTES,
                prefetch=settings.prefetch,
            )
            self._claim = MemoryClaim(self._engine.claimed_bytes, lambda: self._engine.anonymous_bytes)
        if self._engine.plan.policy == "lru" and self._engine.plan.streamed:
            _warn_of_lru(manifest, self._engine.plan)
        self._room = GenerationRoom(self.model, self._engine, self._claim, is_exact=settings.budget_bytes is not None)
        self._tables = StreamedTables(units, self._engine.rows, self._engine.by_rows)
        self._hooks = StreamingHooks(skeleton, manifest, self._engine, self._tables)
        self._running = threading.RLock()  # held while the model runs
        self._state = threading.Lock()  # guards the two below; never held for long
        self._current: tuple[Run, int] | None = None
        self._closing = threading.Event()
        self._closed = False
        self._budget_is_given = settings.budget_bytes is not None
        self.base_bytes = rss_bytes()
        self._engine.warm()

    @contextmanager
    def running(self, run: Run, *, prefetch: bool = True) -> Iterator[PreTrainedModel]:
        """Run the model: alone, without gradients, counted, and interrupted by `run.interrupt` or `close`.

        Raises:
            ModelClosedError: it is closed, or was closed meanwhile.
        """
        with runs.holding(self._running, run.check):
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

    @property
    def closed(self) -> bool:
        """Whether it is closed, or is about to be."""
        return self._closing.is_set()

    @property
    def plan(self) -> ResidencyPlan:
        """What stays in memory."""
        return self._engine.plan

    @property
    def engine(self) -> Engine:
        """What keeps to the plan."""
        return self._engine

    @property
    def limited_by(self) -> LimitedBy:
        """What limits the weights in memory: what somebody said, or what memory there was."""
        if self._engine.limit.cache_layers is not None:
            return "cache_layers"
        return "memory_budget" if self._budget_is_given else "default"

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
        return self._engine.fetch(names)

    def leave_room(self, prompt_tokens: int, new_tokens: int, sequences: int = 1) -> None:
        """Leave memory for the KV cache of the generation that comes now.

        Raises:
            ConfigurationError: the memory budget that was given is too small for it.
        """
        self._room.leave(prompt_tokens, new_tokens, sequences)

    def set_room(self, size_bytes: int) -> None:
        """Leave so much memory for a KV cache from now on, and no more."""
        self._engine.reserve(size_bytes)
        self._claim.peak_bytes = self._engine.claimed_bytes

    @property
    def kv_cache_bytes(self) -> int:
        """What the KV cache took after the last forward that had one."""
        return self._room.held_bytes

    def resize(self, cache_size: int) -> None:
        """Keep another number of layers from now on."""
        self._engine.resize(cache_size)
        self._claim.peak_bytes = self._engine.claimed_bytes

    def clear(self) -> None:
        """Forget every chunk that is not in use; rows of tables too, unless the model runs just now."""
        self._engine.clear()
        if self._running.acquire(blocking=False):
            try:
                self._tables.clear()
            finally:
                self._running.release()

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
        with runs.holding(self._running):
            self._finish()
        return True

    def _finish(self) -> None:
        if not self._closed:
            self._closed = True
            with ExitStack() as last:
                if self._owns_client:
                    last.callback(self.client.close)
                last.callback(self._claim.close)
                last.callback(self._engine.close)
                self._room.close()
                self._tables.clear()
                self._hooks.detach()

    def _closed_error(self, what: str) -> ModelClosedError:
        return ModelClosedError(f"{self.manifest.name} {what}")


def _limit(settings: OpenSettings) -> Limit:
    if settings.cache_size is not None:
        return Limit(cache_layers=settings.cache_size, policy=settings.policy)
    if settings.budget_bytes is not None:
        return Limit(budget_bytes=settings.budget_bytes, policy=settings.policy)
    found = find_default_budget()
    return Limit(budget_bytes=found.budget_bytes, policy=settings.policy, reason=found.reason)


def _warn_of_lru(manifest: Manifest, plan: ResidencyPlan) -> None:
    logger.warning(
        "%s: an LRU cache of %d chunks is smaller than one pass, which uses %d: it will never hit; the policy 'auto' "
        "keeps a part of them",
        manifest.name, plan.slots, len(plan.sizes) - len(plan.fixed),
    )  # fmt: skip


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
