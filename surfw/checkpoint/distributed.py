"""The tensors of a `torch.distributed.checkpoint`, assembled from the parts that each rank saved.

A read holds only the rows that it needs in memory, but a whole tensor if that is not contiguous in its file. Archives
of `torch.save` are not loaded: their pickle is read as inert data, too, and gives dtype, shape and strides; then the
elements are read directly from the file.

Reading is not thread-safe.
"""

import io
import os
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from surfw.checkpoint.distributed_table import Part, Parted, Place, contiguous, read_table
from surfw.checkpoint.layout import DISTRIBUTED_FILE
from surfw.checkpoint.plain_pickle import ForeignNameError, Made, Named, read_pickle
from surfw.checkpoint.shard import (
    TORCH_DTYPES,
    Identity,
    SourceTensor,
    check_unchanged,
    open_weights,
    read_weights,
)
from surfw.config import KIB, quote
from surfw.errors import CheckpointError, UnsupportedModelError
from surfw.manifest import DTYPE_BITS

_PICKLE_BYTES = 64 * KIB
_MOST_RECORDS = 64
_LOCAL_HEADER = b"PK\x03\x04"
_LOCAL_HEADER_BYTES = 30

_STORAGES = {
    "torch.BoolStorage": "BOOL", "torch.ByteStorage": "U8", "torch.CharStorage": "I8", "torch.ShortStorage": "I16",
    "torch.HalfStorage": "F16", "torch.BFloat16Storage": "BF16", "torch.IntStorage": "I32", "torch.FloatStorage": "F32",
    "torch.ComplexFloatStorage": "C64", "torch.LongStorage": "I64", "torch.DoubleStorage": "F64",
}  # fmt: skip
_UNTYPED = "torch.storage.UntypedStorage"
_REBUILD = "torch._utils._rebuild_tensor_v2"
_REBUILD_UNTYPED = "torch._utils._rebuild_tensor_v3"
_EXPECTED = {_REBUILD, _REBUILD_UNTYPED, _UNTYPED, "collections.OrderedDict", *_STORAGES, *TORCH_DTYPES}
"""The global names that the pickle in an archive may contain."""


class DistributedShard:
    """All ranks' files of a model as one shard; its tensors are sorted by name.

    Attributes:
        identity: identifies all its files, by the sums of their sizes and modification times.
    """

    def __init__(self, folder: Path, names: Collection[str]) -> None:
        """Read the table of a folder with these files.

        Raises:
            CheckpointError: the checkpoint is damaged or incomplete.
            UnsupportedModelError: surfw does not support this kind of checkpoint.
        """
        self.path = folder / DISTRIBUTED_FILE if DISTRIBUTED_FILE in names else folder
        table = read_table(folder, names)
        self._tensors, self._files = table.tensors, table.files
        sizes, times = (one.size_bytes for one in self._files.values()), (one.mtime_ns for one in self._files.values())
        self.identity = Identity(self.path.name, sum(sizes), sum(times))
        self.tensors = tuple(
            SourceTensor(name, one.dtype, one.shape, self.path, None) for name, one in sorted(self._tensors.items())
        )
        self._rows: tuple[str, int, int, Any] | None = None

    def read_into(self, tensor: SourceTensor, destination: memoryview, start: int) -> None:
        """Fill `destination` with the tensor's bytes from byte `start`."""
        if not len(destination):
            return
        one = self._tensors[tensor.name]
        count = one.shape[0] if one.shape else 1
        row_bytes = tensor.nbytes // count
        stop = start + len(destination)
        first, last = start // row_bytes, -(-stop // row_bytes)
        for part in one.parts:
            self._locate(part, one.dtype)
        if any(part.place and part.place.strides != contiguous(part.sizes) for part in one.parts):
            first, last = 0, count  # rows cannot be read separately
        if (first * row_bytes, last * row_bytes) == (start, stop):
            self._rows = None
            self._read_rows(one, first, last, np.frombuffer(destination, np.uint8))
            return
        if self._rows is None or self._rows[:3] != (tensor.name, first, last):
            self._rows = None
            rows = np.empty((last - first) * row_bytes, np.uint8)
            self._read_rows(one, first, last, rows)
            self._rows = tensor.name, first, last, rows
        begin = start - first * row_bytes
        np.frombuffer(destination, np.uint8)[:] = self._rows[3][begin : begin + len(destination)]

    def close(self) -> None:
        """Release the buffered rows; no file stays open."""
        self._rows = None

    def _read_rows(self, tensor: Parted, first: int, last: int, into: Any) -> None:
        """Read rows `first` to `last` (exclusive) of a tensor into a uint8 array of shape (bytes of these rows,)."""
        item = DTYPE_BITS[tensor.dtype] // 8
        shape = tensor.shape or (1,)
        rows = into.reshape(last - first, *shape[1:], item)
        for part in tensor.parts:
            assert part.place is not None, "it was located"
            offsets, sizes = part.offsets or (0,), part.sizes or (1,)
            low, high = max(first, offsets[0]), min(last, offsets[0] + sizes[0])
            if low >= high:
                continue
            strides = part.place.strides or (1,)
            place = part.place.start + (low - offsets[0]) * strides[0] * item
            held = high - low, *sizes[1:]
            inner = tuple(slice(at, at + size) for at, size in zip(offsets[1:], sizes[1:], strict=True))
            there = rows[(slice(low - first, high - first), *inner)]
            if there.flags.c_contiguous and strides == contiguous(sizes):
                self._read(part.file, place, there.reshape(-1))
                continue
            stored = np.empty(_span(held, strides) * item, np.uint8)
            self._read(part.file, place, stored)
            steps = (*(stride * item for stride in strides), 1)
            there[...] = np.lib.stride_tricks.as_strided(stored, (*held, item), steps)

    def _read(self, file: Path, position: int, into: Any) -> None:
        """Fill a uint8 array of shape (bytes,) from a file."""
        fd = open_weights(file)
        try:
            check_unchanged(file, fd, self._files[file])
            read_weights(file, fd, position, memoryview(into))
        finally:
            os.close(fd)

    def _locate(self, part: Part, dtype: str) -> None:
        """Find the elements of a part in its archive.

        Raises:
            CheckpointError: the archive is damaged, or holds another tensor.
            UnsupportedModelError: surfw does not support this kind of checkpoint.
        """
        if part.place is not None:
            return
        where = f"{part.file} at byte {part.start}"
        fd = open_weights(part.file)
        try:
            check_unchanged(part.file, fd, self._files[part.file])
            part.place = _find_elements(fd, part, dtype)
        except ForeignNameError as exc:
            raise UnsupportedModelError(
                f"{where} has a pickle that names {exc}, which is no part of a plain tensor; surfw loads nothing that "
                "a pickle names: save plain tensors"
            ) from exc
        except CheckpointError:
            raise
        except Exception as exc:
            seen = " ".join(str(exc).split())[:200]
            raise CheckpointError(
                f"{where} is no tensor as torch.distributed.checkpoint saves one ({type(exc).__name__}: {seen}); copy "
                "the file again"
            ) from exc
        finally:
            os.close(fd)


class _Archive:
    """A `torch.save` archive in a file, whose records are located without unpacking them."""

    def __init__(self, fd: int, part: Part) -> None:
        self._fd, self._part = fd, part
        with zipfile.ZipFile(io.BufferedReader(_Window(fd, part.start, part.length))) as archive:
            self._records = {record.filename: record for record in archive.infolist()}
        tables = [name for name in self._records if name.endswith("/data.pkl")]
        if len(tables) != 1 or len(self._records) > _MOST_RECORDS:
            raise ValueError(f"{len(tables)} tables, and {len(self._records)} records")
        self._prefix = tables[0].removesuffix("data.pkl")

    def __contains__(self, name: str) -> bool:
        return self._prefix + name in self._records

    def find(self, name: str) -> tuple[int, int]:
        """Return the file offset and size of a record's bytes."""
        record, length = self._records[self._prefix + name], self._part.length
        if record.compress_type != zipfile.ZIP_STORED:
            raise ValueError("its records are compressed")
        header, at = bytearray(_LOCAL_HEADER_BYTES), record.header_offset
        if at < 0 or at + len(header) > length:
            raise ValueError("a record lies outside of it")
        read_weights(self._part.file, self._fd, self._part.start + at, memoryview(header))
        at += len(header) + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        if header[:4] != _LOCAL_HEADER or at + record.file_size > length:
            raise ValueError("a record lies outside of it")
        return self._part.start + at, record.file_size

    def read(self, name: str) -> bytes:
        """Return the bytes of a small record."""
        at, size = self.find(name)
        if size > _PICKLE_BYTES:
            raise ValueError(f"its {name} has {size} bytes")
        data = bytearray(size)
        read_weights(self._part.file, self._fd, at, memoryview(data))
        return bytes(data)


def _find_elements(fd: int, part: Part, dtype: str) -> Place:
    """Find the elements of the only tensor in a `torch.save` archive."""
    archive = _Archive(fd, part)
    if "byteorder" in archive and archive.read("byteorder") != b"little":
        raise ValueError("its bytes are in another order")
    key, first, sizes, strides, found = _read_tensor(read_pickle(archive.read("data.pkl"), _EXPECTED))
    if (found, sizes) != (dtype, part.sizes):
        raise ValueError(f"{found} of shape {quote(sizes)}, expected {dtype} of shape {part.sizes}")
    start, size = archive.find(f"data/{key}")
    item = DTYPE_BITS[dtype] // 8
    if (first + _span(sizes, strides)) * item > size:
        raise ValueError("it has more elements than bytes")
    return Place(start + first * item, strides)


def _read_tensor(made: Any) -> tuple[str, int, tuple[int, ...], tuple[int, ...], str]:
    """Return storage key, storage offset (in elements), sizes, strides and dtype of the tensor in a pickle."""
    if not isinstance(made, Made) or made.name not in {_REBUILD, _REBUILD_UNTYPED}:
        raise TypeError("it holds something else than a tensor")
    storage, first, sizes, strides, _, _, *more = made.args
    if not isinstance(storage, Made) or storage.name:
        raise TypeError("its tensor has no storage")
    kind, named, key, _, _ = storage.args
    if kind != "storage" or not isinstance(named, Named) or not isinstance(key, str):
        raise TypeError("its tensor has no storage")
    if made.name == _REBUILD:
        dtype = _STORAGES[named.name]
    elif more and isinstance(typed := more.pop(0), Named):
        dtype = TORCH_DTYPES[typed.name]
    else:
        raise TypeError("its tensor has no dtype")
    if any(more):
        raise ValueError("its tensor is conjugated or negated")
    numbers = (first, *sizes, *strides)
    if not isinstance(sizes, tuple) or len(sizes) != len(strides) or any(type(one) is not int for one in numbers):
        raise TypeError("its tensor has no sizes")
    if min(numbers) < 0:
        raise ValueError("its tensor has negative sizes")
    return key, first, sizes, tuple(strides), dtype


def _span(sizes: Collection[int], strides: Collection[int]) -> int:
    """Return the number of elements from the first to the last one, inclusive."""
    return 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))


class _Window(io.RawIOBase):
    """A byte range of a file, as a file."""

    def __init__(self, fd: int, start: int, length: int) -> None:
        self._fd, self._start, self._length = fd, start, length
        self._at = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Set the position, relative to the range, and return it."""
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        if self._at < 0:
            raise ValueError("a place before the first byte")
        return self._at

    def tell(self) -> int:
        """Return the position, relative to the range."""
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` from the current position; return the number of bytes read."""
        view = memoryview(buffer)[: max(0, self._length - self._at)]
        count = os.preadv(self._fd, [view], self._start + self._at) if len(view) else 0
        self._at += count
        return count
