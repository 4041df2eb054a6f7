"""Shards written by `torch.save` (`pytorch_model.bin`): the only module in this package that imports torch.

- They are pickles, read with `weights_only=True`: a pickle that needs to run code is refused.
- The file is mapped, not read. Mapped pages count towards the process's memory, so the file is mapped anew after every
  256 MiB. The format of torch before 1.6 cannot be mapped: such a file is loaded whole, with a warning.
- Tensors may be tied, strided or scalars; their bytes are those of the contiguous tensor.
- Entries that are not tensors are skipped with a warning; transformers does not use them either.

Reading is not thread-safe.
"""

import logging
import os
import pickle
import re
from pathlib import Path
from typing import Any

import torch

from surfw.checkpoint.shard import TORCH_DTYPES, SourceTensor, check_unchanged, identify, open_weights, translate_errors
from surfw.config import MIB, format_size, quote
from surfw.errors import CheckpointError, UnsupportedModelError

logger = logging.getLogger("surfw.checkpoint")

_RESIDENT_BYTES = 256 * MIB
_DEEPEST = 3
"""Depth of nested dicts in which tensors are searched for, to name their place in an error."""

_ZIP_MAGIC = b"PK\x03\x04"


class LegacyShard:
    """An open file written by `torch.save`; its tensors are in the order of the pickle."""

    def __init__(self, path: Path) -> None:
        """Unpickle the file's dict of tensors.

        Raises:
            CheckpointError: the file is missing, cannot be read, or is damaged.
            UnsupportedModelError: it needs to run code, or has nested tensors or tensors that surfw does not read.
        """
        self.path = path
        with translate_errors(path), os.fdopen(open_weights(path), "rb") as file:
            self.identity = identify(path, file.fileno())
            self._mapped = file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC
        if not self._mapped:
            logger.warning(
                "%s has the format of torch before 1.6, which has to be held in memory whole (%s); "
                "convert it to safetensors to avoid that",
                path, format_size(self.identity.size_bytes),
            )  # fmt: skip
        self._state = _load(path, mapped=self._mapped)
        self._touched_bytes = 0
        self._current: tuple[str, torch.Tensor] | None = None
        self.tensors = tuple(
            self._describe(name, value) for name, value in self._state.items() if self._is_tensor(name)
        )

        if not self.tensors:
            self._refuse_nested()

    def read_into(self, tensor: SourceTensor, destination: memoryview, start: int) -> None:
        """Fill `destination` with the contiguous tensor's bytes from byte `start`."""
        check_unchanged(self.path, None, self.identity)
        if len(destination):
            source = self._bytes_of(tensor)[start : start + len(destination)]
            torch.frombuffer(destination, dtype=torch.uint8).copy_(source)

    def close(self) -> None:
        """Release the mapping or the memory."""
        self._state, self._current = {}, None

    def _bytes_of(self, tensor: SourceTensor) -> torch.Tensor:
        """Return the tensor as bytes: a view if it is contiguous, else a copy; kept until another tensor is read."""
        if self._current is None or self._current[0] != tensor.name:
            self._current = None
            if self._mapped and self._touched_bytes > _RESIDENT_BYTES:
                self._state = {}
                self._state = _load(self.path, mapped=True)
                self._touched_bytes = 0
            self._touched_bytes += tensor.nbytes
            dense = self._state[tensor.name].detach().contiguous()
            self._current = tensor.name, dense.reshape(-1).view(torch.uint8)
        return self._current[1]

    def _refuse_nested(self) -> None:
        """Raise an error if the tensors are in nested dicts, where transformers does not look."""
        level: list[tuple[list[Any], Any]] = [([], self._state)]
        while level:
            for path, table in level:
                if path and any(isinstance(one, torch.Tensor) for one in table.values()):
                    keys, file = "".join(f"[{quote(key)}]" for key in path), self.path.name
                    raise UnsupportedModelError(
                        f"{self.path} has its tensors under {keys}, expected them by their names at the top; save them "
                        f"so: torch.save(torch.load('{file}'){keys}, '{file}')"
                    )
            level = [
                ([*path, key], value) for path, table in level for key, value in table.items()
                if isinstance(value, dict) and len(path) < _DEEPEST
            ]  # fmt: skip

    def _is_tensor(self, name: Any) -> bool:
        value = self._state[name]
        if isinstance(name, str) and isinstance(value, torch.Tensor):
            return True
        seen = f"{quote(name)}: {type(value).__name__}"
        logger.warning("%s has an entry that is no tensor (%s); it is passed over", self.path, seen)
        return False

    def _describe(self, name: str, tensor: torch.Tensor) -> SourceTensor:
        odd = tensor.is_quantized or tensor.is_meta or tensor.is_conj() or tensor.is_neg()
        if odd or tensor.layout is not torch.strided or str(tensor.dtype) not in TORCH_DTYPES:
            raise UnsupportedModelError(
                f"{self.path}: tensor {quote(name)} is of a kind that surfw does not read ({tensor.dtype}, "
                f"{tensor.layout}); expected a dense tensor of {', '.join(TORCH_DTYPES.values())}"
            )
        if tensor.nbytes > self.identity.size_bytes:
            raise CheckpointError(
                f"{self.path}: tensor {quote(name)} claims {tensor.nbytes} bytes, the file has "
                f"{self.identity.size_bytes}; download it again"
            )
        return SourceTensor(name, TORCH_DTYPES[str(tensor.dtype)], tuple(tensor.shape), self.path, None)


def _load(path: Path, *, mapped: bool) -> dict[Any, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as exc:
        raise _refusal(path, exc) from exc
    if not isinstance(state, dict):
        raise UnsupportedModelError(f"{path} holds a {type(state).__name__}, expected tensors by their names")
    return state


def _refusal(path: Path, error: Exception) -> CheckpointError | UnsupportedModelError:
    """Translate an error of the unpickler, which can be any exception if the bytes are damaged."""
    if isinstance(error, pickle.UnpicklingError) and (code := re.search(r"GLOBAL (\S+)", str(error))):
        return UnsupportedModelError(
            f"{path} can only be read by running code that it names ({quote(code[1])}), which surfw does not do; "
            "where you trust it, load it with torch and save it as safetensors"
        )
    seen = (
        "an invalid pickle" if isinstance(error, pickle.UnpicklingError) else f"{type(error).__name__} {quote(error)}"
    )
    return CheckpointError(f"{path} is damaged, or not from torch.save ({seen}); download it again")
