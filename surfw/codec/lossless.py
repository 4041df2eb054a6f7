"""`lossless`: a payload in frames of 1 MiB, each compressed alone by Blosc, or as it is where that gains too little.

Weights look like noise, but their exponents do not: shuffled so that bytes of equal rank lie side by side, half of the
bytes of bfloat16 compress well. Each frame names its own filter and compressor in Blosc's header (format of c-blosc 1,
https://github.com/Blosc/c-blosc/blob/main/README_CHUNK_FORMAT.rst). The sizes of the frames stand in the manifest; a
frame that is as long as its payload is the payload. No frame is longer.

Frames are decoded by several threads, and in the memory that they arrived in: coded bytes come to the end of it, and
the payload grows from its start. As no frame is longer than its payload, what is decoded never reaches the coded bytes
of a later frame.
"""

import struct
import threading
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

from surfw.config import BLOCK_BYTES, MIB
from surfw.errors import IntegrityError
from surfw.manifest import DTYPE_BITS, TensorInfo

FRAME_BYTES = BLOCK_BYTES
"""Payload bytes of a frame; the last one of a chunk may have fewer."""

DECODERS = 2
"""Threads that decode one chunk."""

DECODING_BYTES = 9 * DECODERS * MIB
"""What decoding takes besides the memory of chunks, as measured: for each thread a copy of a frame, and what Blosc
works in, with what malloc keeps of that."""

_LEAST_GAIN = 0.05
_HEADER = struct.Struct("<BBBBIII")  # version, compressor's version, flags, item size, payload, block, frame bytes
_LEVEL = 1


def encode_frame(payload: memoryview, item_bytes: int) -> bytes | memoryview:
    """One frame: compressed, or the payload itself where that gains less than 5 %.

    Args:
        payload: up to `FRAME_BYTES`.
        item_bytes: the size of the elements that most of it is made of.
    """
    coded = _compress(payload, item_bytes)
    return coded if len(coded) <= (1 - _LEAST_GAIN) * len(payload) else payload


def decode_frame(frame: bytes | memoryview, into: memoryview) -> None:
    """Decode one frame into memory of the payload's size.

    Raises:
        ValueError: it is not a frame of such a payload.
    """
    if len(frame) == len(into):
        into[:] = frame
        return
    if len(frame) < _HEADER.size:
        raise ValueError(f"it has {len(frame)} bytes, less than a header")
    *_, payload_bytes, _, frame_bytes = _HEADER.unpack_from(frame)
    if (payload_bytes, frame_bytes) != (len(into), len(frame)):  # or Blosc would read and write what it says there
        raise ValueError(
            f"its header says {frame_bytes} bytes for {payload_bytes}; expected {len(frame)} for {len(into)}"
        )
    try:
        _decompress(frame, into)
    except RuntimeError as exc:  # Blosc's
        raise ValueError(str(exc)) from exc


_own = threading.local()
"""Of each thread that decodes: `frame`, memory for a copy of one, made at its first use."""


def decoders() -> ThreadPoolExecutor:
    """The threads that decode for one model; none begins before Blosc is there."""

    def prepare() -> None:
        from numcodecs import blosc  # noqa: F401 - so that the first frame does not wait for it

    return ThreadPoolExecutor(DECODERS, "surfw-decode", prepare)


class FrameDecoder:
    """Decodes the frames of one chunk, as they arrive. The methods may be called by several threads at once."""

    def __init__(self, coded: memoryview, into: memoryview, sizes: Sequence[int], *, lead: int | None = None) -> None:
        """Nothing is decoded yet.

        Args:
            coded: all frames, which need not have arrived.
            into: memory for the payload.
            sizes: the bytes of each frame.
            lead: how far `coded` begins behind `into`, where they are one memory: at least the difference of their
                lengths; None where they are not.
        """
        assert lead is None or lead + len(coded) >= len(into), "the payload would run over frames to come"
        self._coded = coded
        self._into = into
        self._ends = tuple(accumulate(sizes))
        self._sizes = sizes
        self._lead = lead
        self._next = 0
        self._lock = threading.Lock()

    def payload_bytes(self, arrived: int) -> int:
        """How much payload is still to be decoded from what has arrived."""
        return self._payload_start(self._arrived_frames(arrived)) - self._payload_start(self._next)

    def decode(self, arrived: int) -> None:
        """Decode frames until none is left that has arrived.

        All threads that were called with one value must have returned before one is called with another.

        Args:
            arrived: how many of the coded bytes have arrived.

        Raises:
            IntegrityError: a frame is damaged; `into` holds nothing usable.
        """
        reach = self._payload_start(self._arrived_frames(arrived))
        while (taken := self._take(arrived, reach)) is not None:
            index, frame = taken
            into = self._into[self._payload_start(index) : self._payload_start(index + 1)]
            try:
                decode_frame(frame, into)
            except ValueError as exc:
                raise IntegrityError(f"frame {index} is not what the codec 'lossless' writes: {exc}") from exc

    def _take(self, arrived: int, reach: int) -> tuple[int, memoryview] | None:
        """The next frame; a copy, where other threads may write to its place before it is decoded.

        Under the lock, so that frames are taken in order: nobody writes behind a frame that was not copied yet.
        """
        with self._lock:
            index = self._next
            if index == len(self._ends) or self._ends[index] > arrived:
                return None
            self._next += 1
            start = self._ends[index] - self._sizes[index]
            frame = self._coded[start : self._ends[index]]
            is_overwritten = self._lead is not None and self._lead + start < reach
            return index, _copy(frame) if is_overwritten else frame

    def _arrived_frames(self, arrived: int) -> int:
        return bisect_right(self._ends, arrived)

    def _payload_start(self, index: int) -> int:
        return min(index * FRAME_BYTES, len(self._into))


def _copy(frame: memoryview) -> memoryview:
    """A copy of a frame in the thread's own memory, until the next one."""
    if not hasattr(_own, "frame"):
        _own.frame = memoryview(bytearray(FRAME_BYTES))
    copied: memoryview = _own.frame[: len(frame)]
    copied[:] = frame
    return copied


def item_bytes_of(tensors: Sequence[TensorInfo], start: int, stop: int) -> int:
    """The size of the elements that most of a part of a payload is made of, in bytes.

    Args:
        tensors: of the chunk, in payload order.
        start: where the part of the payload begins.
        stop: where it ends, exclusive.
    """
    shares = Counter[int]()
    for tensor in tensors[bisect_right(tensors, start, key=lambda one: one.offset + one.nbytes) :]:
        if tensor.offset >= stop:
            break
        shares[DTYPE_BITS[tensor.dtype] // 8] += min(stop, tensor.offset + tensor.nbytes) - max(start, tensor.offset)
    return max(shares, key=shares.__getitem__, default=1)


def _compress(data: memoryview, item_bytes: int) -> bytes:
    from numcodecs import blosc  # here and below: it brings numpy, which most commands do without

    shuffled = blosc.SHUFFLE if item_bytes > 1 else blosc.NOSHUFFLE
    coded: bytes = blosc.compress(data, b"zstd", _LEVEL, shuffled, max(1, len(data)), typesize=item_bytes)
    return coded


def _decompress(frame: bytes | memoryview, into: memoryview) -> None:
    from numcodecs import blosc

    blosc.decompress(frame, into)
