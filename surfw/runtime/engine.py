"""Obeys a residency plan: which chunk is in which buffer, what is in flight, what may be evicted.

Counting: a chunk that is resident when execution reaches it is a *hit*. A chunk fetched for this very use is
*prefetched* if it was ready in time, and a *stall* if execution had to wait for it. The three are counted apart.

Invariants, all under one lock: at most `plan.buffers` streamed chunks are in memory, those in flight included, unless
more are in use at once; a chunk in use is never evicted; a failed load leaves nothing behind and is reported to the one
who needs the chunk.
"""

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from surfw.config import format_size
from surfw.errors import ModelClosedError
from surfw.manifest import Chunk, Manifest
from surfw.metrics import Metrics
from surfw.runtime.buffers import Buffer, BufferPool
from surfw.runtime.io_thread import IoThread
from surfw.runtime.loader import Loader
from surfw.runtime.residency import ResidencyPlan
from surfw.runtime.run import Run
from surfw.runtime.schedule import Schedule

logger = logging.getLogger("surfw.runtime")

_LOOKAHEAD = 16
_DEMAND, _AHEAD = 0, 1


@dataclass
class _Entry:
    """A chunk in memory, or on its way there."""

    chunk: Chunk
    buffer: Buffer
    load: Future[None]
    pinned: bool
    users: int = 0
    used_before: bool = False
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)


class Engine:
    """Chunks of one model, in and out of memory. Used by one forward pass at a time."""

    def __init__(
        self,
        manifest: Manifest,
        plan: ResidencyPlan,
        loader: Loader,
        io: IoThread,
        metrics: Metrics,
        *,
        prefetch: bool = True,
    ) -> None:
        """Nothing is loaded yet; `prefetch` says whether chunks are ever fetched ahead of their use."""
        self.manifest = manifest
        self.plan = plan
        self.metrics = metrics
        self._loader = loader
        self._io = io
        self._uses = {use.module: use.chunks for use in manifest.order}
        self._schedule = Schedule(list(self._uses))
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # least recently used first
        self._pool = BufferPool()
        self._lock = threading.RLock()
        self._closed = False
        self._run = Run()
        self._ahead = prefetch

    @contextmanager
    def running(self, run: Run, *, prefetch: bool = True) -> Iterator[None]:
        """Work for this run, which says when to stop; without `prefetch`, fetch only what it needs."""
        before = self._run, self._ahead
        self._run, self._ahead = run, prefetch and self._ahead
        try:
            yield
        finally:
            self._run, self._ahead = before

    def acquire(self, module: str) -> dict[str, torch.Tensor]:
        """The tensors a module needs, waiting for what is not there yet; they stay until `release`.

        Raises:
            SurfwError: a chunk could not be loaded, or the run was interrupted.
        """
        names = self._uses[module]
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
        names = self._uses[module]
        self._let_go(names)
        with self._lock:
            if not self._closed:
                self._trim()
                self._prefetch(names)

    def pin(self, module: str) -> dict[str, torch.Tensor]:
        """The tensors of a module whose weights are used outside of its own forward; they stay from now on."""
        tensors = self.acquire(module)
        self.keep(module)
        return tensors

    def keep(self, module: str) -> None:
        """Never evict the chunks that a module uses now."""
        with self._lock:
            for name in self._uses[module]:
                entry = self._entries[name]
                if not entry.pinned:
                    entry.pinned = True
                    logger.warning(
                        "%s uses weights of %s outside of its forward; they stay in memory (%s)",
                        self.manifest.name, module, format_size(entry.buffer.capacity_bytes),
                    )  # fmt: skip

    def release_all(self) -> None:
        """Nothing runs: whatever was acquired may be evicted."""
        with self._lock:
            for entry in self._entries.values():
                entry.users = 0

    def warm(self) -> None:
        """Start to fetch what the first modules will need."""
        with self._lock:
            self._prefetch(())

    def fetch(self, names: Sequence[str]) -> list[Future[None]]:
        """Start to fetch chunks, as many as there is room for once idle ones are evicted; the first ones go first.

        Returns:
            What is on its way, or there, in the order of the names.
        """
        wanted: set[str] = set()
        loads: list[Future[None]] = []
        with self._lock:
            self._drop_failed(names)
            for name in names:
                entry = self._entries.get(name)
                if entry is None:
                    if self._closed or (name not in self.plan.pinned and not self._room(wanted)):
                        break
                    entry = self._start(name, _AHEAD)
                    entry.used_before = True  # it was asked for on its own, not for the use that finds it there
                wanted.add(name)
                self._entries.move_to_end(name)
                loads.append(entry.load)
        return loads

    def resize(self, cache_layers: int) -> None:
        """Keep another number of chunks from now on: evict at once what is too much and idle, the rest after its use.

        Raises:
            ConfigurationError: fewer than one chunk is to be kept.
        """
        with self._lock:
            self.plan = self.plan.resized(cache_layers)
            self._trim()
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
            return sum(entry.buffer.capacity_bytes for entry in self._entries.values())

    def close(self) -> None:
        """Cancel what is in flight and let go of all memory."""
        with self._lock:
            self._closed = True
            loads = [entry.load for entry in self._entries.values()]
            self._entries.clear()
            self._pool.clear()
        for load in loads:
            load.cancel()

    def _hold(self, module: str, names: Sequence[str]) -> list[tuple[_Entry, bool]]:
        """Mark the chunks of a module as used, starting their loads if need be; say of each whether it is ready."""
        while True:
            with self._lock:
                self._run.check()
                self._drop_failed(names)
                obstacle = self._make_room(names)
                if obstacle is None:
                    self._schedule.observe(module)
                    entries = [self._entries.get(name) or self._start(name, _DEMAND) for name in names]
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
        if not entry.tensors:
            views = self._loader.tensors(entry.chunk, entry.buffer)
            entry.tensors = {name: torch.nn.Parameter(view, requires_grad=False) for name, view in views.items()}
        return entry.tensors

    def _start(self, name: str, priority: int) -> _Entry:
        chunk = self.manifest.by_name[name]
        size = self._loader.buffer_bytes(chunk)
        pinned = name in self.plan.pinned
        buffer = Buffer(size) if pinned else self._pool.take(size)
        load = self._io.submit(self._load(chunk, buffer, priority))
        entry = _Entry(chunk, buffer, load, pinned)
        self._entries[name] = entry
        return entry

    async def _load(self, chunk: Chunk, buffer: Buffer, priority: int) -> None:
        start = time.perf_counter()
        stored_bytes = await self._loader.load(chunk, buffer, priority=priority)
        self.metrics.add("fetched_bytes", stored_bytes)
        self.metrics.latency("fetch").observe(time.perf_counter() - start)

    def _prefetch(self, in_use: Sequence[str]) -> None:
        """Start to fetch what runs next: small parts freely, and one streamed chunk at a time."""
        if not self._ahead:
            return
        sooner = set(in_use)
        for name in self._coming():
            if name in self._entries:
                sooner.add(name)
            elif name in self.plan.pinned:
                self._start(name, _AHEAD)
            else:
                if not self._in_flight() and self._room(sooner):
                    self._start(name, _AHEAD)
                return

    def _coming(self) -> Iterator[str]:
        seen: set[str] = set()
        for module in self._schedule.upcoming(_LOOKAHEAD):
            for name in self._uses[module]:
                if name not in seen:
                    seen.add(name)
                    yield name

    def _in_flight(self) -> bool:
        return any(not entry.load.done() and not entry.pinned for entry in self._entries.values())

    def _streamed(self) -> list[str]:
        return [name for name, entry in self._entries.items() if not entry.pinned]

    def _evictable(self, needed: Collection[str]) -> list[str]:
        """Streamed chunks that nobody uses and that are not needed, least recently used first."""
        return [name for name in self._streamed() if self._entries[name].users == 0 and name not in needed]

    def _room(self, sooner: Collection[str]) -> bool:
        """Whether there is a buffer for a chunk to fetch ahead, evicting one that is not needed sooner."""
        if len(self._streamed()) < self.plan.buffers:
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
        missing = sum(name not in self._entries and name not in self.plan.pinned for name in names)
        while missing and len(self._streamed()) + missing > self.plan.buffers:
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

    def _trim(self) -> None:
        """Evict what the plan has no buffer for, as far as nobody uses it, and nothing of it is in flight."""
        surplus = len(self._streamed()) - self.plan.buffers
        idle = [name for name in self._evictable(()) if self._entries[name].load.done()]
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
        entry.tensors.clear()
        if not entry.load.done():
            entry.load.cancel()
        elif not entry.pinned:
            self._pool.give_back(entry.buffer)


def _failed(load: Future[None]) -> bool:
    return load.cancelled() or load.exception() is not None
