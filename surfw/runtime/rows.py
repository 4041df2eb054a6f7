"""Rows of a table that is not in memory: only the blocks they lie in are read.

An embedding uses one row of its table for each token. To look ids up, the rows of the different ones among them are put
together into a small table, and torch looks the ids up in that: a gather, so the bits are those of the whole table.

Invariants: no block is used that was not verified; memory is bounded by `buffer_bytes` (a single longer range than the
scratch buffer makes that grow), however many rows are asked for. Where they take several groups of blocks, the next
group is under way while one is waited for. Used by one forward pass at a time.
"""

from collections import OrderedDict
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import groupby

import torch

from surfw.config import BLOCK_BYTES, MIB
from surfw.manifest import Chunk, TensorInfo
from surfw.runtime.blocks import BlockReader, plain_form
from surfw.runtime.buffers import Buffer
from surfw.runtime.io_thread import Job
from surfw.skeleton.dtypes import torch_dtype

Range = tuple[int, int]
"""Stored bytes of a chunk, end-exclusive."""


class RowReader:
    """Looks up rows of tensors of one model, and reads its small tensors alone."""

    def __init__(
        self,
        blocks: BlockReader,
        dtypes: Mapping[str, torch.dtype] | None = None,
        *,
        scratch_bytes: int = 16 * MIB,
        keep_bytes: int = 8 * MIB,
    ) -> None:
        """Say how rows are read.

        Args:
            blocks: reads the blocks.
            dtypes: the dtypes of the tensors that shall not have the stored one.
            scratch_bytes: the most that is read at a time, at least one block.
            keep_bytes: how much of the blocks used last stays in memory; 0 keeps none.
        """
        self._blocks = blocks
        self._dtypes = dtypes or {}
        self._homes = {info.name: (chunk, info) for chunk in blocks.manifest.chunks for info in chunk.tensors}
        self._scratch_blocks = max(1, scratch_bytes // BLOCK_BYTES)
        self._keep_blocks = keep_bytes // BLOCK_BYTES
        self._scratch: Buffer | None = None
        self._kept: OrderedDict[tuple[str, int], bytes] = OrderedDict()  # least recently used first

    @property
    def buffer_bytes(self) -> int:
        """The most memory that this keeps between two uses."""
        return (self._scratch_blocks + self._keep_blocks) * BLOCK_BYTES

    def lookup(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        """`torch.nn.functional.embedding(ids, table)` for the tensor of that name; counted as one of `row_reads`.

        Args:
            name: the table, of shape (rows, …).
            ids: int32 or int64 of any shape.

        Returns:
            Shape (*ids.shape, …), in the dtype that the model computes with.

        Raises:
            IndexError: an id is not one of a row, with torch's own text.
            SurfwError: a block could not be read, or the run was interrupted.
        """
        chunk, info = self._homes[name]
        different, places = torch.unique(ids, return_inverse=True)
        if different.numel() and not 0 <= int(different[0]) <= int(different[-1]) < info.shape[0]:
            raise IndexError("index out of range in self")
        width = info.nbytes // info.shape[0] if info.shape[0] else 0
        starts = (info.offset + row * width for row in different.tolist())
        self._blocks.metrics.add("row_reads")
        table = self._assemble(chunk, info, [(start, start + width) for start in starts])
        return torch.nn.functional.embedding(places, table.view(len(different), *info.shape[1:]))

    def tensor(self, name: str) -> torch.Tensor:
        """The whole tensor of that name, in memory of its own.

        Raises:
            SurfwError: a block could not be read, or the run was interrupted.
        """
        chunk, info = self._homes[name]
        return self._assemble(chunk, info, [(info.offset, info.offset + info.nbytes)]).view(info.shape)

    def clear(self) -> None:
        """Give all memory back."""
        self._scratch = None
        self._kept.clear()

    def _assemble(self, chunk: Chunk, info: TensorInfo, ranges: Sequence[Range]) -> torch.Tensor:
        """The elements in sorted ranges of equal lengths, one range behind the other, as the model computes with."""
        stored = torch.empty(sum(stop - start for start, stop in ranges), dtype=torch.uint8)
        view, done = stored.numpy().data, 0
        for piece in self._pieces(chunk, ranges):
            view[done : done + piece.nbytes] = piece
            done += piece.nbytes
        dtype = torch_dtype(info.dtype)
        return stored.view(dtype).to(self._dtypes.get(info.name, dtype))

    def _pieces(self, chunk: Chunk, ranges: Sequence[Range]) -> Iterator[memoryview]:
        """The bytes of each range; valid until the next one is asked for."""
        groups = list(plan_groups([one for one in ranges if one[0] < one[1]], self._scratch_blocks))
        most = max((len(blocks) for _, blocks in groups), default=0)
        bring = (
            self._bring_ahead if len(groups) > 1 and most <= self._scratch_blocks <= self._keep_blocks else self._bring
        )
        brought = bring(chunk, [blocks for _, blocks in groups])
        with closing(brought):
            for scratch, (group, blocks) in zip(brought, groups, strict=True):
                places = {block: place * BLOCK_BYTES for place, block in enumerate(blocks)}
                for start, stop in group:
                    place = places[start // BLOCK_BYTES] + start % BLOCK_BYTES
                    yield scratch[place : place + stop - start]

    def _bring(self, chunk: Chunk, groups: Sequence[Sequence[int]]) -> Generator[memoryview, None, None]:
        """The blocks of each group, side by side in the scratch buffer."""
        for blocks in groups:
            if self._scratch is None or self._scratch.capacity_bytes < len(blocks) * BLOCK_BYTES:
                self._scratch = Buffer(len(blocks) * BLOCK_BYTES)
            places = self._places(chunk, blocks, self._scratch.view)
            missing = {block: into for block, into in places.items() if not self._recall(chunk, block, into)}
            if missing:
                try:
                    self._blocks.wait(self._start(chunk, missing, blocks, self._scratch.view))
                except BaseException:
                    self._scratch = None  # it may still be written to
                    raise
                self._keep(chunk, missing)
            yield self._scratch.view

    def _bring_ahead(self, chunk: Chunk, groups: Sequence[Sequence[int]]) -> Generator[memoryview, None, None]:
        """As `_bring`, and the next group is under way while one is waited for, and used.

        It lies in the memory of the blocks used last, of which so many groups would leave nothing anyway.
        """
        self._kept.clear()
        buffers = [
            self._scratch or Buffer(self._scratch_blocks * BLOCK_BYTES),
            Buffer(self._scratch_blocks * BLOCK_BYTES),
        ]
        self._scratch = None  # until the end: it may still be written to
        places = [self._places(chunk, blocks, buffers[at % 2].view) for at, blocks in enumerate(groups)]

        def start(at: int) -> Job[None]:
            return self._start(chunk, places[at], groups[at], buffers[at % 2].view)

        under_way = [start(0)]
        try:
            for at in range(len(groups)):
                under_way += [start(at + 1)] if at + 1 < len(groups) else []
                self._blocks.wait(under_way.pop(0))
                yield buffers[at % 2].view
        finally:
            for job in under_way:
                job.cancel()
        last = (len(groups) - 1) % 2
        self._scratch = buffers.pop(last)
        buffers.clear()  # before there is anything in its place
        places[:-1] = []
        self._keep(chunk, places[-1])

    def _places(self, chunk: Chunk, blocks: Sequence[int], scratch: memoryview) -> dict[int, memoryview]:
        """Where each block goes."""
        ends = plain_form(chunk).stored_bytes
        return {
            block: scratch[place * BLOCK_BYTES :][: min(BLOCK_BYTES, ends - block * BLOCK_BYTES)]
            for place, block in enumerate(blocks)
        }

    def _recall(self, chunk: Chunk, block: int, into: memoryview) -> bool:
        """Fill in a block that was kept; whether it was."""
        kept = self._kept.get((chunk.name, block))
        if kept:
            self._kept.move_to_end((chunk.name, block))
            into[:] = kept
        return bool(kept)

    def _start(
        self, chunk: Chunk, missing: Mapping[int, memoryview], blocks: Sequence[int], scratch: memoryview
    ) -> Job[None]:
        runs = []
        for first, last in plan_runs(list(missing)):
            at = blocks.index(first) * BLOCK_BYTES
            length = (last - first) * BLOCK_BYTES + missing[last].nbytes
            runs.append((first, scratch[at : at + length]))
        return self._blocks.start(chunk, runs)

    def _keep(self, chunk: Chunk, read: Mapping[int, memoryview]) -> None:
        for block in list(read)[-self._keep_blocks :] if self._keep_blocks else ():
            self._kept[chunk.name, block] = bytes(read[block])
        while len(self._kept) > self._keep_blocks:
            self._kept.popitem(last=False)


def plan_groups(ranges: Iterable[Range], most_blocks: int) -> Iterator[tuple[list[Range], list[int]]]:
    """Cut sorted ranges of stored bytes into groups that lie in at most that many blocks, a longer range alone.

    Returns:
        Each group, and the blocks it lies in, in order.
    """
    group: list[Range] = []
    blocks: list[int] = []
    for start, stop in ranges:
        touched = range(start // BLOCK_BYTES, -(-stop // BLOCK_BYTES))
        new = [block for block in touched if not blocks or block > blocks[-1]]
        if group and len(blocks) + len(new) > most_blocks:
            yield group, blocks
            group, blocks, new = [], [], list(touched)
        group.append((start, stop))
        blocks += new
    if group:
        yield group, blocks


def plan_runs(blocks: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Sorted blocks as runs of neighbours: the first and the last block of each."""
    for _, run in groupby(enumerate(blocks), key=lambda one: one[1] - one[0]):
        neighbours = [block for _, block in run]
        yield neighbours[0], neighbours[-1]
