"""A device without hardware: ordinary memory, and threads that copy and decode when they please.

It behaves as badly as a device may. Its memory is garbage until what comes into it has been waited for; copies and
decodings begin late, unless somebody waits; and a copy into memory that computing or decoding may still read, or out of
memory that has changed, is noticed. Tests run models on it, and so does `surfw bench device` where there is no card.
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
"""Floating-point numbers of such bytes are no numbers."""


@dataclass(slots=True, eq=False)
class _Work:
    """A copy or a decoding, and the point in its stream where it ends.

    Attributes:
        do: does it.
        after: what of the other stream it waits for.
        address: of the memory that it fills.
        is_waited_for: whether copies wait for it.
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
    """Works that are done one after another, by a thread that takes its time."""

    def __init__(self, name: str, latest_seconds: float, seed: int) -> None:
        self.last: _Work | None = None
        self._name = name
        self._latest_seconds = latest_seconds
        self._random = random.Random(seed)  # noqa: S311 - no secret
        self._works: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def add(self, work: _Work) -> _Work:
        """Have it done after those before it."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()
        self.last = work
        self._works.put(work)
        return work

    def synchronize(self) -> None:
        """Wait until all is done."""
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
            except Exception as exc:  # noqa: BLE001 - whoever waits is told
                work.failed = exc
            work.took_seconds = time.perf_counter() - start
            work.do, work.after = _nothing, ()  # no memory is kept for it any longer
            work.done.set()
            del work


class SimulatedDevice(Device):
    """Memory of this machine that stands for a device's.

    Attributes:
        in_use_bytes, peak_bytes: memory that was asked for and still lives, now and at most.
        computing_seconds: what `time` says.
    """

    torch_device = torch.device("cpu")
    name = "a simulated device"
    computing_seconds = 0.0

    def __init__(self, *, seed: int = 0, latest_seconds: float = 0.002) -> None:
        """Begin copies that nobody waits for after up to so many seconds."""
        self.decoder: Decode | None = exponents.decode
        self.in_use_bytes = self.peak_bytes = 0
        self._time = self._let_go = 0
        self._read: dict[int, int] = {}  # when memory was last handed to those who compute
        self._decoded: dict[int, _Work] = {}  # what was decoded last out of some memory, or into it
        self._copies = _Stream("surfw-simulated-copies", latest_seconds, seed)
        self._decodes = _Stream("surfw-simulated-decoder", latest_seconds, seed + 1)
        self._lock = threading.Lock()

    def find_budget(self) -> DefaultBudget:
        """Some memory."""
        return DefaultBudget(4 * GB, "a simulated device has 4 GB")

    def allocate(self, size_bytes: int) -> torch.Tensor:
        """Garbage."""
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
        """Count the peak anew."""
        self.peak_bytes = self.in_use_bytes

    def page_lock(self, buffer: Buffer) -> None:
        """Nothing to do."""
        buffer.is_locked = True

    def copy(self, into: torch.Tensor, source: torch.Tensor) -> Copy:
        """Spoil the memory now, if nothing is decoded out of it, and fill it later."""
        with self._lock:
            self._expect_unread(into)
            reader = self._decoded.get(_address(into))
            assert reader is None or reader.is_waited_for, "a copy does not wait for what is decoded with its memory"
            if reader is None:
                into.fill_(_GARBAGE)
            return self._copies.add(_Work(partial(into.copy_, source), address=_address(into)))

    def decode(self, coded: torch.Tensor, piece: Piece, into: torch.Tensor) -> Copy:
        """Spoil the memory now, and decode into it later."""
        with self._lock:
            self._expect_unread(into)
            into.view(torch.uint8).fill_(_GARBAGE)
            after = () if self._copies.last is None else (self._copies.last,)
            work = _Work(partial(_decode, coded, piece, into), after, _address(into))
            self._decoded[_address(coded)] = self._decoded[_address(into)] = work
            return self._decodes.add(work)

    def wait_for_decoding(self, decoded: Copy) -> None:
        """Let the copies wait."""
        assert isinstance(decoded, _Work), "decoding has an end"
        with self._lock:
            decoded.is_waited_for = True
            self._copies.add(_Work(_nothing, (decoded,)))

    @contextmanager
    def between_copies(self) -> Iterator[None]:
        """Wait for the copies: what computes here has no stream."""
        self._copies.synchronize()
        yield

    def time(self, work: Callable[[], object]) -> float:
        """Do it; the figure means nothing."""
        with self.between_copies():
            work()
        return self.computing_seconds

    def wait(self, copied: Copy) -> object:
        """Wait for the copy: what computes here has no stream that could."""
        assert isinstance(copied, _Work), "computing waits for copies"
        copied.synchronize()
        with self._lock:
            self._time += 1
            self._read[copied.address] = self._time
        return None

    def wait_for_computing(self, stream: object) -> None:
        """Note it: torch on the CPU has computed all that it was told to."""
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
        self.in_use_bytes -= size_bytes  # without the lock: this may come at any time, in a thread that has it


def _address(memory: torch.Tensor) -> int:
    """Where the memory begins that this is a part of."""
    return memory.untyped_storage().data_ptr()


def _decode(coded: torch.Tensor, piece: Piece, into: torch.Tensor) -> None:
    exponents.decode(coded, piece, into)
    coded.fill_(_GARBAGE)


def _nothing() -> None:
    """Nothing is to be done."""
