"""The safetensors header, no I/O: bytes in, names, dtypes, shapes and absolute byte ranges out.

Format: https://github.com/huggingface/safetensors#format. A file is 8 bytes (little-endian length of the header), the
header (a JSON object from tensor name to dtype, shape and offsets into the payload), and the payload. The rules, each
checked before anything is believed:

- The header has at most 100 MB, lies within the file, starts with `{`, and names nothing twice.
- A tensor's byte range has exactly the size that its dtype and shape give.
- The ranges cover the payload without holes or overlaps, and the payload ends where the file ends.

Whatever the bytes are, they parse or raise `CheckpointError` or `UnsupportedModelError`, never anything else.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from surfw.errors import CheckpointError, UnsupportedModelError
from surfw.manifest import DTYPE_BITS, nbytes

PREFIX_BYTES = 8
"""The length of the header stands in this many bytes before it."""

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""

UNSUPPORTED_DTYPES = frozenset({"F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})
"""Types of the format that surfw does not read."""

_MAX_ELEMENTS = 1 << 63


@dataclass(frozen=True, slots=True)
class HeaderTensor:
    """One tensor of a file: its safetensors dtype, shape, and byte range in the file (`stop` is exclusive)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Header:
    """The tensors of a file in the order of their bytes, and what `__metadata__` says."""

    tensors: tuple[HeaderTensor, ...]
    metadata: Mapping[str, str]


def header_length(prefix: bytes, file_bytes: int, where: str) -> int:
    """Length of the header in bytes, from the first 8 bytes of a file of `file_bytes` bytes that is named `where`.

    Raises:
        CheckpointError: the file is too short, or the length is beyond the format's limit or the file's end.
    """
    if len(prefix) < PREFIX_BYTES:
        raise _damaged(where, f"it has {file_bytes} bytes, expected at least {PREFIX_BYTES}")
    length = int.from_bytes(prefix[:PREFIX_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        raise _damaged(where, f"its header claims {length} bytes, the format allows {MAX_HEADER_BYTES}")
    if PREFIX_BYTES + length > file_bytes:
        raise _truncated(where, PREFIX_BYTES + length, file_bytes)
    return length


def parse_header(header: bytes, file_bytes: int, where: str) -> Header:
    """The header of a file of `file_bytes` bytes; `header` is what follows the first 8 bytes, in its full length.

    Raises:
        CheckpointError: a rule of the format is broken; the text names `where` and the rule.
        UnsupportedModelError: a tensor has a type of the format that surfw does not read.
    """
    document = _decode(header, where)
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(where, "__metadata__ is not an object of texts")
    payload_start = PREFIX_BYTES + len(header)
    tensors = [_tensor(name, entry, payload_start, where) for name, entry in document.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.stop))
    end = payload_start
    for tensor in tensors:
        if tensor.start != end:
            fault = "overlaps the one before" if tensor.start < end else "leaves a hole before it"
            raise _damaged(
                where, f"tensor {quote(tensor.name)} begins at byte {tensor.start}, expected {end}: it {fault}"
            )
        end = tensor.stop
    if end > file_bytes:
        raise _truncated(where, end, file_bytes)
    if end < file_bytes:
        raise _damaged(where, f"it has {file_bytes} bytes, its header describes {end}")
    return Header(tuple(tensors), metadata)


def quote(name: object) -> str:
    """A name from a file as it may stand in an error: quoted, on one line, of bounded length."""
    return ascii(str(name)[:120])


def _decode(header: bytes, where: str) -> dict[str, Any]:
    if header[:1] != b"{":
        raise _damaged(where, f"its header starts with {header[:8]!r}, expected '{{'")
    try:
        document: dict[str, Any] = json.loads(header.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError as exc:
        raise _damaged(where, "its header is nested too deeply") from exc
    except ValueError as exc:
        raise _damaged(where, f"its header is not the JSON that the format allows ({exc})") from exc
    return document


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document: dict[str, Any] = {}
    for name, value in pairs:
        if name in document:
            raise ValueError(f"the key {quote(name)} stands there twice")
        name.encode()  # a lone surrogate is JSON to Python, but no text
        document[name] = value
    return document


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _tensor(name: str, entry: Any, payload_start: int, where: str) -> HeaderTensor:
    what = f"tensor {quote(name)}"
    if not isinstance(entry, dict):
        raise _damaged(where, f"{what} is described by {quote(entry)}, expected an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if isinstance(dtype, str) and dtype in UNSUPPORTED_DTYPES:
        raise UnsupportedModelError(
            f"{where}: {what} has dtype {dtype}, which surfw does not read; "
            f"convert it to one of {', '.join(DTYPE_BITS)}"
        )
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _damaged(where, f"{what} has dtype {quote(dtype)}, expected one of {', '.join(DTYPE_BITS)}")
    if not _are_sizes(shape):
        raise _damaged(where, f"{what} has shape {quote(shape)}, expected integers from 0")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _damaged(where, f"{what} has data_offsets {quote(offsets)}, expected [begin, end] with 0 <= begin <= end")
    if _overflows(shape):
        raise _damaged(where, f"{what} has shape {quote(shape)}, more elements than 64 bits can count")
    begin, end = offsets
    if end - begin != nbytes(dtype, shape):
        raise _damaged(
            where, f"{what} ({dtype} {quote(shape)}) has {end - begin} bytes, expected {nbytes(dtype, shape)}"
        )
    return HeaderTensor(name, dtype, tuple(shape), payload_start + begin, payload_start + end)


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    """Whether it is a list of integers from 0; JSON's true and false are none."""
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _overflows(shape: list[int]) -> bool:
    """Whether the elements are too many to count; a dimension of 0 does not excuse the others."""
    count = 1
    for size in shape:
        count *= max(size, 1)
        if count >= _MAX_ELEMENTS:
            return True
    return False


def _damaged(where: str, complaint: str) -> CheckpointError:
    return CheckpointError(f"{where} is not a valid safetensors file: {complaint}; download it again")


def _truncated(where: str, expected_bytes: int, file_bytes: int) -> CheckpointError:
    return CheckpointError(
        f"{where} is truncated: expected {expected_bytes} bytes, the file has {file_bytes}; download the shard again"
    )
