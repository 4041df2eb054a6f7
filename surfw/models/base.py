"""`StreamingBaseModel`: one transformers model whose weights arrive while it runs, from its opening to its end.

A model is not open → being opened (by its first use) → open → closing → closed. Its opening, each run and its end hold
one lock in turn, `_busy`; `close` interrupts whichever has it. Everything else (statistics, prefetching, resizing) goes
straight to the engine and waits for nobody.

Runs happen in the caller's thread or, for the asynchronous calls, in one thread that belongs to the model. No
asynchronous call blocks the event loop, and a plain one that would take long to open or read something refuses to.
"""

import asyncio
import contextvars
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any, ClassVar, Self, TypeVar, Unpack

import torch
from transformers import PreTrainedModel

from surfw.config import OnMissing, Policy, expect
from surfw.errors import ConfigurationError, ModelClosedError, UnsupportedModelError
from surfw.manifest import Manifest
from surfw.metrics import Metrics
from surfw.models.assembly import ModelParts, assemble
from surfw.models.client import Source, WeightClient
from surfw.models.explain import Advice, Explanation, advise, explain
from surfw.models.kv_reserve import generation_size
from surfw.models.options import ConnectionOptions, OpenOptions, OpenSettings, budget_bytes, check_device, expect_number
from surfw.models.progress import Progress
from surfw.models.statistics import (
    CacheInfo,
    InferenceStats,
    Statistics,
    cache_info,
    find_progress,
    full_statistics,
    inference_stats,
)
from surfw.runtime.plan import Limit, ResidencyPlan
from surfw.runtime.run import Run, current_run, run_in_executor, wait_until_done
from surfw.skeleton.default_dtype import runs
from surfw.threads import refuse_event_loop

T = TypeVar("T")


class StreamingBaseModel:
    """A transformers model over a source of weights; call it as you would call the resident one.

    For a model class of your own that transformers does not know, subclass this and name it:

        class StreamingMyModel(StreamingBaseModel):
            model_class = MyModel  # a transformers.PreTrainedModel, with its config_class

    Forwards of one model run one after another, whichever threads and tasks they come from. Everything else
    (statistics, prefetching, resizing, closing) may be called at any time from any thread. A model that was opened has
    to be closed; `with` and `async with` do both.

    Attributes:
        model_class: the class to build; None takes the one in the model's configuration, from transformers or
            registered there.
        model_types: the configuration's `model_type`s that this class is for; empty for any.
        metrics: counters `hits`, `prefetched`, `stalls`, `fetched_bytes`; spans `stall`, `forward`; latencies `fetch`,
            `inference`.
    """

    model_class: ClassVar[type[PreTrainedModel] | None] = None
    model_types: ClassVar[frozenset[str]] = frozenset()

    def __init__(
        self,
        source: Source,
        model: str | None = None,
        *,
        cache_size: int | None = None,
        memory_budget: int | str | None = None,
        prefetch: bool = True,
        device: str | torch.device = "cpu",
        dtype: str | None = None,
        on_missing: OnMissing = "error",
        policy: Policy = "auto",
        **connection: Unpack[ConnectionOptions],
    ) -> None:
        """Note what is wanted; the first use opens it: a call, `warmup`, entering its context.

        Args:
            source: a server (`ws://host:port`, `wss://…`), a store (a folder, a storage URL, a `StorageBackend`), or a
                `WeightClient` that several models share.
            model: its name there, in full or a unique last part; None for the only one.
            cache_size: how many layers are kept in memory, counting embeddings and heads of over 1 MiB; one more may be
                in flight. Default: as many as fit into the memory there is.
            memory_budget: instead of `cache_size`, what the weights in memory may take: bytes, or a size as `1.5GB`.
                Default: what the machine and this process's control groups have left, less a headroom and what other
                open models may still take.
            prefetch: fetch the next layers while one computes.
            device: where to compute; only the CPU.
            dtype: run in this dtype, as `from_pretrained(dtype=…)` would; default: the one it is stored in.
            on_missing: `error`, or `uninitialized`: compute with weights that the checkpoint does not have, with a
                warning. The only way ever to do so.
            policy: which layers stay where not all fit. `auto`: a part of them that is chosen once, for the order in
                which they run; `lru`: those that were used last.
            **connection: `token`, `ssl`, `retry`, `connect_timeout`, `silence_timeout`, `storage_options`; see
                `WeightClient`.

        Raises:
            ConfigurationError: an argument cannot be used, or both `cache_size` and `memory_budget` are given.
        """
        if cache_size is not None and memory_budget is not None:
            raise ConfigurationError(
                f"cache_size {cache_size} and memory_budget {memory_budget} exclude each other; give one of them"
            )
        expect("model", model, str | None, "a model's name or None")
        check_device(device)
        self._settings = OpenSettings(
            limit=Limit(cache_layers=cache_size, budget_bytes=budget_bytes(memory_budget), policy=policy),
            prefetch=prefetch,
            dtype=dtype,
            on_missing=on_missing,
            model_class=self.model_class,
        )
        self._owns_client = not isinstance(source, WeightClient)
        given = sorted(name for name, value in connection.items() if value is not None)
        if given and isinstance(source, WeightClient):
            raise ConfigurationError(f"{given[0]} belongs to the WeightClient; give it there")
        if unknown := sorted(set(connection) - set(ConnectionOptions.__annotations__)):
            raise TypeError(f"{type(self).__name__} takes no argument {unknown[0]!r}")
        self.metrics = Metrics()
        self._client = source if isinstance(source, WeightClient) else WeightClient(source, **connection)
        self._wanted = model
        self._busy = threading.RLock()  # held while it is opened, while it runs, and while it is taken apart
        self._state = threading.Lock()  # guards what follows; never held for long
        self._current: tuple[Run, int] | None = None  # what holds `_busy`, and its thread
        self._parts: ModelParts | None = None
        self._compute = ThreadPoolExecutor(1, thread_name_prefix="surfw-compute")
        self._closing = threading.Event()
        self._closed = False

    @classmethod
    def _over(cls, source: Source, model: str | None, **options: Unpack[OpenOptions]) -> Self:
        return cls(source, model, **options)

    @classmethod
    def open(cls, source: Source, model: str | None = None, **options: Unpack[OpenOptions]) -> Self:
        """Open a model now; only its manifest is read before this returns. Arguments as of the class.

        Raises:
            ConfigurationError: an argument cannot be used, or an event loop runs in this thread: use `open_async`.
            UnknownModelError: the source has no such model.
            SurfwError: the source cannot be reached, or the model cannot be built.
        """
        return cls._over(source, model, **options).__enter__()

    @classmethod
    async def open_async(cls, source: Source, model: str | None = None, **options: Unpack[OpenOptions]) -> Self:
        """As `open`, without blocking the event loop."""
        return await cls._over(source, model, **options).__aenter__()

    @property
    def model(self) -> PreTrainedModel:
        """Transformers' own model, in evaluation mode."""
        return self._open_here().model

    @property
    def manifest(self) -> Manifest:
        """The model's manifest: its chunks, configuration and files."""
        return self._open_here().manifest

    @property
    def plan(self) -> ResidencyPlan:
        """The plan of what stays in memory and what is streamed."""
        return self._open_here().engine.plan

    @property
    def layers(self) -> list[str]:
        """Names of the layers, in the order they run; `warmup` and `prefetch_next_layers` count them from 0."""
        return list(self._open_here().layers)

    def __call__(self, *args: Any, enable_prefetch: bool = True, **kwargs: Any) -> Any:
        """One forward pass; arguments and result are those of the transformers model.

        Args:
            *args: as of the transformers model.
            enable_prefetch: fetch layers ahead of their use in this pass, unless the model was opened without prefetch.
            **kwargs: as of the transformers model.

        Raises:
            SurfwError: weights could not be read.
            ModelClosedError: the model is closed, or was closed meanwhile.
        """
        return self.run(lambda model: model(*args, **kwargs), enable_prefetch=enable_prefetch)

    def run(self, work: Callable[[PreTrainedModel], T], *, enable_prefetch: bool = True) -> T:
        """Do something with transformers' model, alone and without gradients; it counts as one inference.

        Raises:
            SurfwError: weights could not be read.
            ModelClosedError: the model is closed, or was closed meanwhile.
        """
        parts, run = self._open_here(), current_run.get() or Run()
        with self._holding(run):
            start = time.perf_counter()
            try:
                with (
                    parts.engine.running(run, prefetch=enable_prefetch),
                    self.metrics.span("forward"),
                    torch.no_grad(),
                ):
                    result = work(parts.model)
            except BaseException:
                parts.hooks.recover()
                raise
            self.metrics.latency("inference").observe(time.perf_counter() - start)
            return result

    async def forward_async(self, *args: Any, enable_prefetch: bool = True, **kwargs: Any) -> Any:
        """One forward pass in a thread of the model's own, without blocking the event loop; otherwise as a call.

        When it is cancelled, the pass ends at its next layer, and only then this does.
        """
        return await self._in_thread(lambda: self(*args, enable_prefetch=enable_prefetch, **kwargs))

    def leave_room(self, prompt_tokens: int, new_tokens: int, sequences: int = 1) -> None:
        """Leave memory for the KV cache of a generation of your own, as `generate` does by itself.

        Args:
            prompt_tokens: in each sequence.
            new_tokens: in each sequence, at most.
            sequences: rows of the batch, times beams.

        Raises:
            ConfigurationError: the memory budget is too small for it.
        """
        self._open_here().kv.reserve_for(prompt_tokens, new_tokens, sequences)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate with transformers' own `generate()`; arguments, streamers and result are its."""
        self._expect_generation()

        def generate(model: Any) -> Any:
            self.leave_room(*generation_size(model, args, kwargs))
            return model.generate(*args, **kwargs)

        return self.run(generate)

    async def generate_async(self, *args: Any, **kwargs: Any) -> Any:
        """As `generate`, in a thread of the model's own; cancelled as `forward_async`."""
        return await self._in_thread(lambda: self.generate(*args, **kwargs))

    async def warmup(self, layers: Iterable[int] | None = None) -> list[str]:
        """Bring layers into memory before they are needed, as many as the cache has room for.

        Args:
            layers: counted from 0 in the order they run; default: from the first on.

        Returns:
            The names of those that are in memory now.

        Raises:
            ConfigurationError: there is no such layer.
            SurfwError: one could not be loaded.
        """
        parts = await self._open_async()
        if self._closing.is_set():
            raise self._closed_error()
        arrived = []
        for name, load in parts.engine.fetch(parts.layer_names(range(len(parts.layers)) if layers is None else layers)):
            await wait_until_done(load)  # a caller that stops waiting stops no fetch
            if not load.cancelled():
                load.result()
                arrived.append(name)
            elif self._closing.is_set():
                raise self._closed_error("was closed while its layers were fetched")
        return arrived

    async def prefetch_next_layers(self, current_layer: int, prefetch_count: int = 1) -> list[str]:
        """Bring the layers after one into memory; after the last one comes the first, as in decoding.

        Args:
            current_layer: counted from 0 in the order they run.
            prefetch_count: how many.

        Returns:
            The names of those that are in memory now; fewer than asked for, if the cache has no room for more.

        Raises:
            ConfigurationError: there is no such layer, or the count is negative.
            SurfwError: one could not be loaded.
        """
        parts = await self._open_async()
        count = len(parts.layers)
        if prefetch_count < 0 or not 0 <= current_layer < count:
            raise ConfigurationError(
                f"cannot prefetch {prefetch_count} layers after layer {current_layer}: {parts.manifest.name} has "
                f"{count} layers, counted from 0"
            )
        following = range(current_layer + 1, current_layer + 1 + min(prefetch_count, count - 1))
        return await self.warmup(index % count for index in following)

    def explain(self, *, prompt_tokens: int = 1, new_tokens: int = 0) -> Explanation:
        """Measure how fast weights arrive and the model computes, and say what limits it and what more memory brings.

        Takes some seconds: two passes of the model, and reading up to 256 MB of what does not stay in memory. The
        statistics leave them out.

        Args:
            prompt_tokens: of the prompt; a pass of a model that does not generate has so many.
            new_tokens: that will be generated; if any, memory is left for the KV cache of it all, as `leave_room` does.

        Raises:
            ConfigurationError: a number cannot be used, the memory budget is too small for the KV cache, or an event
                loop runs in this thread: use `explain_async`.
            SurfwError: weights could not be read.
        """
        refuse_event_loop("measuring a model", "'await model.explain_async()'")
        expect_number("prompt_tokens", prompt_tokens, 1)
        expect_number("new_tokens", new_tokens, 0)
        parts = self._open()
        if new_tokens and parts.model.can_generate():
            parts.kv.reserve_for(prompt_tokens, new_tokens)
        return explain(parts, partial(self.run, enable_prefetch=False), prompt_tokens=prompt_tokens)

    async def explain_async(self, *, prompt_tokens: int = 1, new_tokens: int = 0) -> Explanation:
        """As `explain`, in a thread of the model's own, without blocking the event loop."""
        return await self._in_thread(lambda: self.explain(prompt_tokens=prompt_tokens, new_tokens=new_tokens))

    def get_cache_info(self) -> CacheInfo:
        """What is kept in memory, and how often weights were found there."""
        return cache_info(self.metrics, self._parts, self.cache_size)

    def get_inference_stats(self) -> InferenceStats:
        """How long the runs so far took."""
        return inference_stats(self.metrics)

    def statistics(self) -> Statistics:
        """All statistics, in the form that `surfw infer --json` prints."""
        return full_statistics(self.metrics, self._parts, self._client.refetched_blocks)

    def progress(self) -> Progress:
        """Where a run is just now, for whoever shows it."""
        return find_progress(self.metrics, self._parts)

    def advise(self, *, seconds_per_token: float, stall_share: float) -> Advice | None:
        """Say what more memory would bring, from a generation that has ended; None where nothing honest can be said.

        Args:
            seconds_per_token: the mean time of each token after the first.
            stall_share: the part of that time that was spent waiting for weights.
        """
        return advise(self._open_here(), seconds_per_token=seconds_per_token, stall_share=stall_share)

    def clear_cache(self) -> None:
        """Forget every layer that is not in use, and give its memory back. Counters go on."""
        if (parts := self._parts) is None:
            return
        parts.engine.clear()
        if self._busy.acquire(blocking=False):  # else a run may be using rows of tables just now
            try:
                parts.tables.clear()
            finally:
                self._busy.release()

    @property
    def cache_size(self) -> int:
        """How many layers are kept in memory; 0 for a model that is not open and was opened without a number.

        Setting it takes effect at once, also while the model runs: what is too much is evicted, or, where it is in use
        just now, after its use.
        """
        return self._parts.engine.plan.slots if self._parts else self._settings.limit.cache_layers or 0

    @cache_size.setter
    def cache_size(self, layers: int) -> None:
        with self._state:
            limit = replace(self._settings.limit, cache_layers=layers, budget_bytes=None)
            self._settings = replace(self._settings, limit=limit)
            if self._parts is not None:
                self._parts.engine.resize(layers)

    def read_file(self, path: str) -> bytes:
        """A tokenizer file that the model's manifest lists. It blocks, so not where an event loop runs."""
        refuse_event_loop("reading a file", f"'await asyncio.to_thread(model.read_file, {path!r})'")
        manifest = self._open().manifest
        return self._client.run(lambda source: source.file(manifest, path))

    def close(self) -> None:
        """Stop what runs, leave the source unless it is shared, and transformers' model without weights and hooks.

        A run that goes on in another thread ends with `ModelClosedError` at its next layer, and this waits for it; one
        that calls this from within is closed at its end. Closing twice is fine.
        """
        with self._state:
            self._closing.set()
            current = self._current
        is_within = False
        if current is not None:
            run, thread = current
            run.interrupt(self._closed_error("was closed while it ran") if self._parts else self._closed_error())
            is_within = thread == threading.get_ident()  # then `_holding` takes it apart, once the run has unwound
        if not is_within:
            with runs.holding(self._busy):
                self._take_apart()
        self._compute.shutdown(wait=not is_within and current_run.get() is None)

    async def close_async(self) -> None:
        """As `close`, without blocking the event loop."""
        await asyncio.to_thread(contextvars.Context().run, self.close)

    def __enter__(self) -> Self:
        """Open the model, if it is not open."""
        self._refuse_to_block()
        try:
            self._open()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        """Close."""
        self.close()

    async def __aenter__(self) -> Self:
        """Open the model, if it is not open, without blocking the event loop."""
        try:
            await self._in_thread(self._open)
        except BaseException:
            await self.close_async()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        """Close, without blocking the event loop."""
        await self.close_async()

    def __repr__(self) -> str:
        """The model's name, its source and its state."""
        state = "closed" if self._closing.is_set() else "open" if self._parts else "not open yet"
        return f"<{type(self).__name__} {self._wanted or 'the only model'} of {self._client.url}, {state}>"

    def __del__(self) -> None:
        """Warn about a model that was never closed."""
        if getattr(self, "_parts", None) is not None and not self._closing.is_set():
            warnings.warn(f"{self!r} was never closed", ResourceWarning, stacklevel=2, source=self)

    @contextmanager
    def _holding(self, run: Run) -> Iterator[None]:
        """Have the model to oneself, for a run or its opening; `run.interrupt` or `close` ends that."""
        with runs.holding(self._busy, run.check):
            with self._state:
                if self._closing.is_set():
                    raise self._closed_error()
                outer, self._current = self._current, (run, threading.get_ident())
            try:
                yield
            finally:
                with self._state:
                    self._current = outer
                    is_to_end = self._closing.is_set() and outer is None
                if is_to_end:
                    self._take_apart()

    def _take_apart(self) -> None:
        """End it; the caller holds `_busy`."""
        if not self._closed:
            self._closed = True
            with ExitStack() as last:
                if self._owns_client:
                    last.callback(self._client.close)
                if self._parts is not None:
                    self._parts.close()

    def _open(self) -> ModelParts:
        """The parts of the open model; the first call opens it. Those of a closed one are refused."""
        if self._closing.is_set():
            raise self._closed_error()
        if self._parts is not None:
            return self._parts
        run = current_run.get() or Run()
        with self._holding(run):
            if self._parts is None:  # else another thread has opened it meanwhile
                settings = self._settings
                outer = current_run.set(run)  # what the opening waits for, it waits for as this run, which can be ended
                try:
                    parts = assemble(self._client, self._find_manifest(), settings, self.metrics)
                except BaseException:
                    if self._owns_client:
                        self._client.disconnect()
                    raise
                finally:
                    current_run.reset(outer)
                with self._state:
                    self._parts = parts
                    if (layers := self._settings.limit.cache_layers) != settings.limit.cache_layers and layers:
                        parts.engine.resize(layers)  # it was set meanwhile
            return self._parts

    def _open_here(self) -> ModelParts:
        """The parts, for callers in a thread where an event loop may run; those of a closed model still tell facts."""
        self._refuse_to_block()
        return self._parts or self._open()

    async def _open_async(self) -> ModelParts:
        """The parts; opened in the model's thread if need be, without waiting for what runs there if not."""
        return await self._in_thread(self._open) if self._parts is None else self._parts

    def _refuse_to_block(self) -> None:
        if self._parts is None and not self._closing.is_set():
            refuse_event_loop("opening a model", f"'await {type(self).__name__}.open_async(…)' or 'async with'")

    def _find_manifest(self) -> Manifest:
        """The manifest of the model that is wanted, if this class is for such a model."""
        name = self._client.run(lambda source: source.resolve(self._wanted))
        manifest = self._client.run(lambda source: source.manifest(name))
        found = manifest.config.get("model_type")
        if self.model_types and found not in self.model_types:
            raise UnsupportedModelError(
                f"{manifest.name} is a {manifest.class_name} of type {str(found)[:80]!r}, but {type(self).__name__} is "
                f"for {', '.join(sorted(self.model_types))}; use StreamingModel, which opens any"
            )
        return manifest

    def _closed_error(self, what: str = "is closed; open it again") -> ModelClosedError:
        name = self._parts.manifest.name if self._parts else self._wanted or f"the model of {self._client.url}"
        return ModelClosedError(f"{name} {what}")

    def _expect_generation(self) -> None:
        if not self.model.can_generate():
            raise ConfigurationError(
                f"{self.manifest.name} ({self.manifest.class_name}) does not generate; call it, or use forward_async"
            )

    async def _in_thread(self, work: Callable[[], T]) -> T:
        """Do the work in the model's own thread; when this is cancelled, interrupt it and wait for its end."""
        if self._closing.is_set():
            raise self._closed_error()
        return await run_in_executor(self._compute, work)
