"""A GGUF file: the byte ranges and ggml types of its tensors. Its header is read by the package `gguf`.

Conversion to configuration, tokenizer and dense weights, as in transformers, is in `surfw.skeleton.gguf`. Here, a
tensor is its stored bytes, as one row of `U8`.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from surfw.checkpoint.shard import SourceTensor, check_unchanged, identify, open_weights, read_weights
from surfw.errors import CheckpointError, UnsupportedModelError

SUFFIX = ".gguf"
_MAGIC = b"GGUF"


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """How a tensor is stored: its ggml type, and the numpy dtype and shape of its bytes, as reported by `gguf`."""

    ggml_type: Any
    dtype: str
    shape: tuple[int, ...]


class GgufShard:
    """An open GGUF file.

    Attributes:
        architecture: llama.cpp's name of the model's architecture.
        stored: how each tensor is stored, by its name in the file.
    """

    def __init__(self, path: Path) -> None:
        """Open the file and read its header.

        Raises:
            CheckpointError: it is missing, cannot be read, or is damaged.
            UnsupportedModelError: it is one of several parts, or the package `gguf` is not installed.
        """
        self.path = path
        self._fd = open_weights(path)
        try:
            self.identity = identify(path, self._fd)
            _expect_magic(path, self._fd)
            self.architecture, self.stored, self.tensors = _read_header(path, self.identity.size_bytes)
        except BaseException:
            self.close()
            raise

    def read_into(self, tensor: SourceTensor, destination: memoryview, start: int) -> None:
        """Fill `destination` with the tensor's stored bytes from byte `start`."""
        assert tensor.start is not None, "it is of this file"
        check_unchanged(self.path, self._fd, self.identity)
        read_weights(self.path, self._fd, tensor.start + start, destination)

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _expect_magic(path: Path, fd: int) -> None:
    if os.pread(fd, len(_MAGIC), 0) != _MAGIC:
        raise CheckpointError(f"{path} is no GGUF file: it does not begin with {_MAGIC.decode()}; download it again")


def _read_header(path: Path, size_bytes: int) -> tuple[str, Mapping[str, GgufTensor], tuple[SourceTensor, ...]]:
    if find_spec("gguf") is None:
        raise UnsupportedModelError(f"{path} is a GGUF file, which needs a package: pip install 'surfw[gguf]'")
    from gguf import GGUFReader

    class Reader(GGUFReader):  # type: ignore[misc]
        """Refuses to read past the end of the file, where the base class returns empty values without end."""

        def _get(self, offset: int, dtype: Any, count: int = 1, *order: Any, **options: Any) -> Any:
            found = super()._get(offset, dtype, count, *order, **options)
            if len(found) < int(count):
                raise ValueError(f"{count} values are expected at byte {offset}, where {len(found)} are left")
            return found

    try:
        reader = Reader(path)
        fields = reader.fields
        architecture = str(fields["general.architecture"].contents())
        parts = int(fields["split.count"].contents()) if "split.count" in fields else 1
        stored = {one.name: GgufTensor(one.tensor_type, one.data.dtype.str, one.data.shape) for one in reader.tensors}
        tensors = tuple(
            SourceTensor(one.name, "U8", (int(one.n_bytes),), path, int(one.data_offset)) for one in reader.tensors
        )
    except Exception as exc:
        said = " ".join(str(exc).split())[:200]
        raise CheckpointError(
            f"{path} is damaged, or no GGUF file ({type(exc).__name__}: {said}); download it again"
        ) from exc
    if parts > 1:
        raise UnsupportedModelError(
            f"{path} is one of {parts} parts of a model; join them with llama-gguf-split --merge, and name the result"
        )
    for one in tensors:
        if one.start is None or one.start + one.nbytes > size_bytes:
            raise CheckpointError(f"{path} is truncated: tensor {one.name} ends behind it; download it again")
    return architecture, stored, tensors
