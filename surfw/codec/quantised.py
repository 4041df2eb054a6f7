"""`int8` and `int4`: quantised matrices, in the layout that is stored, sent and kept in memory. Without torch.

A chunk in one of these forms consists of its tensors in payload order, each aligned to 64 bytes, with zeros between.
Matrices used in multiplications are quantised, each as int8 or int4 (see `plan_parts`); all other tensors are as in the
payload. Numbers are little-endian. A weight is its code times its scale; there are no zero points. N is the number of
rows (output channels), K the number of columns.

int8
    N × K codes from -127 to 127, row by row; then, aligned to 64 bytes, N row scales as float32. A scale is the row's
    largest absolute weight ÷ 127, rounded to 8 significant bits, so that bfloat16 represents it exactly.

int4
    Rows are grouped into panels of 64; the last panel is padded with rows of zeros. Each panel has 32 bytes per column,
    column by column: byte j holds row j in its low half and row j + 32 in its high half, each as code + 8, with codes
    from -8 to 7. So the 64 codes to multiply with one input are adjacent, whatever the processor's vector width.
    Then, aligned to 64 bytes, the scales as bfloat16: for each group of `GROUP` columns, one per row of all panels. A
    scale may be negative: without clipping, the weight that is furthest from zero gets the code -8.

The scale of an int4 group is searched for: the shares `_TRIED` of the scale that clips nothing are tried, and the one
with the least sum of squared errors is chosen, the first if several are equal. Root mean square relative errors for
normally distributed weights: 0.083 for groups of 32 (4.5 bits per weight), 0.091 for 64 (4.25 bits), 0.097 for 128;
0.0083 for int8. llama.cpp's Q4_0 (groups of 32, no clipping) has 0.086.

The same weights give the same bytes on every machine: all arithmetic is float32, one operation at a time, rounded half
to even, and sums are taken in the order written here. No scale is smaller than 2^-101, so it does not matter whether a
processor supports subnormal numbers.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from surfw.errors import CheckpointError
from surfw.manifest import GROUP, PANEL, Kind, Part, nbytes

_NUMPY = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_LEAST_SCALE = np.float32(2.0**-100)
_LIMIT = np.float32(2.0**127)
_TRIED = tuple(np.float32(share) for share in (1.0, 0.95, 0.9, 0.85, 0.8))
"""Scales to try for a group, as shares of the scale that clips nothing."""

_BLOCK_WEIGHTS = 1 << 17
"""Weights processed at a time: a few arrays of this size fit into a processor's cache."""

Floats = npt.NDArray[np.float32]
Write = Callable[[bytes | memoryview], object]
"""Takes the next stored bytes."""


class PackedEncoder:
    """Encodes one chunk from its payload, incrementally, in pieces of any size.

    Besides the piece, it holds at most one incomplete row (int8) or panel (int4), the scales of one tensor, and some
    MiB of working memory.
    """

    def __init__(self, parts: Sequence[Part], write: Write) -> None:
        """`write` receives the stored bytes in order."""
        self._write = write
        self._written = 0
        self._coming = list(reversed(parts))
        self._coder: _Coder | None = None

    def update(self, payload: memoryview) -> None:
        """Encode the next bytes of the payload.

        Raises:
            CheckpointError: a weight is not finite, or too large.
        """
        while len(payload):
            if self._coder is None or not self._coder.missing:
                self._begin_next()
                continue
            taken = payload[: self._coder.missing]
            for coded in self._coder.update(taken):
                self._put(coded)
            payload = payload[len(taken) :]

    def finish(self) -> None:
        """Write the remaining bytes after the whole payload.

        Raises:
            CheckpointError: a weight is not finite, or too large.
        """
        while self._coming:
            self._begin_next()
        self._end()

    def _begin_next(self) -> None:
        self._end()
        part = self._coming.pop()
        self._fill_up(part.start)
        self._coder = _CODERS[part.kind](part)

    def _end(self) -> None:
        if self._coder is None:
            return
        assert not self._coder.missing, f"the payload ended within {self._coder.part.name}"
        for coded in self._coder.codes_left():
            self._put(coded)
        self._fill_up(self._coder.part.scales)
        self._put(self._coder.scales())
        assert self._written == self._coder.part.stop, f"{self._coder.part.name} is not as long as planned"
        self._coder = None

    def _fill_up(self, place: int) -> None:
        self._put(bytes(place - self._written))

    def _put(self, coded: bytes | memoryview) -> None:
        if len(coded):
            self._write(coded)
            self._written += len(coded)


def decode_tensor(part: Part, stored: bytes | memoryview) -> Floats:
    """Decode a quantised matrix to float32, in its shape; exactly code × scale.

    Args:
        part: a part of kind int8 or int4.
        stored: the stored bytes of the whole form.
    """
    rows, columns = part.shape
    codes = np.frombuffer(stored, np.uint8)[part.start :]
    scales = np.frombuffer(stored, np.uint8)[part.scales : part.stop]
    if part.kind == "int8":
        scales_of_rows: Floats = scales.view("<f4")[:, None]
        return codes[: rows * columns].view(np.int8).reshape(rows, columns).astype(np.float32) * scales_of_rows
    pairs = codes[: part.panels * columns * PANEL // 2].reshape(part.panels, columns, PANEL // 2)
    signed = np.concatenate([pairs & 15, pairs >> 4], axis=2).astype(np.float32) - np.float32(8)
    of_groups = _widen(scales.view("<u2")).reshape(columns // GROUP, 1, part.panels, PANEL)
    grouped = signed.transpose(1, 0, 2).reshape(columns // GROUP, GROUP, part.panels, PANEL)
    return np.ascontiguousarray((grouped * of_groups).reshape(columns, -1).T[:rows])


class _Coder:
    """Encodes one tensor: splits its payload into whole units and encodes these. The base class copies them unchanged.

    Attributes:
        part: the position and kind of the tensor.
        missing: bytes of its payload that are still to come.
    """

    def __init__(self, part: Part, unit_bytes: int = 1) -> None:
        self.part = part
        self.missing = nbytes(part.dtype, part.shape)
        self._unit_bytes = unit_bytes
        self._begun = bytearray()  # an incomplete unit

    def update(self, payload: memoryview) -> Iterator[bytes | memoryview]:
        """Yield the stored bytes of the units that are now complete."""
        self.missing -= len(payload)
        if self._begun:
            taken = payload[: self._unit_bytes - len(self._begun)]
            self._begun += taken
            payload = payload[len(taken) :]
            if len(self._begun) < self._unit_bytes:
                return
            yield from self.codes_left()
        whole = len(payload) // self._unit_bytes * self._unit_bytes
        yield from self._code(payload[:whole])
        self._begun += payload[whole:]

    def codes_left(self) -> Iterator[bytes | memoryview]:
        """Yield the stored bytes of the buffered unit, complete or not."""
        begun, self._begun = self._begun, bytearray()
        if begun:
            yield from self._code(memoryview(begun))

    def scales(self) -> bytes:
        """Return the bytes that are stored after the codes."""
        return b""

    def _code(self, payload: memoryview) -> Iterator[bytes | memoryview]:
        yield payload


class _Int8Coder(_Coder):
    """Encodes row by row."""

    def __init__(self, part: Part) -> None:
        super().__init__(part, part.shape[1] * nbytes(part.dtype, (1,)))
        self._scales: list[Floats] = []

    def _code(self, payload: memoryview) -> Iterator[bytes]:
        step = max(1, _BLOCK_WEIGHTS // self.part.shape[1]) * self._unit_bytes
        for start in range(0, len(payload), step):
            stored = np.frombuffer(payload[start : start + step], _NUMPY[self.part.dtype])
            weights = _floats(stored.reshape(-1, self.part.shape[1]), self.part.dtype)
            scales = _widen(_bfloat16(np.maximum(_largest(self.part, weights) / np.float32(127), _LEAST_SCALE)))
            self._scales.append(scales)
            yield np.rint(weights / scales[:, None]).astype(np.int8).tobytes()

    def scales(self) -> bytes:
        return np.concatenate(self._scales).astype("<f4").tobytes()


class _Int4Coder(_Coder):
    """Encodes panel by panel, each in slices of columns."""

    def __init__(self, part: Part) -> None:
        super().__init__(part, PANEL * part.shape[1] * nbytes(part.dtype, (1,)))
        self._scales: list[npt.NDArray[np.uint16]] = []

    def _code(self, payload: memoryview) -> Iterator[bytes]:
        columns = self.part.shape[1]
        step = _BLOCK_WEIGHTS // PANEL
        for start in range(0, len(payload), self._unit_bytes):
            stored = np.frombuffer(payload[start : start + self._unit_bytes], _NUMPY[self.part.dtype])
            panel = stored.reshape(-1, columns)
            scales = []
            for first in range(0, columns, step):
                weights = _floats(np.ascontiguousarray(panel[:, first : first + step]), self.part.dtype)
                _largest(self.part, weights)
                groups = np.zeros((GROUP, weights.shape[1] // GROUP, PANEL), np.float32)
                groups[..., : len(weights)] = weights.reshape(len(weights), -1, GROUP).transpose(2, 1, 0)
                codes, of_groups = _quantise_groups(groups)
                scales.append(of_groups)
                stored_codes = (codes + np.float32(8)).astype(np.uint8).transpose(1, 0, 2)
                yield (stored_codes[..., : PANEL // 2] | stored_codes[..., PANEL // 2 :] << 4).tobytes()
            self._scales.append(np.concatenate(scales))

    def scales(self) -> bytes:
        return np.concatenate(self._scales, axis=1).astype("<u2").tobytes()


_CODERS: dict[Kind, Callable[[Part], _Coder]] = {"raw": _Coder, "int8": _Int8Coder, "int4": _Int4Coder}


def _quantise_groups(groups: Floats) -> tuple[Floats, npt.NDArray[np.uint16]]:
    """Return the codes of groups, whose elements lie along the first axis, and their scales as bfloat16 bits."""
    highest, lowest = groups.max(axis=0), groups.min(axis=0)
    base = np.where(highest > -lowest, highest, lowest) / np.float32(-8)
    base[np.abs(base) < _LEAST_SCALE] = _LEAST_SCALE
    relative = groups / base
    least, best = np.full_like(base, np.inf), np.ones_like(base)
    for share in _TRIED:
        errors = relative / share
        errors -= _nearest_codes(errors)
        total = _sum_of_squares(errors) * (share * share)
        best[total < least] = share
        np.minimum(total, least, out=least)
    scales = _bfloat16(base * best)
    return _nearest_codes(groups / _widen(scales)), scales


def _nearest_codes(relative: Floats) -> Floats:
    codes = np.rint(relative)
    np.maximum(codes, np.float32(-8), out=codes)
    return np.minimum(codes, np.float32(7), out=codes)


def _sum_of_squares(values: Floats) -> Floats:
    """Sum over the first axis, whose length is a power of two, by adding halves, so that the order is fixed."""
    values = values * values
    while half := len(values) // 2:
        values = values[:half] + values[half:]
    total: Floats = values[0]
    return total


def _largest(part: Part, weights: Floats) -> Floats:
    """Return the largest absolute weight of each row.

    Raises:
        CheckpointError: a weight is not finite, or too large.
    """
    largest: Floats = np.abs(weights).max(axis=1)
    if not (largest < _LIMIT).all():
        wrong = weights[~(np.abs(weights) < _LIMIT)][0]
        raise CheckpointError(
            f"{part.name} has the weight {wrong:.3g}; {part.kind} takes finite ones below 2^127: "
            "keep this model in a form with all bits, none or lossless"
        )
    return largest


def _floats(stored: npt.NDArray[np.generic], dtype: str) -> Floats:
    """Convert stored elements to float32, exactly."""
    return _widen(stored.astype(np.uint16)) if dtype == "BF16" else stored.astype(np.float32)


def _widen(bits: npt.NDArray[np.uint16]) -> Floats:
    """Convert bfloat16 bits to float32, exactly."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _bfloat16(values: Floats) -> npt.NDArray[np.uint16]:
    """Convert finite values to bfloat16 bits, rounded half to even."""
    bits = values.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
