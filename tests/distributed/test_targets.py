"""Which parts of a model can be filled: placements whose values the ranks would add up are refused."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate

from surfw.distributed.targets import find_targets
from surfw.errors import UnsupportedModelError
from tests.stores import make_store


@pytest.fixture
def alone() -> Iterator[None]:
    """A job with a single rank in this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_a_parameter_whose_values_are_summed_over_ranks_is_refused(tmp_path: Path) -> None:
    manifest = make_store(tmp_path, sizes=[8])
    name, stored = next(iter(manifest.tensors.items()))
    path, _, leaf = name.rpartition(".")
    model = nn.Module()
    module = model
    for part in path.split("."):
        inner = nn.Module()
        module.add_module(part, inner)
        module = inner
    mesh = init_device_mesh("cpu", (1,))

    def place(placement: Placement) -> None:
        values = torch.zeros(stored.shape, dtype=torch.uint8)
        module.register_buffer(leaf, DTensor.from_local(values, mesh, [placement]))

    place(Replicate())
    assert [target.held.nbytes for target in find_targets(model, manifest)] == [8]
    place(Partial())
    with pytest.raises(UnsupportedModelError, match=r"is placed as P.*summed; .* place it as Shard or Replicate"):
        find_targets(model, manifest)
