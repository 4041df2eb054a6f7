"""Plans which rank reads which blocks of a model, and which ranks receive parts of them. Pure: no torch, no I/O.

Only whole blocks of 1 MiB can be verified, and the slices of ranks rarely start on block boundaries. So on each machine
one rank reads each needed block and sends the other ranks their parts of it. This covers blocks that straddle two row
shards, column shards, and tensors that all ranks hold. If ranks on several machines need different parts of a block,
one rank reads it for all machines, provided that this moves fewer bytes than one read per machine.

Invariants: every block with a needed byte is read once in each domain (one machine, or all), by a rank that needs some
of it; every byte of every slice comes from exactly one read; up to the granularity of blocks, a rank reads its share,
which is the bytes it holds, those held `n` times on a machine divided by `n`.
"""

from bisect import bisect_right
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from surfw.config import BLOCK_BYTES
from surfw.manifest import Chunk, TensorInfo, nbytes

Run = tuple[int, int]
"""A range of indices or bytes, end-exclusive."""

Need = tuple[str, "Slice"]
"""The name of a tensor in the manifest, and the slice of it that a rank holds."""


@dataclass(frozen=True)
class Slice:
    """The part of a tensor that a rank holds: some columns of some rows, stored contiguously in row-major order.

    Attributes:
        row_bytes: bytes per row of the whole tensor; a row may span several dimensions.
        rows: the rows held, sorted.
        columns: the bytes held of each row, sorted.
    """

    row_bytes: int
    rows: tuple[Run, ...]
    columns: tuple[Run, ...]

    @cached_property
    def width_bytes(self) -> int:
        """Bytes held per row."""
        return sum(stop - start for start, stop in self.columns)

    @cached_property
    def nbytes(self) -> int:
        """Bytes held in all."""
        return sum(stop - start for start, stop in self.rows) * self.width_bytes

    @cached_property
    def extent(self) -> Run:
        """The smallest range of the whole tensor's bytes that contains the slice."""
        if not self.nbytes:
            return 0, 0
        first = self.rows[0][0] * self.row_bytes + self.columns[0][0]
        return first, (self.rows[-1][1] - 1) * self.row_bytes + self.columns[-1][1]

    def before(self, at: int) -> int:
        """The number of the slice's bytes among the first `at` bytes of the whole tensor."""
        low, high = self.extent
        if at <= low:
            return 0
        if at >= high:
            return self.nbytes
        row, column = divmod(at, self.row_bytes)
        whole = sum(min(row, stop) - start for start, stop in self.rows if start < row)
        is_held = any(start <= row < stop for start, stop in self.rows)
        part = sum(min(column, stop) - start for start, stop in self.columns if start < column) if is_held else 0
        return whole * self.width_bytes + part

    def runs(self, start: int, stop: int) -> Iterator[Run]:
        """The ranges of the whole tensor's bytes `start` to `stop` that are held, in order."""
        for row in range(start // self.row_bytes, -(-stop // self.row_bytes)) if self.nbytes else ():
            if any(first <= row < last for first, last in self.rows):
                at = row * self.row_bytes
                for low, high in self.columns:
                    if max(start, at + low) < min(stop, at + high):
                        yield max(start, at + low), min(stop, at + high)


def make_slice(tensor: TensorInfo, held: Mapping[int, Sequence[Run]]) -> Slice:
    """Make a slice from the indices held of each dimension; dimensions not in `held` are held whole."""
    shape = tensor.shape
    cut = [dim for dim, runs in sorted(held.items()) if tuple(runs) != ((0, shape[dim]),)]
    if not cut:
        return Slice(max(1, tensor.nbytes), ((0, 1),), ((0, tensor.nbytes),))
    last = cut[-1]
    rows: list[Run] = [(0, 1)]
    for dim in range(last):
        rows = list(_nest(rows, shape[dim], held[dim] if dim in cut else [(0, shape[dim])]))
    step = nbytes(tensor.dtype, shape[last + 1 :])
    return Slice(shape[last] * step, tuple(rows), tuple((low * step, high * step) for low, high in held[last]))


def _nest(rows: Iterable[Run], size: int, runs: Sequence[Run]) -> Iterator[Run]:
    """Expand rows by one more dimension of this size, of which `runs` are held."""
    is_whole = tuple(runs) == ((0, size),)
    for start, stop in rows:
        if is_whole:
            yield start * size, stop * size
        else:
            for row in range(start, stop):
                yield from ((row * size + low, row * size + high) for low, high in runs)


@dataclass(slots=True)
class Unit:
    """Adjacent blocks of a chunk that a rank reads at once.

    Attributes:
        chunk: the chunk.
        start, stop: the range of its payload bytes, end-exclusive.
        ranks: the ranks that need some of these bytes, including the reader.
    """

    chunk: Chunk
    start: int
    stop: int
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """The bytes that a unit and a rank's slice have in common.

    Attributes:
        need: the slice's index in the rank's list of needs.
        origin: the tensor's offset in the chunk's payload.
        start, stop: the range of the whole tensor's bytes that is in the unit.
        at, end: the corresponding range of the slice's bytes.
    """

    need: int
    origin: int
    start: int
    stop: int
    at: int
    end: int


@dataclass(frozen=True)
class LoadPlan:
    """Which rank reads what, and which ranks receive parts of it.

    Attributes:
        needs: the needs of each rank.
        units: the units that each rank reads, in order.
        shares: the bytes that each rank should read.
        window_bytes: the most bytes that a rank reads in a round.
    """

    needs: Sequence[Sequence[Need]]
    units: Sequence[Sequence[Unit]]
    shares: Sequence[float]
    window_bytes: int

    def read_bytes(self, rank: int) -> int:
        """The bytes that a rank reads in all."""
        return sum(unit.stop - unit.start for unit in self.units[rank])

    @cached_property
    def rounds(self) -> list[list[list[Unit]]]:
        """The units that each rank reads in each round, limited by its window: indexed by round, then by rank."""
        queues = [_fill(units, self.window_bytes) for units in self.units]
        count = max(map(len, queues), default=0)
        return [[queue[at] if at < len(queue) else [] for queue in queues] for at in range(count)]

    @cached_property
    def _by_tensor(self) -> list[dict[str, list[tuple[int, Slice]]]]:
        """For each rank, the indices and slices of its needs, by tensor name."""
        found: list[dict[str, list[tuple[int, Slice]]]] = [{} for _ in self.needs]
        for rank, needs in enumerate(self.needs):
            for place, (name, held) in enumerate(needs):
                found[rank].setdefault(name, []).append((place, held))
        return found

    def pieces(self, unit: Unit, rank: int) -> Iterator[Piece]:
        """The pieces of a unit that a rank needs, in an order that both the reader and the rank derive."""
        for tensor in tensors_in(unit.chunk, unit.start, unit.stop):
            start = max(0, unit.start - tensor.offset)
            stop = min(tensor.nbytes, unit.stop - tensor.offset)
            for place, held in self._by_tensor[rank].get(tensor.name, ()):
                at, end = held.before(start), held.before(stop)
                if at < end:
                    yield Piece(place, tensor.offset, start, stop, at, end)


def tensors_in(chunk: Chunk, start: int, stop: int) -> Iterator[TensorInfo]:
    """The tensors that overlap this range of a chunk's payload, in order."""
    first = bisect_right(chunk.tensors, start, key=lambda tensor: tensor.offset) - 1
    for tensor in chunk.tensors[max(0, first) :]:
        if tensor.offset >= stop:
            return
        if tensor.nbytes and tensor.offset + tensor.nbytes > start:
            yield tensor


def plan_load(
    chunks: Iterable[Chunk], needs: Sequence[Sequence[Need]], hosts: Sequence[Hashable], *, window_bytes: int
) -> LoadPlan:
    """Assign each needed block to the ranks that read it.

    Args:
        chunks: the model's chunks, in the order they are used.
        needs: the needs of each rank.
        hosts: the machine of each rank.
        window_bytes: the most bytes that a rank reads at once, a multiple of the block size.
    """
    count = len(needs)
    wanted: dict[str, list[tuple[int, Slice]]] = {}
    for rank, mine in enumerate(needs):
        for name, held in mine:
            wanted.setdefault(name, []).append((rank, held))
    units: list[list[Unit]] = [[] for _ in range(count)]
    shares, read = [0.0] * count, [0] * count
    for chunk in chunks:
        for start in range(0, chunk.payload_bytes, BLOCK_BYTES):
            stop = min(start + BLOCK_BYTES, chunk.payload_bytes)
            needed, part = _needed(chunk, start, stop, wanted, hosts)
            for rank in part:
                shares[rank] += part[rank]
            for ranks in _domains(needed, hosts, stop - start):
                reader = max(ranks, key=lambda rank: (shares[rank] - read[rank], needed[rank], -rank))
                read[reader] += stop - start
                _append(units[reader], Unit(chunk, start, stop, ranks), window_bytes)
    return LoadPlan(needs, units, shares, window_bytes)


def _needed(
    chunk: Chunk,
    start: int,
    stop: int,
    wanted: Mapping[str, Sequence[tuple[int, Slice]]],
    hosts: Sequence[Hashable],
) -> tuple[dict[int, int], dict[int, float]]:
    """The number of bytes of a block that each rank needs, and its share of reading them."""
    held, part = dict[int, int](), dict[int, float]()
    for tensor in tensors_in(chunk, start, stop):
        low, high = start - tensor.offset, stop - tensor.offset
        alike: dict[tuple[Hashable, Slice], list[int]] = {}
        for rank, one in wanted.get(tensor.name, ()):
            first, last = one.extent
            if first < high and low < last:
                alike.setdefault((hosts[rank], one), []).append(rank)
        for (_, one), ranks in alike.items():
            size = one.before(min(high, tensor.nbytes)) - one.before(max(low, 0))
            for rank in ranks if size else ():
                held[rank] = held.get(rank, 0) + size
                part[rank] = part.get(rank, 0.0) + size / len(ranks)
    return held, part


def _domains(held: Mapping[int, int], hosts: Sequence[Hashable], size_bytes: int) -> list[tuple[int, ...]]:
    """The groups of ranks that share one read of a block: one group per machine, or a single one if that is cheaper."""
    by_host: dict[Hashable, list[int]] = {}
    for rank in sorted(held):
        by_host.setdefault(hosts[rank], []).append(rank)
    needed = [min(size_bytes, sum(held[rank] for rank in ranks)) for ranks in by_host.values()]
    if len(by_host) > 1 and size_bytes + sum(needed) - max(needed) < len(by_host) * size_bytes:
        return [tuple(sorted(held))]
    return [tuple(ranks) for ranks in by_host.values()]


def _append(units: list[Unit], unit: Unit, window_bytes: int) -> None:
    """Append a block to a rank's units, extending the last unit if it is adjacent and goes to the same ranks."""
    last = units[-1] if units else None
    is_next = last is not None and last.chunk is unit.chunk and last.stop == unit.start and last.ranks == unit.ranks
    if last is not None and is_next and unit.stop - last.start <= window_bytes:
        last.stop = unit.stop
    else:
        units.append(unit)


def _fill(units: Sequence[Unit], window_bytes: int) -> list[list[Unit]]:
    """Split units into groups that fit into a window."""
    groups: list[list[Unit]] = []
    room = 0
    for unit in units:
        size = unit.stop - unit.start
        if not groups or size > room:
            groups.append([])
            room = max(window_bytes, size)
        groups[-1].append(unit)
        room -= size
    return groups


def choose_window(needs: Sequence[Sequence[Need]], most_bytes: int) -> int:
    """Choose the window size: half of the largest slice, at most `most_bytes`, in whole blocks; at least one block.

    With that, two windows and the data gathered from one of them take at most twice the largest slice.
    """
    largest = max((held.nbytes for mine in needs for _, held in mine), default=0)
    return max(1, min(most_bytes, largest // 2) // BLOCK_BYTES) * BLOCK_BYTES


def runs_of(indices: Iterable[int]) -> tuple[Run, ...]:
    """Group sorted indices into runs of consecutive ones."""
    runs: list[Run] = []
    for index in indices:
        if runs and runs[-1][1] == index:
            runs[-1] = runs[-1][0], index + 1
        else:
            runs.append((index, index + 1))
    return tuple(runs)
