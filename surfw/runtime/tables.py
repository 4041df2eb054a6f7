"""Tables of embeddings that are looked up in without being in memory, row by row.

`tables_of` finds them in a model, by what its modules are: no architecture is named. The rest of a module that holds
such a table (a norm, small embeddings, a bias) is read alone, once, and stays.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from surfw.config import MIB
from surfw.manifest import Manifest
from surfw.runtime.loader import as_parameter
from surfw.runtime.rows import RowReader
from surfw.skeleton.build import Skeleton
from surfw.skeleton.units import Slot


@dataclass(frozen=True, slots=True)
class TableUnit:
    """A unit that can run while its tables are not in memory. All names are those of the manifest's tensors.

    Attributes:
        path: the unit's.
        chunks: the chunks that its tensors lie in.
        looked_up: tables of embeddings, which rows are read of.
        others: its other tensors, which are read alone and stay.
    """

    path: str
    chunks: tuple[str, ...]
    looked_up: tuple[str, ...]
    others: tuple[str, ...]


class Tables(Protocol):
    """What the hooks ask of tables."""

    def row_wise(self, path: str) -> bool:
        """Whether the unit now runs without its tables in memory."""

    def others(self, path: str) -> Mapping[str, torch.Tensor]:
        """The unit's tensors that are no tables, by name; they stay in memory."""

    def apply(self, name: str, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The result of a function of torch that is called with the table of that name as its weight.

        Returns:
            The result; NotImplemented if the whole table is needed for it.
        """


class StreamedTables:
    """The tables of one model, read while it runs."""

    def __init__(self, units: Mapping[str, TableUnit], rows: RowReader, by_rows: Callable[[str], bool]) -> None:
        """Name the units that have tables, what reads them, and what says of a unit's path that it reads rows now."""
        self._units = units
        self._rows = rows
        self._by_rows = by_rows
        self._others: dict[str, torch.Tensor] = {}

    def row_wise(self, path: str) -> bool:
        """Whether the unit now runs without its tables in memory."""
        return path in self._units and self._by_rows(path)

    def others(self, path: str) -> Mapping[str, torch.Tensor]:
        """The unit's tensors that are no tables; read once.

        Raises:
            SurfwError: a block could not be read, or the run was interrupted.
        """
        names = self._units[path].others
        for name in names:
            if name not in self._others:
                self._others[name] = as_parameter(self._rows.tensor(name))
        return {name: self._others[name] for name in names}

    def apply(self, name: str, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """`embedding` row by row; NotImplemented for what needs the whole table.

        Raises:
            IndexError: an id is not one of a row.
            SurfwError: a block could not be read, or the run was interrupted.
        """
        if function is nn.functional.embedding:
            return self._look_up(name, *args, **kwargs)
        return NotImplemented

    def clear(self) -> None:
        """Give all memory back."""
        self._rows.clear()
        self._others.clear()

    def _look_up(
        self,
        name: str,
        input: Any,  # noqa: A002 - torch's name
        weight: torch.Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        *_: Any,
        **__: Any,
    ) -> Any:
        """As torch's `embedding`; what only gradients would need makes no difference."""
        ids = type(input) is torch.Tensor and input.dtype in {torch.int32, torch.int64} and input.device.type == "cpu"
        padded = padding_idx is not None and not -weight.shape[0] <= padding_idx < weight.shape[0]
        if not ids or padded or max_norm is not None:
            return NotImplemented
        return self._rows.lookup(name, input)


def tables_of(skeleton: Skeleton, manifest: Manifest, *, least_bytes: int = MIB) -> dict[str, TableUnit]:
    """The units that can run without their tables in memory, by path. Pure.

    A table is a matrix of at least `least_bytes` that is, in a unit beside the layers, the weight of embeddings and of
    nothing else. What else the unit has must be less; and of chunks that are not stored as they are, no part can be
    read alone.
    """
    chunk_of = {info.name: chunk for chunk in manifest.chunks for info in chunk.tensors}
    stored = {info.name: info for chunk in manifest.chunks for info in chunk.tensors}
    found = {}
    for unit in (unit for unit in skeleton.units if unit.kind == "part"):
        names = {slot: name for slot in unit.slots if (name := manifest.ties.get(slot.name, slot.name)) in stored}
        embeddings = {name for slot, name in names.items() if _is_embedding(slot)}
        only = embeddings - {name for slot, name in names.items() if not _is_embedding(slot)}
        tables = {name for name in only if stored[name].nbytes >= least_bytes and len(stored[name].shape) == 2}
        others = dict.fromkeys(name for name in names.values() if name not in tables)
        size = {name: stored[name].nbytes for name in names.values()}
        in_parts = all(chunk_of[name].form("none") for name in names.values())
        if tables and in_parts and sum(size[name] for name in others) < sum(size[name] for name in tables):
            chunks = dict.fromkeys(chunk_of[name].name for name in names.values())
            looked_up = dict.fromkeys(name for name in names.values() if name in tables)
            found[unit.path] = TableUnit(unit.path, tuple(chunks), tuple(looked_up), tuple(others))
    return found


def _is_embedding(slot: Slot) -> bool:
    return isinstance(slot.module, nn.Embedding) and slot.leaf == "weight"
