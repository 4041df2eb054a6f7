"""`ModelLifetime`: opening, exclusive use and closing of a model.

States: not open → opening (at the first use) → open → closing → closed. Opening, each run and the teardown hold one
lock, `_busy`; `close` interrupts its holder.

Runs happen in the caller's thread or, for asynchronous calls, in one thread that belongs to the model. No asynchronous
call blocks the event loop, and a synchronous call that would open the model inside an event loop is refused.
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
    """Opens a model over a source of weights, admits one run at a time, and closes it.

    Attributes:
        model_types: the `model_type`s of the configurations that this class accepts; empty for any.
        metrics: see `StreamingBaseModel`.
    """

    model_types: ClassVar[frozenset[str]] = frozenset()

    def __init__(
        self, source: Source, model: str | None, settings: OpenSettings, **connection: Unpack[ConnectionOptions]
    ) -> None:
        """Store the settings; see `StreamingBaseModel`."""
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
        self._busy = threading.RLock()  # held while it is opened, runs, or is taken apart
        self._state = threading.Lock()  # guards what follows; never held for long
        self._current: tuple[Run, int] | None = None  # the run that holds `_busy`, and its thread
        self._parts: ModelParts | None = None
        self._compute = ThreadPoolExecutor(1, thread_name_prefix="surfw-compute")
        self._closing = threading.Event()
        self._closed = False

    def close(self) -> None:
        """Stop a run, close the source unless it is shared, and remove weights and hooks from the transformers model.

        A run in another thread ends with `ModelClosedError` at its next layer, and this waits for it. When called from
        within a run, the model is closed at the end of that run. Closing twice is fine.
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
        """Like `close`, without blocking the event loop."""
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
        """Close the model."""
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
        """Close the model, without blocking the event loop."""
        await self.close_async()

    def __repr__(self) -> str:
        """Show the model's name, source and state."""
        state = "closed" if self._closing.is_set() else "open" if self._parts else "not open yet"
        return f"<{type(self).__name__} {self._wanted or 'the only model'} of {self._client.url}, {state}>"

    def __del__(self) -> None:
        """Warn about a model that was never closed."""
        if getattr(self, "_parts", None) is not None and not self._closing.is_set():
            warnings.warn(f"{self!r} was never closed", ResourceWarning, stacklevel=2, source=self)

    @contextmanager
    def _holding(self, run: Run) -> Iterator[None]:
        """Hold the model exclusively, for a run or for opening it; `run.interrupt` or `close` ends the wait."""
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
        """Close the parts and an owned client; the caller holds `_busy`."""
        if not self._closed:
            self._closed = True
            with ExitStack() as last:
                if self._owns_client:
                    last.callback(self._client.close)
                if self._parts is not None:
                    self._parts.close()

    def _open(self) -> ModelParts:
        """Return the parts of the model, opening it at the first call; raise if it is closed."""
        if self._closing.is_set():
            raise self._closed_error()
        if self._parts is not None:
            return self._parts
        run = current_run.get() or Run()
        with self._holding(run):
            if self._parts is None:  # else another thread has opened it
                settings = self._opening()
                outer = current_run.set(run)  # so that interrupting this run also interrupts what opening waits for
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
                        parts.engine.resize(layers)  # it was set in the meantime
            return self._parts

    def _take_part(self, manifest: Manifest, skeleton: Skeleton) -> tuple[Manifest, Skeleton]:
        """Select the part of the model that this process runs; here, all of it."""
        return manifest, skeleton

    def _switch(self, name: str) -> None:
        """Open another model of the source in place of this one, and close the old one.

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
            outer = current_run.set(run)  # as in `_open`: `close` can interrupt what this waits for
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
        """Called before another model replaces this one."""

    def _open_here(self) -> ModelParts:
        """Return the parts, but refuse to open the model in an event loop; a closed model's parts stay readable."""
        self._refuse_to_block()
        return self._parts or self._open()

    async def _open_async(self) -> ModelParts:
        """Return the parts; only a model that is not open yet waits for the model's thread."""
        return await self._in_thread(self._open) if self._parts is None else self._parts

    def _refuse_to_block(self) -> None:
        if self._parts is None and not self._closing.is_set():
            refuse_event_loop("opening a model", f"'await {type(self).__name__}.open_async(…)' or 'async with'")

    def _opening(self) -> OpenSettings:
        return replace(self._settings, is_pinned=split_pin(self._wanted)[1] is not None)

    def _find_manifest(self) -> tuple[Manifest, str | None]:
        """Find the manifest of the wanted model, and check its type; for an adapter, its base and the adapter's name.

        Raises:
            ConfigurationError: two adapters are given.
            IntegrityError: the model does not match its pin, or is pinned and would be read in a packed form.
            UnsupportedModelError: this class is for other model types.
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
        return self._client.run(lambda source: source.manifest_to_open(manifest)), adapter

    def expect_open(self, model: object) -> None:
        """Check that `model` is still the open transformers model, and was not replaced by `switch`.

        Raises:
            ModelClosedError: it was replaced.
        """
        if self._parts is not None and self._parts.model is not model:
            raise self._closed_error("has taken the place of the model that this was asked of; ask again")

    def _closed_error(self, what: str = "is closed; open it again") -> ModelClosedError:
        name = self._parts.manifest.name if self._parts else self._wanted or f"the model of {self._client.url}"
        return ModelClosedError(f"{name} {what}")

    async def _in_thread(self, work: Callable[[], T]) -> T:
        """Run `work` in the model's own thread; on cancellation, interrupt it and wait for it to end."""
        if self._closing.is_set():
            raise self._closed_error()
        return await run_in_executor(self._compute, work)
