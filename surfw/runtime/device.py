"""Devices that a model computes on: their memory, copies into it, and the order of copying and computing.

Copies have a stream of their own; computing uses the current stream of the model's thread. Events order the two in both
directions: computing waits for the copy of what it reads, and a copy waits for earlier readers of its memory. None of
these waits blocks the host. Device memory belongs to the copy stream, so freed memory is reused only by later copies.
Coded chunks (`exponents`) are decoded concurrently with the copies that follow.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

import torch

from surfw.config import MIB, is_device
from surfw.errors import ConfigurationError
from surfw.runtime.buffers import Buffer
from surfw.runtime.exponents import Decode, Piece
from surfw.runtime.memory import DefaultBudget

DEVICE_ALIGNMENT = 512
"""Sizes of memory on a device are multiples of this: what torch's allocator on CUDA rounds to."""

SIMULATED = "simulated"
"""The device that `surfw.runtime.simulated` stands in for."""

_COPIES = 4


class Copy(Protocol):
    """A copy that was issued."""

    def query(self) -> bool:
        """Whether it is done."""

    def synchronize(self) -> None:
        """Wait on the host until it is done."""

    def seconds(self) -> float:
        """How long it took; call it once it is done."""


class Device(ABC):
    """A device with memory of its own.

    Attributes:
        torch_device: torch's name for it.
        name: for messages.
        working_bytes: memory that computing takes besides weights and KV cache, as long as activations are small.
        decoder: decodes exponents in the current stream; None if the device cannot.
    """

    torch_device: torch.device
    name: str
    working_bytes: int = 0
    decoder: Decode | None = None

    @abstractmethod
    def find_budget(self) -> DefaultBudget:
        """The memory that a model may take by default."""

    @abstractmethod
    def allocate(self, size_bytes: int) -> torch.Tensor:
        """Allocate device memory: uint8, of shape (size_bytes,), writable inside and outside of inference mode.

        Raises:
            SurfwError: there is not enough.
        """

    @abstractmethod
    def page_lock(self, buffer: Buffer) -> None:
        """Page-lock a buffer for as long as it lives, so that the device can read it directly."""

    @abstractmethod
    def copy(self, into: torch.Tensor, source: torch.Tensor) -> Copy:
        """Issue a copy from host memory, after all earlier copies.

        Args:
            into: device memory.
            source: host memory of the same size, which must not change until the copy is done.
        """

    @abstractmethod
    def wait(self, copied: Copy) -> object:
        """Make later computations wait for a copy; returns the stream that they run on."""

    @abstractmethod
    def wait_for_computing(self, stream: object) -> None:
        """Make later copies wait for all computations issued so far on a stream that `wait` returned."""

    @abstractmethod
    def decode(self, coded: torch.Tensor, piece: Piece, into: torch.Tensor) -> Copy:
        """Issue a decoding, after all earlier copies and concurrent with later ones; arguments as for `Decode`.

        Computations wait for it as for a copy.
        """

    @abstractmethod
    def wait_for_decoding(self, decoded: Copy) -> None:
        """Make later copies wait for a decoding."""

    @abstractmethod
    def between_copies(self) -> AbstractContextManager[object]:
        """A context in which computations run after all earlier copies and before all later ones."""

    @abstractmethod
    def time(self, work: Callable[[], object]) -> float:
        """How many seconds the device takes for the computations of `work`, run between copies."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait on the host until the device is idle."""

    def measure_copying(self, size_bytes: int = 64 * MIB) -> float:
        """Bytes per second of copies from page-locked memory; takes `size_bytes` of memory on both sides."""
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
        """Free all resources other than memory; nothing may be copied any more."""


def open_device(device: str | torch.device) -> Device | None:
    """Open a device by name; None for the CPU.

    Args:
        device: `cpu`, `cuda`, `cuda:1`, or `auto`: the first CUDA device if torch sees one, else the CPU.

    Raises:
        ConfigurationError: there is no such device, or surfw does not support it.
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
            f"device {name!r} cannot be used: torch {torch.__version__} sees no CUDA device; name another one "
            "(device, --device), or install a torch that fits the driver"
        )
    from surfw.runtime.cuda import CudaDevice

    index = int(name.partition(":")[2] or 0) if name != "auto" else 0
    if index >= torch.cuda.device_count():
        raise ConfigurationError(
            f"device {name!r} is not there: torch sees {torch.cuda.device_count()}, counted from cuda:0; name "
            "one of these (device, --device)"
        )
    return CudaDevice(index)


def check_device(device: str | torch.device) -> str:
    """Check that surfw can compute on a device; returns its name.

    Raises:
        ConfigurationError: it cannot.
    """
    name = str(device)
    if is_device(name) or name == SIMULATED:
        return name
    if name.startswith("mps"):
        raise ConfigurationError(f"device {name[:80]!r} cannot be used yet; expected 'cpu', 'cuda' or 'auto'")
    if "," in name:
        raise ConfigurationError(
            f"device {name[:80]!r} names several, and a model computes on one; expected 'cpu', 'cuda', 'cuda:1' or "
            "'auto'"
        )
    raise ConfigurationError(f"device {name[:80]!r} is not a device; expected 'cpu', 'cuda', 'cuda:1' or 'auto'")
