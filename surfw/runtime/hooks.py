"""Puts a module's weights in place before its forward and takes them away afterwards.

The model is transformers' own and is not changed otherwise: after `detach`, nothing of surfw remains on it. A parameter
that its user puts where a streamed one was stays there, and is used.

While its weights are away, an absent tensor stands in a module. It knows its shape and dtype and holds nothing. Asking
for its facts is free. Computing with it, which happens where a model uses a weight outside of the forward of the module
that owns it, loads the weight first, unless a part of it is enough for the result. So no model ever computes with
weights that are missing. Below, it lies on the meta device, where torch itself refuses to compute. Changing it in place
is refused: the change would be lost with the memory that it was made in.
"""

import copy
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn, Self

import torch
from torch.utils.hooks import RemovableHandle

from surfw.errors import ManifestError, ModelError
from surfw.manifest import Manifest
from surfw.runtime.engine import Engine
from surfw.runtime.plan import ResidencyPlan
from surfw.runtime.rows import StreamedTables
from surfw.skeleton.build import Skeleton
from surfw.skeleton.units import Slot, Unit

logger = logging.getLogger("surfw.runtime")

_FACTS = {
    "size", "dim", "numel", "nelement", "ndimension", "stride", "storage_offset", "is_floating_point", "is_complex",
    "is_contiguous", "element_size", "get_device", "__len__", "__hash__", "requires_grad_", "is_inference", "is_signed",
    "detach_",
}  # fmt: skip
_CPU = torch.device("cpu")
_VALUES = {"data", "T", "H", "mT", "mH", "real", "imag"}
_READS = {"__index__", "__int__", "__invert__"}
_CONVERSIONS = {"to", "cpu", "float", "double", "half", "bfloat16"}

Load = Callable[[], torch.Tensor]
"""Brings the whole weight."""
Apply = Callable[[Callable[..., Any], Sequence[Any], Mapping[str, Any]], Any]
"""The result of a function of torch whose second argument, or whose `weight`, is the absent tensor; NotImplemented if
the whole weight has to be brought for it."""


class _Absent(torch.Tensor):
    """Loads itself when torch is asked to compute with it."""

    _surfw_load: Load
    _surfw_apply: Apply | None
    _surfw_device: torch.device

    def __new__(cls, like: torch.Tensor, load: Load, apply: Apply | None = None, device: torch.device = _CPU) -> Self:
        """Take the facts from a tensor on the meta device; it comes to another device when it is loaded."""
        absent: Self = torch.Tensor._make_subclass(cls, like.detach())  # noqa: SLF001 - as torch.nn.Parameter does
        absent._surfw_load, absent._surfw_apply, absent._surfw_device = load, apply, device
        return absent

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Answer for the facts; for everything else, put the real tensors where the absent ones are."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in {"__get__", "__set__", "__delete__"}:
            attribute = func.__self__.__name__
            if attribute == "device":
                return args[0]._surfw_device  # noqa: SLF001 - ours
            if attribute == "is_cuda":
                return args[0]._surfw_device.type == "cuda"  # noqa: SLF001 - ours
            if attribute == "is_meta":
                return False
            known = attribute not in _VALUES
        else:
            known = name in _FACTS
        if not known:
            result = _without_values(func, name, args, kwargs)
            if result is not NotImplemented:
                return result
            args = _present(args)
            kwargs = {key: _present(value) for key, value in kwargs.items()}
        with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001 - the documented way to call on, see torch.overrides
            return func(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        """A copy has its values, and is a parameter where this stands for one."""
        values = copy.deepcopy(self._surfw_load().detach(), memo)
        return torch.nn.Parameter(values, self.requires_grad) if isinstance(self, torch.nn.Parameter) else values

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # torch's has no types
        """Its facts, as there are no values."""
        return f"<absent weight, {self.dtype}, {tuple(self.shape)}>"


class AbsentParameter(_Absent, torch.nn.Parameter):
    """Stands for a parameter."""


class AbsentBuffer(_Absent):
    """Stands for a buffer that is part of the checkpoint."""


def _without_values(function: Callable[..., Any], name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What can be answered without the values of an absent tensor; NotImplemented if it cannot.

    Raises:
        ModelError: the values would be changed.
    """
    if name == "share_memory_":  # there are no values to be shared: each process reads its own
        return args[0]
    if _changes_absent(name, args, kwargs):
        raise ModelError(
            "a streamed weight cannot be changed in place, as it is read anew for every use; put a parameter of your "
            "own in its place (module.weight = torch.nn.Parameter(...)), and for another dtype open the model with "
            "dtype=..."
        )
    if name == "_has_compatible_shallow_copy_type":  # asked by `Module.to`, which sets `data` if it is so
        return True
    if name == "__set__":  # its own data once more, as `Module.to` does where there is nothing to convert
        return None
    if name in _CONVERSIONS and _converts_to_itself(function, args, kwargs):
        return args[0]
    weight = args[1] if len(args) > 1 else kwargs.get("weight")
    apply = weight._surfw_apply if isinstance(weight, _Absent) else None  # noqa: SLF001 - ours
    return apply(function, args, kwargs) if apply else NotImplemented


def _changes_absent(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether torch is asked to write to an absent tensor."""
    if name == "__set__":
        return args[1] is not args[0]
    is_in_place = (name.endswith("_") and not name.endswith("__")) or (name.startswith("__i") and name not in _READS)
    written = [kwargs.get("out")]
    if is_in_place or name == "__setitem__":
        first = next(iter([*args, *kwargs.values()]), None)  # of `torch.nn.init`, it has a name
        written += first if isinstance(first, tuple | list) else [first]
    return any(isinstance(one, _Absent) for one in written)


def _converts_to_itself(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a conversion, such as `to`, gives back the very tensor: it has that dtype, and lies on that device."""
    like = torch.empty(0, dtype=args[0].dtype, device=args[0]._surfw_device)  # noqa: SLF001 - ours
    return function(like, *args[1:], **kwargs) is like


def _present(value: Any) -> Any:
    if isinstance(value, _Absent):
        return value._surfw_load()  # noqa: SLF001 - ours
    if type(value) in {tuple, list}:
        return type(value)(_present(one) for one in value)
    return value


@dataclass(slots=True, eq=False)
class _Place:
    """A slot, and what the hooks have put there last.

    Attributes:
        registry: torch's dictionary of the slot's module.
        leaf: the slot's name in it.
        stored: the name under which its tensor is stored.
        original: what lay there before the hooks.
        absent: stands there while the weight is away.
        placed: what lies there now, unless the user has replaced it.
    """

    slot: Slot
    registry: dict[str, Any]
    leaf: str
    stored: str
    original: torch.Tensor
    absent: torch.Tensor
    placed: torch.Tensor

    def put(self, tensor: torch.Tensor) -> None:
        """Put a tensor there."""
        self.registry[self.leaf] = self.placed = tensor

    @property
    def is_ours(self) -> bool:
        """Whether what the hooks have put there is there still."""
        return self.registry.get(self.leaf) is self.placed


class StreamingHooks:
    """The hooks of one model."""

    def __init__(
        self,
        skeleton: Skeleton,
        manifest: Manifest,
        engine: Engine,
        tables: StreamedTables | None = None,
        device: torch.device = _CPU,
    ) -> None:
        """Attach to every unit that the manifest's order names.

        Args:
            skeleton: the model without weights.
            manifest: its weights.
            engine: brings them.
            tables: says which units run without their tables in memory.
            device: where the engine brings them.
        """
        self._engine = engine
        self._device = device
        self._staying: dict[str, list[_Place]] = {}  # units whose tensors are left in place until the run ends
        self._staying_by: ResidencyPlan | None = None
        self._tables = tables
        self._name = manifest.name
        self._without_tables: set[str] = set()  # paths of the units that now run so
        self._inside: list[int] = []  # threads that are within a forward of the model
        self._places: list[list[_Place]] = []
        self._units: list[tuple[Unit, list[_Place]]] = []
        self._unit_handles: list[RemovableHandle] = []  # none while the tensors of all units stay
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
        """Remove the hooks; every slot gets back what it held before, unless the user has replaced that."""
        for handle in [*self._handles, *self._unit_handles]:
            handle.remove()
        self._handles.clear()
        self._unit_handles.clear()
        self._staying.clear()
        for places in self._places:
            for place in places:
                if place.is_ours:
                    place.put(place.original)

    def recover(self) -> None:
        """Take away what a forward that was interrupted has left in place."""
        if self._handles:
            self._without_tables.clear()
            self._inside.clear()
            self._staying.clear()
            self._hook_units()
            for places in self._places:
                self._take_away(places)
            self._engine.release_all()

    def end_run(self) -> None:
        """Take away what was left in place while the run went on."""
        if not self._handles:
            return  # detached meanwhile
        self._hook_units()
        staying, self._staying = self._staying, {}
        for path, places in staying.items():
            self._take_away(places)
            self._engine.release(path)

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        """Refuse: a copy of the model would have these very hooks."""
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
        """Have the units' forwards watched, if they are not."""
        for unit, places in self._units if not self._unit_handles else ():
            before, after = partial(self._before, unit, places), partial(self._after, unit, places)
            self._unit_handles += [
                unit.module.register_forward_pre_hook(before, prepend=True),
                unit.module.register_forward_hook(after, always_call=True),
            ]

    def _settle(self) -> None:
        """Where the tensors of all units stay, watch only the model: then it is as fast as one without hooks."""
        if len(self._staying) == len(self._units):
            for handle in self._unit_handles:
                handle.remove()
            self._unit_handles.clear()

    def _enter(self, module: torch.nn.Module, args: Any) -> None:
        self._inside.append(threading.get_ident())
        if self._staying and self._staying_by is not self._engine.plan:
            self.end_run()  # another plan: what no longer stays has to go before anything comes
        elif not self._unit_handles:
            self._engine.pause()

    def _leave(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        if (thread := threading.get_ident()) in self._inside:
            self._inside.remove(thread)
        if self._staying and self._unit_handles:
            self._settle()

    def _before(self, unit: Unit, places: list[_Place], module: torch.nn.Module, args: Any) -> None:
        for place in places:
            if not place.is_ours:
                self._give_up_replaced(places)
                break
        if not places:
            return
        if self._staying:
            if self._staying_by is not self._engine.plan:
                self.end_run()
            elif unit.path in self._staying:
                self._engine.passes(unit.path)
                return
        if self._tables and self._tables.row_wise(unit.path):
            self._engine.observe(unit.path)
            self._without_tables.add(unit.path)
            others = self._tables.others(unit.path)
            self._put([place for place in places if place.stored in others], others)
        else:
            self._put(places, self._engine.acquire(unit.path))

    def _after(self, unit: Unit, places: list[_Place], module: torch.nn.Module, args: Any, output: Any) -> None:
        if unit.path in self._staying:
            return
        if unit.path in self._without_tables:
            self._without_tables.remove(unit.path)
            self._take_away(places)
            return
        if not places or places[0].placed is places[0].absent:
            return  # its weights never came: the forward failed before it began
        if _shares_memory(output, places):
            self._engine.keep(unit.path)
        if self._engine.stays(unit.path):
            self._staying[unit.path], self._staying_by = places, self._engine.plan
            return
        self._take_away(places)
        self._engine.release(unit.path)

    def _apply(
        self, unit: Unit, name: str, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        """What torch is asked to do with an absent weight, done without the whole of it if that can be."""
        if self._tables and (unit.path in self._without_tables or self._tables.row_wise(unit.path)):
            return self._tables.apply(name, function, args, kwargs)
        return NotImplemented

    def _bring(self, unit: Unit, places: Sequence[_Place], stored: str) -> torch.Tensor:
        """A weight that is needed while it is absent.

        If its unit runs, its rows were not enough: the unit's weights are loaded, and go after its forward. If the
        model runs, it uses them from outside of their module: from now on they stay in memory. If it does not run, its
        user looks at the weight, and gets a copy.
        """
        if unit.path in self._without_tables:
            tensors = self._engine.acquire(unit.path)
            self._without_tables.remove(unit.path)
        elif self._engine.runs_here() or threading.get_ident() in self._inside:
            tensors = self._engine.pin(unit.path)
        else:
            return self._engine.read(stored)
        self._put([place for place in places if place.is_ours], tensors)
        return tensors[stored]

    def _put(self, places: Sequence[_Place], tensors: Mapping[str, torch.Tensor]) -> None:
        for place in places:
            tensor = tensors[place.stored]
            place.put(tensor.data if place.slot.is_buffer else tensor)

    def _take_away(self, places: Sequence[_Place]) -> None:
        for place in places:
            if place.is_ours:
                place.put(place.absent)

    def _give_up_replaced(self, places: list[_Place]) -> None:
        """Leave a tensor that replaces a streamed weight where it is.

        Raises:
            ModelError: a weight has been taken out of its module, as parametrizations do.
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
                place.put(held)  # tied again, to what it is tied to anyway
                continue
            places.remove(place)
            logger.warning(
                "%s: %s has been replaced; what was put there is used from now on", self._name, place.slot.name
            )


def _shares_memory(output: Any, places: Sequence[_Place]) -> bool:
    """Whether a module returns a view of its own weights, as of a table: then they are used after it has run."""
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
