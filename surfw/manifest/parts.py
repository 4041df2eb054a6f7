"""Where the tensors of a chunk lie in its forms `int8` and `int4`, whose bytes `surfw.codec.quantised` describes. Pure.

A form lists the kind of each tensor, and nothing else: all places follow from kinds, dtypes and shapes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from surfw.config import aligned
from surfw.manifest.facts import Chunk, Form, Kind, Reason, TensorInfo

GROUP = 32
"""Columns that share a scale in `int4`."""

PANEL = 64
"""Rows that lie together in `int4`."""

LEAST_WEIGHTS = 4096
"""Matrices with fewer stay as they are: they are no part of the size, and often matter more than others."""

_COLUMNS: dict[Kind, int] = {"int8": 16, "int4": GROUP}
"""What the number of columns has to be a multiple of; for int8, because torch's kernel takes no others."""

_DTYPES = frozenset({"F32", "F16", "BF16"})


@dataclass(frozen=True, slots=True)
class Part:
    """Where one tensor lies in a chunk's packed form. Places are bytes from the form's start, each a multiple of 64.

    Attributes:
        name: the tensor's.
        kind: how it is stored.
        dtype: the safetensors dtype that it has in the payload.
        shape: as in the payload.
        start: where its bytes or codes begin.
        scales: where its scales begin; where it ends, if it has none.
        stop: where it ends; the next part begins at the next multiple of 64.
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
        """How many panels of rows an int4 matrix has."""
        return -(-self.shape[0] // PANEL)


def fits(tensor: TensorInfo, kind: Kind) -> bool:
    """Whether a tensor can be of a kind.

    Quantised can be matrices of at least `LEAST_WEIGHTS` in float32, float16 or bfloat16 whose columns are a multiple
    of 16 (int8) or of `GROUP` (int4). Shapes do not tell whether that makes sense: rows have to be output channels, as
    in the weight of `torch.nn.Linear`, or rows to look up. GPT-2's matrices are the other way round.
    """
    if kind == "raw":
        return True
    if tensor.dtype not in _DTYPES or len(tensor.shape) != 2:
        return False
    rows, columns = tensor.shape
    return columns % _COLUMNS[kind] == 0 and rows * columns >= LEAST_WEIGHTS


def why_exact(tensor: TensorInfo) -> Reason:
    """Why surfw does not quantise a tensor that is `raw` in every packed form."""
    if len(tensor.shape) != 2:
        return "vectors" if len(tensor.shape) < 2 else "others"
    if fits(tensor, "int8"):
        return "others"
    if tensor.dtype not in _DTYPES:
        return "dtypes"
    return "small" if prod(tensor.shape) < LEAST_WEIGHTS else "shapes"


def plan_parts(tensors: Sequence[TensorInfo], kinds: Sequence[Kind]) -> tuple[Part, ...]:
    """Where each tensor of a chunk lies in its packed form.

    Args:
        tensors: in payload order.
        kinds: of each, which it must fit (`fits`).
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
    """Where each tensor of a chunk lies in a packed form of it."""
    return plan_parts(chunk.tensors, form.kinds)


def stored_bytes(tensor: TensorInfo, kind: Kind) -> int:
    """What a tensor takes as that kind, rows that fill a panel up included."""
    return sum(_sizes(tensor, kind))


def packed_bytes(parts: Sequence[Part]) -> int:
    """The size of the form that has these parts."""
    return parts[-1].stop if parts else 0


def _sizes(tensor: TensorInfo, kind: Kind) -> tuple[int, int]:
    """Bytes of what a tensor is stored as: codes (or all of it), and scales."""
    if kind == "raw":
        return tensor.nbytes, 0
    rows, columns = tensor.shape
    if kind == "int8":
        return rows * columns, rows * 4
    filled = -(-rows // PANEL) * PANEL
    return filled * columns // 2, filled * columns // GROUP * 2
