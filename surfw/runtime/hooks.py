"""Puts a module's weights in place before its forward and removes them afterwards.

The model is transformers' own and not changed otherwise: after `detach`, nothing of surfw remains on it. If the user
replaces a streamed parameter, the replacement is used and left in place. In a run that streams nothing, weights remain
in place until the run ends (`Engine.stay`).

While a module's weights are not in place, absent tensors stand in for them (`surfw.runtime.absent`).
"""

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch
from torch.utils.hooks import RemovableHandle

from surfw.errors import ManifestError, ModelError
from surfw.manifest import Manifest
from surfw.runtime.absent import AbsentBuffer, AbsentParameter
from surfw.runtime.engine import Engine
from surfw.runtime.expert_hooks import ExpertHooks
from surfw.runtime.plan import ResidencyPlan
from surfw.runtime.rows import StreamedTables
from surfw.skeleton.build import Skeleton
from surfw.skeleton.units import Slot, Unit

logger = logging.getLogger("surfw.runtime")

_CPU = torch.device("cpu")


@dataclass(slots=True, eq=False)
class _Place:
    """A slot, and the tensor that the hooks put there last.

    Attributes:
        registry: torch's dictionary of parameters or buffers of the slot's module.
        leaf: the slot's name in it.
        stored: the name under which its tensor is stored.
        original: the tensor there before the hooks.
        absent: the absent tensor for it.
        placed: what the hooks put there last; still there, unless the user has replaced it.
    """

    slot: Slot
    registry: dict[str, Any]
    leaf: str
    stored: str
    original: torch.Tensor
    absent: torch.Tensor
    placed: torch.Tensor

    def put(self, tensor: torch.Tensor) -> None:
        """Put a tensor into the slot."""
        self.registry[self.leaf] = self.placed = tensor

    @property
    def is_ours(self) -> bool:
        """Whether the slot still holds what the hooks put there."""
        return self.registry.get(self.leaf) is self.placed


class StreamingHooks:
    """The hooks of one model."""

    def __init__(
        self,
        skeleton: Skeleton,
        manifest: Manifest,
        engine: Engine,
        tables: StreamedTables | None = None,
        *,
        device: torch.device = _CPU,
        experts: ExpertHooks | None = None,
    ) -> None:
        """Attach to every unit that the manifest's order names.

        Args:
            skeleton: the model without weights.
            manifest: its weights.
            engine: loads them.
            tables: says which units run without their tables in memory.
            device: where the engine puts them.
            experts: the hooks of modules whose experts are loaded one by one.
        """
        self._is_adapted = False
        self._experts = experts
        self._engine = engine
        self._device = device
        self._staying: dict[str, list[_Place]] = {}  # units whose tensors remain in place until the run ends
        self._staying_by: ResidencyPlan | None = None
        self._running: list[str] = []  # paths of the units that are within their forwards
        self._ran: list[str] = []  # units that ran in the model's last forward with hooks on the units
        self._tables = tables
        self._name = manifest.name
        self._without_tables: set[str] = set()  # paths of the units that now run without their tables
        self._inside: list[int] = []  # threads that are within a forward of the model
        self._frozen: list[torch.Tensor] = []  # absent tensors whose `requires_grad` is off until `thaw`
        self._places: list[list[_Place]] = []
        self._units: list[tuple[Unit, list[_Place]]] = []
        self._unit_handles: list[RemovableHandle] = []  # none while the tensors of all units remain in place
        provided = _provided(manifest)
        used = {use.module for use in manifest.order}
        for unit in skeleton.units:
            slots = [slot for slot in unit.slots if slot.name in provided]
            if not slots:
                continue
            if unit.path not in used:
                raise ManifestError(
                    f"the manifest of {manifest.name} does not say when {unit.path} runs; chunk it again"
                )
            self._attach(unit, slots, manifest.ties)
        self._hook_units()
        self._handles = [
            skeleton.model.register_forward_pre_hook(self._enter, prepend=True),
            skeleton.model.register_forward_hook(self._leave, always_call=True),
        ]

    def detach(self) -> None:
        """Remove the hooks, and restore the original tensor of every slot that the user has not replaced."""
        if self._experts:
            self._experts.detach()
        for handle in [*self._handles, *self._unit_handles]:
            handle.remove()
        self._handles.clear()
        self._unit_handles.clear()
        self._staying.clear()
        for places in self._places:
            for place in places:
                if place.is_ours:
                    place.put(place.original)

    def adapt(self, is_adapted: bool) -> None:
        """Say whether an adapter is applied from the next run on: then weights do not require gradients, as in peft.

        No gradients are taken, but torch chooses by that flag how it multiplies; see `loader.as_parameter`.
        """
        self._is_adapted = is_adapted

    def recover(self) -> None:
        """Remove the weights that an interrupted forward has left in place."""
        if self._handles:
            if self._experts:
                self._experts.recover()
            self._without_tables.clear()
            self._inside.clear()
            self._running.clear()
            self._staying.clear()
            self._hook_units()
            for places in self._places:
                self._take_away(places)
            self._engine.release_all()

    def end_run(self) -> None:
        """Remove and release the weights that were left in place during the run."""
        if not self._handles:
            return  # already detached
        self._hook_units()
        staying, self._staying = self._staying, {}
        for path, places in staying.items():
            self._take_away(places)
            self._engine.release(path)

    @property
    def units(self) -> list[tuple[str, torch.nn.Module]]:
        """The paths and modules whose weights the hooks manage."""
        return [(unit.path, unit.module) for unit, _ in self._units]

    def freeze(self) -> None:
        """Turn off `requires_grad` of streamed weights, until `thaw`; call it while nothing runs."""
        self.recover()
        self._frozen = [place.absent for _, places in self._units for place in places if place.absent.requires_grad]
        for absent in self._frozen:
            absent.requires_grad = False

    def thaw(self) -> None:
        """Undo `freeze`: streamed weights require gradients again, as those of `from_pretrained` do."""
        for absent in self._frozen:
            absent.requires_grad_()
        self._frozen.clear()

    @contextmanager
    def in_place(self, path: str) -> Iterator[None]:
        """Put the weights of a unit in place during the body, outside of its forward.

        Raises:
            SurfwError: they could not be read, or the run was interrupted.
        """
        unit, places = next(one for one in self._units if one[0].path == path)
        self._before(unit, places, unit.module, ())
        try:
            yield
        finally:
            self._after(unit, places, unit.module, (), None)

    def addresses(self, path: str) -> set[int]:
        """The memory addresses of the weights of a unit that are in place now."""
        places = next(places for unit, places in self._units if unit.path == path)
        return {place.placed.untyped_storage().data_ptr() for place in places if place.placed is not place.absent}

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        """Refuse: a copy of the model would share these hooks."""
        raise ModelError(
            f"{self._name} cannot be copied, as its weights are elsewhere; open it again, or load it with transformers"
        )

    def _attach(self, unit: Unit, slots: Sequence[Slot], ties: Mapping[str, str]) -> None:
        places: list[_Place] = []
        for slot in slots:
            kind, stored = AbsentBuffer if slot.is_buffer else AbsentParameter, ties.get(slot.name, slot.name)
            apply = partial(self._apply, unit, stored) if self._tables else None
            absent = kind(slot.tensor, partial(self._bring, unit, places, stored), apply, self._device)
            registry: Any = slot.module._buffers if slot.is_buffer else slot.module._parameters  # noqa: SLF001 - torch's registries
            places.append(_Place(slot, registry, slot.leaf, stored, slot.tensor, absent, absent))
            slot.put(absent)
        self._places.append(places)
        self._units.append((unit, places))

    def _hook_units(self) -> None:
        """Hook the units' forwards, if they are not hooked."""
        for unit, places in self._units if not self._unit_handles else ():
            before, after = partial(self._before, unit, places), partial(self._after, unit, places)
            self._unit_handles += [
                unit.module.register_forward_pre_hook(before, prepend=True),
                unit.module.register_forward_hook(after, always_call=True),
            ]

    def _settle(self) -> None:
        """Unhook the units if all their tensors remain in place, so that the model is as fast as one without hooks."""
        if not self._engine.watches_layers and len(self._staying) == len(self._units):
            for handle in self._unit_handles:
                handle.remove()
            self._unit_handles.clear()

    def _enter(self, module: torch.nn.Module, args: Any) -> None:
        self._inside.append(threading.get_ident())
        self._give_up_earlier_plan()
        if self._unit_handles:
            self._ran.clear()
        else:
            self._engine.passes(self._ran)

    def _leave(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        if (thread := threading.get_ident()) in self._inside:
            self._inside.remove(thread)
        if not self._running:
            self._give_up_earlier_plan()
        if self._staying and self._unit_handles:
            self._settle()

    def _give_up_earlier_plan(self) -> None:
        """If the plan has changed, remove what the earlier one left in place before anything is loaded."""
        if self._staying and self._staying_by is not self._engine.plan:
            self.end_run()

    def _before(self, unit: Unit, places: list[_Place], module: torch.nn.Module, args: Any) -> None:
        self._running.append(unit.path)
        for place in places:
            if not place.is_ours:
                self._give_up_replaced(places)
                break
        if not places:
            return
        if self._inside:
            self._ran.append(unit.path)
        if len(self._running) == 1:
            self._give_up_earlier_plan()
        if unit.path in self._staying:
            self._engine.passes((unit.path,))
            return
        if self._tables and self._tables.row_wise(unit.path):
            self._engine.observe(unit.path)
            self._without_tables.add(unit.path)
            others = self._tables.others(unit.path)
            self._put([place for place in places if place.stored in others], others)
        else:
            self._put(places, self._engine.acquire(unit.path))

    def _after(self, unit: Unit, places: list[_Place], module: torch.nn.Module, args: Any, output: Any) -> None:
        if unit.path in self._running:
            self._running.remove(unit.path)
        if unit.path in self._staying:
            return
        if unit.path in self._without_tables:
            self._without_tables.remove(unit.path)
            self._take_away(places)
            return
        if not places or places[0].placed is places[0].absent:
            return  # its weights were not put in place: the forward failed before it began
        if _shares_memory(output, places):
            self._engine.keep(unit.path)
        if not self._staying:
            self._staying_by = self._engine.plan
        if self._staying_by is self._engine.plan and self._engine.stay(unit.path):
            self._staying[unit.path] = places
            return
        self._take_away(places)
        self._engine.release(unit.path)

    def _apply(
        self, unit: Unit, name: str, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        """Compute a function of an absent weight without loading the whole weight, or return NotImplemented."""
        if self._tables and (unit.path in self._without_tables or self._tables.row_wise(unit.path)):
            return self._tables.apply(name, function, args, kwargs)
        return NotImplemented

    def _bring(self, unit: Unit, places: Sequence[_Place], stored: str) -> torch.Tensor:
        """Load a weight that is needed while it is absent.

        If its unit runs, rows were not enough: the unit's weights are loaded, and removed after its forward. If another
        part of the model runs, it uses the weights from outside of their module: they are pinned from now on. If the
        model does not run, its user is looking at the weight, and gets a copy.
        """
        if unit.path in self._without_tables:
            tensors = self._engine.acquire(unit.path)
            self._without_tables.remove(unit.path)
        elif self._engine.runs_here() or threading.get_ident() in self._inside:
            tensors = self._engine.pin(unit.path)
        else:
            return self._engine.read(stored)
        self._put([place for place in places if place.is_ours], tensors)
        return tensors[stored].detach() if self._frozen else tensors[stored]

    def _put(self, places: Sequence[_Place], tensors: Mapping[str, torch.Tensor]) -> None:
        for place in places:
            tensor = tensors[place.stored]
            wants = place.absent.requires_grad and not self._is_adapted
            if type(tensor) is torch.nn.Parameter and tensor.requires_grad and not wants and not place.slot.is_buffer:
                tensor = torch.nn.Parameter(tensor.detach(), requires_grad=False)
            place.put(tensor.data if place.slot.is_buffer else tensor)

    def _take_away(self, places: Sequence[_Place]) -> None:
        for place in places:
            if place.is_ours:
                place.put(place.absent)

    def _give_up_replaced(self, places: list[_Place]) -> None:
        """Stop managing slots in which the user has replaced a streamed weight.

        Raises:
            ModelError: a weight was removed from its module, as parametrizations do.
        """
        for place in [one for one in places if not one.is_ours]:
            held = place.registry.get(place.leaf)
            if held is None:
                raise ModelError(
                    f"{place.slot.name} of {self._name} has been taken out of its module, as a parametrization or "
                    "pruning does; a streamed weight cannot be moved: undo that, or load the model with transformers"
                )
            tied = (one.absent for unit in self._places for one in unit if one.stored == place.stored)
            if any(held is absent for absent in tied):
                place.put(held)  # tied again, to the weight that it is already tied to
                continue
            places.remove(place)
            logger.warning(
                "%s: %s has been replaced; what was put there is used from now on", self._name, place.slot.name
            )


def _shares_memory(output: Any, places: Sequence[_Place]) -> bool:
    """Whether a module returns a view of its weights, such as of a table, so that they are used after it has run."""
    weights = {place.placed.untyped_storage().data_ptr() for place in places if place.placed.numel()}
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
    return set(manifest.tensors) | set(manifest.ties)
