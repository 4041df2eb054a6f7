"""`ModelLifetime`: a model from its opening to its end, and who has it meanwhile.

A model is not open → being opened (by its first use) → open → closing → closed. Its opening, each run and its end hold
one lock in turn, `_busy`; `close` interrupts whichever has it.

Runs happen in the caller's thread or, for the asynchronous calls, in one thread that belongs to the model. No
asynchronous call blocks the event loop, and a plain one that would take long to open something refuses to.
"""

import asyncio
import contextvars
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import TracebackType
from typing import ClassVar, Self, TypeVar, Unpack

from surfw.codec import for_run, packed_codec
from surfw.errors import ConfigurationError, IntegrityError, ModelClosedError, UnsupportedModelError
from surfw.manifest import Manifest
from surfw.metrics import Metrics
from surfw.models.assembly import ModelParts, assemble
from surfw.models.client import Source, WeightClient
from surfw.models.options import ConnectionOptions, OpenSettings
from surfw.models.switching import switch_parts
from surfw.runtime.run import Run, current_run, run_in_executor
from surfw.skeleton.build import Skeleton
from surfw.skeleton.default_dtype import runs
from surfw.source import check_pin, find_base, refuse_second_adapter, split_pin
from surfw.threads import refuse_event_loop

T = TypeVar("T")


class ModelLifetime:
    """Opens a model over a source of weights, lends it to one run at a time, and closes it.

    Attributes:
        model_types: the configuration's `model_type`s that this class is for; empty for any.
        metrics: see `StreamingBaseModel`.
    """

    model_types: ClassVar[frozenset[str]] = frozenset()

    def __init__(
        self, source: Source, model: str | None, settings: OpenSettings, **connection: Unpack[ConnectionOptions]
    ) -> None:
        """Note what is wanted; see `StreamingBaseModel`."""
        self._settings = settings
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
                settings = self._opening()
                outer = current_run.set(run)  # what the opening waits for, it waits for as this run, which can be ended
                try:
                    manifest, adapter = self._find_manifest()
                    parts = assemble(
                        self._client,
                        manifest,
                        settings,
                        self.metrics,
                        adapter=adapter or settings.adapter,
                        take_part=self._take_part,
                    )
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

    def _take_part(self, manifest: Manifest, skeleton: Skeleton) -> tuple[Manifest, Skeleton]:
        """The part of the model that this process runs: all of it."""
        return manifest, skeleton

    def _switch(self, name: str) -> None:
        """Have another model of the source from now on; the one there was is closed.

        Raises:
            ConfigurationError: the model runs in this thread.
        """
        current = self._current
        if current is not None and current[1] == threading.get_ident():
            raise ConfigurationError(f"{self._open().manifest.name} runs just now; switch to another model after that")
        run = current_run.get() or Run()
        with self._holding(run):
            old = self._open()
            before, self._wanted = self._wanted, name
            outer = current_run.set(
                run
            )  # as in `_open`: whoever closes the model does not wait for what this waits for
            try:
                manifest, adapter = self._find_manifest()
                self._on_switch()
                parts = switch_parts(old, manifest, self._opening(), self.metrics, adapter=adapter)
            except BaseException:
                self._wanted = before
                raise
            finally:
                current_run.reset(outer)
            with self._state:
                self._parts = parts

    def _on_switch(self) -> None:
        """Another model of the source is about to take the place of this one."""

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

    def _opening(self) -> OpenSettings:
        return replace(self._settings, is_pinned=split_pin(self._wanted)[1] is not None)

    def _find_manifest(self) -> tuple[Manifest, str | None]:
        """The manifest of the model that is wanted, if this class is for such a model; and the adapter, if it is one.

        Raises:
            ConfigurationError: two adapters are wanted.
            IntegrityError: it is not the one that a pin names.
        """
        wanted, pin = split_pin(self._wanted)
        name = self._client.run(lambda source: source.resolve(wanted))
        manifest, adapter = self._client.run(lambda source: source.manifest(name)), None
        check_pin(manifest, pin, where=self._client.url)
        if pin and (packed := packed_codec(for_run(manifest, self._settings.codec, where=self._client.url))):
            raise IntegrityError(
                f"{manifest.name} is read as {packed}, which its identity does not cover; leave out the pin, or read "
                "an exact form of it (codec, --codec)"
            )
        if manifest.base is not None:
            refuse_second_adapter(manifest, self._settings.adapter)
            found_adapter, adapter = manifest, manifest.name
            manifest = self._client.run(lambda source: find_base(source, found_adapter))
        found = manifest.config.get("model_type")
        if self.model_types and found not in self.model_types:
            raise UnsupportedModelError(
                f"{manifest.name} is a {manifest.class_name} of type {str(found)[:80]!r}, but {type(self).__name__} is "
                f"for {', '.join(sorted(self.model_types))}; use StreamingModel, which opens any"
            )
        return manifest, adapter

    def expect_open(self, model: object) -> None:
        """See that what was prepared for transformers' model of before does not go to the one of now (`switch`).

        Raises:
            ModelClosedError: there is another one now.
        """
        if self._parts is not None and self._parts.model is not model:
            raise self._closed_error("has taken the place of the model that this was asked of; ask again")

    def _closed_error(self, what: str = "is closed; open it again") -> ModelClosedError:
        name = self._parts.manifest.name if self._parts else self._wanted or f"the model of {self._client.url}"
        return ModelClosedError(f"{name} {what}")

    async def _in_thread(self, work: Callable[[], T]) -> T:
        """Do the work in the model's own thread; when this is cancelled, interrupt it and wait for its end."""
        if self._closing.is_set():
            raise self._closed_error()
        return await run_in_executor(self._compute, work)
