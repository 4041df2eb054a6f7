"""`StreamingBaseModel`: one transformers model whose weights arrive while it runs, and what one can do with it.

`ModelLifetime` opens it, lends it to one run at a time, and closes it. Statistics, prefetching and resizing go straight
to the engine and wait for nobody. No asynchronous call blocks the event loop.
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
    """Arguments with their tensors on a device; on the CPU, they are left as they are."""
    if device.type == "cpu":
        return value
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if type(value) is dict:
        return {name: to_device(one, device) for name, one in value.items()}
    return type(value)(to_device(one, device) for one in value) if type(value) in {list, tuple} else value


class StreamingBaseModel(AdaptedModel):
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
            device: where to compute: `cpu`, `cuda`, `cuda:1`, or `auto`, which is a CUDA device where torch sees one.
                Then `memory_budget` is of the machine's memory, where weights wait that do not stay on the device;
                `cache_size` counts layers on the device.
            device_memory: instead of `cache_size`, what weights and KV cache may take on the device. Default: what is
                free there, less a headroom.
            dtype: run in this dtype, as `from_pretrained(dtype=…)` would; default: the one it is stored in.
            on_missing: `error`, or `uninitialized`: compute with weights that the checkpoint does not have, with a
                warning. The only way ever to do so.
            policy: which layers stay where not all fit. `auto`: a part of them that is chosen once, for the order in
                which they run; `lru`: those that were used last.
            codec: which form of the weights is read where the source has several: `auto` takes the exact one that the
                run is faster with, as measured; `none` or `lossless` that one wherever it is there, and the result is
                the same. `int8` and `int4` are not exact, and stay packed in memory; they have to be there. With `none`
                nothing is coded on the way to a device, either.
            adapter: the name of a LoRA adapter in the same source, which is applied from the beginning; see
                `set_adapter`. An adapter's name as `model` opens its base with it.
            **connection: `token`, `ssl`, `retry`, `connect_timeout`, `silence_timeout`, `storage_options`,
                `disk_cache`, `cache_dir`, `offline`, `deadline`, `encryption_key_file`, `verify_key`,
                `source_order`; see `WeightClient`.

        Raises:
            ConfigurationError: an argument cannot be used, or both `cache_size` and `memory_budget` are given.
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
    def device(self) -> torch.device:
        """Where the model computes."""
        return self._open_here().device

    @property
    def _engine(self) -> Engine:
        """What brings its weights; for measurements."""
        return self._open_here().engine

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
        device = self._open_here().device
        moved, named = to_device(args, device), to_device(kwargs, device)
        return self.run(lambda model: model(*moved, **named), enable_prefetch=enable_prefetch)

    def run(self, work: Callable[[PreTrainedModel], T], *, enable_prefetch: bool = True) -> T:
        """Do something with transformers' model, alone and without gradients; it counts as one inference.

        Raises:
            SurfwError: weights could not be read.
            ModelClosedError: the model is closed, was closed meanwhile, or gave its place to another one (`switch`).
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
        """One forward pass in a thread of the model's own, without blocking the event loop; otherwise as a call.

        When it is cancelled, the pass ends at its next layer, and only then this does.
        """
        return await self._in_thread(lambda: self(*args, enable_prefetch=enable_prefetch, **kwargs))

    def switch(self, name: str) -> None:
        """Run another model of the same source from now on, with the same settings; the one there was is closed.

        Layers that both have, as fine-tunes do, stay in memory where they are, and are not fetched. `model` is another
        object then, and nothing is guessed ahead any more (`speculate`). A run that goes on ends first; what waits for
        the old model ends with `ModelClosedError`. Where the new model cannot be opened, the old one goes on.

        Args:
            name: its name in the source, in full or a unique last part.

        Raises:
            ConfigurationError: the memory is too small for it, it runs just now, or an event loop runs in this thread:
                use `switch_async`.
            UnknownModelError: the source has no such model.
            SurfwError: the new model cannot be opened.
        """
        expect("name", name, str, "a model's name")
        refuse_event_loop("switching to another model", "'await model.switch_async(…)'")
        self._open_here()
        self._switch(name)

    def _on_switch(self) -> None:
        """Guess no more: no draft is known to go with the other model, and a draft of our own gives its memory back."""
        self._end_speculation()

    async def switch_async(self, name: str) -> None:
        """As `switch`, without blocking the event loop."""
        await self._in_thread(lambda: self.switch(name))

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

        device = self._open_here().device
        moved, named = to_device(args, device), to_device(kwargs, device)

        def generate(model: Any) -> Any:
            size = generation_size(model, args, kwargs)
            if quantised := find_quantised(model, args, kwargs):  # such a cache cannot take a guess back
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
        """Guess tokens ahead from now on, which one pass checks together, wherever one sequence is generated.

        Transformers' own assisted generation: greedy answers are the plain ones wherever they are there. Guessing rests
        where it does not pay, as measured in each generation. A draft that was opened here, and is slower than plain
        passes would be with its memory, is closed. Without arguments, there is no guessing any more.

        Args:
            prompt_lookup: guess up to so many tokens, from what followed the same words earlier in the text.
            draft: instead, the model that guesses: one that is open; the name of one; or `self:int4`, `self:int8`,
                this model in that form. One that is named is opened here, kept in memory as a whole within this
                model's budget, and closed with this model.
            draft_source: where the named draft is; default: where this model is.

        Raises:
            ConfigurationError: an argument cannot be used, or there is too little memory for both models.
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
        """Whether tokens are guessed ahead, see `speculate`."""
        return self._speculation is not None

    def _open_draft(self, name: str | None, source: Source | None) -> OwnDraft:
        """Open a draft within this model's budget."""
        parts, settings, options = self._open_here(), self._settings, OpenOptions()
        if parts.below is not None:
            raise ConfigurationError(
                f"{parts.manifest.name} computes on {parts.device}, where a draft has memory of its own: open it with "
                "a device_memory, and give the open model as the draft"
            )
        kind: type[StreamingBaseModel] = StreamingBaseModel
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
            name = parts.manifest.name
        place = self._client if source is None else source

        def open_draft(budget: int | None) -> StreamingBaseModel:
            options["memory_budget"] = budget
            return kind.open(place, name, **options)

        return OwnDraft(parts, open_draft)

    def _end_speculation(self) -> None:
        self._speculation = None
        self._close_own_draft()

    def _close_own_draft(self) -> None:
        own, self._own_draft = self._own_draft, None
        if own is not None:
            own.close()

    def _take_apart(self) -> None:
        """End it, and the draft that it opened."""
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
        """Leave room for a generation, as `leave_room` does, and have it done within a run; what `speculate` says.

        Args:
            size: tokens of the prompt, new ones at most, and sequences.
            generate: calls `generate()` of transformers' model once, with these arguments besides its own.
            guesses: whether it may guess; only a single sequence does.
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
        return full_statistics(self.metrics, self._parts, self._client.refetched_blocks, self._speculation)

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

    @property
    def memory_budget(self) -> int | None:
        """What weights and KV cache may take in memory, in bytes; None where layers are counted, or it is not open.

        Setting it, to bytes or a size as `1.5GB`, takes effect at once, also while the model runs: what is too much is
        evicted, or, where it is in use just now, after its use. A draft that this model opened is part of it.

        Raises:
            ConfigurationError: it is too small for the model; all stays as it was.
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
        """A tokenizer file that the model's manifest lists. It blocks, so not where an event loop runs."""
        refuse_event_loop("reading a file", f"'await asyncio.to_thread(model.read_file, {path!r})'")
        return self._read_file_of(self._open().manifest, path)

    def _read_file_of(self, manifest: Manifest, path: str) -> bytes:
        """A file of this model, or of one of its adapters."""
        return self._client.run(lambda source: source.file(manifest, path))

    def _expect_generation(self) -> None:
        if not self.model.can_generate():
            raise ConfigurationError(
                f"{self.manifest.name} ({self.manifest.class_name}) does not generate; call it, or use forward_async"
            )
