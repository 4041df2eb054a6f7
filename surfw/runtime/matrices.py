"""Computes with quantised matrices in their packed form (see `surfw.codec.quantised` for the format).

There are two ways to multiply. For few input rows in bfloat16, torch's kernels read the codes directly. For many rows,
and for other dtypes, for which these kernels are not vectorised, the matrix is unpacked and multiplied piece by piece.
The choice depends only on kind, dtype and number of rows, so a weight gives the same bits whether it is resident or
streamed. The number of rows above which the second way is faster is measured once per process. The same measurement
finds the order in which the processor's int4 kernel reads codes: as stored (AVX-512), or an order that they are
converted to for each use (AVX2). If neither order gives the right results, or a kernel is missing or fails, only the
second way is used.

The int4 kernel also needs the scales in its own layout. If memory is given for it (`operand_bytes`), a matrix keeps the
converted scales; otherwise they are converted for each use, which takes a third of the time of a product with one row.
Each thread keeps scratch memory for one piece (`scratch_bytes`).
"""

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import ClassVar, Self

import torch

from surfw.config import ALIGNMENT, MIB
from surfw.manifest import GROUP, PANEL, Kind, Part

logger = logging.getLogger("surfw.runtime")

SCRATCH_BYTES = 4 * MIB
"""Size of the piece of a matrix that is unpacked at a time; at least 64 rows."""

DEVICE_SCRATCH_BYTES = 128 * MIB
"""The same on a device, where each piece takes several kernels, and memory is faster than a CPU's caches."""

_OPERAND_BYTES, _ORDERED_BYTES = 4 * MIB, 4 * MIB
_ORDERED_AT_ONCE_BYTES = MIB
_FIRST_ROWS, _MOST_ROWS = 16, 128
_TIMES = 3
_MEASURING_SECONDS = 0.03
"""The measurement stops after this long, with the result so far."""


Order = Callable[[torch.Tensor], torch.Tensor]
"""Converts stored codes to the order and the shape that a kernel reads."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """How torch's kernel for a kind of matrices is used.

    Attributes:
        rows: the most input rows that it is used for; 0 if it is not used.
        order: converts codes for it.
    """

    rows: int
    order: Order


class Packed(ABC):
    """A quantised matrix of N rows and K columns.

    Attributes:
        kind: the kind of quantisation.
        orders: the orders in which a kernel may read its codes.
        shape: N and K.
        codes: as stored.
        scales: as stored.
    """

    kind: ClassVar[Kind]
    orders: ClassVar[Sequence[Order]]

    def __init__(self, shape: tuple[int, int], codes: torch.Tensor, scales: torch.Tensor) -> None:
        """Use the codes and scales without copying them."""
        self.shape = shape
        self.codes = codes
        self.scales = scales

    def multiply(self, inputs: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """`torch.nn.functional.linear`.

        Args:
            inputs: shape (…, K), in a floating-point dtype.
            bias: shape (N,).

        Returns:
            Shape (…, N), in the dtype of the inputs.
        """
        rows = inputs.reshape(-1, self.shape[1])
        is_here = self.codes.device.type == "cpu"
        kernel = kernel_of(self.kind) if is_here and rows.dtype is torch.bfloat16 else None
        if kernel and 0 < len(rows) <= kernel.rows:
            product = self.multiply_few(rows, kernel.order)
        else:
            product = self.multiply_many(rows)
        if bias is not None:
            product += bias
        return product.view(*inputs.shape[:-1], self.shape[0])

    def multiply_many(self, rows: torch.Tensor) -> torch.Tensor:
        """The product with input rows of any dtype, piece by piece."""
        product = rows.new_empty(len(rows), self.shape[0])
        dtype = _computed_in(rows.dtype)
        rows = rows.to(dtype)
        step = self._piece_rows(dtype)
        for first in range(0, self.shape[0] if len(rows) else 0, step):
            product[:, first : first + step] = rows @ self.unpack(first, min(first + step, self.shape[0]), dtype)
        return product

    def unpacked(self, dtype: torch.dtype) -> torch.Tensor:
        """The values of the whole matrix, in new memory."""
        whole = torch.empty(self.shape, dtype=dtype, device=self.codes.device)
        computed = _computed_in(dtype)
        step = self._piece_rows(computed)
        for first in range(0, self.shape[0], step):
            whole[first : first + step] = self.unpack(first, min(first + step, self.shape[0]), computed).t()
        return whole

    @classmethod
    @abstractmethod
    def over(cls, part: Part, memory: torch.Tensor, operand: torch.Tensor | None) -> Self:
        """A matrix over the memory of its stored form; `operand` has `operand_bytes`, if it is given."""

    @classmethod
    @abstractmethod
    def sample(cls, rows: int, columns: int) -> Self:
        """A matrix of this size with random whole numbers as values, for measurements."""

    @abstractmethod
    def multiply_few(self, rows: torch.Tensor, order: Order) -> torch.Tensor:
        """The product with a few bfloat16 input rows, by torch's kernel, with codes converted by `order`."""

    @abstractmethod
    def unpack(self, first: int, last: int, dtype: torch.dtype) -> torch.Tensor:
        """The values of some rows, transposed: shape (K, last - first), valid until the thread's next call.

        Args:
            first: the first row, a multiple of `PANEL`.
            last: the last row, exclusive.
            dtype: of the values, which are code × scale, rounded once; not float16.
        """

    @abstractmethod
    def look_up(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The rows with these ids, which must be in range: shape (ids, K)."""

    def _piece_rows(self, dtype: torch.dtype) -> int:
        """The number of rows in a piece, unpacked to this dtype."""
        most_bytes = SCRATCH_BYTES if self.codes.device.type == "cpu" else DEVICE_SCRATCH_BYTES
        return self._step(most_bytes, self.shape[1] * dtype.itemsize)

    @staticmethod
    def _step(most_bytes: int, row_bytes: int) -> int:
        """The number of rows that fit into `most_bytes`: whole panels, at least one."""
        return max(1, most_bytes // (row_bytes * PANEL)) * PANEL


def _as_stored(codes: torch.Tensor) -> torch.Tensor:
    return codes if codes.dtype is torch.int8 else codes.view(-1, codes.shape[1] // 2)


def _in_panels_of_32(codes: torch.Tensor) -> torch.Tensor:
    """int4 codes as torch's AVX2 kernel reads them: of 32 rows, byte j of a column holds rows j and j + 16.

    Valid until the thread orders or unpacks other codes.
    """
    panels, columns, _ = codes.shape
    ordered = _SCRATCH.take("piece", (panels, 2, columns, 4), torch.int32, codes.device)
    step = min(panels, max(1, _ORDERED_AT_ONCE_BYTES // (columns * PANEL // 2)))
    halves = _SCRATCH.take("codes", (3, step, columns), torch.complex128, codes.device)  # 16 bytes at a time
    for first in range(0, panels, step):
        quarters = codes[first : first + step].view(torch.complex128)
        low, high, shifted = halves[:, : len(quarters)].view(torch.int32).view(3, len(quarters), columns, 4)
        for side, half in enumerate((low, high)):
            half.view(torch.complex128).copy_(quarters[..., side : side + 1])
        even, odd = ordered[first : first + step].unbind(1)
        torch.bitwise_and(high, 0x0F0F0F0F, out=shifted).bitwise_left_shift_(4)
        torch.bitwise_and(low, 0x0F0F0F0F, out=even).bitwise_or_(shifted)
        torch.bitwise_and(high, ~0x0F0F0F0F, out=odd).bitwise_or_(low.bitwise_right_shift_(4).bitwise_and_(0x0F0F0F0F))
    return ordered.view(torch.uint8).view(-1, columns // 2)


class _Int8(Packed):
    """Codes of shape (N, K), int8; scales of shape (N,), float32."""

    kind = "int8"
    orders = (_as_stored,)

    def __init__(self, shape: tuple[int, int], codes: torch.Tensor, scales: torch.Tensor) -> None:
        super().__init__(shape, codes, scales)
        self._scales_of_kernel: torch.Tensor | None = None

    @classmethod
    def over(cls, part: Part, memory: torch.Tensor, operand: torch.Tensor | None) -> Self:  # noqa: ARG003 - it needs none
        rows, columns = part.shape
        codes = _elements(memory, part.start, rows * columns, torch.int8)
        return cls((rows, columns), codes.view(rows, columns), _elements(memory, part.scales, rows, torch.float32))

    @classmethod
    def sample(cls, rows: int, columns: int) -> Self:
        codes = _numbers(-127, 128, rows, columns).to(torch.int8)
        return cls((rows, columns), codes, _numbers(0, 3, rows).exp2())

    def multiply_few(self, rows: torch.Tensor, order: Order) -> torch.Tensor:
        if self._scales_of_kernel is None:
            self._scales_of_kernel = self.scales.to(torch.bfloat16)  # exact, see the format
        rows = rows.contiguous()
        if rows.data_ptr() % ALIGNMENT:
            rows = rows.clone()  # the kernel needs aligned vectors
        return torch._weight_int8pack_mm(rows, order(self.codes), self._scales_of_kernel)  # noqa: SLF001 - there is no public one

    def unpack(self, first: int, last: int, dtype: torch.dtype) -> torch.Tensor:
        piece = _SCRATCH.take("piece", (last - first, self.shape[1]), dtype, self.codes.device)
        scales = self.scales[first:last, None].to(dtype)
        return torch.mul(self.codes[first:last], scales, out=piece).t()

    def look_up(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return int8_values(self.codes[ids], self.scales[ids], dtype)


class _Int4(Packed):
    """Codes of shape (panels, K, 32), uint8, two per byte; scales of shape (groups, 64 × panels), bfloat16."""

    kind = "int4"
    orders = (_as_stored, _in_panels_of_32)

    def __init__(
        self, shape: tuple[int, int], codes: torch.Tensor, scales: torch.Tensor, memory: torch.Tensor | None = None
    ) -> None:
        """Use the codes and scales without copying them; `memory`, if any, keeps the scales in the kernel's layout."""
        super().__init__(shape, codes, scales)
        self._scale_bits = scales.view(torch.uint16)
        self._memory = memory
        self._kept: Sequence[torch.Tensor] = ()

    @classmethod
    def over(cls, part: Part, memory: torch.Tensor, operand: torch.Tensor | None) -> Self:
        rows, columns = part.shape
        filled = -(-rows // PANEL) * PANEL
        codes = _elements(memory, part.start, filled * columns // 2, torch.uint8).view(-1, columns, PANEL // 2)
        scales = _elements(memory, part.scales, filled * columns // GROUP, torch.bfloat16).view(-1, filled)
        return cls((rows, columns), codes, scales, operand)

    @classmethod
    def sample(cls, rows: int, columns: int) -> Self:
        filled = -(-rows // PANEL) * PANEL
        codes = _numbers(0, 256, filled // PANEL, columns, PANEL // 2).to(torch.uint8)
        return cls((rows, columns), codes, _numbers(0, 3, columns // GROUP, filled).exp2().to(torch.bfloat16))

    def multiply_few(self, rows: torch.Tensor, order: Order) -> torch.Tensor:
        rows, filled = rows.contiguous(), self.scales.shape[1]
        most = filled if self._memory is not None else self._step(_OPERAND_BYTES, len(self.scales) * 4)
        if order is not _as_stored:
            most = min(most, self._step(_ORDERED_BYTES, self.shape[1] // 2))
        step = -(-filled // (-(-filled // most) * PANEL)) * PANEL  # as few parts as possible, of about equal size
        parts = zip(torch.split(self.codes, step // PANEL), self._operands(step), strict=True)
        products = [_multiply_few(rows, order(codes), operand) for codes, operand in parts]
        product = products[0] if len(products) == 1 else torch.cat(products, dim=1)
        return product if filled == self.shape[0] else product[:, : self.shape[0]].contiguous()

    def _operands(self, step: int) -> Iterable[torch.Tensor]:
        """The scales in the kernel's layout, `step` rows at a time: kept, or each valid until the next one."""
        parts = torch.split(self._scale_bits, step, dim=1)
        if self._memory is None:
            return (
                _fill_operand(_SCRATCH.take("operand", bits.shape, torch.int32, bits.device), bits) for bits in parts
            )
        if len(self._kept) != len(parts):
            with torch.inference_mode(mode=False):  # or they could not be used outside of that mode
                places = torch.split(self._memory.view(torch.int32), [bits.numel() for bits in parts])
                self._kept = [
                    _fill_operand(place.view(bits.shape), bits) for place, bits in zip(places, parts, strict=True)
                ]
        return self._kept

    def unpack(self, first: int, last: int, dtype: torch.dtype) -> torch.Tensor:
        codes = self.codes[first // PANEL : -(-last // PANEL)].view(torch.int32)
        panels, columns, words = codes.shape
        halves = _SCRATCH.take("codes", (panels, 2, columns, words), torch.int32, codes.device)  # four codes in each
        torch.bitwise_and(codes, 0x0F0F0F0F, out=halves[:, 0])
        torch.bitwise_right_shift(codes, 4, out=halves[:, 1])
        halves[:, 1].bitwise_and_(0x0F0F0F0F)
        signed = halves.view(torch.int8).sub_(8).view(panels, 2, -1, GROUP, PANEL // 2)
        piece = _SCRATCH.take("piece", (columns, panels * PANEL), dtype, codes.device)
        scales = self.scales[:, first : first + panels * PANEL].to(dtype)
        torch.mul(
            signed.permute(2, 3, 0, 1, 4),
            scales.view(-1, 1, panels, 2, PANEL // 2),
            out=piece.view(-1, GROUP, panels, 2, PANEL // 2),
        )
        return piece[:, : last - first]

    def look_up(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        place = ids.remainder(PANEL)
        pairs = self.codes[ids // PANEL, :, place % (PANEL // 2)]
        codes = (pairs >> (place // (PANEL // 2) * 4)[:, None].to(torch.uint8)) & 15
        grouped = codes.to(torch.float32).sub_(8).view(len(ids), self.shape[1] // GROUP, GROUP)
        return grouped.mul_(self.scales[:, ids].t()[..., None]).view(len(ids), self.shape[1]).to(dtype)


def _fill_operand(pairs: torch.Tensor, scale_bits: torch.Tensor) -> torch.Tensor:
    """Scales as the int4 kernel reads them, shape (groups, 64 × panels, 2): each followed by its zero point, 0."""
    pairs.copy_(scale_bits)
    return pairs.view(torch.bfloat16).view(*pairs.shape, 2)


def _multiply_few(rows: torch.Tensor, codes: torch.Tensor, operand: torch.Tensor) -> torch.Tensor:
    return torch._weight_int4pack_mm_for_cpu(rows, codes, GROUP, operand)  # noqa: SLF001 - there is no public one


def int8_values(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The values of rows of an int8 matrix: codes of shape (rows, K), int8, and scales of shape (rows,), float32."""
    return (codes.to(torch.float32) * scales[:, None]).to(dtype)


def matrix_over(part: Part, memory: torch.Tensor, operand: torch.Tensor | None = None) -> Packed:
    """A quantised tensor over its stored form, without a copy.

    Args:
        part: of kind int8 or int4.
        memory: the stored form that contains it, as uint8, on any device; kept alive.
        operand: memory of `operand_bytes`, at a multiple of 64, to keep the operand that each use would make anew.
    """
    return _KINDS[part.kind].over(part, memory, operand)


def operand_bytes(part: Part) -> int:
    """Memory for a matrix's operand: for int4, the scales in the kernel's layout; for int8, nothing."""
    return 2 * (part.stop - part.scales) if part.kind == "int4" else 0


def scratch_bytes(columns: int, dtype: torch.dtype, piece_bytes: int = SCRATCH_BYTES) -> int:
    """The most memory that a piece of a matrix with at most this many columns takes: values, codes and scales."""
    itemsize = _computed_in(dtype).itemsize
    values = max(piece_bytes, PANEL * columns * itemsize)
    return values + values // itemsize + max(_OPERAND_BYTES, PANEL * columns // GROUP * 4)


_KINDS: Mapping[Kind, type[Packed]] = {"int8": _Int8, "int4": _Int4}


def kernel_of(kind: Kind) -> Kernel:
    """How torch's kernel is used for a kind. Measured at the first call, ideally while nothing else runs."""
    with _MEASURING:
        if kind not in _KERNELS:
            sample = _KINDS[kind].sample(1024, 1024)
            order = _find_order(sample)
            _KERNELS[kind] = Kernel(_measure(sample, order), order) if order else Kernel(0, _as_stored)
            logger.info("%s: torch's kernel is used for up to %d rows", kind, _KERNELS[kind].rows)
        return _KERNELS[kind]


_MEASURING = threading.Lock()
_KERNELS: dict[Kind, Kernel] = {}


def _find_order(packed: Packed) -> Order | None:
    """The order in which the kernel gives the right results; None if no order does."""
    inputs = _numbers(-4, 5, 5, packed.shape[1]).to(torch.bfloat16)
    expected = packed.multiply_many(inputs).float()
    for order in packed.orders:
        try:
            seen = packed.multiply_few(inputs, order).float()
        except (AttributeError, RuntimeError) as exc:
            logger.info("%s: torch's kernel does not work here: %s", packed.kind, exc)
            return None
        if torch.allclose(seen, expected, rtol=0.02):
            return order
    return None


def _measure(packed: Packed, order: Order) -> int:
    """The most input rows for which the kernel is faster: 0, or a power of two up to `_MOST_ROWS`."""
    inputs = _numbers(-4, 5, _MOST_ROWS, packed.shape[1]).to(torch.bfloat16)
    few = partial(packed.multiply_few, order=order)
    deadline = time.perf_counter() + _MEASURING_SECONDS

    def is_faster(rows: int) -> bool:
        return _shortest(few, inputs[:rows]) < _shortest(packed.multiply_many, inputs[:rows])

    rows = _FIRST_ROWS
    if is_faster(rows):
        while rows < _MOST_ROWS and time.perf_counter() < deadline and is_faster(2 * rows):
            rows *= 2
        return rows
    rows //= 2
    while rows and time.perf_counter() < deadline and not is_faster(rows):
        rows //= 2
    return rows


def _numbers(least: int, stop: int, *shape: int) -> torch.Tensor:
    """Random whole numbers, the same at every call; torch's global generator is not touched."""
    return torch.randint(least, stop, shape, generator=torch.Generator().manual_seed(0))


def _shortest(multiply: Callable[[torch.Tensor], object], inputs: torch.Tensor) -> float:
    times = []
    for _ in range(_TIMES):
        start = time.perf_counter()
        multiply(inputs)
        times.append(time.perf_counter() - start)
    return min(times)


class _Scratch(threading.local):
    """Memory that a thread reuses."""

    def __init__(self) -> None:
        self._memory: dict[str, torch.Tensor] = {}

    def take(self, use: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """An uninitialised tensor in reused memory; on a device it is new, as torch caches memory there itself."""
        if device.type != "cpu":
            return torch.empty(shape, dtype=dtype, device=device)
        size_bytes = prod(shape) * dtype.itemsize
        held = self._memory.get(use)
        if held is None or len(held) < size_bytes:
            with torch.inference_mode(mode=False):  # or it could not be used outside of that mode
                held = self._memory[use] = torch.empty(size_bytes, dtype=torch.uint8)
        return held[:size_bytes].view(dtype).view(shape)


_SCRATCH = _Scratch()


def _computed_in(dtype: torch.dtype) -> torch.dtype:
    """The dtype of unpacked values: float32 for float16, whose range is too small for scales and which is slow."""
    return torch.float32 if dtype is torch.float16 else dtype


def _elements(memory: torch.Tensor, place: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """Elements in memory: a view, or a copy if the address is not a multiple of 64."""
    found = memory[place : place + count * dtype.itemsize]
    return (found.clone() if found.data_ptr() % ALIGNMENT else found).view(dtype)
