"""The layout of a chunk's tensors in its forms `int8` and `int4`; `surfw.codec.quantised` describes the bytes. Pure.

A form lists only the kind of each tensor: all offsets follow from kinds, dtypes and shapes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from surfw.config import aligned
from surfw.manifest.facts import Chunk, Form, Kind, Reason, TensorInfo

GROUP = 32
"""Columns that share a scale in `int4`."""

PANEL = 64
"""Rows that are interleaved in `int4`."""

LEAST_WEIGHTS = 4096
"""Matrices with fewer weights are not quantised: they hardly add to the size, and are often more sensitive."""

_COLUMNS: dict[Kind, int] = {"int8": 16, "int4": GROUP}
"""The number of columns must be a multiple of this; for int8, torch's kernel requires it."""

_DTYPES = frozenset({"F32", "F16", "BF16"})


@dataclass(frozen=True, slots=True)
class Part:
    """The position of one tensor in a chunk's packed form. Offsets are in bytes; parts and scales are aligned to 64.

    Attributes:
        name: the tensor's name.
        kind: how it is stored.
        dtype: its safetensors dtype in the payload.
        shape: its shape in the payload.
        start: offset of its bytes or codes.
        scales: offset of its scales; equals `stop` if it has none.
        stop: end offset; the next part begins at the next multiple of 64.
    """

    name: str
    kind: Kind
    dtype: str
    shape: tuple[int, ...]
    start: int
    scales: int
    stop: int

    @property
    def panels(self) -> int:
        """Number of row panels of an int4 matrix."""
        return -(-self.shape[0] // PANEL)


def fits(tensor: TensorInfo, kind: Kind) -> bool:
    """Whether a tensor can be stored as this kind.

    A matrix can be quantised if it has at least `LEAST_WEIGHTS` weights in float32, float16 or bfloat16, and its number
    of columns is a multiple of 16 (int8) or of `GROUP` (int4). The shape does not show whether quantising makes sense:
    rows must be output channels, as in the weight of `torch.nn.Linear`, or rows to look up. GPT-2's matrices are
    transposed.
    """
    if kind == "raw":
        return True
    if tensor.dtype not in _DTYPES or len(tensor.shape) != 2:
        return False
    rows, columns = tensor.shape
    return columns % _COLUMNS[kind] == 0 and rows * columns >= LEAST_WEIGHTS


def why_exact(tensor: TensorInfo) -> Reason:
    """Return why a tensor that is `raw` in every packed form is not quantised."""
    if len(tensor.shape) != 2:
        return "vectors" if len(tensor.shape) < 2 else "others"
    if fits(tensor, "int8"):
        return "others"
    if tensor.dtype not in _DTYPES:
        return "dtypes"
    return "small" if prod(tensor.shape) < LEAST_WEIGHTS else "shapes"


def plan_parts(tensors: Sequence[TensorInfo], kinds: Sequence[Kind]) -> tuple[Part, ...]:
    """Compute the position of each tensor of a chunk in its packed form.

    Args:
        tensors: the tensors in payload order.
        kinds: the kind of each tensor, which it must fit (`fits`).
    """
    parts: list[Part] = []
    end = 0
    for tensor, kind in zip(tensors, kinds, strict=True):
        start = aligned(end)
        codes_bytes, scales_bytes = _sizes(tensor, kind)
        scales = aligned(start + codes_bytes) if scales_bytes else start + codes_bytes
        end = scales + scales_bytes
        parts.append(Part(tensor.name, kind, tensor.dtype, tensor.shape, start, scales, end))
    return tuple(parts)


def parts_of(chunk: Chunk, form: Form) -> tuple[Part, ...]:
    """Return the position of each tensor of a chunk in a packed form."""
    return plan_parts(chunk.tensors, form.kinds)


def stored_bytes(tensor: TensorInfo, kind: Kind) -> int:
    """Return the stored bytes of a tensor as this kind, including rows that pad a panel."""
    return sum(_sizes(tensor, kind))


def packed_bytes(parts: Sequence[Part]) -> int:
    """Return the size of the form with these parts."""
    return parts[-1].stop if parts else 0


def _sizes(tensor: TensorInfo, kind: Kind) -> tuple[int, int]:
    """Return the bytes of a tensor's codes (or of the whole tensor) and of its scales."""
    if kind == "raw":
        return tensor.nbytes, 0
    rows, columns = tensor.shape
    if kind == "int8":
        return rows * columns, rows * 4
    filled = -(-rows // PANEL) * PANEL
    return filled * columns // 2, filled * columns // GROUP * 2
