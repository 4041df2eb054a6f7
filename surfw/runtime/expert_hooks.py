"""Puts the experts that a router has chosen in place before their module's forward, and removes them afterwards.

While no forward of its module runs, an absent tensor stands in for a stack (`surfw.runtime.absent`); using it then
loads all experts. If the user replaces a stack, the replacement is used and left in place.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch
from torch.utils.hooks import RemovableHandle

from surfw.errors import ManifestError, ModelError
from surfw.manifest import Manifest
from surfw.runtime.absent import AbsentParameter
from surfw.runtime.experts import ExpertPool
from surfw.runtime.foresight import Foresight
from surfw.skeleton.build import Skeleton
from surfw.skeleton.experts import ExpertModule, expert_module
from surfw.skeleton.units import Slot

_CPU = torch.device("cpu")


@dataclass(slots=True, eq=False)
class _Place:
    """A slot of a stack, its original tensor, and the absent tensor that stands in while no experts are in place."""

    slot: Slot
    original: torch.Tensor
    absent: AbsentParameter


class ExpertHooks:
    """The hooks of one model's modules of experts."""

    def __init__(self, skeleton: Skeleton, manifest: Manifest, pool: ExpertPool, device: torch.device = _CPU) -> None:
        """Attach to every module whose experts are chunks of their own; `pool` loads them onto the device.

        Raises:
            ManifestError: the model's modules do not match the manifest's experts.
        """
        self._pool = pool
        self._device = device
        self._name = manifest.name
        self._places: list[_Place] = []
        self._handles: list[RemovableHandle] = []
        attached: list[ExpertModule] = []
        modules = dict(skeleton.model.named_modules())
        for path, experts in manifest.experts.items():
            # A class that no longer declares which experts it uses gets all of them.
            found = skeleton.experts.get(path) or (expert_module(path, modules[path]) if path in modules else None)
            if found is None or {slot.name for slot in found.slots} != set(experts.stacks):
                raise ManifestError(f"{manifest.name}: {path} holds other experts now; chunk the model again")
            self._attach(found)
            attached.append(found)
        self._foresight = Foresight(skeleton.model, attached, pool.afford)
        pool.on_cramped = self._foresight.forget

    def detach(self) -> None:
        """Remove the hooks, and restore the original tensor of every slot that the user has not replaced."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for place in self._places:
            if not self._is_replaced(place):
                place.slot.put(place.original)
        self._places.clear()

    def recover(self) -> None:
        """Remove the experts that an interrupted forward has left in place."""
        for place in self._places:
            if not self._is_replaced(place):
                place.slot.put(place.absent)
        self._pool.release_all()

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        """Refuse: a copy of the model would share these hooks."""
        raise ModelError(
            f"{self._name} cannot be copied, as its weights are elsewhere; open it again, or load it with transformers"
        )

    def _attach(self, module: ExpertModule) -> None:
        if module.reads_all:
            self._pool.read_whole.add(module.path)
        places = []
        for slot in module.slots:
            absent = AbsentParameter(slot.tensor, partial(self._pool.read, slot.name), device=self._device)
            places.append(_Place(slot, slot.tensor, absent))
            slot.put(absent)
        self._places += places
        self._handles += [
            module.module.register_forward_pre_hook(
                partial(self._before, module, places), prepend=True, with_kwargs=True
            ),
            module.module.register_forward_hook(partial(self._after, module, places), always_call=True),
        ]

    def _before(
        self, module: ExpertModule, places: list[_Place], _: torch.nn.Module, args: Any, kwargs: Mapping[str, Any]
    ) -> None:
        ours = [place for place in places if place.slot.tensor is place.absent]
        if not ours:
            return  # the user has replaced all of them
        counts, used = module.choice(args, kwargs)
        tensors = self._pool.acquire(module.path, counts, used)
        if self._pool.foresees:
            self._foresee(module.path, used, args)
        for place in ours:
            place.slot.put(tensors[place.slot.name])

    def _after(self, module: ExpertModule, places: list[_Place], *_: Any) -> None:
        for place in places:
            if not self._is_replaced(place):
                place.slot.put(place.absent)
        self._pool.release(module.path)

    def _foresee(self, path: str, used: list[int], args: Any) -> None:
        """Prefetch the experts that the next module will probably use, if a single token is computed."""
        self._foresight.learn(path)
        inputs = args[0] if args else None
        if not isinstance(inputs, torch.Tensor) or inputs.numel() != inputs.shape[-1]:
            return
        if guess := self._foresight.guess(path, inputs, len(used)):
            self._pool.expect(*guess)

    def _is_replaced(self, place: _Place) -> bool:
        """Whether the user has replaced the tensor in this slot."""
        held = place.slot.tensor
        return held is not place.absent and held is not self._pool.stack(place.slot.name)
