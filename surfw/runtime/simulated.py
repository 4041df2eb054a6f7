"""A device without hardware: ordinary memory, and a thread that copies when it pleases.

It behaves as badly as a device may. Its memory is garbage until a copy into it has been waited for; copies begin late,
unless somebody waits; and a copy into memory that computing may still read, or out of memory that has changed, is
noticed. Tests run models on it, and so does `surfw bench device` where there is no card.
"""

import queue
import random
import threading
import time
import weakref
from dataclasses import dataclass, field

import torch

from surfw.config import GB
from surfw.runtime.buffers import Buffer
from surfw.runtime.device import Copy, Device
from surfw.runtime.memory import DefaultBudget

_GARBAGE = 0xFF
"""Floating-point numbers of such bytes are no numbers."""


@dataclass(slots=True, eq=False)
class _Copy:
    """A copy, and the point in the stream where it ends."""

    into: torch.Tensor | None
    source: torch.Tensor | None
    address: int
    took_seconds: float = 0.0
    wanted: threading.Event = field(default_factory=threading.Event)
    done: threading.Event = field(default_factory=threading.Event)

    def query(self) -> bool:
        return self.done.is_set()

    def synchronize(self) -> None:
        self.wanted.set()
        self.done.wait()

    def seconds(self) -> float:
        return self.took_seconds


class SimulatedDevice(Device):
    """Memory of this machine that stands for a device's.

    Attributes:
        in_use_bytes, peak_bytes: memory that was asked for and still lives, now and at most.
    """

    torch_device = torch.device("cpu")
    name = "a simulated device"

    def __init__(self, *, seed: int = 0, latest_seconds: float = 0.002) -> None:
        """Begin copies that nobody waits for after up to so many seconds."""
        self.in_use_bytes = self.peak_bytes = 0
        self._random = random.Random(seed)  # noqa: S311 - no secret
        self._latest_seconds = latest_seconds
        self._time = self._let_go = 0
        self._read: dict[int, int] = {}  # when memory was last handed to those who compute
        self._copies: queue.SimpleQueue[_Copy | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def find_budget(self) -> DefaultBudget:
        """Some memory."""
        return DefaultBudget(4 * GB, "a simulated device has 4 GB")

    def allocate(self, size_bytes: int) -> torch.Tensor:
        """Garbage."""
        memory = torch.full((size_bytes,), _GARBAGE, dtype=torch.uint8)
        with self._lock:
            self.in_use_bytes += size_bytes
            self.peak_bytes = max(self.peak_bytes, self.in_use_bytes)
            self._read.pop(memory.data_ptr(), None)
        weakref.finalize(memory.untyped_storage(), self._free, size_bytes)
        return memory

    def reset_peak(self) -> None:
        """Count the peak anew."""
        self.peak_bytes = self.in_use_bytes

    def page_lock(self, buffer: Buffer) -> None:
        """Nothing to do."""
        buffer.is_locked = True

    def copy(self, into: torch.Tensor, source: torch.Tensor) -> Copy:
        """Spoil the memory now, and fill it later."""
        with self._lock:
            read = self._read.get(into.data_ptr(), 0)
            assert read <= self._let_go, "a copy does not wait for those who read the memory that it writes to"
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="surfw-simulated-device", daemon=True)
                self._thread.start()
            into.fill_(_GARBAGE)
            copy = _Copy(into, source, into.data_ptr())
            self._copies.put(copy)
        return copy

    def wait(self, copied: Copy) -> object:
        """Wait for the copy: what computes here has no stream that could."""
        assert isinstance(copied, _Copy), "computing waits for copies"
        copied.synchronize()
        with self._lock:
            self._time += 1
            self._read[copied.address] = self._time
        return None

    def wait_for_computing(self, stream: object) -> None:
        """Note it: torch on the CPU has computed all that it was told to."""
        self._let_go = self._time

    def synchronize(self) -> None:
        """Wait for all copies."""
        if self._thread is not None:
            last = _Copy(None, None, 0)
            self._copies.put(last)
            last.synchronize()

    def close(self) -> None:
        """End the thread."""
        if self._thread is not None:
            self._copies.put(None)
            self._thread.join()
            self._thread = None

    def _free(self, size_bytes: int) -> None:
        self.in_use_bytes -= size_bytes  # without the lock: this may come at any time, in a thread that has it

    def _work(self) -> None:
        while (copy := self._copies.get()) is not None:
            copy.wanted.wait(self._random.uniform(0, self._latest_seconds))
            start = time.perf_counter()
            if copy.into is not None and copy.source is not None:
                copy.into.copy_(copy.source)
            copy.took_seconds = time.perf_counter() - start
            copy.into = copy.source = None  # neither memory is kept for it any longer
            copy.done.set()
            del copy
