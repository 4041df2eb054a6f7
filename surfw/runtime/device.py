"""Devices that a model computes on: their memory, copies into it, and the order of copying and computing.

Copies have a stream of their own; computing has the one that is current where the model runs. Events order the two, in
both directions: computing waits for the copy of what it reads, and a copy waits for those who read its memory before.
None of these waits holds up the host. Memory of the device belongs to the stream of the copies, so what is given back
is used again only by later copies.
"""

import logging
import time
import weakref
from abc import ABC, abstractmethod
from contextlib import suppress
from typing import Any, Protocol

import torch

from surfw.config import MIB, format_size, is_device
from surfw.errors import ConfigurationError, SurfwError
from surfw.runtime.buffers import Buffer
from surfw.runtime.memory import DefaultBudget

logger = logging.getLogger("surfw.runtime")

DEVICE_ALIGNMENT = 512
"""Sizes of memory on a device are multiples of this: what torch's allocator on CUDA rounds to."""

SIMULATED = "simulated"
"""The device that `surfw.runtime.simulated` stands in for."""

_COPIES = 4
_WORKING_BYTES = 192 * MIB
_HEADROOM_BYTES, _HEADROOM_SHARE = 512 * MIB, 0.05


class Copy(Protocol):
    """A copy that was issued."""

    def query(self) -> bool:
        """Whether it is done."""

    def synchronize(self) -> None:
        """Wait on the host until it is."""

    def seconds(self) -> float:
        """How long it took, once it is done."""


class Device(ABC):
    """A device with memory of its own.

    Attributes:
        torch_device: as torch calls it.
        name: for people.
        working_bytes: memory that computing takes besides weights and KV cache, as long as activations are small.
    """

    torch_device: torch.device
    name: str
    working_bytes: int = 0

    @abstractmethod
    def find_budget(self) -> DefaultBudget:
        """What a model may take by default."""

    @abstractmethod
    def allocate(self, size_bytes: int) -> torch.Tensor:
        """Memory of the device: uint8, of shape (size_bytes,).

        Raises:
            SurfwError: there is none.
        """

    @abstractmethod
    def page_lock(self, buffer: Buffer) -> None:
        """Keep a buffer's pages where they are as long as it lives, so that the device reads them itself."""

    @abstractmethod
    def copy(self, into: torch.Tensor, source: torch.Tensor) -> Copy:
        """Copy from host memory, after the copies before it.

        Args:
            into: memory of the device.
            source: host memory of as many bytes, which stays as it is until the copy is done.
        """

    @abstractmethod
    def wait(self, copied: Copy) -> object:
        """Make what is computed from now on wait for a copy; the stream that it is computed on."""

    @abstractmethod
    def wait_for_computing(self, stream: object) -> None:
        """Make copies from now on wait for all that was to be computed on a stream until now, one that `wait` gave."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait on the host until the device has nothing to do."""

    def measure_copying(self, size_bytes: int = 64 * MIB) -> float:
        """Bytes per second of copies out of page-locked memory; it takes so much memory on both sides."""
        buffer, memory = Buffer(size_bytes), self.allocate(size_bytes)
        self.page_lock(buffer)
        source = torch.frombuffer(buffer.view, dtype=torch.uint8)[:size_bytes]
        self.copy(memory, source).synchronize()
        start = time.perf_counter()
        for _ in range(_COPIES):
            copied = self.copy(memory, source)
        copied.synchronize()
        return _COPIES * size_bytes / (time.perf_counter() - start)

    @abstractmethod
    def close(self) -> None:
        """Let go of all that is not memory, once nobody copies any more."""


class _CudaCopy:
    """A copy between two events of its stream; who waits for it on the host sleeps meanwhile."""

    def __init__(self) -> None:
        self.begin: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self.end: Any = torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]

    def query(self) -> bool:
        return bool(self.end.query())

    def synchronize(self) -> None:
        self.end.synchronize()

    def seconds(self) -> float:
        return float(self.begin.elapsed_time(self.end)) / 1000


class CudaDevice(Device):
    """A CUDA device."""

    working_bytes = _WORKING_BYTES

    def __init__(self, index: int) -> None:
        """Use the device of that index."""
        self.torch_device = torch.device("cuda", index)
        self.name = torch.cuda.get_device_name(index)
        self._has_warned = False
        self._copies: Any = torch.cuda.Stream(self.torch_device)  # type: ignore[no-untyped-call]

    def find_budget(self) -> DefaultBudget:
        """What is free, less a headroom; memory that torch has cached counts as free."""
        free, total = torch.cuda.mem_get_info(self.torch_device)
        reserved, used = torch.cuda.memory_reserved(self.torch_device), torch.cuda.memory_allocated(self.torch_device)
        free += reserved - used
        headroom = max(_HEADROOM_BYTES, int(total * _HEADROOM_SHARE))
        return DefaultBudget(
            max(0, free - headroom),
            f"{self.name} has {format_size(total)}, {format_size(free)} of it is free, {format_size(headroom)} is "
            "headroom",
        )

    def allocate(self, size_bytes: int) -> torch.Tensor:
        """Memory of the stream that copies."""
        try:
            with torch.cuda.stream(self._copies):
                return torch.empty(size_bytes, dtype=torch.uint8, device=self.torch_device)
        except torch.cuda.OutOfMemoryError as exc:
            raise SurfwError(
                f"{self.name} has no memory for {size_bytes} bytes of weights; close what else uses it, or give the "
                "model less of it (device_memory, --device-memory)"
            ) from exc

    def page_lock(self, buffer: Buffer) -> None:
        """Register the buffer with CUDA; it is unregistered before it is unmapped. Where that fails, warn once."""
        if buffer.is_locked:
            return
        address = torch.frombuffer(buffer.view, dtype=torch.uint8).data_ptr()
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        with torch.cuda.device(self.torch_device):
            code = runtime.cudaHostRegister(address, buffer.capacity_bytes, 0)
        buffer.is_locked = True
        if not int(code):
            weakref.finalize(buffer, _unregister, runtime, address, buffer.view)
            return
        with suppress(RuntimeError):
            torch.zeros(1, device=self.torch_device)  # takes note of the error, so that no kernel after it does
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                "host memory cannot be page-locked for %s (CUDA error %d), so copies to it are slower; allow the "
                "process more of it (ulimit -l), or give the weights less (memory_budget, --memory-budget)",
                self.name, int(code),
            )  # fmt: skip

    def copy(self, into: torch.Tensor, source: torch.Tensor) -> Copy:
        """Issue it on the stream that copies."""
        copy = _CudaCopy()
        copy.begin.record(self._copies)
        with torch.cuda.stream(self._copies):
            into.copy_(source, non_blocking=True)
        copy.end.record(self._copies)
        return copy

    def wait(self, copied: Copy) -> object:
        """Make the current stream wait."""
        stream: Any = torch.cuda.current_stream(self.torch_device)
        assert isinstance(copied, _CudaCopy), "computing waits for copies"
        stream.wait_event(copied.end)
        return stream

    def wait_for_computing(self, stream: Any) -> None:
        """Make the stream that copies wait."""
        self._copies.wait_stream(stream)

    def synchronize(self) -> None:
        """Wait for all streams."""
        torch.cuda.synchronize(self.torch_device)

    def close(self) -> None:
        """Let torch give back what it has cached for this."""
        torch.cuda.empty_cache()


def _unregister(runtime: Any, address: int, _view: memoryview) -> None:
    """Let the pages of a buffer go; the view has kept them mapped until now."""
    runtime.cudaHostUnregister(address)


def open_device(device: str | torch.device) -> Device | None:
    """A device by its name; None for the CPU.

    Args:
        device: `cpu`, `cuda`, `cuda:1`, or `auto`: the first CUDA device where torch sees one.

    Raises:
        ConfigurationError: there is no such device, or surfw does not compute there.
    """
    name = check_device(device)
    if name == SIMULATED:
        from surfw.runtime.simulated import SimulatedDevice

        return SimulatedDevice()
    is_there = torch.cuda.is_available()
    if name == "cpu" or (name == "auto" and not is_there):
        return None
    if not is_there:
        raise ConfigurationError(
            f"device {name!r} cannot be used: torch {torch.__version__} sees no CUDA device; compute on the CPU "
            "(device 'cpu'), or install a torch that fits the driver"
        )
    index = int(name.partition(":")[2] or 0) if name != "auto" else 0
    if index >= torch.cuda.device_count():
        raise ConfigurationError(
            f"device {name!r} is not there: torch sees {torch.cuda.device_count()}, counted from cuda:0"
        )
    return CudaDevice(index)


def check_device(device: str | torch.device) -> str:
    """The name of a device that surfw computes on.

    Raises:
        ConfigurationError: it is none.
    """
    name = str(device)
    if is_device(name) or name == SIMULATED:
        return name
    if name.startswith("mps"):
        raise ConfigurationError(f"device {name[:80]!r} cannot be used yet; expected 'cpu', 'cuda' or 'auto'")
    raise ConfigurationError(f"device {name[:80]!r} is not a device; expected 'cpu', 'cuda', 'cuda:1' or 'auto'")
