"""`lossless`: a payload in 1 MiB frames, each compressed separately by Blosc, or uncompressed if that gains too little.

Weights look like noise, but their exponents do not: after a byte shuffle, which groups bytes by their position in the
element, half of the bytes of bfloat16 compress well. Each frame names its filter and compressor in Blosc's header
(format of c-blosc 1, https://github.com/Blosc/c-blosc/blob/main/README_CHUNK_FORMAT.rst). The manifest has the sizes of
the frames. A frame with the length of its payload is the payload itself; no frame is longer.

Several threads decode the frames in place: coded bytes arrive at the end of the memory, and the payload grows from its
start. Since no frame is longer than its payload, decoded bytes never reach the coded bytes of a later frame.
"""

import struct
import threading
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, pairwise

from surfw.config import BLOCK_BYTES, MIB
from surfw.errors import IntegrityError
from surfw.manifest import DTYPE_BITS, TensorInfo

FRAME_BYTES = BLOCK_BYTES
"""Payload bytes of a frame; the last one of a chunk may have fewer."""

DECODERS = 2
"""Threads that decode one chunk."""

DECODING_BYTES = 9 * DECODERS * MIB
"""Memory for decoding besides that of chunks, as measured: for each thread a copy of a frame and Blosc's buffers,
including what malloc retains of these."""

_LEAST_GAIN = 0.05
_HEADER = struct.Struct("<BBBBIII")  # version, compressor's version, flags, item size, payload, block, frame bytes
_LEVEL = 1


def encode_frame(payload: memoryview, item_bytes: int) -> bytes | memoryview:
    """Encode one frame: compressed, or the payload itself if compression gains less than 5 %.

    Args:
        payload: up to `FRAME_BYTES`.
        item_bytes: the size of its predominant elements.
    """
    coded = _compress(payload, item_bytes)
    return coded if len(coded) <= (1 - _LEAST_GAIN) * len(payload) else payload


def decode_frame(frame: bytes | memoryview, into: memoryview) -> None:
    """Decode one frame into memory of the payload's size.

    Raises:
        ValueError: it is not a valid frame of a payload of this size.
    """
    if len(frame) == len(into):
        into[:] = frame
        return
    if len(frame) < _HEADER.size:
        raise ValueError(f"it has {len(frame)} bytes, less than a header")
    *_, payload_bytes, _, frame_bytes = _HEADER.unpack_from(frame)
    if (payload_bytes, frame_bytes) != (len(into), len(frame)):  # or Blosc would read and write the sizes in the header
        raise ValueError(
            f"its header says {frame_bytes} bytes for {payload_bytes}; expected {len(frame)} for {len(into)}"
        )
    try:
        _decompress(frame, into)
    except RuntimeError as exc:  # Blosc's
        raise ValueError(str(exc)) from exc


def decode_numbered(index: int, frame: bytes | memoryview, into: memoryview) -> None:
    """Decode frame `index` of a chunk.

    Raises:
        IntegrityError: it is not a valid frame of a payload of this size; the message names the frame.
    """
    try:
        decode_frame(frame, into)
    except ValueError as exc:
        raise IntegrityError(f"frame {index} is not what the codec 'lossless' writes: {exc}") from exc


class CodedRange:
    """Where some frames lie in the stored bytes of a chunk, in whole blocks, since only these can be verified.

    Attributes:
        low: where the first block starts.
        high: where the last block stops, exclusive.
    """

    def __init__(self, sizes: Sequence[int], first: int, stop: int) -> None:
        """Locate the frames from `first` to `stop`, exclusive, of a chunk whose frames have these sizes."""
        ends = [0, *accumulate(sizes)]
        self._first, self._ends = first, ends[first : stop + 1]
        self.low = ends[first] // BLOCK_BYTES * BLOCK_BYTES
        self.high = min(-(-ends[stop] // BLOCK_BYTES) * BLOCK_BYTES, ends[-1])

    def decode(self, coded: memoryview, into: memoryview) -> None:
        """Decode the frames from the bytes between `low` and `high`.

        Raises:
            IntegrityError: a frame is damaged; the contents of `into` are then undefined.
        """
        for number, (start, stop) in enumerate(pairwise(self._ends)):
            payload = into[number * FRAME_BYTES :][:FRAME_BYTES]
            decode_numbered(self._first + number, coded[start - self.low : stop - self.low], payload)


_own = threading.local()
"""Per decoding thread: `frame`, memory for a copy of a frame, allocated at first use."""


def decoders() -> ThreadPoolExecutor:
    """Create the threads that decode for one model; each imports Blosc before its first frame."""

    def prepare() -> None:
        from numcodecs import blosc  # noqa: F401 - imported early, so that the first frame does not wait

    return ThreadPoolExecutor(DECODERS, "surfw-decode", prepare)


class FrameDecoder:
    """Decodes the frames of one chunk as they arrive. Methods are thread-safe."""

    def __init__(self, coded: memoryview, into: memoryview, sizes: Sequence[int], *, lead: int | None = None) -> None:
        """Set up decoding.

        Args:
            coded: memory of all frames, which need not have arrived yet.
            into: memory for the payload.
            sizes: the bytes of each frame.
            lead: if `coded` and `into` share memory, the offset of `coded` from the start of `into`: at least the
                difference of their lengths; None if they do not share memory.
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
        """Return the payload bytes that can be decoded from the arrived bytes and have not been yet."""
        return self._payload_start(self._arrived_frames(arrived)) - self._payload_start(self._next)

    def decode(self, arrived: int) -> None:
        """Decode all frames that have arrived.

        All calls with one value of `arrived` must have returned before a call with another value.

        Args:
            arrived: number of coded bytes that have arrived.

        Raises:
            IntegrityError: a frame is damaged; the contents of `into` are then undefined.
        """
        reach = self._payload_start(self._arrived_frames(arrived))
        while (taken := self._take(arrived, reach)) is not None:
            index, frame = taken
            into = self._into[self._payload_start(index) : self._payload_start(index + 1)]
            decode_numbered(index, frame, into)

    def _take(self, arrived: int, reach: int) -> tuple[int, memoryview] | None:
        """Take the next frame; it is copied if other threads may overwrite it before it is decoded.

        Frames are taken and copied in order, under the lock, so that none is overwritten before it has been copied.
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
    """Copy a frame into the thread's own memory; valid until the next copy."""
    if not hasattr(_own, "frame"):
        _own.frame = memoryview(bytearray(FRAME_BYTES))
    copied: memoryview = _own.frame[: len(frame)]
    copied[:] = frame
    return copied


def item_bytes_of(tensors: Sequence[TensorInfo], start: int, stop: int) -> int:
    """Return the size, in bytes, of the predominant elements in a range of a payload.

    Args:
        tensors: the chunk's tensors, in payload order.
        start: start of the range.
        stop: end of the range, exclusive.
    """
    shares = Counter[int]()
    for tensor in tensors[bisect_right(tensors, start, key=lambda one: one.offset + one.nbytes) :]:
        if tensor.offset >= stop:
            break
        shares[DTYPE_BITS[tensor.dtype] // 8] += min(stop, tensor.offset + tensor.nbytes) - max(start, tensor.offset)
    return max(shares, key=shares.__getitem__, default=1)


def _compress(data: memoryview, item_bytes: int) -> bytes:
    from numcodecs import blosc  # here and below: imports numpy, which most commands do not need

    shuffled = blosc.SHUFFLE if item_bytes > 1 else blosc.NOSHUFFLE
    coded: bytes = blosc.compress(data, b"zstd", _LEVEL, shuffled, max(1, len(data)), typesize=item_bytes)
    return coded


def _decompress(frame: bytes | memoryview, into: memoryview) -> None:
    from numcodecs import blosc

    blosc.decompress(frame, into)
