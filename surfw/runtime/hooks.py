"""Puts a module's weights in place before its forward and takes them away afterwards.

The model is transformers' own and is not changed otherwise: after `detach`, nothing of surfw remains on it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from surfw.errors import ManifestError
from surfw.manifest import Manifest
from surfw.runtime.absent import AbsentBuffer, AbsentParameter
from surfw.runtime.engine import Engine
from surfw.runtime.tables import Tables
from surfw.skeleton.build import Skeleton
from surfw.skeleton.units import Slot, Unit


class StreamingHooks:
    """The hooks of one model."""

    def __init__(self, skeleton: Skeleton, manifest: Manifest, engine: Engine, tables: Tables | None = None) -> None:
        """Attach to every unit that the manifest's order names; `tables` knows which run without theirs in memory."""
        self._engine = engine
        self._tables = tables
        self._without_tables: set[str] = set()  # paths of the units that now run so
        self._ties = manifest.ties
        self._original = {slot.name: slot.tensor for unit in skeleton.units for slot in unit.slots}
        provided = _provided(manifest)
        self._slots = [slot for unit in skeleton.units for slot in unit.slots if slot.name in provided]
        self._absent: dict[str, torch.Tensor] = {}
        self._handles: list[RemovableHandle] = []
        used = {use.module for use in manifest.order}
        for unit in skeleton.units:
            slots = [slot for slot in unit.slots if slot.name in provided]
            if not slots:
                continue
            if unit.path not in used:
                raise ManifestError(
                    f"the manifest of {manifest.name} does not say when {unit.path} runs; chunk it again"
                )
            self._attach(unit, slots)

    def detach(self) -> None:
        """Remove the hooks; every slot gets back what it held before."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for slot in self._slots:
            slot.put(self._original[slot.name])

    def recover(self) -> None:
        """Take away what a forward that was interrupted has left in place."""
        if self._handles:
            self._without_tables.clear()
            self._take_away(self._slots)
            self._engine.release_all()

    def _attach(self, unit: Unit, slots: Sequence[Slot]) -> None:
        for slot in slots:
            kind = AbsentBuffer if slot.is_buffer else AbsentParameter
            apply = partial(self._apply, unit, self._stored(slot)) if self._tables else None
            absent = kind(slot.tensor, partial(self._bring, unit, slots, slot), apply)
            self._absent[slot.name] = absent
            slot.put(absent)
        before, after = partial(self._before, unit, slots), partial(self._after, unit, slots)
        self._handles += [
            unit.module.register_forward_pre_hook(before, prepend=True),
            unit.module.register_forward_hook(after, always_call=True),
        ]

    def _before(self, unit: Unit, slots: Sequence[Slot], module: torch.nn.Module, args: Any) -> None:
        if self._tables and self._tables.row_wise(unit.path):
            self._engine.passes(unit.path)
            self._without_tables.add(unit.path)
            others = self._tables.others(unit.path)
            self._put([slot for slot in slots if self._stored(slot) in others], others)
        else:
            self._put(slots, self._engine.acquire(unit.path))

    def _after(self, unit: Unit, slots: Sequence[Slot], module: torch.nn.Module, args: Any, output: Any) -> None:
        if unit.path in self._without_tables:
            self._without_tables.remove(unit.path)
            self._take_away(slots)
            return
        if slots[0].tensor is self._absent[slots[0].name]:
            return  # its weights never came: the forward failed before it began
        if _shares_memory(output, slots):
            self._engine.keep(unit.path)
        self._take_away(slots)
        self._engine.release(unit.path)

    def _apply(
        self, unit: Unit, name: str, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        """What torch is asked to do with an absent weight, done without the whole of it if that can be."""
        if self._tables and (unit.path in self._without_tables or self._tables.row_wise(unit.path)):
            return self._tables.apply(name, function, args, kwargs)
        return NotImplemented

    def _bring(self, unit: Unit, slots: Sequence[Slot], slot: Slot) -> torch.Tensor:
        """Load a unit whose weights are needed while they are absent.

        If it runs, they were to be read in parts, and this cannot be: they go after its forward. If not, the model uses
        them from outside: from now on they stay in memory.
        """
        if unit.path in self._without_tables:
            self._put(slots, self._engine.acquire(unit.path))
            self._without_tables.remove(unit.path)
        else:
            self._put(slots, self._engine.pin(unit.path))
        return slot.tensor

    def _put(self, slots: Sequence[Slot], tensors: Mapping[str, torch.Tensor]) -> None:
        for slot in slots:
            tensor = tensors[self._stored(slot)]
            slot.put(tensor.data if slot.is_buffer else tensor)

    def _stored(self, slot: Slot) -> str:
        """The name under which a slot's tensor is stored."""
        return self._ties.get(slot.name, slot.name)

    def _take_away(self, slots: Sequence[Slot]) -> None:
        for slot in slots:
            slot.put(self._absent[slot.name])


def _shares_memory(output: Any, slots: Sequence[Slot]) -> bool:
    """Whether a module returns a view of its own weights, as of a table: then they are used after it has run."""
    weights = {slot.tensor.untyped_storage().data_ptr() for slot in slots if slot.tensor.numel()}
    return any(tensor.untyped_storage().data_ptr() in weights for tensor in _tensors_in(output))


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        if value.layout is torch.strided and not isinstance(value, AbsentParameter | AbsentBuffer):
            yield value
    elif isinstance(value, tuple | list | dict):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(inner)


def _provided(manifest: Manifest) -> set[str]:
    """Names of all tensors that chunks and ties provide."""
    stored = {tensor.name for chunk in manifest.chunks for tensor in chunk.tensors}
    return stored | set(manifest.ties)
