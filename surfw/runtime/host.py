"""The memory behind the slots of the host tier: buffers, the loads that fill them, and tensors over them.

The engine decides, under its lock, which slots are created and evicted. A ring slot gets one of a few reused buffers.
Any other slot has a buffer of its own or, if everything is resident and the source can be mapped, the file's pages.

Invariant: memory that a load may still write to is not used for another chunk.
"""

import time
from collections.abc import Hashable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from surfw.errors import ModelClosedError
from surfw.manifest import Chunk, Manifest
from surfw.metrics import Metrics
from surfw.runtime.buffers import Buffer, buffer_capacity
from surfw.runtime.device import Device
from surfw.runtime.loader import Loader, as_parameter, buffer_bytes, packed_form
from surfw.runtime.plan import ResidencyPlan
from surfw.runtime.run import IoThread, Job
from surfw.runtime.slots import Slot
from surfw.source import View
from surfw.threads import in_thread


@dataclass(slots=True, eq=False)
class Contents:
    """The contents of a slot.

    Attributes:
        chunk: the chunk that it holds or receives.
        memory: a buffer, or mapped pages; None while the chunk is being mapped.
        load: done when the chunk is loaded, or could not be.
        tensors: parameters over the memory, made at the first use.
    """

    chunk: Chunk
    memory: Buffer | View | None
    load: Job[None] = field(init=False)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)


class Tier(Protocol):
    """The memory behind a table's slots. Not thread-safe: the engine holds the lock.

    Attributes:
        spare: unused buffers of the ring, all of its size.
    """

    spare: list[Any]

    def __getitem__(self, name: str) -> Any:
        """The contents of a chunk's slot; their `load` is done when the chunk is loaded, or could not be."""

    def adopt(self, plan: ResidencyPlan) -> None:
        """Create slots for another plan from now on."""

    def load(self, slot: Slot, priority: int) -> None:
        """Begin to load a chunk."""

    def read(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of a chunk in new memory, without a slot."""

    def collect(self) -> Iterator[tuple[str, bool]]:
        """The chunks whose loads have ended since the last call, and whether they failed."""

    def check(self, contents: Any) -> None:
        """Raise the error of a load that has ended, if it failed."""

    def tensors(self, contents: Any) -> dict[str, torch.Tensor]:
        """Parameters over a chunk whose load has ended; raises the load's error if it failed."""

    def expect_unchanged(self, names: Iterable[str]) -> None:
        """Raise if a mapped file has changed since the tensors of these chunks were made."""

    def evict(self, slot: Slot) -> None:
        """Free a slot's contents, and cancel its load if it is in flight."""

    def close(self) -> None:
        """Free everything, and cancel loads in flight."""

    def loads(self) -> Mapping[str, Future[None]]:
        """The loads, ended or not, of all chunks that have a slot."""

    @property
    def anonymous_bytes(self) -> int:
        """Host memory of filled buffers that are not mapped files."""

    @property
    def mapped(self) -> Mapping[Hashable, int]:
        """The size in bytes of each file mapping; other models may share them."""


class HostTier:
    """Contents of slots in host memory. Not thread-safe: the engine holds the lock.

    Attributes:
        spare: unused buffers of the ring, all of its size.
    """

    def __init__(
        self,
        manifest: Manifest,
        loader: Loader,
        io: IoThread,
        metrics: Metrics,
        plan: ResidencyPlan,
        *,
        device: Device | None = None,
    ) -> None:
        """Start empty. `loader` fills buffers in the thread `io`; `device`, if any, page-locks and reads them."""
        self._manifest = manifest
        self._loader = loader
        self._io = io
        self._metrics = metrics
        self._contents: dict[str, Contents] = {}
        self._in_flight: dict[str, Future[None]] = {}  # loads that `collect` has not reported
        self.spare: list[Buffer] = []
        self._plan = plan
        self._device = device

    def __getitem__(self, name: str) -> Contents:
        """The contents of a chunk's slot."""
        return self._contents[name]

    def adopt(self, plan: ResidencyPlan) -> None:
        """Create slots for another plan from now on."""
        if plan.ring_bytes != self._plan.ring_bytes:
            self.spare.clear()
        self._plan = plan

    def load(self, slot: Slot, priority: int) -> None:
        """Begin to load a chunk: into a ring buffer or a buffer of its own, or mapped if everything is resident."""
        buffer = self.spare.pop() if slot.in_ring and self.spare else None
        if buffer is not None and buffer.capacity_bytes < slot.size_bytes:
            buffer = None  # freed before a larger one is allocated
        chunk = self._manifest.by_name[slot.name]
        is_shared = not slot.in_ring and self._device is None
        there = self._loader.find_shared(chunk, buffer_capacity(slot.size_bytes)) if is_shared else None
        if buffer is None and there is None and (slot.in_ring or not self._plan.everything_fits):
            buffer = Buffer(slot.size_bytes)
        contents = Contents(chunk, there or buffer)
        filling = self._fill(contents, slot.size_bytes, priority, is_shared=is_shared) if there is None else _nothing()
        contents.load = self._io.submit(filling)
        self._contents[slot.name] = contents
        self._in_flight[slot.name] = contents.load

    def read(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of a chunk in new memory, without a slot."""
        chunk = self._manifest.by_name[name]
        buffer = Buffer(buffer_bytes(chunk, self._loader.dtypes))
        self._io.run(self._loader.load(chunk, buffer, priority=0))
        return self._loader.tensors(chunk, buffer)

    def collect(self) -> Iterator[tuple[str, bool]]:
        """The chunks whose loads have ended since the last call, and whether they failed."""
        for name, load in list(self._in_flight.items()):
            if load.done():
                del self._in_flight[name]
                yield name, load.cancelled() or load.exception() is not None

    def tensors(self, contents: Contents) -> dict[str, torch.Tensor]:
        """Parameters over a chunk whose load has ended.

        Raises:
            ModelClosedError: the load was cancelled.
            SurfwError: the load failed, or a mapped file has changed.
        """
        self.check(contents)
        if isinstance(contents.memory, View):
            contents.memory.expect_unchanged()
        if not contents.tensors:
            assert contents.memory is not None, f"{contents.chunk.name} is loaded and has no memory"
            views = self._loader.tensors(contents.chunk, contents.memory)
            contents.tensors = {name: as_parameter(view) for name, view in views.items()}
        return contents.tensors

    def expect_unchanged(self, names: Iterable[str]) -> None:
        """Raise if a mapped file has changed since the tensors of these chunks were made."""
        for name in names:
            if isinstance(memory := self._contents[name].memory, View):
                memory.expect_unchanged()

    def check(self, contents: Contents) -> None:
        """Raise the error of a load that has ended, if it failed."""
        if contents.load.cancelled():
            raise ModelClosedError(f"the source of {self._manifest.name} was closed while it was read")
        contents.load.result()

    def evict(self, slot: Slot) -> None:
        """Free a slot's contents, and cancel its load if it is in flight."""
        contents = self._contents.pop(slot.name)
        self._in_flight.pop(slot.name, None)
        for tensor in contents.tensors.values():
            torch.autograd.graph.increment_version(tensor)  # a backward pass that needs it fails instead of being wrong
        contents.tensors.clear()
        buffer, ring_bytes = contents.memory, buffer_capacity(self._plan.ring_bytes)
        if not contents.load.done():
            contents.load.cancel()  # its buffer is freed once nothing writes to it any more
            return
        contents.memory = None  # even if a failed load keeps the contents alive
        if not slot.in_ring or not isinstance(buffer, Buffer) or buffer.is_shared:
            return
        if buffer.capacity_bytes == ring_bytes:
            self.spare.append(buffer)  # buffers of an earlier ring are freed

    def close(self) -> None:
        """Free everything, and cancel loads in flight; tensors that callers still hold stay valid."""
        loads = list(self.loads().values())
        self._contents.clear()
        self._in_flight.clear()
        self.spare.clear()
        for load in loads:
            load.cancel()
        self._loader.close()

    def loads(self) -> dict[str, Future[None]]:
        """The loads, ended or not, of all chunks that have a slot."""
        return {name: contents.load for name, contents in self._contents.items()}

    @property
    def anonymous_bytes(self) -> int:
        """Memory of filled buffers that are not mapped files, which the kernel counts as in use."""
        filled = [one.memory for one in self._contents.values() if one.load.done()]
        views = sum(one.memory.nbytes for one in filled if isinstance(one, View) and not one.is_mapped)
        return views + sum(one.capacity_bytes for one in filled if isinstance(one, Buffer))

    @property
    def mapped(self) -> Mapping[Hashable, int]:
        """The size in bytes of each file mapping; other models may share them."""
        found = [one.memory for one in self._contents.values() if one.load.done()]
        return {id(one): one.memory.nbytes for one in found if isinstance(one, View) and one.is_mapped}

    async def _fill(self, contents: Contents, size_bytes: int, priority: int, *, is_shared: bool) -> None:
        """Map the chunk if it has no buffer and can be mapped; else fetch it."""
        start = time.perf_counter()
        if contents.memory is None and self._device is None:
            contents.memory = await self._loader.map(contents.chunk)
        if isinstance(contents.memory, View):
            form = packed_form(contents.chunk) or contents.chunk.form("none")
            assert form is not None, "no other is mapped"
        else:
            contents.memory = buffer = contents.memory or Buffer(size_bytes)
            if self._device is not None and not buffer.is_locked:
                await in_thread(self._device.page_lock, buffer)
            form = await self._loader.load(
                contents.chunk,
                buffer,
                priority=priority,
                in_pieces=self._plan.in_pieces,
                may_map=self._plan.everything_fits and self._device is None,
            )
        if is_shared:
            self._loader.share(contents.chunk, form, contents.memory)
        self._metrics.add("fetched_bytes", form.stored_bytes)
        self._metrics.latency("fetch").observe(time.perf_counter() - start)


async def _nothing() -> None:
    """The load of a chunk that is already in memory."""
