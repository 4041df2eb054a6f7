"""Which rank reads which blocks of a model, and who gets what of them. Pure: no torch, no I/O.

Only whole blocks of 1 MiB can be verified, and the slices of ranks seldom begin where blocks do. So every block that
somebody needs is read by one rank on each machine, and what of it others need goes from there to them: the blocks
between two row shards, the columns of every rank out of whole rows, tensors that all ranks hold. Where the ranks of
several machines need different parts of a block, one rank of all reads it, if that moves fewer bytes than one read on
each machine.

Invariants: every block that has a needed byte is read once in each domain (a machine, or all), by a rank that needs
some of it; every byte of every slice comes from exactly one read; within what single blocks allow, a rank reads as much
as its share, which is what it holds, where that is held `n` times on a machine divided by `n`.
"""

from bisect import bisect_right
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from surfw.config import BLOCK_BYTES
from surfw.manifest import Chunk, TensorInfo, nbytes

Run = tuple[int, int]
"""Neighbouring indices or bytes, end-exclusive."""

Need = tuple[str, "Slice"]
"""A tensor of the manifest, and what a rank holds of it."""


@dataclass(frozen=True)
class Slice:
    """What a rank holds of a tensor: some columns of some rows, in row-major order, as its bytes lie one by one.

    Attributes:
        row_bytes: bytes of a row of the whole tensor, in whatever dimensions that is.
        rows: which rows, sorted.
        columns: which bytes of each row, sorted.
    """

    row_bytes: int
    rows: tuple[Run, ...]
    columns: tuple[Run, ...]

    @cached_property
    def width_bytes(self) -> int:
        """Bytes that are held of a row."""
        return sum(stop - start for start, stop in self.columns)

    @cached_property
    def nbytes(self) -> int:
        """Bytes that are held."""
        return sum(stop - start for start, stop in self.rows) * self.width_bytes

    @cached_property
    def extent(self) -> Run:
        """The bytes of the whole tensor that all of them lie in."""
        if not self.nbytes:
            return 0, 0
        first = self.rows[0][0] * self.row_bytes + self.columns[0][0]
        return first, (self.rows[-1][1] - 1) * self.row_bytes + self.columns[-1][1]

    def before(self, at: int) -> int:
        """How many of its bytes lie in the first `at` bytes of the whole tensor: where byte `at` is in the slice."""
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
        """The bytes `start` to `stop` of the whole tensor that are held, as runs of them, in order."""
        for row in range(start // self.row_bytes, -(-stop // self.row_bytes)) if self.nbytes else ():
            if any(first <= row < last for first, last in self.rows):
                at = row * self.row_bytes
                for low, high in self.columns:
                    if max(start, at + low) < min(stop, at + high):
                        yield max(start, at + low), min(stop, at + high)


def make_slice(tensor: TensorInfo, held: Mapping[int, Sequence[Run]]) -> Slice:
    """What is held of a tensor, by the indices that are held of its dimensions; those not named are held whole."""
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
    """The rows with one more dimension of that size, of which these runs are held."""
    is_whole = tuple(runs) == ((0, size),)
    for start, stop in rows:
        if is_whole:
            yield start * size, stop * size
        else:
            for row in range(start, stop):
                yield from ((row * size + low, row * size + high) for low, high in runs)


@dataclass(slots=True)
class Unit:
    """Neighbouring blocks of a chunk that a rank reads at once.

    Attributes:
        chunk: whose blocks they are.
        start, stop: which of its payload bytes, end-exclusive.
        ranks: who gets something of them, the reader among them.
    """

    chunk: Chunk
    start: int
    stop: int
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes of a unit that belong to a slice of a rank, where they lie together.

    Attributes:
        need: the slice's place in the rank's list of needs.
        origin: where the tensor begins in the chunk's payload.
        start, stop: of the whole tensor, which bytes are in the unit.
        at, end: of the slice, which bytes they are.
    """

    need: int
    origin: int
    start: int
    stop: int
    at: int
    end: int


@dataclass(frozen=True)
class LoadPlan:
    """Who reads what, and who gets what of it.

    Attributes:
        needs: of each rank.
        units: that each rank reads, in the order it does.
        shares: bytes that each rank should read.
        window_bytes: the most that a rank reads in a round.
    """

    needs: Sequence[Sequence[Need]]
    units: Sequence[Sequence[Unit]]
    shares: Sequence[float]
    window_bytes: int

    def read_bytes(self, rank: int) -> int:
        """What a rank reads."""
        return sum(unit.stop - unit.start for unit in self.units[rank])

    @cached_property
    def rounds(self) -> list[list[list[Unit]]]:
        """What each rank reads in each round: as much as its window holds."""
        queues = [_fill(units, self.window_bytes) for units in self.units]
        count = max(map(len, queues), default=0)
        return [[queue[at] if at < len(queue) else [] for queue in queues] for at in range(count)]

    @cached_property
    def _by_tensor(self) -> list[dict[str, list[tuple[int, Slice]]]]:
        """Of each rank, the places and slices of its needs by their tensors."""
        found: list[dict[str, list[tuple[int, Slice]]]] = [{} for _ in self.needs]
        for rank, needs in enumerate(self.needs):
            for place, (name, held) in enumerate(needs):
                found[rank].setdefault(name, []).append((place, held))
        return found

    def pieces(self, unit: Unit, rank: int) -> Iterator[Piece]:
        """What of a unit belongs to a rank, in an order that its reader and the rank agree on."""
        for tensor in tensors_in(unit.chunk, unit.start, unit.stop):
            start = max(0, unit.start - tensor.offset)
            stop = min(tensor.nbytes, unit.stop - tensor.offset)
            for place, held in self._by_tensor[rank].get(tensor.name, ()):
                at, end = held.before(start), held.before(stop)
                if at < end:
                    yield Piece(place, tensor.offset, start, stop, at, end)


def tensors_in(chunk: Chunk, start: int, stop: int) -> Iterator[TensorInfo]:
    """The tensors that some of these bytes of a chunk's payload belong to, in order."""
    first = bisect_right(chunk.tensors, start, key=lambda tensor: tensor.offset) - 1
    for tensor in chunk.tensors[max(0, first) :]:
        if tensor.offset >= stop:
            return
        if tensor.nbytes and tensor.offset + tensor.nbytes > start:
            yield tensor


def plan_load(
    chunks: Iterable[Chunk], needs: Sequence[Sequence[Need]], hosts: Sequence[Hashable], *, window_bytes: int
) -> LoadPlan:
    """Decide who reads which blocks.

    Args:
        chunks: of the model, in the order they are used.
        needs: of each rank.
        hosts: the machine that each rank is on.
        window_bytes: the most that a rank reads at once; whole blocks.
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
    """How many bytes each rank needs of these, and what of that it should read."""
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
    """The groups of ranks for each of which one reads a block: those of each machine, or all where that is cheaper."""
    by_host: dict[Hashable, list[int]] = {}
    for rank in sorted(held):
        by_host.setdefault(hosts[rank], []).append(rank)
    needed = [min(size_bytes, sum(held[rank] for rank in ranks)) for ranks in by_host.values()]
    if len(by_host) > 1 and size_bytes + sum(needed) - max(needed) < len(by_host) * size_bytes:
        return [tuple(sorted(held))]
    return [tuple(ranks) for ranks in by_host.values()]


def _append(units: list[Unit], unit: Unit, window_bytes: int) -> None:
    """Add a block to what a rank reads: to the blocks before it, if it goes on with them to the same ranks."""
    last = units[-1] if units else None
    is_next = last is not None and last.chunk is unit.chunk and last.stop == unit.start and last.ranks == unit.ranks
    if last is not None and is_next and unit.stop - last.start <= window_bytes:
        last.stop = unit.stop
    else:
        units.append(unit)


def _fill(units: Sequence[Unit], window_bytes: int) -> list[list[Unit]]:
    """Units in groups that a window holds."""
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
    """How much a rank reads at once: a half of the largest slice of all, in whole blocks; at least one.

    Two windows, and what is put together for others out of one, take no more than twice the largest slice then.
    """
    largest = max((held.nbytes for mine in needs for _, held in mine), default=0)
    return max(1, min(most_bytes, largest // 2) // BLOCK_BYTES) * BLOCK_BYTES


def runs_of(indices: Iterable[int]) -> tuple[Run, ...]:
    """Sorted indices as runs of neighbours."""
    runs: list[Run] = []
    for index in indices:
        if runs and runs[-1][1] == index:
            runs[-1] = runs[-1][0], index + 1
        else:
            runs.append((index, index + 1))
    return tuple(runs)
