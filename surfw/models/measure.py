"""Measures how fast a model's weights can be read and how fast it computes, in a few seconds.

Both measure what a run does: reads go through the model's own source and are verified; passes are forwards of the
model itself. Both are bounded in time and bytes.
"""

import asyncio
import inspect
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from surfw.config import BLOCK_BYTES, MB, MIB
from surfw.manifest import Chunk, Form
from surfw.models.assembly import ModelParts
from surfw.runtime.buffers import Buffer
from surfw.runtime.device_engine import DeviceEngine
from surfw.runtime.run import Run, current_run
from surfw.source import ChunkSource, Read
from surfw.storage.local_reader import FileRange, LocalReader

RunModel = Callable[[Callable[[PreTrainedModel], None]], None]
"""Calls a function with the transformers model, with exclusive use of it."""

READ_SECONDS, READ_BYTES = 1.5, 256 * MB
"""Once either is reached, no further piece is read."""

PASS_SECONDS = 5.0
"""After this time a pass is interrupted, and its result scaled up from the part that ran."""

_LEAST_BYTES = 32 * MB
"""Smaller reads are too short to measure a disk's speed."""

_PASSES = 8
_QUICK_PASSES_SECONDS = 2.0
"""After this time, no further pass is started."""

_READERS = 2
_LARGEST_PIECE = 32 * MIB
_QUICK_SECONDS = 0.1
SPARE_POSITIONS = 2
"""Positions that some families, such as RoBERTa, reserve."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Computing:
    """Compute time of the model.

    Attributes:
        seconds: compute time of one pass: the modules with weights alone, without any waiting.
        share: the fraction of the weights that was measured; below 1, `seconds` is scaled up from it.
    """

    seconds: float
    share: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """Amount and time of a measured read.

    Attributes:
        stored_bytes: stored bytes read.
        seconds: time taken.
    """

    stored_bytes: int
    seconds: float

    @property
    def bytes_per_second(self) -> float:
        """Stored bytes per second."""
        return self.stored_bytes / self.seconds


class _Enough(Exception):  # noqa: N818 - not an error: it ends a pass that takes too long
    """The time limit for a pass was reached."""


Fetch = Callable[[int, int, memoryview], Awaitable[object]]
"""Reads a range of stored bytes, given by start and stop, into memory of that size."""


def measure_reading(parts: ModelParts) -> Reading | None:
    """Read streamed chunks for a while, each at most once; None if no chunk is streamed."""
    plan, manifest = (parts.below or parts.engine).plan, parts.manifest
    names = set(plan.streamed)
    if plan.expert_bytes < plan.all_expert_bytes:
        names |= {chunk.name for one in manifest.experts.values() for chunk in one.chunks}
    streamed = ((chunk, parts.forms.form(chunk)) for chunk in manifest.chunks if chunk.name in names)
    forms = [(chunk, form) for chunk, form in streamed if form.stored_bytes]

    async def read(source: ChunkSource) -> Reading:
        def fetch(chunk: Chunk, form: Form, start: int, stop: int, view: memoryview) -> Awaitable[object]:
            return source.fetch(manifest, [Read(chunk, form, start, stop, view)])

        tiers: dict[bool, list[tuple[int, Fetch]]] = {}
        for chunk, form in forms:
            is_near = any(form is one for one in source.near(manifest, chunk))
            tiers.setdefault(is_near, []).append((form.stored_bytes, partial(fetch, chunk, form)))
        return _joined([(tier, await _read_for_a_while(tier)) for tier in tiers.values()])

    return parts.client.run(read) if forms else None


def _joined(tiers: Sequence[tuple[Sequence[tuple[int, Fetch]], Reading]]) -> Reading:
    """Combine measurements of local and remote chunks, each tier at its own rate."""
    if len(tiers) == 1:
        return tiers[0][1]
    sizes = [sum(size for size, _ in tier) for tier, _ in tiers]
    seconds = sum(size / reading.bytes_per_second for size, (_, reading) in zip(sizes, tiers, strict=True))
    return Reading(stored_bytes=sum(sizes), seconds=seconds)


def measure_copying(parts: ModelParts) -> float | None:
    """Bytes per second from host memory to the device; None if a pass copies nothing."""
    engine = parts.engine
    copies = isinstance(engine, DeviceEngine) and engine.plan.bytes_per_pass
    return engine.device.measure_copying() if copies and isinstance(engine, DeviceEngine) else None


def measure_files(files: Sequence[Path]) -> Reading | None:
    """Read local files for a while, bypassing the page cache as for weights; None if there is too little to measure.

    Raises:
        StorageError: a file cannot be read.
    """
    sizes = {path: path.stat().st_size for path in files}
    if sum(sizes.values()) < _LEAST_BYTES:
        return None

    async def read() -> Reading:
        def fetch(path: Path, start: int, stop: int, view: memoryview) -> Awaitable[object]:
            return reader.read([FileRange(path, start, stop)], view, None, urgent=False)

        with closing(LocalReader()) as reader:
            return await _read_for_a_while([(size, partial(fetch, path)) for path, size in sizes.items() if size])

    return asyncio.run(read())


async def _read_for_a_while(stored: Sequence[tuple[int, Fetch]]) -> Reading:
    """Read two pieces at a time, as in a run; pieces grow while they arrive quickly.

    Args:
        stored: the size of each object to read, and its reader.
    """
    left = deque((size, fetch, 0) for size, fetch in stored)  # with the next offset in each
    allowed = READ_BYTES
    largest = min(_LARGEST_PIECE, max(size for size, _ in stored))
    views = [Buffer(largest).view for _ in range(_READERS)]
    for view in views:
        view[:] = bytes(len(view))  # touched once, to fault in the pages
    began = time.perf_counter()

    async def read(view: memoryview) -> None:
        nonlocal allowed
        length = BLOCK_BYTES
        while left and allowed > 0 and (now := time.perf_counter()) - began < READ_SECONDS:
            size, fetch, start = left.popleft()
            stop = min(start + length, size)
            if stop < size:
                left.appendleft((size, fetch, stop))
            allowed -= stop - start
            await fetch(start, stop, view[: stop - start])
            if time.perf_counter() - now < _QUICK_SECONDS:
                length = min(2 * length, _LARGEST_PIECE)

    await asyncio.gather(*map(read, views))
    return Reading(stored_bytes=READ_BYTES - allowed, seconds=time.perf_counter() - began)


def measure_computing(parts: ModelParts, run: RunModel, prompt_tokens: int) -> Computing | None:
    """Run passes without prefetch, and add up the least time of each module with weights.

    A pass of a model that generates has one token, as in decoding; other models get the whole prompt. If the first pass
    does not end in time, the result is scaled up from the part that ran. None for a model that takes no token ids, or
    if not even one layer ran in time.
    """
    if parts.model.main_input_name != "input_ids":
        return None
    interruptible = Run()
    timer = threading.Timer(PASS_SECONDS, interruptible.interrupt, [_Enough()])
    start = time.perf_counter()

    def run_passes(model: PreTrainedModel) -> None:
        first, again = _passes(model, prompt_tokens)
        first()
        watch.end_pass()
        for _ in range(_PASSES):
            again()
            watch.end_pass()
            if time.perf_counter() - start > _QUICK_PASSES_SECONDS:
                break

    with ExitStack() as last:
        watch = _Stopwatch(parts)
        last.callback(watch.close)
        last.callback(current_run.reset, current_run.set(interruptible))
        last.callback(timer.join)
        last.callback(timer.cancel)
        timer.start()
        with suppress(_Enough):
            run(run_passes)
    return watch.result()


class _Stopwatch:
    """Times the innermost modules with weights, without the time spent waiting."""

    def __init__(self, parts: ModelParts) -> None:
        uses = {use.module: use.chunks for use in parts.manifest.order}
        inner = [name for name in uses if name and not any(other.startswith(f"{name}.") for other in uses)]
        size = {chunk.name: chunk.payload_bytes for chunk in parts.manifest.chunks}
        self._bytes = {name: sum(size[chunk] for chunk in uses[name]) for name in inner}
        self._metrics = parts.engine.metrics
        self._synchronize = parts.synchronize
        self._took: dict[str, float] = {}
        self._least: dict[str, float] = {}
        self._began = 0.0
        self._recurring: frozenset[str] = frozenset()
        self._hooks: list[RemovableHandle] = []
        for name in inner:
            module = parts.model.get_submodule(name)
            self._hooks += [
                module.register_forward_pre_hook(self._begin),
                module.register_forward_hook(partial(self._end, name), prepend=True),
            ]

    def end_pass(self) -> None:
        """Record the end of a pass; the modules that ran in the latest pass are the recurring ones."""
        for name, seconds in self._took.items():
            self._least[name] = min(seconds, self._least.get(name, seconds))
        self._recurring = frozenset(self._took)
        self._took.clear()

    def result(self) -> Computing | None:
        """The result of the completed passes; if no pass was completed, that of the interrupted one."""
        seconds = sum(self._least[name] for name in self._recurring)
        share = 1.0
        if not self._recurring:
            seconds = sum(self._took.values())
            share = sum(self._bytes[name] for name in self._took) / max(1, sum(self._bytes.values()))
        return Computing(seconds=seconds / share, share=share) if seconds and share else None

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _begin(self, *_: object) -> None:
        self._synchronize()
        self._began = self._clock()

    def _end(self, name: str, *_: object) -> None:
        self._synchronize()
        self._took[name] = self._took.get(name, 0.0) + self._clock() - self._began

    def _clock(self) -> float:
        """Seconds in which the model ran and did not wait."""
        return self._metrics.seconds("forward") - self._metrics.seconds("stall")


def most_positions(config: Any) -> int | None:
    """The number of tokens that a model has positions for; None if unlimited, which some configurations write as -1."""
    positions = getattr(config, "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


def _passes(model: Any, prompt_tokens: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """A first forward, and a repeatable one; with an encoder and a decoder, the latter skips the encoder."""
    config = model.config.get_text_config()
    positions = most_positions(config) or prompt_tokens + SPARE_POSITIONS
    tokens = 1 if model.can_generate() else max(1, min(prompt_tokens, positions - SPARE_POSITIONS))
    ids = torch.full((1, tokens), _harmless_id(config), dtype=torch.int64, device=model.device)
    options: dict[str, Any] = {}
    arguments = inspect.signature(model.forward).parameters.values()
    if model.can_generate() and any(one.name == "use_cache" or one.kind is one.VAR_KEYWORD for one in arguments):
        options["use_cache"] = False
    if model.config.is_encoder_decoder:
        options["decoder_input_ids"] = ids
    if not (model.config.is_encoder_decoder and model.can_generate()):
        return (lambda: model(input_ids=ids, **options),) * 2
    seen: list[torch.Tensor] = []
    return (
        lambda: seen.append(model(input_ids=ids, return_dict=True, **options).encoder_last_hidden_state),
        lambda: model(encoder_outputs=(seen[0],), **options),
    )


def _harmless_id(config: Any) -> int:
    """A token id that the model accepts: its end token, if it names one."""
    end = getattr(config, "eos_token_id", None)
    end = end[0] if isinstance(end, list) and end else end
    return min(end if isinstance(end, int) else 1, int(config.vocab_size) - 1)
