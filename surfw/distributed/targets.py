"""The slices of a model's weights that this rank holds, and the memory that they are loaded into.

A parameter is a whole tensor, or a `DTensor` that holds a slice of one, as FSDP2 and tensor parallelism place it.
Parameters on the meta device get memory; others are filled in place. Bytes are received directly into their final
memory, unless the model has another dtype than the manifest or is on a device; then they go through a staging buffer.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from surfw.distributed.plan import Need, Run, Slice, make_slice, runs_of
from surfw.errors import ManifestError, UnsupportedModelError
from surfw.manifest import Manifest, TensorInfo
from surfw.skeleton.dtypes import safetensors_dtype, torch_dtype
from surfw.skeleton.units import Slot, own_slots


@dataclass
class Target:
    """A slice of a stored tensor, and the slots in the model that hold it.

    Attributes:
        tensor: the stored tensor.
        held: the slice of it.
        slots: the slots that hold it; tied ones hold the same slice.
    """

    tensor: TensorInfo
    held: Slice
    slots: list[Slot]
    _local: torch.Tensor | None = field(default=None, repr=False)
    _stored: torch.Tensor | None = field(default=None, repr=False)
    _missing_bytes: int = -1

    @property
    def held_bytes(self) -> int:
        """The memory, in bytes, that it takes in the model."""
        distinct = {id(slot.tensor): slot.tensor for slot in self.slots}
        return sum(_local_of(tensor).nbytes for tensor in distinct.values())

    @property
    def memory(self) -> torch.Tensor:
        """The memory for the slice's stored bytes: uint8 of shape (held.nbytes,). Allocated on first access."""
        if self._stored is None:
            self._missing_bytes = self.held.nbytes
            first = self.slots[0].tensor
            local = _local_of(first)
            if local.is_meta:
                device = first.device_mesh.device_type if isinstance(first, DTensor) else "cpu"
                local = torch.empty(local.shape, dtype=local.dtype, device=device)
            self._local = local
            is_as_stored = local.dtype == torch_dtype(self.tensor.dtype) and local.device.type == "cpu"
            if is_as_stored and local.is_contiguous():
                self._stored = local.detach().reshape(-1).view(torch.uint8)
            else:
                self._stored = torch.empty(self.held.nbytes, dtype=torch.uint8)
        return self._stored

    @property
    def staged_bytes(self) -> int:
        """The size of the staging buffer in use, in bytes; 0 if none is in use."""
        if self._stored is None or self._local is None:
            return 0
        return self.held.nbytes if self._stored.data_ptr() != self._local.data_ptr() else 0

    def arrived(self, size_bytes: int) -> None:
        """Record that more bytes have arrived; after the last ones, call `finish`."""
        self._missing_bytes -= size_bytes
        if not self._missing_bytes:
            self.finish()

    @torch.no_grad()
    def finish(self) -> None:
        """Put the slice into its slots, and release the staging buffer."""
        stored, local = self.memory, self._local
        assert local is not None, "memory makes it"
        if stored.data_ptr() != local.data_ptr():
            values = stored.view(torch_dtype(self.tensor.dtype))
            local.copy_(values.view(local.shape))
        made: dict[int, torch.Tensor] = {}
        for slot in self.slots:
            there = slot.tensor
            if not there.is_meta:
                if (own := _local_of(there)).data_ptr() != local.data_ptr():
                    own.copy_(local)
                continue
            if id(there) not in made:
                values = local.clone() if made else local
                made[id(there)] = _like(there, values)
            slot.put(made[id(there)])
        self._local = self._stored = None


def _local_of(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor."""
    if not isinstance(tensor, DTensor):
        return tensor
    local: torch.Tensor = tensor.to_local()
    return local.detach()


def _like(there: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """A tensor like `there`, with the values `local`: a parameter or a buffer, placed the same way."""
    whole: torch.Tensor = local
    if isinstance(there, DTensor):
        whole = DTensor.from_local(
            local, there.device_mesh, there.placements, run_check=False, shape=there.shape, stride=there.stride()
        )
    return nn.Parameter(whole, requires_grad=there.requires_grad) if isinstance(there, nn.Parameter) else whole


def find_targets(model: nn.Module, manifest: Manifest) -> list[Target]:
    """Find the slices of the manifest's tensors that a model holds, in the order of the model's modules.

    Raises:
        ManifestError: the model has weights that the manifest lacks, or that have another shape or dtype there.
        UnsupportedModelError: a weight has a `Partial` placement, whose local values would be summed.
    """
    found: dict[tuple[str, Slice], Target] = {}
    held = _Held()
    for slot in state_slots(model):
        stored = manifest.tensors.get(manifest.ties.get(slot.name, slot.name))
        if stored is None:
            if slot.tensor.is_meta:
                raise ManifestError(
                    f"{manifest.name} has no weights for {slot.name} of {type(model).__name__}; expected a model of "
                    f"{manifest.class_name}, as surfw.distributed.build_model makes it, or a part of one"
                )
            continue
        _check_fit(slot, stored, manifest)
        part = held.of(slot.tensor, stored)
        found.setdefault((stored.name, part), Target(stored, part, [])).slots.append(slot)
    return list(found.values())


def state_slots(model: nn.Module) -> Iterator[Slot]:
    """Every slot of a model's state dict; a tied parameter has several."""
    for path, module in model.named_modules():
        yield from own_slots(module, path)


def _check_fit(slot: Slot, stored: TensorInfo, manifest: Manifest) -> None:
    place = slot.tensor
    if isinstance(place, DTensor) and any(placement.is_partial() for placement in place.placements):
        raise UnsupportedModelError(
            f"{slot.name} is placed as {', '.join(map(str, place.placements))}, so that what the ranks hold is summed; "
            "each would be given the stored values; place it as Shard or Replicate"
        )
    if tuple(place.shape) != stored.shape:
        raise ManifestError(
            f"{manifest.name}: {slot.name} has shape {stored.shape} in the manifest, {tuple(place.shape)} in the model"
        )
    found = torch_dtype(stored.dtype)
    if found != place.dtype and not (found.is_floating_point and place.dtype.is_floating_point):
        raise ManifestError(
            f"{manifest.name}: {slot.name} has dtype {stored.dtype} in the manifest, {safetensors_dtype(place.dtype)} "
            "in the model"
        )


class _Held:
    """Computes the slices that this rank's `DTensor`s hold; torch is asked once per size and placement."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int, tuple[Any, ...]], tuple[Run, ...]] = {}

    def of(self, tensor: torch.Tensor, stored: TensorInfo) -> Slice:
        """The slice of a stored tensor."""
        if not isinstance(tensor, DTensor):
            return make_slice(stored, {})
        dims = {placement.dim % tensor.ndim for placement in tensor.placements if hasattr(placement, "dim")}
        return make_slice(stored, {dim: self._indices(tensor, dim) for dim in dims})

    def _indices(self, tensor: DTensor, dim: int) -> Sequence[Run]:
        """The indices of a dimension that this rank holds, found by placing a range of indices like the tensor."""
        placements = []
        for placement in tensor.placements:
            is_cut = hasattr(placement, "dim") and placement.dim % tensor.ndim == dim
            placements.append(_along_first(placement) if is_cut else Replicate())
        mesh: DeviceMesh = tensor.device_mesh
        key = id(mesh), tensor.shape[dim], tuple(placements)
        if key not in self._known:
            counter = torch.arange(tensor.shape[dim], device=mesh.device_type)
            placed = distribute_tensor(counter, mesh, placements, src_data_rank=None)
            self._known[key] = runs_of(placed.to_local().tolist())
        return self._known[key]


def _along_first(placement: Any) -> Any:
    """The same placement for a one-dimensional tensor."""
    others: Mapping[str, Any] = {"split_factor": placement.split_factor} if hasattr(placement, "split_factor") else {}
    return type(placement)(0, **others)


def needs_of(targets: Sequence[Target]) -> list[Need]:
    """The needs of these targets, for `plan_load`."""
    return [(target.tensor.name, target.held) for target in targets]
