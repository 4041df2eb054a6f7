"""Plan the contents of each chunk before any byte is read. Pure functions of plain data.

The tensors of a chunk have a fixed order: first those whose size is a multiple of 64 bytes (`ALIGNMENT`), then the
others, each group in the module's registration order. So, without gaps in storage, all tensors of the first group are
aligned to 64 bytes, and only the few small ones at the end have to be moved to aligned addresses in memory.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from surfw.codec import PACKED_CODECS
from surfw.config import ALIGNMENT
from surfw.errors import ConfigurationError
from surfw.manifest import Chunk, Form, Kind, TensorInfo, Use, fits, slice_name, stored_bytes

_INT4 = frozenset({"layer", "expert"})
"""Kinds of chunks whose matrices the codec int4 stores as int4."""


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor to be stored in a chunk.

    Attributes:
        info: its name, dtype, shape and offset in the payload.
        copy_of: the source tensor from which its bytes are copied; None if it has to be converted.
        copy_from: the offset in that source tensor, in bytes.
        is_matrix: whether it may be quantised: it is used only as the weight of `torch.nn.Linear` or of embeddings, or
            is a matrix of an expert that is used like one.
    """

    info: TensorInfo
    copy_of: str | None
    is_matrix: bool = False
    copy_from: int = 0


@dataclass(frozen=True, slots=True)
class PlannedChunk:
    """A chunk to write: see `manifest.Chunk`.

    Attributes:
        id: its id, if that is known before the payload is read.
        ready: existing forms, quantised or encrypted, that are copied unchanged.
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
        """Return how a packed form holds each tensor; empty if nothing is quantised, or the codec is not a packed one.

        The codec `int4` stores matrices of layers and experts as int4, but embeddings and heads, which are more
        sensitive, as int8. It also stores matrices with few rows as int8 if padding would make int4 larger.
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
        """Return the form of this codec that is copied unchanged, if there is one."""
        return next((form for form in self.ready if form.codec == codec), None)

    def chunk(self, chunk_id: str, *forms: Form) -> Chunk:
        """Return the manifest's description of the chunk, stored in these forms."""
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
    """Change planned chunks so that only the experts of a mixture are quantised.

    Raises:
        ConfigurationError: no expert can be quantised.
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
    """What planning needs to know about an executed module.

    Attributes:
        path: its path in the model.
        kind: see `manifest.Chunk`.
        tensors: the names of its tensors.
        experts: the modules in it whose experts get their own chunks: maps their paths to the names of their stacks.
    """

    path: str
    kind: str
    tensors: tuple[str, ...]
    experts: Mapping[str, Sequence[str]] = field(default_factory=dict)


def plan_chunks(units: Iterable[UnitFacts], tensors: Mapping[str, PlannedTensor], ties: Mapping[str, str]) -> ChunkPlan:
    """Assign the tensors to chunks: one for each unit that stores any, and one for each expert in a unit.

    Args:
        units: the executed modules, in order.
        tensors: every tensor to store, by name; stacks of experts are given as slices.
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
    """Return the tensors of a chunk in payload order, with their offsets."""
    arranged, offset = [], 0
    for tensor in sorted(tensors, key=lambda tensor: tensor.info.nbytes % ALIGNMENT != 0):
        arranged.append(replace(tensor, info=replace(tensor.info, offset=offset)))
        offset += tensor.info.nbytes
    return tuple(arranged)
