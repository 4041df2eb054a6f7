"""CUDA devices, with torch's streams, events and page-locked memory."""

import logging
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from importlib.util import find_spec
from typing import Any

import torch

from surfw.config import MIB, format_size
from surfw.errors import SurfwError
from surfw.runtime.buffers import Buffer
from surfw.runtime.device import Copy, Device
from surfw.runtime.exponents import Piece
from surfw.runtime.memory import DefaultBudget

logger = logging.getLogger("surfw.runtime")

_WORKING_BYTES = 192 * MIB
_HEADROOM_BYTES, _HEADROOM_SHARE = 512 * MIB, 0.05


class _CudaCopy:
    """A copy or a decoding between two events of its stream; waiting for it on the host sleeps instead of spinning."""

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
        """Use the device with this index."""
        self.torch_device = torch.device("cuda", index)
        self.name = torch.cuda.get_device_name(index)
        self._has_warned = False
        self._copies: Any = torch.cuda.Stream(self.torch_device)  # type: ignore[no-untyped-call]
        self._decodes: Any = torch.cuda.Stream(self.torch_device)  # type: ignore[no-untyped-call]
        if find_spec("triton"):
            self.decoder = _decode

    def find_budget(self) -> DefaultBudget:
        """The free memory, less a headroom; memory that torch has cached counts as free."""
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
        """Allocate memory that belongs to the copy stream."""
        try:
            with torch.cuda.stream(self._copies), torch.inference_mode(mode=False):
                return torch.empty(size_bytes, dtype=torch.uint8, device=self.torch_device)
        except torch.cuda.OutOfMemoryError as exc:
            raise SurfwError(
                f"{self.name} has no memory for {size_bytes} bytes of weights; close what else uses it, or give the "
                "model less of it (device_memory, --device-memory)"
            ) from exc

    def page_lock(self, buffer: Buffer) -> None:
        """Register the buffer with CUDA until it is unmapped; if that fails, warn once."""
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
            torch.zeros(1, device=self.torch_device)  # clears the pending error, so that no later kernel raises it
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                "host memory cannot be page-locked for %s (CUDA error %d), so copies to it are slower; allow the "
                "process more of it (ulimit -l), or give the weights less (memory_budget, --memory-budget)",
                self.name, int(code),
            )  # fmt: skip

    def copy(self, into: torch.Tensor, source: torch.Tensor) -> Copy:
        """Issue the copy on the copy stream."""
        copy = _CudaCopy()
        copy.begin.record(self._copies)
        with torch.cuda.stream(self._copies):
            into.copy_(source, non_blocking=True)
        copy.end.record(self._copies)
        return copy

    def wait(self, copied: Copy) -> object:
        """Make the current stream wait, and return it."""
        stream: Any = torch.cuda.current_stream(self.torch_device)
        assert isinstance(copied, _CudaCopy), "computing waits for copies"
        stream.wait_event(copied.end)
        return stream

    def wait_for_computing(self, stream: Any) -> None:
        """Make the copy stream wait."""
        self._copies.wait_stream(stream)

    def decode(self, coded: torch.Tensor, piece: Piece, into: torch.Tensor) -> Copy:
        """Issue the decoding on the decoding stream."""
        decoding = _CudaCopy()
        self._decodes.wait_stream(self._copies)
        decoding.begin.record(self._decodes)
        with torch.cuda.stream(self._decodes):
            _decode(coded, piece, into)
        decoding.end.record(self._decodes)
        return decoding

    def wait_for_decoding(self, decoded: Copy) -> None:
        """Make the copy stream wait."""
        assert isinstance(decoded, _CudaCopy), "decoding has an end"
        self._copies.wait_event(decoded.end)

    def between_copies(self) -> AbstractContextManager[object]:
        """Compute on the copy stream."""
        return torch.cuda.stream(self._copies)

    def time(self, work: Callable[[], object]) -> float:
        """Measure with two events of the copy stream."""
        timed = _CudaCopy()
        with self.between_copies():
            timed.begin.record(self._copies)
            work()
            timed.end.record(self._copies)
        timed.synchronize()
        return timed.seconds()

    def synchronize(self) -> None:
        """Wait for all streams."""
        torch.cuda.synchronize(self.torch_device)

    def close(self) -> None:
        """Make torch free the memory that it has cached."""
        torch.cuda.empty_cache()


def _decode(coded: torch.Tensor, piece: Piece, into: torch.Tensor) -> None:
    from surfw.runtime.exponents_triton import decode  # this import takes seconds, and is rarely needed

    decode(coded, piece, into)


def _unregister(runtime: Any, address: int, _view: memoryview) -> None:
    """Unregister the pages of a buffer; the view has kept them mapped until now."""
    runtime.cudaHostUnregister(address)
