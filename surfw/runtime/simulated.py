"""A device without hardware: ordinary memory, and threads that copy and decode with random delays.

It behaves as badly as a device may. Memory holds garbage until its copy or decoding has been awaited; copies and
decodings begin late unless somebody waits for them; a copy into memory that computing or decoding may still read is
detected, and a copy from memory that changes too early delivers the changed bytes. Tests run models on it, and so does
`surfw bench device` on machines without a GPU.
"""

import queue
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch

from surfw.config import GB
from surfw.runtime import exponents
from surfw.runtime.buffers import Buffer
from surfw.runtime.device import Copy, Device
from surfw.runtime.exponents import Decode, Piece
from surfw.runtime.memory import DefaultBudget

_GARBAGE = 0xFF
"""Floating-point numbers made of this byte are NaN."""


@dataclass(slots=True, eq=False)
class _Work:
    """A copy or a decoding, and the point in its stream where it ends.

    Attributes:
        do: performs it.
        after: work of the other stream that it waits for.
        address: of the memory that it fills.
        is_waited_for: whether later copies wait for it.
    """

    do: Callable[[], object]
    after: tuple["_Work", ...] = ()
    address: int = 0
    is_waited_for: bool = False
    took_seconds: float = 0.0
    failed: Exception | None = None
    wanted: threading.Event = field(default_factory=threading.Event)
    done: threading.Event = field(default_factory=threading.Event)

    def query(self) -> bool:
        return self.done.is_set()

    def synchronize(self) -> None:
        self.wanted.set()
        for one in self.after:
            one.wanted.set()
        self.done.wait()
        if self.failed is not None:
            raise self.failed

    def seconds(self) -> float:
        return self.took_seconds


class _Stream:
    """Runs work in order, in a thread that delays it."""

    def __init__(self, name: str, latest_seconds: float, seed: int) -> None:
        self.last: _Work | None = None
        self._name = name
        self._latest_seconds = latest_seconds
        self._random = random.Random(seed)  # noqa: S311 - no secret
        self._works: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def add(self, work: _Work) -> _Work:
        """Queue work."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()
        self.last = work
        self._works.put(work)
        return work

    def synchronize(self) -> None:
        """Wait until all queued work is done."""
        if self._thread is not None:
            self.add(_Work(_nothing)).synchronize()

    def close(self) -> None:
        """End the thread."""
        if self._thread is not None:
            self._works.put(None)
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while (work := self._works.get()) is not None:
            if work.do is not _nothing:
                work.wanted.wait(self._random.uniform(0, self._latest_seconds))
            for one in work.after:
                one.wanted.set()
                one.done.wait()
            start = time.perf_counter()
            try:
                work.do()
            except Exception as exc:  # noqa: BLE001 - raised again in the waiting thread
                work.failed = exc
            work.took_seconds = time.perf_counter() - start
            work.do, work.after = _nothing, ()  # so that they keep no memory alive
            work.done.set()
            del work


class SimulatedDevice(Device):
    """Memory of this machine that simulates a device's.

    Attributes:
        in_use_bytes, peak_bytes: allocated memory that is still alive, now and at its peak.
        computing_seconds: what `time` returns.
    """

    torch_device = torch.device("cpu")
    name = "a simulated device"
    computing_seconds = 0.0

    def __init__(self, *, seed: int = 0, latest_seconds: float = 0.002) -> None:
        """Begin copies that nobody waits for after a random delay of up to `latest_seconds`."""
        self.decoder: Decode | None = exponents.decode
        self.in_use_bytes = self.peak_bytes = 0
        self._time = self._let_go = 0
        self._read: dict[int, int] = {}  # by address, when memory was last handed to a computation
        self._decoded: dict[int, _Work] = {}  # by address, the last decoding that reads or writes the memory
        self._copies = _Stream("surfw-simulated-copies", latest_seconds, seed)
        self._decodes = _Stream("surfw-simulated-decoder", latest_seconds, seed + 1)
        self._lock = threading.Lock()

    def find_budget(self) -> DefaultBudget:
        """A fixed amount of memory."""
        return DefaultBudget(4 * GB, "a simulated device has 4 GB")

    def allocate(self, size_bytes: int) -> torch.Tensor:
        """Memory full of garbage."""
        with torch.inference_mode(mode=False):
            memory = torch.full((size_bytes,), _GARBAGE, dtype=torch.uint8)
        with self._lock:
            self.in_use_bytes += size_bytes
            self.peak_bytes = max(self.peak_bytes, self.in_use_bytes)
            self._read.pop(_address(memory), None)
            self._decoded.pop(_address(memory), None)
        weakref.finalize(memory.untyped_storage(), self._free, size_bytes)
        return memory

    def reset_peak(self) -> None:
        """Restart the measurement of the peak."""
        self.peak_bytes = self.in_use_bytes

    def page_lock(self, buffer: Buffer) -> None:
        """Only mark the buffer as locked."""
        buffer.is_locked = True

    def copy(self, into: torch.Tensor, source: torch.Tensor) -> Copy:
        """Fill the memory with garbage now, unless something is decoded from it, and copy into it later."""
        with self._lock:
            self._expect_unread(into)
            reader = self._decoded.get(_address(into))
            assert reader is None or reader.is_waited_for, "a copy does not wait for what is decoded with its memory"
            if reader is None:
                into.fill_(_GARBAGE)
            return self._copies.add(_Work(partial(into.copy_, source), address=_address(into)))

    def decode(self, coded: torch.Tensor, piece: Piece, into: torch.Tensor) -> Copy:
        """Fill the memory with garbage now, and decode into it later."""
        with self._lock:
            self._expect_unread(into)
            into.view(torch.uint8).fill_(_GARBAGE)
            after = () if self._copies.last is None else (self._copies.last,)
            work = _Work(partial(_decode, coded, piece, into), after, _address(into))
            self._decoded[_address(coded)] = self._decoded[_address(into)] = work
            return self._decodes.add(work)

    def wait_for_decoding(self, decoded: Copy) -> None:
        """Make later copies wait."""
        assert isinstance(decoded, _Work), "decoding has an end"
        with self._lock:
            decoded.is_waited_for = True
            self._copies.add(_Work(_nothing, (decoded,)))

    @contextmanager
    def between_copies(self) -> Iterator[None]:
        """Wait for the copies on the host: computing has no stream here."""
        self._copies.synchronize()
        yield

    def time(self, work: Callable[[], object]) -> float:
        """Do the work; the returned figure is fixed and means nothing."""
        with self.between_copies():
            work()
        return self.computing_seconds

    def wait(self, copied: Copy) -> object:
        """Wait for the copy on the host: computing has no stream here that could wait."""
        assert isinstance(copied, _Work), "computing waits for copies"
        copied.synchronize()
        with self._lock:
            self._time += 1
            self._read[copied.address] = self._time
        return None

    def wait_for_computing(self, stream: object) -> None:
        """Only note it: torch on the CPU computes synchronously, so there is nothing to wait for."""
        self._let_go = self._time

    def synchronize(self) -> None:
        """Wait for all copies and decodings."""
        self._copies.synchronize()
        self._decodes.synchronize()

    def close(self) -> None:
        """End the threads."""
        self._copies.close()
        self._decodes.close()

    def _expect_unread(self, into: torch.Tensor) -> None:
        read = self._read.get(_address(into), 0)
        assert read <= self._let_go, "a copy does not wait for those who read the memory that it writes to"

    def _free(self, size_bytes: int) -> None:
        self.in_use_bytes -= size_bytes  # without the lock: a finalizer may run in a thread that holds it


def _address(memory: torch.Tensor) -> int:
    """The address of the underlying storage."""
    return memory.untyped_storage().data_ptr()


def _decode(coded: torch.Tensor, piece: Piece, into: torch.Tensor) -> None:
    exponents.decode(coded, piece, into)
    coded.fill_(_GARBAGE)


def _nothing() -> None:
    """Do nothing."""
