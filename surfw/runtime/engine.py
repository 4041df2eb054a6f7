"""Loads and evicts the chunks of a model, as its slot table decides.

The engine drives a `SlotTable`: it takes the lock, asks the table for a decision, and carries it out. It owns the
buffers and the loads in flight. It learns the order of the modules by observing what runs (`Schedule`). It makes a new
plan when the schedule changes, when memory has to be reserved for something else, and when weights turn out to be used
outside of their module's forward. If no plan fits, nothing changes.

Counting: a chunk that is resident when execution reaches it is a *hit*. A chunk fetched for this use is *prefetched* if
it was ready in time, and a *stall* if execution had to wait for it. The three are counted separately.

Invariants, under one lock: a chunk has a slot if and only if it has contents in the tier; memory that a load still
writes to is not used for another chunk; a failed load is reported to the caller that needs the chunk.
"""

import logging
import threading
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch

from surfw import tracing
from surfw.config import MIB, format_size
from surfw.errors import ConfigurationError, ModelClosedError
from surfw.manifest import Manifest, Use
from surfw.metrics import Metrics
from surfw.runtime.experts import ExpertPool
from surfw.runtime.host import HostTier, Tier
from surfw.runtime.loader import Loader
from surfw.runtime.memory import bound_kernels
from surfw.runtime.packed import values_of
from surfw.runtime.plan import Limit, Needs, ResidencyPlan, least_bytes, plan_residency
from surfw.runtime.rows import RowReader, TableUnit
from surfw.runtime.run import IoThread, Run, current_run
from surfw.runtime.schedule import Phases, Schedule
from surfw.runtime.slots import Decision, Slot, SlotState, SlotTable
from surfw.skeleton.default_dtype import runs

logger = logging.getLogger("surfw.runtime")

_OUTSIDE_BYTES = 4 * MIB
_DEMAND, _LAST_PRIORITY = 0, 1 << 30


class Engine:
    """Loads and evicts the chunks of one model.

    One forward pass at a time may use it; the other methods may be called from any thread.

    Attributes:
        manifest, metrics: as given.
        limit: the current limit on memory.
        table: which chunk is in which slot.
        host: the memory of the slots.
        rows: reads rows of tables for the current run.
        experts: loads the experts that a router chooses.
        watches_layers: whether every module reports each forward even while all are resident. If False, only passes of
            the whole model are reported then.
        reached: the chunks of the module that execution reached last.
    """

    watches_layers: ClassVar[bool] = True

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
        order: Sequence[Use] | None = None,
    ) -> None:
        """Make a plan; nothing is loaded yet.

        Args:
            manifest: the model.
            needs: its memory needs; the schedule is filled in here.
            limit: how much memory may be used.
            loader: loads chunks into buffers.
            io: the thread that the loader works in.
            metrics: counts hits, stalls and bytes.
            phases: the order in which modules run, as far as it is known; default: the manifest's, as a cycle.
            tables: modules that can run while their tables are not in memory.
            rows_bytes: memory for blocks of tables that are being read, and as much again for the most recent ones.
            prefetch: whether chunks are ever prefetched.
            order: the modules, and the chunks of each; default: the manifest's.

        Raises:
            ConfigurationError: the limit is too small for the model.
        """
        bound_kernels()
        self.manifest = manifest
        self.metrics = metrics
        self.limit = limit
        self._ahead = prefetch
        self._io = io
        self._source = loader.source
        self._units = tables or {}
        self._schedule = Schedule(manifest.order if order is None else order, phases, row_wise=self._units)
        self._planned_version = self._schedule.version
        self._needs = self._schedule.apply_to(needs)
        plan = self._plan(self._needs, limit)
        self.table = SlotTable(needs.sizes, plan)
        self.host: Tier = self._open_tier(loader, io, plan)
        self._lock = threading.RLock()
        self._closed = False
        self._run = Run()
        self._runner: int | None = None  # the thread of the current run
        self._asked = _DEMAND
        self._beside_bytes = 0
        self.reached: tuple[str, ...] = ()
        reader = partial(
            RowReader, loader.source, manifest, io, metrics,
            dtypes=loader.dtypes, prove=loader.prove, read_frame=loader.read_frame,
        )  # fmt: skip
        self.experts = self._open_experts(loader, io, plan)
        self.rows = reader(run=lambda: self._run, scratch_bytes=rows_bytes, keep_bytes=rows_bytes)
        self._outside = reader(scratch_bytes=_OUTSIDE_BYTES, keep_bytes=0)
        self._reading = threading.Lock()  # held while a tensor is read outside of a run
        self._announce()

    def _open_tier(self, loader: Loader, io: IoThread, plan: ResidencyPlan) -> Tier:
        return HostTier(self.manifest, loader, io, self.metrics, plan)

    def _open_experts(self, loader: Loader, io: IoThread, plan: ResidencyPlan) -> ExpertPool:
        return ExpertPool(
            self.manifest, loader, io=io, metrics=self.metrics, plan=plan, run=lambda: self._run, is_ahead=self._ahead
        )

    def _plan(self, needs: Needs, limit: Limit) -> ResidencyPlan:
        return plan_residency(needs, limit)

    # Called by a run.

    @contextmanager
    def running(self, run: Run, *, prefetch: bool = True) -> Iterator[None]:
        """Work for this run, which may be interrupted; without `prefetch`, fetch chunks only when they are needed."""
        before = self._run, self._ahead, self._runner
        self._run, self._ahead, self._runner = run, prefetch and self._ahead, threading.get_ident()
        with self._lock:
            self._schedule.begin()
        try:
            with runs.computing():
                yield
        finally:
            self._run, self._ahead, self._runner = before

    def check(self) -> None:
        """Check whether the current run was interrupted.

        Raises:
            SurfwError: it was.
        """
        self._run.check()

    def acquire(self, module: str) -> dict[str, torch.Tensor]:
        """The tensors that a module needs, once all are loaded; they are not evicted before `release`.

        Raises:
            SurfwError: a chunk could not be loaded, or the run was interrupted.
        """
        names = self.reached = self._schedule.uses[module]
        tensors: dict[str, torch.Tensor] = {}
        held = self._hold(module, names)
        try:
            for slot, contents, was_ready in held:
                self.metrics.add(slot.count_use(was_ready=was_ready))
                if not was_ready:
                    self._wait(contents.load)
                tensors |= self.host.tensors(contents)
                if not was_ready:
                    with self._lock:
                        self._prefetch(names)  # this load no longer counts as in flight
        except BaseException:
            with self._lock:
                self.table.let_go(names)
            raise
        return tensors

    def release(self, module: str) -> None:
        """Note that a module has run: its chunks may be evicted, and the next ones prefetched."""
        names = self._schedule.uses[module]
        with self._lock:
            if self._closed:
                return
            self._sync()
            floats = not self.plan.floating.isdisjoint(names)
            next_use = self._schedule.next_uses(self._needs) if floats else {}
            self._obey(self.table.release(names, next_use))
            self._prefetch(names if self.plan.policy == "lru" else ())

    def observe(self, module: str) -> None:
        """Note that a module looks up rows instead of loading its chunks, and prefetch what runs next.

        Raises:
            SurfwError: the run was interrupted.
        """
        self._run.pause()
        with self._lock:
            self._learn(module)
            self._prefetch(())

    def foresee(self, modules: Sequence[str]) -> None:
        """Plan for these modules as a cycle in this order, as in training; later observations correct the schedule.

        Raises:
            ConfigurationError: the limit is too small for that.
        """
        with self._lock:
            for module in [*modules, *modules]:
                self._schedule.observe(module)
            self._schedule.begin()
            self._replan(self._needs, self.limit)

    def by_rows(self, module: str) -> bool:
        """Whether a module is to look up single rows because its table is not in memory."""
        unit = self._units.get(module)
        if unit is None:
            return False
        with self._lock:
            if self.plan.tables.isdisjoint(unit.chunks):
                return False
            self._sync()
            return not self.table.is_ready(unit.chunks)

    def pin(self, module: str) -> dict[str, torch.Tensor]:
        """The tensors of a module whose weights are used outside of its own forward; they are pinned from now on."""
        tensors = self.acquire(module)
        self.keep(module)
        return tensors

    def keep(self, module: str) -> None:
        """Pin the chunks that a module uses.

        Raises:
            ConfigurationError: there is not enough memory to pin them.
        """
        with self._lock:
            forced = frozenset(self._schedule.uses[module]) - self._needs.fixed
            if not forced:
                return
            needs = replace(self._needs, fixed=self._needs.fixed | forced, tables=self._needs.tables - forced)
            try:
                self._replan(needs, self.limit)
            except ConfigurationError as exc:
                raise ConfigurationError(
                    f"weights of {module} are used outside of its forward, so they have to stay in memory: {exc}"
                ) from exc
            for name in sorted(forced):
                logger.warning(
                    "%s uses weights of %s outside of its forward; they stay in memory (%s)",
                    self.manifest.name, module, format_size(self.table[name].size_bytes),
                )  # fmt: skip

    def stay(self, module: str) -> bool:
        """Whether a module that has just run may keep its tensors in place until the run ends.

        It may in a run of this thread that streams nothing; from then on, its uses are reported with `passes`. If not,
        the caller has to release it.
        """
        return self.plan.everything_fits and self._stay(module)

    def passes(self, modules: Sequence[str]) -> None:
        """Note that modules run, in this order, whose tensors are still in place (see `stay`).

        Raises:
            SurfwError: the run was interrupted, or a mapped file has changed.
        """
        self._run.pause()
        with self._lock:
            for module in modules:
                self._learn(module)
        names = [name for module in modules for name in self._schedule.uses[module]]
        self.host.expect_unchanged(names)
        self.reached = self._schedule.uses[modules[-1]] if modules else ()
        self.metrics.add("hits", len(names))

    def runs_here(self) -> bool:
        """Whether the current run is one of this thread."""
        return self._runner == threading.get_ident()

    def release_all(self) -> None:
        """Release every chunk that was acquired; nothing runs any more."""
        with self._lock:
            self.table.release_all()

    # Called by others, during or between runs.

    def read(self, name: str) -> torch.Tensor:
        """A copy of one tensor for the caller; which chunks are resident, and the schedule, stay as they were.

        Args:
            name: as in the manifest.

        Raises:
            SurfwError: it could not be loaded.
        """
        with self._lock:
            self._sync()
            chunk = self.manifest.home[name].name
            if self.table.is_ready([chunk]):
                return values_of(self.host.tensors(self.host[chunk])[name])
        with self._reading:
            if self.manifest.home[name].form("none") is None:  # such a chunk cannot be read in parts
                return values_of(self.host.read(chunk)[name])
            return self._outside.tensor(name)

    def warm(self) -> None:
        """Start to fetch the chunks of the first modules."""
        with self._lock:
            self._prefetch(())

    def fetch(self, names: Sequence[str]) -> list[tuple[str, Future[None]]]:
        """Start to fetch chunks in this order, as many as fit once idle ones are evicted.

        Returns:
            The chunks that are resident or in flight, in the order of the names, with their loads.
        """
        with self._lock:
            if not self._closed:
                self._sync()
                self._obey(self.table.fetch(names))
            return [(name, self.host[name].load) for name in names if name in self.table]

    def keep_only(self, names: Collection[str]) -> None:
        """Evict all idle chunks except these, and free their memory."""
        with self._lock:
            self._obey(self.table.clear(names))
            self.host.spare.clear()

    def clear(self) -> None:
        """Evict all idle chunks, and free their memory."""
        with self._lock:
            self._obey(self.table.clear())
            self.host.spare.clear()
            self.experts.clear()

    def close(self) -> None:
        """Cancel the loads in flight and free all memory."""
        with self._lock:
            self._closed = True
            self.table.forget(list(self.table))
            self.experts.close()
            self.host.close()

    # The plan.

    @property
    def read_ahead(self) -> int:
        """How many prefetched chunks are ready and not used yet."""
        with self._lock:
            return sum(slot.state is SlotState.READY and not slot.is_known for slot in self.table)

    @property
    def plan(self) -> ResidencyPlan:
        """Which chunks are pinned, and which are streamed."""
        return self.table.plan

    @property
    def needs(self) -> Needs:
        """The model's needs, with the current schedule."""
        with self._lock:
            return self._schedule.apply_to(self._needs)

    def plan_with(self, limit: Limit) -> ResidencyPlan:
        """The plan under another limit, without adopting it.

        Raises:
            ConfigurationError: the limit is too small for the model.
        """
        with self._lock:
            return self._plan(self._schedule.apply_to(self._needs), limit)

    @property
    def least_budget_bytes(self) -> int:
        """The smallest budget that the model runs with from any source, including what is reserved now."""
        with self._lock:
            needs = self._schedule.apply_to(self._needs)
            return least_bytes(needs.from_anywhere()) + self.limit.reserved_bytes

    @property
    def claimed_bytes(self) -> int:
        """The most memory that the plan and the reserve may take."""
        plan = self.plan
        return plan.peak_bytes + plan.reserved_bytes

    def reserve(self, size_bytes: int, *, or_less: bool = False) -> None:
        """Reserve this much of the budget, in place of the previous reserve.

        On return the memory is free, except for chunks in use. Loads of chunks that no longer fit are cancelled.

        Args:
            size_bytes: the new reserve.
            or_less: reserve less if the model needs the memory to run.

        Raises:
            ConfigurationError: the rest is too small for the model; nothing has changed.
        """
        with self._lock:
            if or_less and self.limit.budget_bytes is not None:
                least = least_bytes(self._schedule.apply_to(self._needs).in_pieces())
                size_bytes = max(0, min(size_bytes, self.limit.budget_bytes - least))
            is_less = size_bytes < self.limit.reserved_bytes
            if size_bytes != self.limit.reserved_bytes:
                self._replan(self._needs, replace(self.limit, reserved_bytes=size_bytes))
        if not is_less:  # even for the same size: an interrupt may have ended an earlier wait
            self._make_way()

    def hold_beside(self, size_bytes: int) -> None:
        """Count this much memory besides the weights in the tier where the model computes, in place of the last value.

        Raises:
            ConfigurationError: the rest is too small for the model; nothing has changed.
        """
        with self._lock:
            working_bytes = self._needs.working_bytes - self._beside_bytes + size_bytes
            if working_bytes != self._needs.working_bytes:
                self._replan(replace(self._needs, working_bytes=working_bytes), self.limit)
            self._beside_bytes = size_bytes

    def resize(self, cache_layers: int) -> None:
        """Change the number of chunks to keep. Surplus chunks are evicted at once if idle, else after their use.

        Raises:
            ConfigurationError: the number is less than 1.
        """
        self.relimit(replace(self.limit, cache_layers=cache_layers, budget_bytes=None, reserved_bytes=0, reason=""))

    def relimit(self, limit: Limit) -> None:
        """Adopt another limit; chunks are evicted as in `resize`.

        Raises:
            ConfigurationError: it is too small for the model; nothing has changed.
        """
        with self._lock:
            self._replan(self._needs, limit)
            self.host.spare.clear()

    def shrink(self, size_bytes: int) -> tuple[int, int] | None:
        """Lower the budget by about this many bytes, or by as many as possible.

        Returns:
            The budget before and after, in bytes. None if nothing can be freed: the model needs all of it, or most of
            it is mapped files, which the kernel reclaims itself.
        """
        with self._lock:
            before = min(self.claimed_bytes, self.limit.budget_bytes or self.claimed_bytes)
            now = max(before - size_bytes, self.least_budget_bytes)
            is_mapped = self.plan.everything_fits and 2 * self.host.anonymous_bytes < before
            if self._closed or is_mapped or now >= before:
                return None
            self.relimit(replace(self.limit, cache_layers=None, budget_bytes=now))
            return before, now

    # What is in memory.

    def resident(self) -> list[str]:
        """Names of the resident chunks, least recently used first, then those of experts."""
        with self._lock:
            self._sync()
            return [slot.name for slot in self.table if slot.state is SlotState.READY] + self.experts.resident()

    @property
    def resident_bytes(self) -> int:
        """Memory of all buffers that hold a chunk or receive one."""
        with self._lock:
            return sum(slot.size_bytes for slot in self.table) + self.experts.resident_bytes

    @property
    def anonymous_bytes(self) -> int:
        """Memory of filled buffers that are not mapped files, which the kernel counts as in use."""
        with self._lock:
            return self.host.anonymous_bytes + self.experts.resident_bytes

    @property
    def mapped(self) -> Mapping[Hashable, int]:
        """The size in bytes of each file mapping; other models may share them."""
        with self._lock:
            return self.host.mapped

    def _hold(self, module: str, names: Sequence[str]) -> list[tuple[Slot, Any, bool]]:
        """Mark the chunks of a module as in use, and load the missing ones; say of each whether it is ready."""
        self._run.pause()  # without the lock, which others need meanwhile
        with self._lock:
            self._learn(module)
            if absent := self.plan.absent.intersection(names):  # tables that are needed as a whole after all
                self._replan(replace(self._needs, tables=self._needs.tables - absent), self.limit)
        while True:
            with self._lock:
                self._run.check()
                self._sync()
                decision = self.table.make_ready(names)
                self._obey(decision, _DEMAND)
                if decision.cancel is not None:
                    ending = self.host[decision.cancel.name].load
                    ending.cancel()
                elif not (loads := [load for name in names if (load := self.host[name].load).is_ending]):
                    slots = self.table.hold(names)
                    try:
                        self._prefetch(names)
                    except BaseException:
                        self.table.let_go(names)
                        raise
                    return [(one, self.host[one.name], one.state is not SlotState.LOADING) for one in slots]
                else:
                    ending = loads[0]  # a run that was interrupted cancelled this load, which has not ended yet
            self._wait(ending)

    def _make_way(self) -> None:
        """Cancel loads until the rest fits the plan, and wait until their memory is free."""
        while True:
            with self._lock:
                self._sync()
                self._obey(self.table.trim())
                ending = [self.host[slot.name].load for slot in self.table.misplaced()]
                for load in ending:
                    load.cancel()
            if not ending:
                return
            for load in ending:
                if self.runs_here():
                    self._wait(load)
                else:
                    (current_run.get() or Run()).wait_for(load)

    def _stay(self, module: str) -> bool:
        """Whether the chunks of a module are pinned and outside of the ring, in a run of this thread; see `stay`."""
        names = self._schedule.uses[module]
        with self._lock:
            if not self.runs_here() or not self.plan.pinned.issuperset(names):
                return False
            if any(self.table[name].in_ring for name in names):
                return False
            self._sync()
            self._obey(self.table.trim())
            return True

    def _wait(self, load: Future[None]) -> None:
        with self.metrics.span("stall"), tracing.span("stall", "stall", layer=self.reached):
            self._run.wait_for(load)

    def _learn(self, module: str) -> None:
        """Note that a module runs. A changed schedule gets a new plan at the beginning of its cycle."""
        self._schedule.observe(module)
        if self._schedule.version != self._planned_version and self._schedule.starts_cycle(module):
            self._replan(self._needs, self.limit)

    def _replan(self, needs: Needs, limit: Limit) -> None:
        """Make and adopt a plan for these needs, this limit and the current schedule.

        Raises:
            ConfigurationError: no plan fits; nothing has changed.
        """
        needs = self._schedule.apply_to(needs)
        plan = self._plan(needs, limit)
        self._needs, self.limit, self._planned_version = needs, limit, self._schedule.version
        self.host.adopt(plan)
        self._sync()
        self._obey(self.table.adopt(plan))
        self.experts.adopt(plan)
        del self.host.spare[self.table.spare_ring_slots :]
        self._announce()

    def _announce(self) -> None:
        """Announce to the source which chunks each pass uses, and which of them are pinned."""
        cycle = [self.manifest.by_name[name] for name in self._needs.cycle]
        kept = [chunk for chunk in cycle if chunk.name in self.plan.pinned or not self.plan.bytes_per_pass]
        with suppress(ModelClosedError):
            self._io.submit(self._source.announce(self.manifest, cycle, kept))

    def _prefetch(self, in_use: Sequence[str]) -> None:
        """Prefetch what runs next, as far as there is memory."""
        if self._ahead and not self.table.is_complete:
            self._sync()
            self._obey(self.table.prefetch(self._schedule.upcoming_chunks(self.plan.tables), in_use))

    def _sync(self) -> None:
        """Report to the table which loads have ended; if the loads did so themselves, they would wait for the lock."""
        for name, failed in self.host.collect():
            self.table.ended(name, failed=failed)

    def _obey(self, decision: Decision, priority: int | None = None) -> None:
        """Carry out a decision. Without a priority its loads are prefetches: after all demands, in request order."""
        for slot in decision.evict:
            self.host.evict(slot)
        for index, slot in enumerate(decision.load):
            if priority is None:
                self._asked = self._asked % _LAST_PRIORITY + 1
            try:
                self.host.load(slot, self._asked if priority is None else priority)
            except BaseException:
                self.table.forget(decision.load[index:])
                raise
        if decision.evict:
            del self.host.spare[self.table.spare_ring_slots :]
