"""Plain torch modules streamed from memory: the engine and the hooks without a store or transformers."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from surfw.manifest import Chunk, Form, Manifest, TensorInfo, digest_blocks
from surfw.metrics import Metrics
from surfw.runtime.engine import Engine
from surfw.runtime.hooks import StreamingHooks
from surfw.runtime.loader import Loader
from surfw.runtime.plan import Limit
from surfw.runtime.run import IoThread
from surfw.skeleton.build import Skeleton
from surfw.skeleton.dtypes import safetensors_dtype
from surfw.skeleton.units import find_units
from tests.toys import ToySource, toy_model_of, toy_needs


@dataclass
class Streamed:
    """A resident module, and a copy without weights, which hooks fill."""

    resident: nn.Module
    model: nn.Module
    engine: Engine
    hooks: StreamingHooks
    source: ToySource

    def users(self) -> int:
        """How many holds on chunks exist now."""
        return sum(slot.users for slot in self.engine.table)


def raw(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor."""
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


def chunk_of(name: str, kind: str, tensors: Mapping[str, torch.Tensor], *, codec: str = "none") -> tuple[Chunk, bytes]:
    """A chunk of these tensors, and its payload."""
    infos, payload = [], b""
    for each, tensor in tensors.items():
        infos.append(TensorInfo(each, safetensors_dtype(tensor.dtype), tuple(tensor.shape), len(payload)))
        payload += raw(tensor)
    digest, blocks = digest_blocks([payload])
    form = Form(codec, len(payload), digest, blocks)
    return Chunk(name, kind, digest, len(payload), tuple(infos), (form,)), payload


def describe(model: nn.Module, state: dict[str, torch.Tensor]) -> tuple[Manifest, ToySource]:
    """A manifest with a chunk for each unit, and a source with the chunks."""
    made = [
        chunk_of(unit.path, unit.kind, {slot.name: state[slot.name] for slot in unit.slots})
        for unit in find_units(model)
    ]
    return toy_model_of(made)


def skeleton_of(model: Any) -> Skeleton:
    """The skeleton of any module with units."""
    return Skeleton(model, torch.float32)


@contextmanager
def streamed(build: Callable[[], nn.Module], *, cache_layers: int | None = 1) -> Iterator[Streamed]:
    """Build a module twice, and stream one of them from memory, layer by layer."""
    torch.manual_seed(0)
    resident = build().eval()
    with torch.device("meta"):
        model = build().eval()
    manifest, source = describe(model, resident.state_dict())
    loader = Loader(source, manifest)
    io = IoThread()
    engine = Engine(manifest, toy_needs(manifest), Limit(cache_layers=cache_layers), loader, io=io, metrics=Metrics())
    hooks = StreamingHooks(skeleton_of(model), manifest, engine)
    try:
        with torch.no_grad():
            yield Streamed(resident, model, engine, hooks, source)
    finally:
        hooks.detach()
        engine.close()
        io.close()
