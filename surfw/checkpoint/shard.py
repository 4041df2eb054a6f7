"""One file of a checkpoint: the interface of all shards, and the safetensors shard.

Bytes are read with `preadv`, never mapped: mapped pages would count towards the process's memory. If a file changes
after it was opened, the next read fails.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

from surfw.errors import CheckpointError, UnsupportedModelError
from surfw.files import open_regular, user_name
from surfw.manifest import nbytes
from surfw.safetensors_header import (
    PREFIX_BYTES,
    Header,
    HeaderError,
    TruncatedFileError,
    UnsupportedDtypeError,
    header_length,
    parse_header,
)

_POINTER = b"version https://git-lfs."

TORCH_DTYPES = {
    "torch.bool": "BOOL", "torch.uint8": "U8", "torch.int8": "I8", "torch.float8_e4m3fn": "F8_E4M3",
    "torch.float8_e5m2": "F8_E5M2", "torch.uint16": "U16", "torch.int16": "I16", "torch.float16": "F16",
    "torch.bfloat16": "BF16", "torch.uint32": "U32", "torch.int32": "I32", "torch.float32": "F32",
    "torch.complex64": "C64", "torch.uint64": "U64", "torch.int64": "I64", "torch.float64": "F64",
}  # fmt: skip
"""Safetensors names of the dtypes that are supported in torch's own file formats, by torch name."""


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """A tensor of a source checkpoint.

    Attributes:
        name: its name in the file; transformers may rename it while loading.
        dtype: safetensors name, such as `BF16`.
        shape: sizes of its dimensions.
        file: the shard that holds it.
        start: file offset of its data; None if they are not a plain byte range (legacy files).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int | None

    @property
    def nbytes(self) -> int:
        """Bytes of the contiguous tensor."""
        return nbytes(self.dtype, self.shape)


class Identity(NamedTuple):
    """Identifies a file: its name, size in bytes, and time of last modification."""

    name: str
    size_bytes: int
    mtime_ns: int


class Shard(Protocol):
    """An open weight file."""

    path: Path
    identity: Identity
    tensors: tuple[SourceTensor, ...]

    def read_into(self, tensor: SourceTensor, destination: memoryview, start: int) -> None:
        """Fill `destination` with the tensor's bytes from byte `start` of the tensor.

        Raises:
            CheckpointError: the file changed since it was opened, or cannot be read.
        """

    def close(self) -> None:
        """Close the file; nothing can be read afterwards."""


class SafetensorsShard:
    """An open safetensors file; its tensors are sorted by name, as in transformers."""

    def __init__(self, path: Path) -> None:
        """Open the file and check its header.

        Raises:
            CheckpointError: the file is missing, cannot be read, or is damaged.
            UnsupportedModelError: a tensor has a dtype that surfw does not read.
        """
        self.path = path
        self._fd = open_weights(path)
        try:
            self.identity = identify(path, self._fd)
            self.tensors = read_tensors(
                path, self.identity.size_bytes, partial(read_weights, path, self._fd), where=str(path)
            )
        except BaseException:
            self.close()
            raise

    def read_into(self, tensor: SourceTensor, destination: memoryview, start: int) -> None:
        """Fill `destination` with the tensor's bytes from byte `start` of the tensor."""
        assert tensor.start is not None, "it is of this file"
        check_unchanged(self.path, self._fd, self.identity)
        read_weights(self.path, self._fd, tensor.start + start, destination)

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def read_weights(path: Path, fd: int, position: int, destination: memoryview) -> None:
    """Fill uint8 memory from an open file, starting at byte `position`.

    Raises:
        CheckpointError: the file ends early, or cannot be read.
    """
    done = 0
    with translate_errors(path):
        while done < len(destination):
            count = os.preadv(fd, [destination[done:]], position + done)
            if count == 0:
                raise CheckpointError(
                    f"{path} ends at byte {position + done}, expected {position + len(destination)} bytes: it shrank "
                    "while it was read; run again when nothing writes to it"
                )
            done += count


def read_tensors(
    path: Path, file_bytes: int, read: Callable[[int, memoryview], object], *, where: str
) -> tuple[SourceTensor, ...]:
    """Return the tensors of a safetensors file, sorted by name; see `read_header`."""
    found = read_header(file_bytes, read, where=where).tensors
    return tuple(
        SourceTensor(tensor.name, tensor.dtype, tensor.shape, path, tensor.start)
        for tensor in sorted(found, key=lambda tensor: tensor.name)
    )


def read_header(file_bytes: int, read: Callable[[int, memoryview], object], *, where: str) -> Header:
    """Read the header of a safetensors file; `read(position, memory)` fills memory with its bytes.

    Raises:
        CheckpointError: the file breaks a rule of the format, which the message names.
        UnsupportedModelError: a tensor has a dtype of the format that surfw does not read.
    """
    prefix = bytearray(min(PREFIX_BYTES, file_bytes))
    read(0, memoryview(prefix))
    try:
        text = bytearray(header_length(bytes(prefix), file_bytes))
        read(PREFIX_BYTES, memoryview(text))
        return parse_header(bytes(text), file_bytes)
    except TruncatedFileError as exc:
        raise CheckpointError(f"{where} is truncated: {exc}; download the shard again") from exc
    except UnsupportedDtypeError as exc:
        raise UnsupportedModelError(f"{where}: {exc}") from exc
    except HeaderError as exc:
        raise CheckpointError(f"{where} is not a valid safetensors file: {exc}; download it again") from exc


def identify(path: Path, fd: int | None = None) -> Identity:
    """Return the file's current identity."""
    with translate_errors(path):
        facts = path.stat() if fd is None else os.fstat(fd)
    return Identity(path.name, facts.st_size, facts.st_mtime_ns)


def check_unchanged(path: Path, fd: int | None, then: Identity) -> None:
    """Check that a file has not changed since `then`.

    Raises:
        CheckpointError: its size or modification time changed.
    """
    now = identify(path, fd)
    if now != then:
        raise CheckpointError(
            f"{path} changed since it was opened ({then.size_bytes} bytes then, {now.size_bytes} now); "
            "run again when nothing writes to it"
        )


def open_weights(path: Path) -> int:
    """Open a regular weight file and return its descriptor.

    Raises:
        CheckpointError: it is missing, not a regular file, or a Git LFS pointer, as left by git without LFS.
    """
    with translate_errors(path), ExitStack() as opened:
        if not path.is_file():
            seen = "is no regular file" if path.exists() else "is missing"
            raise CheckpointError(f"{path} {seen}; the checkpoint is incomplete, download it again")
        fd = open_regular(path)
        opened.callback(os.close, fd)
        refuse_pointer(os.pread(fd, len(_POINTER), 0), str(path))
        opened.pop_all()
    return fd


def refuse_pointer(data: bytes, where: str) -> None:
    """Raise CheckpointError if these bytes begin a Git LFS pointer, as left by git without LFS."""
    if data.startswith(_POINTER):
        raise CheckpointError(f"{where} is a Git LFS pointer, not the file itself; run 'git lfs pull' beside it")


@contextmanager
def translate_errors(where: Path | str) -> Iterator[None]:
    """Convert `OSError` for a file into `CheckpointError`."""
    try:
        yield
    except PermissionError as exc:
        raise CheckpointError(
            f"{where} cannot be read: permission denied for user {user_name()}; give that user the rights to it, or "
            "name another checkpoint"
        ) from exc
    except OSError as exc:
        raise CheckpointError(f"{where} cannot be read: {exc.strerror or exc}") from exc
