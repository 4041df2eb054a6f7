"""`load_sharded`: each rank reads its share of a model's blocks, and the ranks exchange the parts that others need.

    needs of all ranks ─▶ plan (the same on each) ─▶ rounds: read a window ─▶ agree ─▶ send, receive, put in place

Each window is read while the previous one is exchanged. Pieces are sent from the window and received in their final
place.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from surfw.config import MIB, expect
from surfw.distributed.place import place_model
from surfw.distributed.plan import LoadPlan, Slice, Unit, choose_window, plan_load
from surfw.distributed.ranks import Ranks, expect_one_model, this_host
from surfw.distributed.targets import Target, find_targets, needs_of
from surfw.errors import ConfigurationError, SurfwError, UnsupportedModelError
from surfw.manifest import Chunk, Digests, Form, Manifest
from surfw.models.client import Source, SourceThread, WeightClient
from surfw.models.from_manifest import open_skeleton
from surfw.runtime.buffers import Buffer
from surfw.runtime.run import Job
from surfw.source import ChunkSource, Read
from surfw.threads import refuse_event_loop

_MOST_WINDOW_BYTES = 16 * MIB
DEFAULT_TIMEOUT_SECONDS = 300.0

Progress = Callable[[int, int], object]
"""Called with the bytes that all ranks together have read so far, and the total that they will read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadReport:
    """The statistics of a load on this rank.

    Attributes:
        rank, ranks: this rank, and the number of ranks.
        held_bytes: the weights that this rank holds now.
        share_bytes: this rank's share of the reads: the bytes it holds, those held by `n` ranks of a machine divided
            by `n`.
        read_bytes: bytes read from the source.
        sent_bytes, received_bytes: bytes exchanged with other ranks.
        staging_bytes: the peak memory used besides the weights.
        seconds: from the call until the last weight was in place.
    """

    rank: int
    ranks: int
    held_bytes: int
    share_bytes: int
    read_bytes: int
    sent_bytes: int
    received_bytes: int
    staging_bytes: int
    seconds: float


def load_sharded(
    model: nn.Module,
    source: Source,
    mesh: Any = None,
    plan: str | Mapping[str, str] | None = None,
    *,
    name: str | None = None,
    timeout: float = DEFAULT_TIMEOUT_SECONDS,
    progress: Progress | None = None,
) -> LoadReport:
    """Load this rank's part of a model's weights, reading only its share. All ranks of the job must call it.

    The model has no weights yet. It comes from `build_model`, or is a part of such a model, such as a pipeline stage;
    its names and shapes are those of the manifest. A `DTensor` keeps its placement. If `mesh` is given, the model is
    placed first; see `plan`.

    Args:
        model: modified in place: parameters on the meta device get memory, others are filled in place.
        source: a server, a store, a checkpoint, or a `WeightClient`, which stays open.
        mesh: a one-dimensional `DeviceMesh` over which to place the model.
        plan: how to place it: `"fsdp"` (the default) with `fully_shard`, layer by layer; `"tp"` with transformers' own
            plan for the model; or a custom plan that maps patterns such as `"model.layers.*.mlp.up_proj"` to styles
            such as `"colwise"`.
        name: the model's name, if the source has several.
        timeout: seconds to wait for another rank that makes no progress.
        progress: called on rank 0 only.

    Raises:
        ConfigurationError: the arguments are invalid together, or the weights are not stored in an exact form that
            allows partial reads.
        ManifestError: the model has weights that the manifest lacks.
        RankError: another rank failed, is gone, or does not answer.
        SurfwError: this rank's share cannot be read; the message names the bytes.
    """
    refuse_event_loop("loading", "a thread of its own")
    expect("timeout", timeout, int | float, "a number of seconds over 0")
    if not timeout > 0:
        raise ConfigurationError(f"timeout is {timeout}; expected a number of seconds over 0")
    begun = time.perf_counter()
    if mesh is not None:
        place_model(model, mesh, plan or "fsdp")
    elif plan is not None:
        raise ConfigurationError("a plan says how to place a model over a mesh; give mesh as well")
    client = source if isinstance(source, SourceThread) else WeightClient(source)
    try:
        with Ranks(timeout) as ranks:
            return _Load(model, client, ranks, progress).run(name, begun)
    finally:
        if client is not source:
            client.close()


class _Load:
    """One load on one rank."""

    def __init__(self, model: nn.Module, client: SourceThread, ranks: Ranks, progress: Progress | None) -> None:
        self._model = model
        self._client = client
        self._ranks = ranks
        self._progress = progress if ranks.rank == 0 else None
        self._sent_bytes = self._received_bytes = 0
        self._staging_bytes = self._copied_bytes = 0

    def run(self, name: str | None, begun: float) -> LoadReport:
        """Load the weights."""
        manifest, targets = self._prepare(name)
        told = self._ranks.gather((manifest.identity, needs_of(targets), this_host()), lambda _: "while it began")
        identities, needs, hosts = zip(*told, strict=True)
        expect_one_model(identities, self._ranks.rank)
        order = dict.fromkeys(chunk for use in manifest.order for chunk in use.chunks)
        chunks = [manifest.by_name[chunk] for chunk in dict.fromkeys([*order, *manifest.by_name])]
        plan = plan_load(chunks, needs, hosts, window_bytes=choose_window(needs, _MOST_WINDOW_BYTES))
        self._go_through(manifest, plan, targets)
        for target in targets:
            if not target.held.nbytes:
                target.finish()  # it has no bytes that could arrive
        self._fill_buffers(manifest)
        mine = self._ranks.rank
        return LoadReport(
            rank=mine,
            ranks=self._ranks.count,
            held_bytes=sum(target.held_bytes for target in targets),
            share_bytes=round(plan.shares[mine]),
            read_bytes=plan.read_bytes(mine),
            sent_bytes=self._sent_bytes,
            received_bytes=self._received_bytes,
            staging_bytes=self._staging_bytes,
            seconds=time.perf_counter() - begun,
        )

    def _prepare(self, name: str | None) -> tuple[Manifest, list[Target]]:
        """The manifest, with all digests, and the model's targets. A failure on one rank fails on all."""
        found: tuple[Manifest, list[Target]] | None = None
        failure: SurfwError | None = None
        try:
            manifest = self._client.run(partial(_find_manifest, name=name))
            found = manifest, find_targets(self._model, manifest)
        except SurfwError as exc:
            failure = exc
        self._ranks.agree(str(failure or ""), lambda _: "before it read anything")
        if failure is not None:
            raise failure
        assert found is not None, "nothing failed"
        return self._learn(found[0]), found[1]

    def _learn(self, manifest: Manifest) -> Manifest:
        """The manifest with all digests; missing ones are computed once, split between the ranks."""
        if manifest.is_known:
            return manifest
        mine, count = self._ranks.rank, self._ranks.count
        unknown = [chunk for chunk in manifest.chunks if not chunk.forms[0].is_known]
        failure: SurfwError | None = None
        known: dict[str, Digests] = {}
        try:
            known = self._client.run(partial(_digest, manifest=manifest, chunks=unknown[mine::count]))
        except SurfwError as exc:
            failure = exc
        doing: Callable[[int], str] = lambda _: "while it computed digests of a checkpoint"  # noqa: E731
        self._ranks.agree(str(failure or ""), doing)
        if failure is not None:
            raise failure
        for others in self._ranks.gather(known, doing):
            known |= others
        return manifest.with_digests(known)

    def _go_through(self, manifest: Manifest, plan: LoadPlan, targets: Sequence[Target]) -> None:
        """Read, exchange and place the weights, round by round."""
        mine, rounds = self._ranks.rank, plan.rounds
        total = sum(plan.read_bytes(rank) for rank in range(self._ranks.count))
        windows = [Buffer(plan.window_bytes) for _ in range(2 if len(rounds) > 1 else 1)]
        self._staging_bytes = sum(window.capacity_bytes for window in windows)
        done = 0
        job = self._read(manifest, rounds[0][mine], windows[0]) if rounds else None
        try:
            for at, units in enumerate(rounds):
                assert job is not None, "there is a round"
                failure = _outcome(job)
                where = _describe(units[mine], self._client.url)
                self._ranks.agree(str(failure or ""), partial(_doing, units, self._client.url))
                if failure:
                    raise _located(failure, where)
                window = windows[at % len(windows)]
                job = None
                if at + 1 < len(rounds):
                    job = self._read(manifest, rounds[at + 1][mine], windows[(at + 1) % 2])
                self._exchange(plan, units, window, targets)
                done += sum(unit.stop - unit.start for queue in units for unit in queue)
                if self._progress is not None:
                    self._progress(done, total)
            job = None
        finally:
            if job is not None:
                job.cancel()

    def _read(self, manifest: Manifest, units: Sequence[Unit], window: Buffer) -> Job[None]:
        """Start reading units into a window, back to back."""
        reads, at = [], 0
        for unit in units:
            size = unit.stop - unit.start
            form = _plain_form(unit.chunk, manifest)
            reads.append(Read(unit.chunk, form, unit.start, unit.stop, window.view[at : at + size]))
            at += size

        async def fetch() -> None:
            if reads:
                await self._client.source.fetch(manifest, reads)

        return self._client.io.submit(fetch())

    def _exchange(
        self, plan: LoadPlan, units: Sequence[Sequence[Unit]], window: Buffer, targets: Sequence[Target]
    ) -> None:
        """Send other ranks their parts of a window, receive this rank's parts, and put them in place."""
        mine = self._ranks.rank
        sent: dict[int, list[torch.Tensor]] = {}
        received: dict[int, list[torch.Tensor]] = {}
        arriving: list[tuple[Target, int]] = []
        at = copied = 0
        for unit in units[mine]:
            data = np.frombuffer(window.view[at : at + unit.stop - unit.start], np.uint8)
            at += unit.stop - unit.start
            for rank in unit.ranks:
                for piece in plan.pieces(unit, rank):
                    low, high = piece.origin + piece.start - unit.start, piece.origin + piece.stop - unit.start
                    held = plan.needs[rank][piece.need][1]
                    values = torch.from_numpy(gather(data[low:high], held, piece.start, piece.stop))
                    if rank == mine:
                        target = targets[piece.need]
                        target.memory[piece.at : piece.end].copy_(values)
                        arriving.append((target, piece.end - piece.at))
                    else:
                        sent.setdefault(rank, []).append(values)
                        copied += 0 if np.may_share_memory(values.numpy(), data) else values.nbytes
        for reader, queue in enumerate(units):
            for unit in queue if reader != mine else ():
                for piece in plan.pieces(unit, mine) if mine in unit.ranks else ():
                    target = targets[piece.need]
                    received.setdefault(reader, []).append(target.memory[piece.at : piece.end])
                    arriving.append((target, piece.end - piece.at))
        staged = sum({id(target): target.staged_bytes for target, _ in arriving}.values())
        self._staging_bytes = max(self._staging_bytes, 2 * window.capacity_bytes + copied + staged)
        self._ranks.exchange(sent, received, partial(_doing, units, self._client.url))
        self._sent_bytes += sum(values.nbytes for one in sent.values() for values in one)
        self._received_bytes += sum(values.nbytes for one in received.values() for values in one)
        for target, size in arriving:
            target.arrived(size)

    def _fill_buffers(self, manifest: Manifest) -> None:
        """Fill the buffers that are still on the meta device, whose values no checkpoint has."""
        missing = [name for name, buffer in self._model.named_buffers() if buffer.is_meta]
        if not missing:
            return
        known = dict(open_skeleton(manifest).model.named_buffers())
        for name in missing:
            path, _, leaf = name.rpartition(".")
            if name not in known or known[name].is_meta:
                raise UnsupportedModelError(
                    f"nobody knows the values of the buffer {name}; build the model with surfw.distributed.build_model"
                )
            self._model.get_submodule(path)._buffers[leaf] = known[name]  # noqa: SLF001 - torch's registries


def gather(data: Any, held: Slice, start: int, stop: int) -> Any:
    """Extract a slice's bytes from the bytes `start` to `stop` of a tensor; a view if they are contiguous.

    Args:
        data: the tensor's bytes `start` to `stop`, uint8 of shape (stop - start,).
        held: the slice.
        start: the offset of `data` in the whole tensor.
        stop: the end of `data` in the whole tensor.
    """
    low, high = max(start, held.extent[0]), min(stop, held.extent[1])
    if high - low == held.before(stop) - held.before(start):
        return data[low - start : high - start]
    first, last = -(-start // held.row_bytes), stop // held.row_bytes
    parts = []
    if first >= last:
        parts = [data[low - start : high - start] for low, high in held.runs(start, stop)]
    else:
        parts += [data[low - start : high - start] for low, high in held.runs(start, first * held.row_bytes)]
        table = data[first * held.row_bytes - start : last * held.row_bytes - start].reshape(-1, held.row_bytes)
        for top, bottom in held.rows:
            rows = table[max(0, top - first) : max(0, bottom - first)]
            parts.append(np.concatenate([rows[:, left:right] for left, right in held.columns], axis=1).reshape(-1))
        parts += [data[low - start : high - start] for low, high in held.runs(last * held.row_bytes, stop)]
    return np.concatenate(parts)


async def _find_manifest(source: ChunkSource, name: str | None) -> Manifest:
    manifest = await source.manifest(await source.resolve(name))
    source.expect_readable(manifest)
    if manifest.base is not None:
        raise UnsupportedModelError(f"{manifest.name} is an adapter, not a model; give the name of its base")
    for chunk in manifest.chunks:
        _plain_form(chunk, manifest)
    return manifest


def _plain_form(chunk: Chunk, manifest: Manifest) -> Form:
    """The chunk's uncompressed form, which allows partial reads."""
    form = chunk.form("none")
    if form is None:
        stored = ", ".join(form.codec for form in chunk.forms)
        raise ConfigurationError(
            f"chunk {chunk.name} of {manifest.name} is stored as {stored}, of which no parts can be read; several "
            "ranks need it uncompressed: chunk the model with codec 'none' as well"
        )
    return form


async def _digest(source: ChunkSource, manifest: Manifest, chunks: Iterable[Chunk]) -> dict[str, Digests]:
    found = {}
    for chunk in chunks:
        digests = await source.digests(manifest, chunk)
        if digests is None:
            raise ConfigurationError(
                f"{manifest.name} has no digests of its weights, so that parts of them cannot be verified; chunk it"
            )
        found[chunk.id] = digests
    return found


def _outcome(job: Job[None]) -> SurfwError | None:
    """Wait for a job; return its `SurfwError`, if any. Other exceptions are raised."""
    try:
        job.result()
    except SurfwError as exc:
        return exc
    return None


def _describe(units: Sequence[Unit], url: str) -> str:
    """Describe the bytes that a rank reads in a round."""
    if not units:
        return f"reading nothing of {url}"
    first, last = units[0], units[-1]
    more = f" to {last.stop} of chunk {last.chunk.name}" if last is not first else f" to {first.stop}"
    return f"reading bytes {first.start} of chunk {first.chunk.name}{more} from {url}"


def _doing(units: Sequence[Sequence[Unit]], url: str, rank: int) -> str:
    """`_describe` for another rank."""
    return f"while {_describe(units[rank], url)}"


def _located(failure: SurfwError, where: str) -> SurfwError:
    """The failure with its location in the message, if its class takes only a message."""
    if type(failure).__init__ is not SurfwError.__init__:
        return failure
    located = type(failure)(f"{where}: {failure}")
    located.__cause__ = failure
    return located
