"""Experts of a mixture, each in its own chunk: their names, and the stacks that they are slices of. Pure.

A module of experts has tensors whose first dimension is the expert, its *stacks*. The chunk `path[5]`, of kind
`expert`, has slice 5 of each stack: the tensors `path.gate_up_proj[5]`, `path.down_proj[5]`, and so on, with the shape
of the stack without its first dimension. The execution order does not list these chunks: a router selects them.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from surfw.manifest.facts import Chunk, TensorInfo

_SLICE = re.compile(r"(.+)\[(0|[1-9][0-9]{0,5})\]")


@dataclass(frozen=True, slots=True)
class Experts:
    """The experts of one module.

    Attributes:
        path: the module's path.
        chunks: the chunks of expert 0, expert 1, and so on.
        stacks: the module's tensors by name, in the order of the chunks' payloads; `offset` is that of a slice in its
            chunk's payload.
    """

    path: str
    chunks: "tuple[Chunk, ...]"
    stacks: "Mapping[str, TensorInfo]"


def slice_name(name: str, index: int) -> str:
    """Return the name of slice `index` of a stack, or of the chunk of expert `index` of a module."""
    return f"{name}[{index}]"


def split_name(name: str) -> tuple[str, int] | None:
    """Split a name made by `slice_name` into stack or module and index; None for other names."""
    found = _SLICE.fullmatch(name)
    return (found[1], int(found[2])) if found else None


def stack_name(name: str) -> str:
    """Return the name of the stack of which a tensor is a slice; its own name if it is not a slice."""
    parts = split_name(name)
    return parts[0] if parts else name


def group_experts(chunks: "Iterable[Chunk]") -> dict[str, Experts]:
    """Return the experts among a model's chunks, by the path of the module that holds them.

    Raises:
        ValueError: an expert is missing, or differs from the others of its module in more than its bytes.
    """
    found: dict[str, list[Chunk]] = {}
    for chunk in chunks:
        if chunk.kind == "expert":
            path, index = split_name(chunk.name) or ("", -1)
            of_module = found.setdefault(path, [])
            if index != len(of_module):
                raise ValueError(f"chunk {chunk.name} is not expert {len(of_module)} of its module")
            of_module.append(chunk)
    return {path: _experts(path, tuple(of_module)) for path, of_module in found.items()}


def _experts(path: str, chunks: "tuple[Chunk, ...]") -> Experts:
    first = [(stack_name(one.name), one.dtype, one.shape, one.offset) for one in chunks[0].tensors]
    for index, chunk in enumerate(chunks):
        names = [(slice_name(name, index), *facts) for name, *facts in first]
        if [(one.name, one.dtype, one.shape, one.offset) for one in chunk.tensors] != names:
            raise ValueError(f"the tensors of chunk {chunk.name} are not slices of those of its module")
    if any(name.rpartition(".")[0] != path for name, *_ in first):
        raise ValueError(f"the tensors of chunk {chunks[0].name} are not of the module {path}")
    stacks = {
        stack_name(one.name): replace(one, name=stack_name(one.name), shape=(len(chunks), *one.shape))
        for one in chunks[0].tensors
    }
    return Experts(path, chunks, stacks)
