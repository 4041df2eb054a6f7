"""What each chunk will hold, decided before a byte is read. Pure: plain data in, plain data out.

The tensors of a chunk stand in a fixed order: first those whose size is a multiple of 64 bytes (`ALIGNMENT`), then the
others, each in the order of the module's registration. Stored without gaps, all of the first kind then lie at multiples
of 64 by themselves, and only the few small ones at the end have to be moved apart in memory.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from surfw.codec import PACKED_CODECS
from surfw.config import ALIGNMENT
from surfw.errors import ConfigurationError
from surfw.manifest import Chunk, Form, Kind, TensorInfo, Use, fits, slice_name, stored_bytes

_INT4 = frozenset({"layer", "expert"})
"""Kinds of chunks whose matrices are int4 in a form of that codec."""


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor on its way into a chunk.

    Attributes:
        info: its name, dtype, shape and place in the payload.
        copy_of: the source tensor whose bytes it has; None where it has to be converted.
        copy_from: where in that source tensor they begin.
        is_matrix: whether it is the weight of `torch.nn.Linear` or of embeddings, and of nothing else, or a matrix of
            an expert that is used like one: only such are quantised.
    """

    info: TensorInfo
    copy_of: str | None
    is_matrix: bool = False
    copy_from: int = 0


@dataclass(frozen=True, slots=True)
class PlannedChunk:
    """A chunk to write: see `manifest.Chunk`.

    Attributes:
        id: its identity, where that is known before its payload is read.
        ready: forms with quantised weights, or encrypted ones, that are there already and are copied as they are.
    """

    name: str
    kind: str
    tensors: tuple[PlannedTensor, ...]
    id: str = ""
    ready: tuple[Form, ...] = ()

    @property
    def payload_bytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.info.nbytes for tensor in self.tensors)

    def kinds(self, codec: str) -> tuple[Kind, ...]:
        """How a packed form of that codec holds each tensor; none if there is nothing to quantise, or no such codec.

        `int4` has the matrices of layers and experts in int4, and embeddings and heads in int8, as these matter more.
        Matrices with so few rows that int4 takes more bytes than int8, as it fills them up, are in int8 too.
        """
        if copied := self.copied(codec):
            return copied.kinds
        wanted: Sequence[Kind] = ("int4", "int8") if codec == "int4" and self.kind in _INT4 else ("int8",)
        kinds: list[Kind] = []
        for tensor in self.tensors:
            fitting = [kind for kind in wanted if tensor.is_matrix and fits(tensor.info, kind)]
            kinds.append(min(fitting, key=partial(stored_bytes, tensor.info), default="raw"))
        return tuple(kinds) if codec in PACKED_CODECS and set(kinds) != {"raw"} else ()

    def copied(self, codec: str) -> Form | None:
        """The form of that codec that is copied as it is, if there is one."""
        return next((form for form in self.ready if form.codec == codec), None)

    def chunk(self, chunk_id: str, *forms: Form) -> Chunk:
        """The chunk as its manifest describes it, stored in these forms."""
        infos = tuple(tensor.info for tensor in self.tensors)
        return Chunk(self.name, self.kind, chunk_id, self.payload_bytes, infos, forms)


@dataclass(frozen=True, slots=True)
class ChunkPlan:
    """All chunks of a model, and the order in which its modules run."""

    chunks: tuple[PlannedChunk, ...]
    order: tuple[Use, ...]

    @property
    def payload_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(chunk.payload_bytes for chunk in self.chunks)


def with_exact_rest(chunks: Iterable[PlannedChunk], name: str) -> tuple[PlannedChunk, ...]:
    """The chunks of a model as they are planned where only the experts of a mixture are quantised.

    Raises:
        ConfigurationError: it has none that can be.
    """
    planned = tuple(
        chunk
        if chunk.kind == "expert"
        else replace(chunk, tensors=tuple(replace(one, is_matrix=False) for one in chunk.tensors))
        for chunk in chunks
    )
    if not any(one.is_matrix for chunk in planned for one in chunk.tensors):
        raise ConfigurationError(
            f"{name} has no experts that can be quantised, so nothing of it would be; leave --quantize (quantize=) out"
        )
    return planned


@dataclass(frozen=True, slots=True)
class UnitFacts:
    """What the plan has to know of an executed module.

    Attributes:
        path: its name in the model.
        kind: see `manifest.Chunk`.
        tensors: the names of its tensors.
        experts: the modules in it whose experts are chunks of their own: their paths, and the stacks in each of them.
    """

    path: str
    kind: str
    tensors: tuple[str, ...]
    experts: Mapping[str, Sequence[str]] = field(default_factory=dict)


def plan_chunks(units: Iterable[UnitFacts], tensors: Mapping[str, PlannedTensor], ties: Mapping[str, str]) -> ChunkPlan:
    """Sort the tensors into chunks, one for each unit that stores any, and one for each expert in it.

    Args:
        units: the executed modules, in order.
        tensors: every tensor to store, by its name; of stacks of experts, their slices.
        ties: tensors that are stored under another name.
    """
    units = list(units)
    home = {name: unit.path for unit in units for name in unit.tensors}
    chunks, order = [], []
    for unit in units:
        if own := [tensors[name] for name in unit.tensors if name in tensors]:
            chunks.append(PlannedChunk(unit.path, unit.kind, arrange(own)))
        for path, stacks in unit.experts.items():
            index = 0
            while slice_name(stacks[0], index) in tensors:
                slices = [tensors[slice_name(name, index)] for name in stacks]
                chunks.append(PlannedChunk(slice_name(path, index), "expert", arrange(slices)))
                index += 1
        stored = (ties.get(name, name) for name in unit.tensors)
        if needed := dict.fromkeys(home[name] for name in stored if name in tensors):
            order.append(Use(unit.path, tuple(needed)))
    return ChunkPlan(tuple(chunks), tuple(order))


def arrange(tensors: Sequence[PlannedTensor]) -> tuple[PlannedTensor, ...]:
    """The tensors of a chunk in the order and at the places that they have in its payload."""
    arranged, offset = [], 0
    for tensor in sorted(tensors, key=lambda tensor: tensor.info.nbytes % ALIGNMENT != 0):
        arranged.append(replace(tensor, info=replace(tensor.info, offset=offset)))
        offset += tensor.info.nbytes
    return tuple(arranged)
