"""`StreamingBaseModel`: a transformers model whose weights arrive while it runs.

`ModelLifetime` opens and closes the model, and admits one run at a time. Statistics, prefetching and resizing go
straight to the engine and do not wait for a run. No asynchronous call blocks the event loop.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Self, TypeVar, Unpack

import torch
from transformers import PreTrainedModel

from surfw.codec import PACKED_CODECS
from surfw.config import CodecChoice, OnMissing, Policy, expect
from surfw.errors import ConfigurationError
from surfw.manifest import Manifest
from surfw.models.adapted import AdaptedModel
from surfw.models.client import Source
from surfw.models.draft import OWN_FORM, OwnDraft
from surfw.models.explain import Advice, Explanation, advise, explain
from surfw.models.kv_reserve import find_quantised, generation_size
from surfw.models.options import ConnectionOptions, OpenOptions, OpenSettings, budget_bytes, expect_number
from surfw.models.progress import Progress
from surfw.models.speculation import Speculation, expect_draft, may_guess
from surfw.models.statistics import (
    CacheInfo,
    InferenceStats,
    Statistics,
    cache_info,
    find_progress,
    full_statistics,
    inference_stats,
)
from surfw.models.traced import traced
from surfw.runtime.engine import Engine
from surfw.runtime.plan import Limit, ResidencyPlan
from surfw.runtime.run import Run, current_run, wait_until_done
from surfw.threads import refuse_event_loop

T = TypeVar("T")


def to_device(value: Any, device: torch.device) -> Any:
    """Move the tensors in (nested) arguments to a device; for the CPU, return the arguments unchanged."""
    if device.type == "cpu":
        return value
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if type(value) is dict:
        return {name: to_device(one, device) for name, one in value.items()}
    return type(value)(to_device(one, device) for one in value) if type(value) in {list, tuple} else value


class StreamingBaseModel(AdaptedModel):
    """A transformers model that streams its weights from a source; call it like the resident model.

    To run a model class that transformers does not know, subclass this and set `model_class`:

        class StreamingMyModel(StreamingBaseModel):
            model_class = MyModel  # a transformers.PreTrainedModel, with its config_class

    Forward passes of one model run one after another, even when several threads or tasks call it. Everything else
    (statistics, prefetching, resizing, closing) may be called at any time from any thread. An opened model must be
    closed; `with` and `async with` open and close it.

    Attributes:
        model_class: the class to build; None uses the class named in the model's configuration, from transformers or
            registered with it.
        model_types: the `model_type`s of the configurations that this class accepts; empty for any.
        metrics: counters `hits`, `prefetched`, `stalls`, `fetched_bytes`, `decoded_bytes`; spans `stall`, `forward`,
            `decode`; latencies `fetch`, `inference`.
    """

    model_class: ClassVar[type[PreTrainedModel] | None] = None
    _speculation: Speculation | None = None
    _own_draft: OwnDraft | None = None

    def __init__(
        self,
        source: Source,
        model: str | None = None,
        *,
        cache_size: int | None = None,
        memory_budget: int | str | None = None,
        prefetch: bool = True,
        device: str | torch.device = "cpu",
        device_memory: int | str | None = None,
        dtype: str | None = None,
        on_missing: OnMissing = "error",
        policy: Policy = "auto",
        codec: CodecChoice = "auto",
        adapter: str | None = None,
        **connection: Unpack[ConnectionOptions],
    ) -> None:
        """Store the settings; the first use opens the model: a call, `warmup`, or entering its context.

        Args:
            source: a server (`ws://host:port`, `wss://…`), a store (a folder, a storage URL, a `StorageBackend`), or a
                `WeightClient` that several models share.
            model: the model's name in the source, in full or a unique last part; None if the source has only one.
            cache_size: number of layers to keep in memory; embeddings and heads over 1 MiB count as layers. One more
                may be in flight. Default: as many as fit into the available memory.
            memory_budget: instead of `cache_size`, the most memory for weights: bytes, or a size such as `1.5GB`.
                Default: what the machine and this process's control groups have left, minus headroom and what other
                open models may still take.
            prefetch: fetch the next layers while one computes.
            device: where to compute: `cpu`, `cuda`, `cuda:1`, or `auto`, which picks a CUDA device if torch sees one.
                On a device, `memory_budget` limits the host memory that holds weights not resident on the device, and
                `cache_size` counts layers on the device.
            device_memory: instead of `cache_size`, the most device memory for weights and KV cache. Default: what is
                free on the device, minus headroom.
            dtype: run in this dtype, as `from_pretrained(dtype=…)` would; default: the stored dtype.
            on_missing: `error`, or `uninitialized`: initialise weights that the checkpoint lacks and warn. surfw
                computes with missing weights in no other case.
            policy: which layers stay resident if not all fit. `auto`: a fixed subset, chosen once for the order in
                which layers run; `lru`: the most recently used.
            codec: which form of the weights to read if the source has several. `auto`: the exact form that measures
                faster. `none` or `lossless`: that form wherever it is stored; results are the same. `int8` and `int4`
                are not exact, stay packed in memory, and must be stored in the source. `none` also turns off coding
                of transfers to a device.
            adapter: the name of a LoRA adapter in the same source, applied from the start; see `set_adapter`. Passing
                an adapter's name as `model` opens its base with the adapter.
            **connection: `token`, `ssl`, `retry`, `connect_timeout`, `silence_timeout`, `storage_options`,
                `disk_cache`, `cache_dir`, `offline`, `deadline`, `encryption_key_file`, `verify_key`,
                `source_order`; see `WeightClient`.

        Raises:
            ConfigurationError: an argument is invalid, or two exclude each other (`cache_size` and `memory_budget` on
                the CPU, `cache_size` and `device_memory`).
        """
        if cache_size is not None and memory_budget is not None and str(device) == "cpu":
            raise ConfigurationError(
                f"cache_size {cache_size} and memory_budget {memory_budget} exclude each other; give one of them"
            )
        expect("model", model, str | None, "a model's name or None")
        if device_memory is not None and cache_size is not None:
            raise ConfigurationError(
                f"cache_size {cache_size} and device_memory {device_memory} exclude each other; give one of them"
            )
        if device_memory is not None and str(device) == "cpu":
            raise ConfigurationError(
                f"{device_memory} of device memory are given (device_memory, --device-memory), and the device is the "
                "CPU; name another one (device, --device)"
            )
        settings = OpenSettings(
            limit=Limit(cache_layers=cache_size, budget_bytes=budget_bytes(memory_budget), policy=policy),
            prefetch=prefetch,
            dtype=dtype,
            on_missing=on_missing,
            codec=codec,
            adapter=adapter,
            model_class=self.model_class,
            device=str(device),
            device_budget_bytes=budget_bytes(device_memory, "device_memory"),
        )
        super().__init__(source, model, settings, **connection)

    @classmethod
    def _over(cls, source: Source, model: str | None, **options: Unpack[OpenOptions]) -> Self:
        return cls(source, model, **options)

    @classmethod
    def open(cls, source: Source, model: str | None = None, **options: Unpack[OpenOptions]) -> Self:
        """Open a model now, reading only its manifest; takes the arguments of the class.

        Raises:
            ConfigurationError: an argument is invalid, or an event loop runs in this thread: use `open_async`.
            UnknownModelError: the source has no such model.
            SurfwError: the source cannot be reached, or the model cannot be built.
        """
        return cls._over(source, model, **options).__enter__()

    @classmethod
    async def open_async(cls, source: Source, model: str | None = None, **options: Unpack[OpenOptions]) -> Self:
        """Like `open`, without blocking the event loop."""
        return await cls._over(source, model, **options).__aenter__()

    @property
    def model(self) -> PreTrainedModel:
        """The underlying transformers model, in evaluation mode."""
        return self._open_here().model

    @property
    def manifest(self) -> Manifest:
        """The model's manifest: its chunks, configuration and files."""
        return self._open_here().manifest

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self._open_here().device

    @property
    def _engine(self) -> Engine:
        """The engine that loads the weights; for measurements."""
        return self._open_here().engine

    @property
    def plan(self) -> ResidencyPlan:
        """Which chunks are resident and which are streamed."""
        return self._open_here().engine.plan

    @property
    def layers(self) -> list[str]:
        """Names of the layers in the order they run; `warmup` and `prefetch_next_layers` take indices into it."""
        return list(self._open_here().layers)

    def __call__(self, *args: Any, enable_prefetch: bool = True, **kwargs: Any) -> Any:
        """Run one forward pass; arguments and result are those of the transformers model.

        Args:
            *args: passed to the transformers model.
            enable_prefetch: prefetch layers in this pass; no effect if the model was opened without prefetch.
            **kwargs: passed to the transformers model.

        Raises:
            SurfwError: weights could not be read.
            ModelClosedError: the model is closed, or was closed during the pass.
        """
        device = self._open_here().device
        moved, named = to_device(args, device), to_device(kwargs, device)
        return self.run(lambda model: model(*moved, **named), enable_prefetch=enable_prefetch)

    def run(self, work: Callable[[PreTrainedModel], T], *, enable_prefetch: bool = True) -> T:
        """Call `work` with the transformers model, exclusively and without gradients; it counts as one inference.

        Raises:
            SurfwError: weights could not be read.
            ModelClosedError: the model is closed, was closed during the run, or was replaced by another (`switch`).
        """
        parts, run = self._open_here(), current_run.get() or Run()
        with self._holding(run):
            self.expect_open(parts.model)
            start = time.perf_counter()
            try:
                with (
                    parts.engine.running(run, prefetch=enable_prefetch),
                    self.metrics.span("forward"),
                    torch.no_grad(),
                    traced(parts.model, parts.manifest),
                ):
                    result = work(parts.model)
            except BaseException:
                parts.hooks.recover()
                raise
            parts.hooks.end_run()
            self.metrics.latency("inference").observe(time.perf_counter() - start)
            return result

    async def forward_async(self, *args: Any, enable_prefetch: bool = True, **kwargs: Any) -> Any:
        """Like a call, but in the model's own thread, without blocking the event loop.

        Cancellation stops the pass at its next layer; the coroutine ends after that.
        """
        return await self._in_thread(lambda: self(*args, enable_prefetch=enable_prefetch, **kwargs))

    def switch(self, name: str) -> None:
        """Close the current model and open another one from the same source with the same settings.

        Resident layers that both models share, as fine-tunes do, stay in place and are not fetched again. Afterwards
        `model` is another object, and speculation is off (`speculate`). The switch waits for a run in progress; calls
        that wait for the old model raise `ModelClosedError`. If the new model cannot be opened, the old one stays in
        use.

        Args:
            name: the new model's name in the source, in full or a unique last part.

        Raises:
            ConfigurationError: the memory is too small for the new model, this was called from within a run, or an
                event loop runs in this thread: use `switch_async`.
            UnknownModelError: the source has no such model.
            SurfwError: the new model cannot be opened.
        """
        expect("name", name, str, "a model's name")
        refuse_event_loop("switching to another model", "'await model.switch_async(…)'")
        self._open_here()
        self._switch(name)

    def _on_switch(self) -> None:
        """End speculation: the draft may not match the new model, and a draft opened here must free its memory."""
        self._end_speculation()

    async def switch_async(self, name: str) -> None:
        """Like `switch`, without blocking the event loop."""
        await self._in_thread(lambda: self.switch(name))

    def leave_room(self, prompt_tokens: int, new_tokens: int, sequences: int = 1) -> None:
        """Reserve memory for the KV cache of your own generation loop; `generate` does this itself.

        Args:
            prompt_tokens: prompt tokens per sequence.
            new_tokens: the most new tokens per sequence.
            sequences: rows of the batch times beams.

        Raises:
            ConfigurationError: the memory budget is too small for this cache.
        """
        self._open_here().kv.reserve_for(prompt_tokens, new_tokens, sequences)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Call transformers' `generate()`; arguments, streamers and result are the same."""
        self._expect_generation()

        device = self._open_here().device
        moved, named = to_device(args, device), to_device(kwargs, device)

        def generate(model: Any) -> Any:
            size = generation_size(model, args, kwargs)
            if quantised := find_quantised(model, args, kwargs):  # it cannot be cropped after a wrong guess
                self._open_here().kv.reserve_for(*size, quantised)
                return model.generate(*moved, **named)
            guesses = may_guess(named, model.generation_config)
            return self.generate_with(size, lambda more: model.generate(*moved, **named, **more), guesses=guesses)

        return self.run(generate)

    def speculate(
        self,
        *,
        prompt_lookup: int | None = None,
        draft: "StreamingBaseModel | str | None" = None,
        draft_source: Source | None = None,
    ) -> None:
        """Turn on speculative decoding: guess tokens ahead and check them in one pass.

        Applies to generations of a single sequence and uses transformers' assisted generation: greedy answers match
        plain decoding wherever transformers' own do. Guessing pauses when it does not pay, as measured in each
        generation. A draft opened here is closed if plain passes with the draft's memory would be faster. Call without
        arguments to turn speculation off.

        Args:
            prompt_lookup: guess up to this many tokens from what followed the same words earlier in the text.
            draft: instead, a draft model: an open model; a model's name; or `self:int4` or `self:int8`, this model
                in that form. A named draft is opened here, kept fully resident within this model's budget, and closed
                with this model.
            draft_source: the source of the named draft; default: this model's source.

        Raises:
            ConfigurationError: an argument is invalid, or the memory is too small for both models.
            SurfwError: the draft cannot be opened.
        """
        expect_number("prompt_lookup", prompt_lookup, 1, kind=int | None)
        expect("draft", draft, StreamingBaseModel | str | None, "an open model, a name or None")
        has_draft = draft is not None or draft_source is not None
        if prompt_lookup is not None and has_draft:
            raise ConfigurationError("prompt_lookup and a draft exclude each other; give one of them")
        self._end_speculation()
        if prompt_lookup is None and not has_draft:
            return
        self._expect_generation()
        if isinstance(draft, str) or (draft is None and has_draft):
            self._own_draft = self._open_draft(draft, draft_source)
            draft = self._own_draft.model
        try:
            if draft is not None:
                expect_draft(self, draft)
        except ConfigurationError:
            self._end_speculation()
            raise
        self._speculation = Speculation(self.metrics, prompt_lookup=prompt_lookup, draft=draft, own=self._own_draft)

    @property
    def guesses(self) -> bool:
        """Whether speculation is on; see `speculate`."""
        return self._speculation is not None

    def _open_draft(self, name: str | None, source: Source | None) -> OwnDraft:
        """Open a draft model within this model's memory budget."""
        parts, settings, options = self._open_here(), self._settings, OpenOptions()
        if parts.below is not None:
            raise ConfigurationError(
                f"{parts.manifest.name} computes on {parts.device}, where a draft has memory of its own: open it with "
                "a device_memory, and give the open model as the draft"
            )
        kind: type[StreamingBaseModel] = StreamingBaseModel
        shown = None
        if name is not None and name.startswith(OWN_FORM):
            kind, source, form = type(self), None, name.removeprefix(OWN_FORM)
            if form not in PACKED_CODECS:
                forms = " or ".join(OWN_FORM + one for one in PACKED_CODECS)
                raise ConfigurationError(f"the draft is {name!a:.80}, expected {forms}, a model's name, or a model")
            options = OpenOptions(
                codec=form,  # type: ignore[typeddict-item]  # one of them
                dtype=settings.dtype,
                on_missing=settings.on_missing,
            )
            shown, name = name, parts.manifest.name
        place = self._client if source is None else source

        def open_draft(budget: int | None) -> StreamingBaseModel:
            options["memory_budget"] = budget
            return kind.open(place, name, **options)

        return OwnDraft(parts, open_draft, shown)

    def _end_speculation(self) -> None:
        self._speculation = None
        self._close_own_draft()

    def _close_own_draft(self) -> None:
        own, self._own_draft = self._own_draft, None
        if own is not None:
            own.close()

    def _take_apart(self) -> None:
        """Close the model and the draft that it opened."""
        if self._own_draft is not None:
            self._own_draft.model.close()
        super()._take_apart()

    def generate_with(
        self,
        size: tuple[int, int, int],
        generate: Callable[[Mapping[str, Any]], T],
        *,
        guesses: bool = True,
    ) -> T:
        """Reserve memory for a generation and run it within the current run, speculatively if `speculate` is on.

        Args:
            size: prompt tokens, the most new tokens, and the number of sequences.
            generate: calls the transformers model's `generate()` once, adding the arguments it is given.
            guesses: whether speculation is allowed; it applies to single sequences only.
        """
        speculation = self._speculation if guesses and size[2] == 1 else None
        if speculation is None or not speculation.begin(*size[:2]):
            self.leave_room(*size)
            return generate({})
        self.leave_room(*size)
        try:
            return speculation.run(self.model, generate)
        finally:
            if speculation.is_over and speculation is self._speculation:
                self._close_own_draft()

    async def generate_async(self, *args: Any, **kwargs: Any) -> Any:
        """Like `generate`, but in the model's own thread; cancellation works as in `forward_async`."""
        return await self._in_thread(lambda: self.generate(*args, **kwargs))

    async def warmup(self, layers: Iterable[int] | None = None) -> list[str]:
        """Load layers before they are needed, as many as fit into the cache.

        Args:
            layers: layer indices, counted from 0 in the order they run; default: all, from the first on.

        Returns:
            The names of the layers that are now in memory.

        Raises:
            ConfigurationError: there is no such layer.
            SurfwError: a layer could not be loaded.
        """
        parts = await self._open_async()
        if self._closing.is_set():
            raise self._closed_error()
        arrived = []
        for name, load in parts.engine.fetch(parts.layer_names(range(len(parts.layers)) if layers is None else layers)):
            await wait_until_done(load)  # cancelling the caller does not cancel the fetch
            if not load.cancelled():
                load.result()
                arrived.append(name)
            elif self._closing.is_set():
                raise self._closed_error("was closed while its layers were fetched")
        return arrived

    async def prefetch_next_layers(self, current_layer: int, prefetch_count: int = 1) -> list[str]:
        """Load the layers after a given one, wrapping around from the last to the first as decoding does.

        Args:
            current_layer: index of the layer, counted from 0 in the order they run.
            prefetch_count: how many layers to load.

        Returns:
            The names of the layers that are now in memory; fewer than `prefetch_count` if the cache is too small.

        Raises:
            ConfigurationError: there is no such layer, or the count is negative.
            SurfwError: a layer could not be loaded.
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
        """Measure transfer and compute speed; report the bottleneck and what more memory would bring.

        Takes a few seconds: two passes of the model, and reading up to 256 MB of streamed weights. The statistics do
        not include them.

        Args:
            prompt_tokens: length of the prompt; for models that do not generate, the tokens of a pass.
            new_tokens: tokens to be generated; if not 0, memory is reserved for the KV cache, as by `leave_room`.

        Raises:
            ConfigurationError: a number is out of range, the memory budget is too small for the KV cache, or an event
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
        """Like `explain`, but in the model's own thread, without blocking the event loop."""
        return await self._in_thread(lambda: self.explain(prompt_tokens=prompt_tokens, new_tokens=new_tokens))

    def get_cache_info(self) -> CacheInfo:
        """What the weight cache holds, and its hit counts."""
        return cache_info(self.metrics, self._parts, self.cache_size)

    def get_inference_stats(self) -> InferenceStats:
        """Timings of the runs so far."""
        return inference_stats(self.metrics)

    def statistics(self) -> Statistics:
        """All statistics, in the form that `surfw infer --json` prints."""
        return full_statistics(self.metrics, self._parts, self._client.refetched_blocks, self._speculation)

    def progress(self) -> Progress:
        """How far the current run has got, for a progress display."""
        return find_progress(self.metrics, self._parts)

    def advise(self, *, seconds_per_token: float, stall_share: float) -> Advice | None:
        """Estimate what more memory would bring, from a finished generation; None if no sound estimate is possible.

        Args:
            seconds_per_token: mean time per token after the first.
            stall_share: the fraction of that time spent waiting for weights.
        """
        return advise(self._open_here(), seconds_per_token=seconds_per_token, stall_share=stall_share)

    def clear_cache(self) -> None:
        """Evict every layer that is not in use and free its memory; counters are not reset."""
        if (parts := self._parts) is None:
            return
        parts.engine.clear()
        if self._busy.acquire(blocking=False):  # otherwise a run may be using table rows
            try:
                parts.tables.clear()
            finally:
                self._busy.release()

    @property
    def cache_size(self) -> int:
        """How many layers are kept in memory; 0 if the model is not open and no `cache_size` was given.

        Setting it takes effect at once, even during a run: excess layers are evicted, those in use after their use.
        """
        return self._parts.engine.plan.slots if self._parts else self._settings.limit.cache_layers or 0

    @cache_size.setter
    def cache_size(self, layers: int) -> None:
        with self._state:
            limit = replace(self._settings.limit, cache_layers=layers, budget_bytes=None)
            self._settings = replace(self._settings, limit=limit)
            if self._parts is not None:
                self._parts.engine.resize(layers)

    @property
    def memory_budget(self) -> int | None:
        """Memory budget for weights and KV cache, in bytes; None if `cache_size` is used or no budget is known yet.

        Setting it, to bytes or a size such as `1.5GB`, takes effect at once, even during a run: excess layers are
        evicted, those in use after their use. The budget includes a draft that this model opened.

        Raises:
            ConfigurationError: the budget is too small for the model; nothing changes.
        """
        if self._parts is None:
            return self._settings.limit.budget_bytes
        host = self._parts.below or self._parts.engine
        return host.limit.budget_bytes if self._own_draft is None else self._own_draft.total_bytes

    @memory_budget.setter
    def memory_budget(self, budget: int | str) -> None:
        size_bytes = budget_bytes(budget)
        if size_bytes is None:
            raise ConfigurationError("memory_budget is None, expected a number of bytes, or a size such as '1.2GB'")
        with self._state:
            limit = replace(self._settings.limit, cache_layers=None, budget_bytes=size_bytes)
            if self._parts is not None:
                host = self._parts.below or self._parts.engine
                if self._own_draft is not None and self._own_draft.total_bytes is not None:
                    self._own_draft.change_budget(size_bytes)
                else:
                    host.relimit(replace(host.limit, cache_layers=None, budget_bytes=size_bytes, reason=""))
            self._settings = replace(self._settings, limit=limit)

    def read_file(self, path: str) -> bytes:
        """Read a tokenizer file listed in the model's manifest; it blocks, so do not call it in an event loop."""
        refuse_event_loop("reading a file", f"'await asyncio.to_thread(model.read_file, {path!r})'")
        return self._read_file_of(self._open().manifest, path)

    def _read_file_of(self, manifest: Manifest, path: str) -> bytes:
        """Read a file of this model or of one of its adapters."""
        return self._client.run(lambda source: source.file(manifest, path))

    def _expect_generation(self) -> None:
        if not self.model.can_generate():
            raise ConfigurationError(
                f"{self.manifest.name} ({self.manifest.class_name}) does not generate; call it, or use forward_async"
            )
