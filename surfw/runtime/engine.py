"""Obeys a residency plan: which chunk is in which buffer, what is in flight, what may be evicted.

Pinned chunks have memory of their own, and stay. The others pass through the ring: a few buffers of one size, which
are used again and again. What comes next is fetched ahead as far as the ring has buffers that nobody uses, across the
end of a pass as well; what was guessed wrong makes way. The plan is made anew when another schedule has been learned,
and when room has to be left for something else.

Counting: a chunk that is resident when execution reaches it is a *hit*. A chunk fetched for this very use is
*prefetched* if it was ready in time, and a *stall* if execution had to wait for it. The three are counted apart.

Invariants, all under one lock: at most `plan.ring_buffers` chunks are in the ring, those in flight included, unless
more are in use at once; the others take no more than the plan's pinned chunks and its room for floating ones; a chunk
in use is never evicted; a failed load leaves nothing behind and is reported to the one who needs the chunk.
"""

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from surfw.config import MIB, format_size
from surfw.errors import ModelClosedError
from surfw.manifest import Chunk, Manifest
from surfw.metrics import Metrics
from surfw.runtime.buffers import Buffer, BufferPool, MappedBuffer, buffer_capacity
from surfw.runtime.loader import Loader, as_parameter
from surfw.runtime.plan import Limit, Needs, ResidencyPlan, floating_victims
from surfw.runtime.planning import Planning
from surfw.runtime.rows import BlockReader, RowReader, TableUnit
from surfw.runtime.run import IoThread, Run
from surfw.runtime.schedule import Phases
from surfw.skeleton.default_dtype import runs

T = TypeVar("T")

logger = logging.getLogger("surfw.runtime")

_LEAST_WINDOW_BYTES = 64 * MIB
_OUTSIDE_BYTES = 4 * MIB
_DEMAND, _LAST_PRIORITY = 0, 1 << 30


@dataclass
class _Entry:
    """A chunk in memory, or on its way there; `buffer` is None while it is being mapped."""

    chunk: Chunk
    size_bytes: int
    in_ring: bool
    buffer: Buffer | MappedBuffer | None
    load: Future[None]
    users: int = 0
    used_before: bool = False
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)


class Engine:
    """Chunks of one model, in and out of memory. Used by one forward pass at a time.

    Attributes:
        manifest: the model.
        metrics: counts hits, prefetched chunks and stalls.
        rows: reads rows of tables for the run that the engine works for.
    """

    def __init__(
        self,
        manifest: Manifest,
        needs: Needs,
        limit: Limit,
        loader: Loader,
        *,
        io: IoThread,
        metrics: Metrics,
        phases: Phases | None = None,
        tables: Mapping[str, TableUnit] | None = None,
        rows_bytes: int = 4 * MIB,
        prefetch: bool = True,
    ) -> None:
        """Make a plan; nothing is loaded yet.

        Args:
            manifest: the model.
            needs: what it needs.
            limit: what may be kept.
            loader: brings chunks into buffers.
            io: the thread it works in.
            metrics: counts hits, prefetched chunks and stalls.
            phases: what is known of the order in which modules run; default: the manifest's, as a cycle.
            tables: modules that can run while their tables are not in memory.
            rows_bytes: memory for the blocks of tables that are being read, and as much for those used last.
            prefetch: whether chunks are ever fetched ahead of their use.

        Raises:
            ConfigurationError: the limit is too small for the model.
        """
        self.manifest = manifest
        self.metrics = metrics
        self._planning = Planning(manifest, needs, limit, phases=phases, tables=tables)
        self._loader = loader
        loader.in_pieces = self.plan.in_pieces
        self._io = io
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # least recently used first
        self._pool = BufferPool()
        self._lock = threading.RLock()
        self._closed = False
        self._run = Run()
        self._ahead = prefetch
        self._asked = _DEMAND
        self._runner: int | None = None  # the thread that has a run
        self._home = {tensor.name: chunk.name for chunk in manifest.chunks for tensor in chunk.tensors}
        self.rows = self._reader(lambda: self._run, scratch_bytes=rows_bytes, keep_bytes=rows_bytes)
        self._outside = self._reader(Run, scratch_bytes=_OUTSIDE_BYTES, keep_bytes=0)
        self._reading = threading.Lock()  # held while a tensor is read outside of a run
        self._is_settled = False  # whether all that stays is there, and nothing else

    @contextmanager
    def running(self, run: Run, *, prefetch: bool = True) -> Iterator[None]:
        """Work for this run, which says when to stop; without `prefetch`, fetch only what it needs."""
        before = self._run, self._ahead, self._runner
        self._run, self._ahead, self._runner = run, prefetch and self._ahead, threading.get_ident()
        with self._lock:
            self._planning.begin()
        try:
            with runs.computing():
                yield
        finally:
            self._run, self._ahead, self._runner = before

    def acquire(self, module: str) -> dict[str, torch.Tensor]:
        """The tensors a module needs, waiting for what is not there yet; they stay until `release`.

        Raises:
            SurfwError: a chunk could not be loaded, or the run was interrupted.
        """
        names = self._planning.uses[module]
        tensors: dict[str, torch.Tensor] = {}
        entries = self._hold(module, names)
        try:
            for entry, ready in entries:
                self._count(entry, ready=ready)
                if not ready:
                    self._wait(entry.load)
                tensors |= self._tensors(entry)
                if not ready:
                    with self._lock:
                        self._prefetch(names)  # what was waited for is no longer in flight
        except BaseException:
            self._let_go(names)
            raise
        return tensors

    def release(self, module: str) -> None:
        """The module has run: its chunks may be evicted, and the next ones may come."""
        names = self._planning.uses[module]
        self._let_go(names)
        with self._lock:
            if not self._closed and not (self.plan.everything_fits and self._is_settled):
                self._keep_floating(names)
                self._trim()
                self._prefetch(names if self.plan.policy == "lru" else ())

    def by_rows(self, module: str) -> bool:
        """Whether a module is to look single rows up: its table is not in memory."""
        unit = self._planning.tables.get(module)
        if unit is None:
            return False
        with self._lock:
            if self.plan.tables.isdisjoint(unit.chunks):
                return False
            entries = [self._entries.get(name) for name in unit.chunks]
            return not all(entry and entry.load.done() and not _failed(entry.load) for entry in entries)

    def passes(self, module: str) -> None:
        """Note that a module runs that looks rows up, and fetch what comes after it.

        Raises:
            SurfwError: the run was interrupted.
        """
        self._run.pause()
        with self._lock:
            self._observe(module)
            self._prefetch(())

    def pin(self, module: str) -> dict[str, torch.Tensor]:
        """The tensors of a module whose weights are used outside of its own forward; they stay from now on."""
        tensors = self.acquire(module)
        self.keep(module)
        return tensors

    def read(self, name: str) -> torch.Tensor:
        """A copy of one tensor, which is the caller's own: what is kept, and what comes next, stays as it was.

        Args:
            name: as in the manifest.

        Raises:
            SurfwError: it could not be loaded.
        """
        chunk = self._home[name]
        with self._lock:
            entry = self._entries.get(chunk)
            if entry is not None and entry.load.done() and not _failed(entry.load):
                return self._tensors(entry)[name].detach().clone()
        with self._reading:
            return self._outside.tensor(name)

    def runs_here(self) -> bool:
        """Whether it works for a run of this thread."""
        return self._runner == threading.get_ident()

    def keep(self, module: str) -> None:
        """Never evict the chunks that a module uses now.

        Raises:
            ConfigurationError: there is no room to keep them.
        """
        with self._lock:
            forced = self._replan(lambda: self._planning.force(module))
            for name in sorted(forced):
                self._entries[name].in_ring = False
                logger.warning(
                    "%s uses weights of %s outside of its forward; they stay in memory (%s)",
                    self.manifest.name, module, format_size(self._entries[name].size_bytes),
                )  # fmt: skip
            self._trim()

    def reserve(self, size_bytes: int, *, or_less: bool = False) -> None:
        """Leave so much of the budget free from now on, in place of what was left free before.

        Args:
            size_bytes: how much.
            or_less: leave less where the model needs it to run.

        Raises:
            ConfigurationError: the model does not run with the rest; all stays as it was.
        """
        with self._lock:
            self._replan(lambda: self._planning.reserve(size_bytes, or_less=or_less))

    def plan_with(self, limit: Limit) -> ResidencyPlan:
        """The plan that there would be with another limit; nothing changes.

        Raises:
            ConfigurationError: the limit is too small for the model.
        """
        with self._lock:
            return self._planning.plan_with(limit)

    @property
    def plan(self) -> ResidencyPlan:
        """What is kept, and what passes through."""
        return self._planning.plan

    @property
    def least_budget_bytes(self) -> int:
        """The smallest budget that the model runs with, and that leaves what is reserved now."""
        with self._lock:
            return self._planning.least_budget_bytes

    def release_all(self) -> None:
        """Nothing runs: whatever was acquired may be evicted."""
        with self._lock:
            for entry in self._entries.values():
                entry.users = 0

    def warm(self) -> None:
        """Start to fetch what the first modules will need."""
        with self._lock:
            self._prefetch(())

    def fetch(self, names: Sequence[str]) -> list[tuple[str, Future[None]]]:
        """Start to fetch chunks, as many as there is room for once idle ones are evicted; the first ones go first.

        Returns:
            The chunks that are on their way, or there, in the order of the names.
        """
        wanted: set[str] = set()
        loads: list[tuple[str, Future[None]]] = []
        with self._lock:
            self._drop_failed(names)
            for name in names:
                entry = self._entries.get(name)
                if entry is None:
                    if self._closed or not (self._has_place(name) or self._ring_has_room(wanted)):
                        continue
                    entry = self._start(name, self._next_priority())
                    entry.used_before = True  # it was asked for on its own, not for the use that finds it there
                wanted.add(name)
                self._entries.move_to_end(name)
                loads.append((name, entry.load))
        return loads

    def resize(self, cache_layers: int) -> None:
        """Keep another number of chunks from now on: evict at once what is too much and idle, the rest after its use.

        Raises:
            ConfigurationError: fewer than one chunk is to be kept.
        """
        with self._lock:
            limit = Limit(cache_layers=cache_layers, policy=self.limit.policy)
            self._replan(lambda: self._planning.set_limit(limit))
            self._pool.clear()

    def clear(self) -> None:
        """Forget every chunk that is not in use, and give its memory back."""
        with self._lock:
            for name, entry in list(self._entries.items()):
                if entry.users == 0:
                    self._drop(name)
            self._pool.clear()

    def resident(self) -> list[str]:
        """Names of the chunks in memory, least recently used first."""
        with self._lock:
            return [name for name, entry in self._entries.items() if entry.load.done() and not _failed(entry.load)]

    @property
    def resident_bytes(self) -> int:
        """Memory of all buffers that hold a chunk or receive one."""
        with self._lock:
            return sum(entry.size_bytes for entry in self._entries.values())

    @property
    def claimed_bytes(self) -> int:
        """The most memory that the plan, and what is reserved beside it, may come to take."""
        with self._lock:
            return self.plan.peak_bytes + self.plan.reserved_bytes

    @property
    def anonymous_bytes(self) -> int:
        """Memory of filled buffers that are not mapped files: what the system counts as in use."""
        with self._lock:
            filled = (entry for entry in self._entries.values() if entry.load.done())
            return sum(entry.size_bytes for entry in filled if isinstance(entry.buffer, Buffer))

    @property
    def limit(self) -> Limit:
        """How much may be kept."""
        return self._planning.limit

    def close(self) -> None:
        """Cancel what is in flight and let go of all memory."""
        with self._lock:
            self._closed = True
            loads = [entry.load for entry in self._entries.values()]
            self._entries.clear()
            self._pool.clear()
        for load in loads:
            load.cancel()

    def _reader(self, run: Callable[[], Run], *, scratch_bytes: int, keep_bytes: int) -> RowReader:
        blocks = BlockReader(self._loader.source, self.manifest, self._io, self.metrics, run)
        return RowReader(blocks, self._loader.dtypes, scratch_bytes=scratch_bytes, keep_bytes=keep_bytes)

    def _hold(self, module: str, names: Sequence[str]) -> list[tuple[_Entry, bool]]:
        """Mark the chunks of a module as used, starting their loads if need be; say of each whether it is ready."""
        self._run.pause()  # without the lock, which others need meanwhile
        with self._lock:
            self._observe(module)
            self._replan(lambda: self._planning.read_whole(names))
        while True:
            with self._lock:
                self._run.check()
                self._drop_failed(names)
                obstacle = self._make_room(names)
                if obstacle is None:
                    entries = [self._entries.get(name) or self._start(name, _DEMAND, names) for name in names]
                    for name, entry in zip(names, entries, strict=True):
                        entry.users += 1
                        self._entries.move_to_end(name)
                    ready = [entry.load.done() for entry in entries]
                    self._prefetch(names)
                    return list(zip(entries, ready, strict=True))
            self._wait(obstacle)

    def _let_go(self, names: Sequence[str]) -> None:
        with self._lock:
            for name in names:
                if name in self._entries:
                    self._entries[name].users -= 1

    def _count(self, entry: _Entry, *, ready: bool) -> None:
        if not ready:
            self.metrics.add("stalls")
        elif entry.used_before:
            self.metrics.add("hits")
        else:
            self.metrics.add("prefetched")
        entry.used_before = True

    def _wait(self, load: Future[None]) -> None:
        with self.metrics.span("stall"):
            self._run.wait_for(load)

    def _tensors(self, entry: _Entry) -> dict[str, torch.Tensor]:
        if entry.load.cancelled():
            raise ModelClosedError(f"the source of {self.manifest.name} was closed while it was read")
        entry.load.result()
        if isinstance(entry.buffer, MappedBuffer):
            entry.buffer.expect_unchanged()
        if not entry.tensors:
            assert entry.buffer is not None, f"{entry.chunk.name} is loaded and has no memory"
            views = self._loader.tensors(entry.chunk, entry.buffer)
            entry.tensors = {name: as_parameter(view) for name, view in views.items()}
        return entry.tensors

    def _start(self, name: str, priority: int, needed: Collection[str] = ()) -> _Entry:
        """Begin to load a chunk; into memory of its own if it has a place there, else through the ring."""
        chunk = self.manifest.by_name[name]
        size = self._planning.size_bytes(name)
        in_ring = not self._has_place(name, needed)
        buffer: Buffer | None = None
        if in_ring:
            buffer = self._pool.take(max(size, self.plan.ring_bytes))
        elif not self.plan.everything_fits:
            buffer = Buffer(size)
        entry = _Entry(chunk, buffer.capacity_bytes if buffer else size, in_ring, buffer, Future())
        entry.load = self._io.submit(self._load(entry, priority))
        self._entries[name] = entry
        return entry

    async def _load(self, entry: _Entry, priority: int) -> None:
        start = time.perf_counter()
        stored_bytes = None
        if entry.buffer is None:
            entry.buffer = mapped = await self._loader.map(entry.chunk)
            stored_bytes = entry.chunk.payload_bytes if mapped else None
        if stored_bytes is None:
            entry.buffer = buffer = entry.buffer if isinstance(entry.buffer, Buffer) else Buffer(entry.size_bytes)
            stored_bytes = await self._loader.load(entry.chunk, buffer, priority=priority)
        self.metrics.add("fetched_bytes", stored_bytes)
        self.metrics.latency("fetch").observe(time.perf_counter() - start)

    def _observe(self, module: str) -> None:
        """Note what runs, which may change the plan."""
        self._replan(lambda: self._planning.observe(module))

    def _replan(self, change: Callable[[], T]) -> T:
        """Change the plan, and evict what the new one has no room for."""
        before = self.plan
        done = change()
        if self.plan is not before:
            self._loader.in_pieces = self.plan.in_pieces
            if before.ring_bytes != self.plan.ring_bytes:
                self._pool.clear()
            self._is_settled = False
            self._trim()
        return done

    def _prefetch(self, in_use: Sequence[str]) -> None:
        """Start to fetch what runs next, as far as there is room, and no more at a time than a window of bytes."""
        if not self._ahead or len(self._entries) >= len(self.plan.sizes):
            return
        window = max(_LEAST_WINDOW_BYTES, 2 * max(self.plan.sizes.values(), default=0))
        flying = sum(entry.size_bytes for entry in self._entries.values() if not entry.load.done())
        sooner = set(in_use)
        for name in self._planning.upcoming():
            if name not in self._entries:
                has_room = not flying or flying + self._planning.size_bytes(name) <= window
                if not has_room or not (self._has_place(name) or self._ring_has_room(sooner)):
                    return
                flying += self._start(name, self._next_priority()).size_bytes
            sooner.add(name)

    def _next_priority(self) -> int:
        """What is asked for ahead comes after what is needed now, and in the order of asking."""
        self._asked = self._asked % _LAST_PRIORITY + 1
        return self._asked

    def _has_place(self, name: str, needed: Collection[str] = ()) -> bool:
        """Whether a chunk has memory of its own; what is neither pinned any more nor needed makes way for it."""
        if self._planning.stays(name):
            return True
        if name not in self.plan.pinned:
            return False
        size, excess = self._planning.size_bytes(name), self._excess_bytes()
        return size + excess <= 0 or self._evict_unpinned(size + excess, needed)

    def _excess_bytes(self) -> int:
        """By how much the memory outside of the ring is more than the plan allows; negative where there is room."""
        held = sum(entry.size_bytes for entry in self._entries.values() if not entry.in_ring)
        return held - self.plan.pinned_bytes - self.plan.room_bytes

    def _evict_unpinned(self, size_bytes: int, needed: Collection[str] = ()) -> bool:
        """Evict what lies outside of the ring, is not pinned and idle, until so much is free; False if it is not."""
        for name, entry in list(self._entries.items()):
            is_idle = entry.users == 0 and entry.load.done() and name not in needed
            if size_bytes > 0 and is_idle and not entry.in_ring and name not in self.plan.pinned:
                size_bytes -= entry.size_bytes
                self._drop(name)
        return size_bytes <= 0

    def _in_ring(self) -> list[str]:
        return [name for name, entry in self._entries.items() if entry.in_ring]

    def _evictable(self, needed: Collection[str]) -> list[str]:
        """Chunks in the ring that nobody uses and that are not needed, least recently used first."""
        return [name for name in self._in_ring() if self._entries[name].users == 0 and name not in needed]

    def _ring_has_room(self, sooner: Collection[str]) -> bool:
        """Whether the ring has a buffer for a chunk to fetch ahead, evicting one that is not needed sooner."""
        if len(self._in_ring()) < self.plan.ring_buffers:
            return True
        for victim in self._evictable(sooner):
            if self._entries[victim].load.done():
                self._drop(victim)
                return True
        return False

    def _make_room(self, names: Sequence[str]) -> Future[None] | None:
        """Room for chunks that are needed now, if need be at the cost of one that was fetched ahead.

        Returns:
            What has to end before there is room: the load of a chunk that was guessed wrong, now cancelled.
        """
        missing = sum(name not in self._entries and not self._has_place(name, names) for name in names)
        while missing and len(self._in_ring()) + missing > self.plan.ring_buffers:
            victims = self._evictable(names)
            if not victims:
                return None
            victim = min(victims, key=lambda one: not self._entries[one].used_before)  # of equals, the first
            load = self._entries[victim].load
            if not load.done():
                load.cancel()
                return load
            self._drop(victim)
        return None

    def _keep_floating(self, names: Sequence[str]) -> None:
        """Take chunks that have just been used out of the ring, if they are better kept than others are."""
        for name in names:
            entry = self._entries.get(name)
            if entry is None or name not in self.plan.floating or not entry.in_ring or entry.users:
                continue
            held = {
                one: other.size_bytes
                for one, other in self._entries.items()
                if not other.in_ring and one in self.plan.floating and not other.users
            }
            free = self.plan.room_bytes - sum(held.values())
            victims = floating_victims(name, held, entry.size_bytes, free, self._planning.next_uses())
            if victims is not None:
                for victim in victims:
                    self._entries[victim].in_ring = True  # its buffer takes the place of the one that is kept
                    self._drop(victim)
                entry.in_ring = False

    def _trim(self) -> None:
        """Evict what the plan has no room for, as far as nobody uses it, and nothing of it is in flight."""
        self._is_settled = self._evict_unpinned(self._excess_bytes()) and len(self._entries) >= len(self.plan.sizes)
        idle = [name for name in self._evictable(()) if self._entries[name].load.done()]
        for name in [one for one in idle if self._entries[one].size_bytes > self.plan.ring_bytes]:
            self._drop(name)  # of a ring that was larger
            idle.remove(name)
        surplus = len(self._in_ring()) - self.plan.ring_buffers
        for name in idle[: max(0, surplus)]:
            self._drop(name)
        if surplus > 0:
            self._pool.clear()

    def _drop_failed(self, names: Sequence[str]) -> None:
        for name in names:
            entry = self._entries.get(name)
            if entry is not None and entry.users == 0 and entry.load.done() and _failed(entry.load):
                self._drop(name)

    def _drop(self, name: str) -> None:
        """Forget a chunk. A buffer that is still written to is not used again."""
        entry = self._entries.pop(name)
        self._is_settled = False
        for tensor in entry.tensors.values():
            torch.autograd.graph.increment_version(tensor)  # so that a backward pass fails, and is not wrong
        entry.tensors.clear()
        if not entry.load.done():
            entry.load.cancel()
        elif entry.in_ring and isinstance(entry.buffer, Buffer) and self._fits_ring(entry.buffer):
            self._pool.give_back(entry.buffer)

    def _fits_ring(self, buffer: Buffer) -> bool:
        """Whether it is one of this plan's ring, not of an earlier one."""
        return self.plan.ring_buffers > 0 and buffer.capacity_bytes == buffer_capacity(self.plan.ring_bytes)


def _failed(load: Future[None]) -> bool:
    return load.cancelled() or load.exception() is not None
