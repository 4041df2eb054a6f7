"""Looks up rows of embedding tables that are not in memory: only the blocks that contain the rows are read.

An embedding uses one row of its table per token. The rows of the distinct ids are gathered into a small table, in which
torch looks up the ids; a gather copies values, so the bits are those of the whole table. Rows of a quantised table are
dequantised first. `tables_of` finds such tables by the types of a model's modules, not by architecture. The other
tensors of a module that holds a table (a norm, small embeddings, a bias) are read once and stay resident.

Rows are read from the plain form, or the packed one if the run reads that. Offline, if only the lossless form is
cached, the frames with the rows are decoded instead: each encodes one block of the payload.

Invariants: sources deliver whole blocks of 1 MiB, and only verified blocks are used. `RowReader.buffer_bytes` bounds
the memory, however many rows are requested (except that a single range longer than the scratch buffer makes it grow).
If the rows take several groups of blocks, the next group is in flight while one is awaited. Used by one forward pass at
a time.
"""

import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import nn

from surfw import tracing
from surfw.config import BLOCK_BYTES, MIB
from surfw.errors import ManifestError, ModelClosedError
from surfw.manifest import Chunk, Form, Manifest, Part, TensorInfo, parts_of
from surfw.metrics import Metrics
from surfw.runtime.buffers import Buffer
from surfw.runtime.loader import as_parameter, packed_form
from surfw.runtime.matrices import int8_values, matrix_over
from surfw.runtime.run import IoThread, Run
from surfw.skeleton.build import Skeleton
from surfw.skeleton.dtypes import torch_dtype
from surfw.source import ChunkSource, Read

_DEMAND = 0
_FRAME_BLOCKS = 2
"""A frame lies in so many blocks of the stored bytes at most."""

Range = tuple[int, int]
"""A range of a chunk's stored bytes: start and exclusive end."""


class RowReader:
    """Reads rows, and single tensors, of one model without loading their chunks."""

    def __init__(
        self,
        source: ChunkSource,
        manifest: Manifest,
        io: IoThread,
        metrics: Metrics,
        *,
        run: Callable[[], Run] = Run,
        dtypes: Mapping[str, torch.dtype] | None = None,
        prove: Callable[[Chunk, Form], Awaitable[None]] | None = None,
        read_frame: Callable[[Chunk, Form, int, memoryview], Awaitable[int]] | None = None,
        scratch_bytes: int = 16 * MIB,
        keep_bytes: int = 8 * MIB,
    ) -> None:
        """Read nothing yet.

        Args:
            source: of the model.
            manifest: the model.
            io: the thread for reads.
            metrics: counts what is read, and how long reads are awaited.
            run: returns the run that waits for a read.
            dtypes: the dtypes of tensors that do not keep the stored one.
            prove: awaited before parts of a chunk are read.
            read_frame: see `Loader.read_frame`; without it, no coded form is read.
            scratch_bytes: the most that is read at a time; at least one block.
            keep_bytes: the size of the cache of recently used blocks; 0 for none.
        """
        self._source = source
        self._manifest = manifest
        self._io = io
        self._metrics = metrics
        self._run = run
        self._dtypes = dtypes or {}
        self._prove = prove
        self._read_frame = read_frame
        self._scratch_blocks = max(1, scratch_bytes // BLOCK_BYTES)
        self._keep_blocks = keep_bytes // BLOCK_BYTES
        self._scratch: Buffer | None = None
        self._kept: OrderedDict[tuple[str, int], bytes] = OrderedDict()  # least recently used first

    @property
    def buffer_bytes(self) -> int:
        """The most memory that is kept between two uses."""
        return (self._scratch_blocks + self._keep_blocks) * BLOCK_BYTES

    def lookup(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        """`torch.nn.functional.embedding(ids, table)` for the named tensor; counted as one of `row_reads`.

        Args:
            name: the table, of shape (rows, …).
            ids: int32 or int64 of any shape.

        Returns:
            Shape (*ids.shape, …), in the dtype that the model computes with.

        Raises:
            IndexError: an id is out of range; the message is torch's.
            SurfwError: a block could not be read, or the run was interrupted.
        """
        chunk, info = self._manifest.home[name], self._manifest.tensors[name]
        different, places = torch.unique(ids, return_inverse=True)
        if different.numel() and not 0 <= int(different[0]) <= int(different[-1]) < info.shape[0]:
            raise IndexError("index out of range in self")
        rows, dtype = different.tolist(), self._dtype(info)
        self._metrics.add("row_reads")
        part = _part_of(chunk, name)
        if part and part.kind == "int8":
            codes = self._rows(chunk, rows, part.start, info.shape[1]).view(torch.int8)
            scales = self._rows(chunk, rows, part.scales, 4).view(torch.float32)
            table = int8_values(codes.view(len(rows), info.shape[1]), scales, dtype)
        else:
            width = info.nbytes // info.shape[0] if info.shape[0] else 0
            stored = self._rows(chunk, rows, part.start if part else info.offset, width)
            table = stored.view(torch_dtype(info.dtype)).to(dtype)
        return torch.nn.functional.embedding(places, table.view(len(rows), *info.shape[1:]))

    def tensor(self, name: str) -> torch.Tensor:
        """The whole named tensor, in new memory.

        Raises:
            SurfwError: a block could not be read, or the run was interrupted.
        """
        chunk, info = self._manifest.home[name], self._manifest.tensors[name]
        part = _part_of(chunk, name)
        start, stop = (part.start, part.stop) if part else (info.offset, info.offset + info.nbytes)
        stored, dtype = self._assemble(chunk, [(start, stop)]), self._dtype(info)
        if part and part.kind != "raw":
            alone = replace(part, start=0, scales=part.scales - start, stop=stop - start)
            return matrix_over(alone, stored).unpacked(dtype)
        return stored.view(torch_dtype(info.dtype)).to(dtype).view(info.shape)

    def clear(self) -> None:
        """Free all memory."""
        self._scratch = None
        self._kept.clear()

    def _dtype(self, info: TensorInfo) -> torch.dtype:
        """The dtype that the model computes with."""
        return self._dtypes.get(info.name, torch_dtype(info.dtype))

    def _rows(self, chunk: Chunk, rows: Sequence[int], first: int, width: int) -> torch.Tensor:
        """The bytes of sorted rows, each `width` bytes long; row 0 begins at stored byte `first`."""
        return self._assemble(chunk, [(first + row * width, first + (row + 1) * width) for row in rows])

    def _assemble(self, chunk: Chunk, ranges: Sequence[Range]) -> torch.Tensor:
        """The stored bytes of sorted ranges of equal lengths, concatenated."""
        stored = torch.empty(sum(stop - start for start, stop in ranges), dtype=torch.uint8)
        view, done = stored.numpy().data, 0
        for piece in self._pieces(chunk, ranges):
            view[done : done + piece.nbytes] = piece
            done += piece.nbytes
        return stored

    def _pieces(self, chunk: Chunk, ranges: Sequence[Range]) -> Iterator[memoryview]:
        """The bytes of each range; valid until the next one is requested."""
        groups = list(plan_groups([one for one in ranges if one[0] < one[1]], self._scratch_blocks))
        with closing(self._bring(chunk, [blocks for _, blocks in groups])) as brought:
            for scratch, (group, blocks) in zip(brought, groups, strict=True):
                places = {block: place * BLOCK_BYTES for place, block in enumerate(blocks)}
                for start, stop in group:
                    place = places[start // BLOCK_BYTES] + start % BLOCK_BYTES
                    yield scratch[place : place + stop - start]

    def _bring(self, chunk: Chunk, groups: Sequence[Sequence[int]]) -> Generator[memoryview, None, None]:
        """The blocks of each group, side by side in the scratch buffer.

        With several groups, the next one is in flight while the current one is awaited and used. It takes the memory of
        the cached blocks, which so many groups would evict anyway.
        """
        if not groups:
            return
        most = max(map(len, groups))
        form = self._form(chunk)
        is_ahead = len(groups) > 1 and most <= self._scratch_blocks <= self._keep_blocks and not form.frames
        if is_ahead:
            self._kept.clear()
        if self._scratch is not None and self._scratch.capacity_bytes < most * BLOCK_BYTES:
            self._scratch = None  # freed before a larger one is allocated
        buffers = [self._scratch or Buffer(most * BLOCK_BYTES)]
        buffers += [Buffer(most * BLOCK_BYTES)] if is_ahead else []
        self._scratch = None  # not reused before the end: reads may still write to it
        under_way: deque[tuple[dict[int, memoryview], Future[None]]] = deque()
        begun = 0
        try:
            for at in range(len(groups)):
                while begun < min(at + len(buffers), len(groups)):
                    under_way.append(self._start(chunk, form, groups[begun], buffers[begun % len(buffers)].view))
                    begun += 1
                missing, job = under_way.popleft()
                self._wait(job)
                if not is_ahead:
                    self._keep(chunk, missing)
                yield buffers[at % len(buffers)].view
        finally:
            for _, job in under_way:
                job.cancel()
        self._scratch = buffers[at % len(buffers)]
        buffers.clear()  # free the second buffer before blocks are cached in its place
        if is_ahead:
            self._keep(chunk, missing)

    def _start(
        self, chunk: Chunk, form: Form, blocks: Sequence[int], scratch: memoryview
    ) -> tuple[dict[int, memoryview], Future[None]]:
        """Copy the cached blocks of a group, and start one fetch for the others, with one read per run of neighbours.

        Returns:
            Where each of the other blocks goes, and the fetch.
        """
        missing, size = {}, chunk.payload_bytes if form.frames else form.stored_bytes
        for place, block in enumerate(blocks):
            into = scratch[place * BLOCK_BYTES :][: min(BLOCK_BYTES, size - block * BLOCK_BYTES)]
            if kept := self._kept.get((chunk.name, block)):
                self._kept.move_to_end((chunk.name, block))
                into[:] = kept
            else:
                missing[block] = into
        if form.frames and missing:
            while len(self._kept) > max(0, self._keep_blocks - _FRAME_BLOCKS):
                self._kept.popitem(last=False)
            return missing, self._io.submit(self._decode(chunk, form, missing))
        reads = []
        for first, last in plan_runs(list(missing)):
            at, start = blocks.index(first) * BLOCK_BYTES, first * BLOCK_BYTES
            length = (last - first) * BLOCK_BYTES + missing[last].nbytes
            reads.append(Read(chunk, form, start, start + length, scratch[at : at + length]))
        if reads:
            return missing, self._io.submit(self._fetch(reads))
        done = Future[None]()
        done.set_result(None)
        return missing, done

    def _wait(self, job: Future[None]) -> None:
        """Wait for a fetch; cancel it if the run or the wait is interrupted."""
        run = self._run()
        try:
            if not job.done():
                with self._metrics.span("stall"), tracing.span("stall", "stall for rows"):
                    run.wait_for(job)
            run.check()
            job.result()
        except CancelledError as exc:
            raise ModelClosedError(f"the source of {self._manifest.name} was closed while it was read") from exc
        except BaseException:
            job.cancel()
            raise

    async def _fetch(self, reads: Sequence[Read]) -> None:
        if self._prove is not None:
            await self._prove(reads[0].chunk, reads[0].form)  # all are of one chunk
        start = time.perf_counter()
        await self._source.fetch(self._manifest, reads, priority=_DEMAND)
        self._metrics.add("fetched_bytes", sum(read.stop - read.start for read in reads))
        self._metrics.latency("fetch").observe(time.perf_counter() - start)

    async def _decode(self, chunk: Chunk, form: Form, blocks: Mapping[int, memoryview]) -> None:
        """Read and decode the frames of these blocks, one at a time."""
        assert self._read_frame is not None
        if self._prove is not None:
            await self._prove(chunk, form)
        for block, into in blocks.items():
            start = time.perf_counter()
            self._metrics.add("fetched_bytes", await self._read_frame(chunk, form, block, into))
            self._metrics.add("decoded_bytes", into.nbytes)
            self._metrics.latency("fetch").observe(time.perf_counter() - start)

    def _form(self, chunk: Chunk) -> Form:
        """The form to read rows from: the coded one if nothing else is there offline."""
        form, coded = form_in_parts(chunk), chunk.form("lossless")
        if form.is_packed or coded is None or self._read_frame is None or not self._source.is_offline:
            return form
        near = {one.codec for one in self._source.near(self._manifest, chunk)}
        return coded if "lossless" in near and "none" not in near else form

    def _keep(self, chunk: Chunk, read: Mapping[int, memoryview]) -> None:
        for block in list(read)[-self._keep_blocks :] if self._keep_blocks else ():
            self._kept[chunk.name, block] = bytes(read[block])
        while len(self._kept) > self._keep_blocks:
            self._kept.popitem(last=False)


def form_in_parts(chunk: Chunk) -> Form:
    """The form of a chunk whose parts can be read on their own: the packed one, if the run reads it, or the plain one.

    Raises:
        ManifestError: the chunk has neither.
    """
    form = packed_form(chunk) or chunk.form("none")
    if form is None:
        offered = ", ".join(form.codec for form in chunk.forms)
        raise ManifestError(
            f"chunk {chunk.name} is stored as {offered}, expected the form 'none' too: its parts cannot be read alone"
        )
    return form


def _part_of(chunk: Chunk, name: str) -> Part | None:
    """Where a tensor lies in the packed form of its chunk; None if the run reads another form."""
    form = packed_form(chunk)
    return next(part for part in parts_of(chunk, form) if part.name == name) if form else None


def _has_rows(chunk: Chunk, name: str) -> bool:
    """Whether each row of a tensor is contiguous in a form that can be read in parts; int4 rows are not."""
    part = _part_of(chunk, name)
    return part.kind != "int4" if part else chunk.form("none") is not None


def plan_groups(ranges: Iterable[Range], most_blocks: int) -> Iterator[tuple[list[Range], list[int]]]:
    """Group sorted ranges of stored bytes so that each group has at most `most_blocks` blocks, or a single range.

    Yields:
        Each group, and the blocks that contain it, in order.
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
    """The runs of neighbours among sorted blocks: the first and the last block of each."""
    for _, run in groupby(enumerate(blocks), key=lambda one: one[1] - one[0]):
        neighbours = [block for _, block in run]
        yield neighbours[0], neighbours[-1]


@dataclass(frozen=True, slots=True)
class TableUnit:
    """A unit that can run while its tables are not in memory. Tensor names are the manifest's.

    Attributes:
        chunks: the chunks that contain its tensors.
        looked_up: embedding tables, which are looked up by rows.
        others: its other tensors, which are read once and stay resident.
    """

    chunks: tuple[str, ...]
    looked_up: tuple[str, ...]
    others: tuple[str, ...]


class StreamedTables:
    """Embedding tables of one model, looked up by rows while it runs.

    Attributes:
        row_wise: whether the module at a path now runs without its tables in memory.
    """

    def __init__(self, units: Mapping[str, TableUnit], rows: RowReader, row_wise: Callable[[str], bool]) -> None:
        """Serve these units with rows from this reader."""
        self._units = units
        self._rows = rows
        self.row_wise = row_wise
        self._others: dict[str, torch.Tensor] = {}

    def others(self, path: str) -> Mapping[str, torch.Tensor]:
        """The unit's tensors other than tables; read once.

        Raises:
            SurfwError: a block could not be read, or the run was interrupted.
        """
        names = self._units[path].others
        for name in names:
            if name not in self._others:
                self._others[name] = as_parameter(self._rows.tensor(name))
        return {name: self._others[name] for name in names}

    def apply(self, name: str, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Compute torch's `embedding` by rows; NotImplemented for functions that need the whole table.

        Raises:
            IndexError: an id is out of range.
            SurfwError: a block could not be read, or the run was interrupted.
        """
        if function is nn.functional.embedding:
            return self._look_up(name, *args, **kwargs)
        return NotImplemented

    def clear(self) -> None:
        """Free all memory."""
        self._rows.clear()
        self._others.clear()

    def _look_up(
        self,
        name: str,
        input: Any,  # noqa: A002 - torch's name
        weight: torch.Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        *_: Any,
        **__: Any,
    ) -> Any:
        """As torch's `embedding`; arguments that only affect gradients are ignored."""
        ids = type(input) is torch.Tensor and input.dtype in {torch.int32, torch.int64}
        padded = padding_idx is not None and not -weight.shape[0] <= padding_idx < weight.shape[0]
        if not ids or padded or max_norm is not None:
            return NotImplemented
        return self._rows.lookup(name, input.cpu())


def tables_of(skeleton: Skeleton, manifest: Manifest, *, least_bytes: int = MIB) -> dict[str, TableUnit]:
    """The units that can run without their tables in memory, by path. Pure.

    A table is a matrix of at least `least_bytes`, in a unit outside of the layers, that only embeddings use as their
    weight. The unit's other tensors must be smaller than its tables. All of them must be in chunks that are stored
    plain or packed, since other forms cannot be read in parts.
    """
    home, stored, found = manifest.home, manifest.tensors, {}
    for unit in (unit for unit in skeleton.units if unit.kind == "part"):
        names = {slot: name for slot in unit.slots if (name := manifest.ties.get(slot.name, slot.name)) in stored}
        embeddings = {slot for slot in names if isinstance(slot.module, nn.Embedding) and slot.leaf == "weight"}
        only = {names[slot] for slot in embeddings} - {names[slot] for slot in names if slot not in embeddings}
        large = {name for name in only if stored[name].nbytes >= least_bytes and len(stored[name].shape) == 2}
        tables = {name for name in large if _has_rows(home[name], name)}
        others = dict.fromkeys(name for name in names.values() if name not in tables)
        size = {name: stored[name].nbytes for name in names.values()}
        in_parts = all(packed_form(home[name]) or home[name].form("none") for name in names.values())
        if tables and in_parts and sum(size[name] for name in others) < sum(size[name] for name in tables):
            chunks = dict.fromkeys(home[name].name for name in names.values())
            looked_up = dict.fromkeys(name for name in names.values() if name in tables)
            found[unit.path] = TableUnit(tuple(chunks), tuple(looked_up), tuple(others))
    return found
