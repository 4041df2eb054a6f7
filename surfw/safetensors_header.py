"""Parses and writes safetensors headers, without I/O.

Format: https://github.com/huggingface/safetensors#format. A file is 8 bytes (little-endian length of the header), the
header (a JSON object from tensor name to dtype, shape and offsets into the payload), and the payload. These rules are
checked:

- The header has at most 100 MB, lies within the file, starts with `{`, and has no duplicate keys.
- A tensor's byte range has exactly the size implied by its dtype and shape.
- The ranges cover the payload without holes or overlaps, and the payload ends where the file ends.

Any input either parses or raises `HeaderError`. The message does not name the file: both source checkpoints and blobs
of a store are parsed here, and only the caller knows what to do about damage.
"""

import json
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeGuard

from surfw.config import quote
from surfw.manifest import DTYPE_BITS, TensorInfo, nbytes

PREFIX_BYTES = 8
"""The size of the header's length field, which precedes the header."""

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""

UNSUPPORTED_DTYPES = frozenset({"F4", "F6_E2M3", "F6_E3M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})
"""Dtypes of the format that surfw does not read."""

HEADER_ALIGNMENT = 4096
"""The alignment of the payload in files that surfw writes, in bytes."""

_MAX_ELEMENTS = 1 << 63


class HeaderError(ValueError):
    """A rule of the format is violated; the message says which."""


class TruncatedFileError(HeaderError):
    """The file ends before its header or its payload is complete."""


class UnsupportedDtypeError(HeaderError):
    """A tensor has a dtype of the format that surfw does not read."""


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
    """The tensors of a file, by offset, and its `__metadata__`."""

    tensors: tuple[HeaderTensor, ...]
    metadata: Mapping[str, str]


def header_length(prefix: bytes, file_bytes: int) -> int:
    """Parse the length of the header from the first 8 bytes of a file of `file_bytes` bytes.

    Raises:
        HeaderError: the file is too short, or the length exceeds the format's limit or the file.
    """
    if len(prefix) < PREFIX_BYTES:
        raise HeaderError(f"it has {file_bytes} bytes, expected at least {PREFIX_BYTES}")
    length = int.from_bytes(prefix[:PREFIX_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        raise HeaderError(f"its header claims {length} bytes, the format allows {MAX_HEADER_BYTES}")
    if PREFIX_BYTES + length > file_bytes:
        raise _truncated(PREFIX_BYTES + length, file_bytes)
    return length


def parse_header(header: bytes, file_bytes: int) -> Header:
    """Parse the header of a file of `file_bytes` bytes; `header` is the whole header, without the 8 length bytes.

    Raises:
        HeaderError: a rule of the format is violated.
    """
    document = _decode(header)
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise HeaderError("__metadata__ is not an object of texts")
    payload_start = PREFIX_BYTES + len(header)
    tensors = [_tensor(name, entry, payload_start) for name, entry in document.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.stop))
    end = payload_start
    for tensor in tensors:
        if tensor.start != end:
            fault = "overlaps the one before" if tensor.start < end else "leaves a hole before it"
            raise HeaderError(f"tensor {quote(tensor.name)} begins at byte {tensor.start}, expected {end}: it {fault}")
        end = tensor.stop
    if end > file_bytes:
        raise _truncated(end, file_bytes)
    if end < file_bytes:
        raise HeaderError(f"it has {file_bytes} bytes, its header describes {end}")
    return Header(tuple(tensors), metadata)


def is_header(data: bytes, file_bytes: int) -> bool:
    """Whether these bytes are exactly the length and the header of a file of `file_bytes` bytes."""
    try:
        parse_header(data[PREFIX_BYTES:], file_bytes)
        return header_length(data, file_bytes) == len(data) - PREFIX_BYTES
    except HeaderError:
        return False


def encode_header(tensors: Sequence[TensorInfo]) -> bytes:
    """Encode the length and the header of a chunk's file, padded so that the payload starts at a multiple of 4096.

    The padding is trailing spaces, which the format allows.
    """
    entries = {
        tensor.name: {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [tensor.offset, tensor.offset + tensor.nbytes],
        }
        for tensor in tensors
    }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    padded = len(text) + -(PREFIX_BYTES + len(text)) % HEADER_ALIGNMENT
    return padded.to_bytes(PREFIX_BYTES, "little") + text.ljust(padded)


def _decode(header: bytes) -> dict[str, Any]:
    if header[:1] != b"{":
        raise HeaderError(f"its header starts with {header[:8]!r}, expected '{{'")
    try:
        document: dict[str, Any] = json.loads(header.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError as exc:
        raise HeaderError("its header is nested too deeply") from exc
    except ValueError as exc:
        raise HeaderError(f"its header is not the JSON that the format allows ({exc})") from exc
    return document


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document: dict[str, Any] = {}
    for name, value in pairs:
        if name in document:
            raise ValueError(f"the key {quote(name)} stands there twice")
        name.encode()  # Python's JSON parser accepts lone surrogates, which are not valid text
        document[name] = value
    return document


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _tensor(name: str, entry: Any, payload_start: int) -> HeaderTensor:
    what = f"tensor {quote(name)}"
    if not isinstance(entry, dict):
        raise HeaderError(f"{what} is described by {quote(entry)}, expected an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if isinstance(dtype, str) and dtype in UNSUPPORTED_DTYPES:
        raise UnsupportedDtypeError(
            f"{what} has dtype {dtype}, which surfw does not read; convert it to one of {', '.join(DTYPE_BITS)}"
        )
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise HeaderError(f"{what} has dtype {quote(dtype)}, expected one of {', '.join(DTYPE_BITS)}")
    if not _are_sizes(shape):
        raise HeaderError(f"{what} has shape {quote(shape)}, expected integers from 0")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise HeaderError(f"{what} has data_offsets {quote(offsets)}, expected [begin, end] with 0 <= begin <= end")
    counts = accumulate((max(size, 1) for size in shape), operator.mul)  # a 0 must not hide absurd other sizes
    if any(count >= _MAX_ELEMENTS for count in counts):
        raise HeaderError(f"{what} has shape {quote(shape)}, more elements than 64 bits can count")
    begin, end = offsets
    if end - begin != nbytes(dtype, shape):
        raise HeaderError(f"{what} ({dtype} {quote(shape)}) has {end - begin} bytes, expected {nbytes(dtype, shape)}")
    return HeaderTensor(name, dtype, tuple(shape), payload_start + begin, payload_start + end)


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    """Whether a value is a list of non-negative integers, excluding booleans."""
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _truncated(expected_bytes: int, file_bytes: int) -> TruncatedFileError:
    return TruncatedFileError(f"expected {expected_bytes} bytes, the file has {file_bytes}")
