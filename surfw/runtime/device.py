"""Devices that a model computes on: their memory, copies into it, and the order of copying and computing.

Copies have a stream of their own; computing has the one that is current where the model runs. Events order the two, in
both directions: computing waits for the copy of what it reads, and a copy waits for those who read its memory before.
None of these waits holds up the host. Memory of the device belongs to the stream of the copies, so what is given back
is used again only by later copies. What arrives coded (`exponents`) is decoded beside the copies that come after it.
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
        """Wait on the host until it is."""

    def seconds(self) -> float:
        """How long it took, once it is done."""


class Device(ABC):
    """A device with memory of its own.

    Attributes:
        torch_device: as torch calls it.
        name: for people.
        working_bytes: memory that computing takes besides weights and KV cache, as long as activations are small.
        decoder: decodes exponents in the current stream; None where the device does not.
    """

    torch_device: torch.device
    name: str
    working_bytes: int = 0
    decoder: Decode | None = None

    @abstractmethod
    def find_budget(self) -> DefaultBudget:
        """What a model may take by default."""

    @abstractmethod
    def allocate(self, size_bytes: int) -> torch.Tensor:
        """Memory of the device: uint8, of shape (size_bytes,), which threads write to whatever mode they are in.

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
    def decode(self, coded: torch.Tensor, piece: Piece, into: torch.Tensor) -> Copy:
        """Decode what the copies until now bring, beside the copies from now on; as of `Decode`.

        What is computed waits for it as for a copy.
        """

    @abstractmethod
    def wait_for_decoding(self, decoded: Copy) -> None:
        """Make copies from now on wait until something is decoded."""

    @abstractmethod
    def between_copies(self) -> AbstractContextManager[object]:
        """What is computed inside comes after the copies until now, and before those from now on."""

    @abstractmethod
    def time(self, work: Callable[[], object]) -> float:
        """How many seconds the device takes for what work computes between copies."""

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
    """The name of a device that surfw computes on.

    Raises:
        ConfigurationError: it is none.
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
