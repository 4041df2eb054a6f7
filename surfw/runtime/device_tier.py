"""The memory behind the slots of a device: copies of the host tier's slots, and tensors over them.

A load borrows a chunk from the host's engine, which loads it if necessary and holds it while it is read, and copies the
whole chunk. The load ends once the copy is issued; from then on, the device keeps the order: computing waits for the
copy, and a copy waits for computations that use the previous contents of its memory. If a chunk is to be coded
(`coding`), that happens after its copy and before its load ends.

Invariant: a chunk of the host tier is held from before the copy is issued until it is done.
"""

import asyncio
import threading
import time
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field

import torch

from surfw import tracing
from surfw.errors import ModelClosedError
from surfw.manifest import Chunk
from surfw.metrics import Metrics
from surfw.runtime.buffers import Buffer
from surfw.runtime.coding import Coded, Coder
from surfw.runtime.device import Copy, Device
from surfw.runtime.host import Contents
from surfw.runtime.lender import Lender
from surfw.runtime.loader import Loader, as_parameter, flat_view
from surfw.runtime.plan import ResidencyPlan
from surfw.runtime.run import IoThread, Job
from surfw.runtime.slots import Slot
from surfw.threads import in_thread

_NOTHING = torch.empty(0, dtype=torch.uint8)


@dataclass(slots=True, eq=False)
class DeviceContents:
    """The contents of a slot on the device.

    Attributes:
        chunk: the chunk that it holds or receives.
        size_bytes: how many bytes are copied.
        memory: uint8, of shape (bytes,); empty once the slot is evicted.
        load: done when the copy was issued, or could not be.
        copied: the copy, or the decoding after it.
        streams: the streams that used the chunk.
        is_gone: whether the slot was evicted, so that nothing may be copied to its memory.
        tensors: parameters over the memory, made at the first use.
    """

    chunk: Chunk
    size_bytes: int
    memory: torch.Tensor
    load: "Future[None]" = field(init=False)
    copied: Copy | None = None
    streams: set[object] = field(default_factory=set)
    is_gone: bool = False
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)


class _Issued(Future[None]):
    """The load of a chunk whose copy was issued immediately."""

    is_ending = False

    def __init__(self) -> None:
        super().__init__()
        self.set_result(None)


class DeviceTier:
    """Contents of slots in a device's memory. Not thread-safe: the engine holds the lock.

    Attributes:
        spare: unused memory of the ring, all of its size.
    """

    def __init__(
        self, host: Lender, loader: Loader, io: IoThread, device: Device, *, metrics: Metrics, plan: ResidencyPlan
    ) -> None:
        """Start empty; chunks are copied from the host's engine."""
        self.spare: list[torch.Tensor] = []
        self._host = host
        self._loader = loader
        self._io = io
        self._device = device
        self._metrics = metrics
        self._plan = plan
        self._contents: dict[str, DeviceContents] = {}
        self._in_flight: dict[str, Future[None]] = {}  # loads that `collect` has not reported
        self._unfinished: set[Job[None]] = set()  # jobs that read host chunks, or memory of slots that may be evicted
        self._issuing = threading.Lock()
        self._coder = Coder(device)
        self._coding = asyncio.Semaphore(1)

    def __getitem__(self, name: str) -> DeviceContents:
        """The contents of a chunk's slot."""
        return self._contents[name]

    def adopt(self, plan: ResidencyPlan) -> None:
        """Create slots for another plan from now on."""
        if plan.ring_bytes != self._plan.ring_bytes and self.spare:
            self._device.synchronize()  # a copy may still write to the memory that is freed
            self.spare.clear()
        self._plan = plan
        if not plan.coding_bytes:
            with self._issuing:
                self._coder.drop()

    def load(self, slot: Slot, priority: int) -> None:
        """Begin to copy a chunk, immediately or once it is in host memory."""
        memory = self.spare.pop() if slot.in_ring and self.spare else None
        if memory is None or memory.numel() < slot.size_bytes:
            if memory is not None:
                self._device.synchronize()  # as in `adopt`
            memory = None  # freed before more is allocated
            memory = self._device.allocate(slot.size_bytes)
        contents = DeviceContents(self._host.manifest.by_name[slot.name], self._plan.sizes[slot.name], memory)
        lent = self._host.lend_ready(slot.name)
        if isinstance(lent, Coded) or (lent is not None and not self._is_to_be_coded(slot.name)):
            self._copy(contents, lent)
            contents.load = _Issued()
        else:
            contents.load = self._await_at_end(self._io.submit(self._bring(contents, lent, priority)))
        self._contents[slot.name] = contents
        self._in_flight[slot.name] = contents.load

    def read(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of a chunk in new memory, without a slot."""
        place = self._device.torch_device
        return {name: tensor.to(place) for name, tensor in self._host.host.read(name).items()}

    def collect(self) -> Iterator[tuple[str, bool]]:
        """The chunks whose loads have ended since the last call, and whether they failed."""
        for name, load in list(self._in_flight.items()):
            if load.done():
                del self._in_flight[name]
                yield name, load.cancelled() or load.exception() is not None

    def tensors(self, contents: DeviceContents) -> dict[str, torch.Tensor]:
        """Parameters over a chunk whose load has ended; later computations wait for the copy.

        Raises:
            ModelClosedError: the load was cancelled.
            SurfwError: the load failed.
        """
        self.check(contents)
        assert contents.copied is not None, f"{contents.chunk.name} is loaded and was not copied"
        contents.streams.add(self._device.wait(contents.copied))
        if not contents.tensors:
            views = self._loader.tensors_in(contents.chunk, contents.memory)
            contents.tensors = {name: as_parameter(view) for name, view in views.items()}
        return contents.tensors

    def expect_unchanged(self, names: Iterable[str]) -> None:
        """Do nothing: on a device, nothing is mapped."""

    def check(self, contents: DeviceContents) -> None:
        """Raise the error of a load that has ended, if it failed."""
        if contents.load.cancelled():
            raise ModelClosedError(f"the source of {self._host.manifest.name} was closed while it was read")
        contents.load.result()

    def evict(self, slot: Slot) -> None:
        """Free a slot's contents; later copies wait for computations that use it."""
        contents = self._contents.pop(slot.name)
        self._in_flight.pop(slot.name, None)
        for tensor in contents.tensors.values():
            torch.autograd.graph.increment_version(tensor)  # a backward pass that needs it fails instead of being wrong
        contents.tensors.clear()
        with self._issuing:
            contents.is_gone = True
            memory, contents.memory = contents.memory, _NOTHING  # a failed load may keep the contents alive
        contents.load.cancel()
        for stream in contents.streams:
            self._device.wait_for_computing(stream)
        if slot.in_ring and memory.numel() == self._plan.ring_bytes:
            self.spare.append(memory)
        elif contents.copied is not None:
            contents.copied.synchronize()  # before its memory is freed

    def close(self) -> None:
        """Free everything, and cancel loads in flight; tensors that callers still hold stay valid."""
        for contents in self._contents.values():
            with self._issuing:
                contents.is_gone = True
            contents.load.cancel()
        self._device.synchronize()  # before memory is freed that copies read or write
        wait(list(self._unfinished))
        for contents in self._contents.values():
            contents.memory = _NOTHING  # a failed load may keep the contents alive
        self._contents.clear()
        self._in_flight.clear()
        self.spare.clear()
        self._coder.drop()

    def loads(self) -> dict[str, Future[None]]:
        """The loads, ended or not, of all chunks that have a slot."""
        return {name: contents.load for name, contents in self._contents.items()}

    @property
    def anonymous_bytes(self) -> int:
        """Always 0: this is not host memory."""
        return 0

    @property
    def mapped(self) -> Mapping[Hashable, int]:
        """Always empty: a device has copies."""
        return {}

    def _is_to_be_coded(self, name: str) -> bool:
        return bool(self._plan.coding_bytes) and not self._coder.gave_up() and self._host.is_to_be_coded(name)

    async def _bring(self, contents: DeviceContents, lent: Contents | Coded | None, priority: int) -> None:
        """Copy a chunk, once it is in host memory, and code it if it is to be coded."""
        name = contents.chunk.name
        if lent is None:
            lent = await self._host.lend(name, priority)
        copied = self._copy(contents, lent)
        if copied is None or isinstance(lent, Coded) or not self._is_to_be_coded(name):
            return
        del lent  # its memory is needed for the coded chunk
        async with self._coding:
            await in_thread(copied.synchronize)
            await in_thread(self._code, contents)

    def _code(self, contents: DeviceContents) -> None:
        """Code a chunk that was copied, and keep the coded form in host memory."""
        name, memory = contents.chunk.name, contents.memory
        if contents.is_gone or contents.copied is None or self._coder.gave_up() or not self._host.claim(name):
            return
        coded = None
        try:
            coded = self._coder.encode(memory[: contents.size_bytes], contents.copied, lambda: contents.is_gone)
        finally:
            self._host.settle(name, coded, is_gone=contents.is_gone)
            if self._coder.gave_up():
                self._host.code_no_more()

    def _copy(self, contents: DeviceContents, lent: Contents | Coded) -> Copy | None:
        """Issue the copy of a lent chunk, and return the chunk to the host when it is done.

        Returns:
            The copy, or the decoding after it; None if the chunk's slot was evicted.
        """
        name = contents.chunk.name
        try:
            with self._issuing:
                copies = () if contents.is_gone else self._issue(contents, lent)
            if copies:
                self._await_at_end(self._io.submit(self._return(copies, contents, lent)))
        except BaseException:
            try:
                self._device.synchronize()  # some copies may have been issued
            finally:
                self._give_back(name, lent)
            raise
        if not copies:
            self._give_back(name, lent)
            return None
        return contents.copied

    def _issue(self, contents: DeviceContents, lent: Contents | Coded) -> Sequence[Copy]:
        """Issue the copies of a chunk."""
        into = contents.memory[: contents.size_bytes]
        if isinstance(lent, Coded):
            copies, contents.copied = self._coder.copy(lent, into)
            return copies
        assert isinstance(lent.memory, Buffer), f"{contents.chunk.name} is mapped, and a device cannot read it there"
        contents.copied = self._device.copy(into, flat_view(lent.memory)[: contents.size_bytes])
        return (contents.copied,)

    def _await_at_end(self, job: Job[None]) -> Job[None]:
        self._unfinished.add(job)
        job.add_done_callback(self._unfinished.discard)
        return job

    async def _return(self, copies: Sequence[Copy], contents: DeviceContents, lent: Contents | Coded) -> None:
        """Return a chunk to the host once it is copied."""
        name = contents.chunk.name
        try:
            await in_thread(copies[-1].synchronize)
            self._metrics.add("copied_bytes", lent.nbytes if isinstance(lent, Coded) else contents.size_bytes)
            self._metrics.add_seconds("copy", seconds := sum(one.seconds() for one in copies))
            if (trace := tracing.current()) is not None:
                now = time.perf_counter()
                trace.add("copy", f"copy {name}", now - seconds, now, {"layer": name, "tier": "device"})
        finally:
            self._give_back(name, lent)

    def _give_back(self, name: str, lent: Contents | Coded) -> None:
        if not isinstance(lent, Coded):
            self._host.give_back(name)
