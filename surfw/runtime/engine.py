"""Brings chunks of a model into memory and out again, as its slot table decides.

The engine is the driver of a `SlotTable`: it takes the lock, asks, and carries out what the table decides; it owns the
buffers and the loads that are on their way. It learns from what runs which modules come next (`Schedule`). Another plan
is made when another schedule has been learned, when memory has to be left for something else, and when weights turn out
to be used where the plan did not expect it; if no plan fits, everything stays as it was.

Counting: a chunk that is resident when execution reaches it is a *hit*. A chunk fetched for this very use is
*prefetched* if it was ready in time, and a *stall* if execution had to wait for it. The three are counted apart.

Invariants, under one lock: a chunk has a slot if and only if it has contents here; memory that a load still writes to
is not used for another chunk; a failed load is reported to the one who needs the chunk.
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
    """Chunks of one model, in and out of memory. Used by one forward pass at a time; the rest from any thread.

    Attributes:
        manifest, metrics: as given.
        limit: what may be kept now.
        table: which chunk is in which slot.
        host: the memory of the slots.
        rows: reads rows of tables for the run that the engine works for.
        experts: brings the experts that a router chooses.
        watches_layers: whether it is told of each module that runs also where all of them stay; if not, of each pass.
        reached: the chunks of the module that execution has reached last.
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
            needs: what it needs; its schedule is filled in here.
            limit: what may be kept.
            loader: brings chunks into buffers.
            io: the thread it works in.
            metrics: counts.
            phases: the order in which modules run, as far as it is known; default: the manifest's, as a cycle.
            tables: modules that can run while their tables are not in memory.
            rows_bytes: memory for blocks of tables that are being read, and as much for those used last.
            prefetch: whether chunks are ever fetched ahead of their use.
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
        self._runner: int | None = None  # the thread that has a run
        self._asked = _DEMAND
        self._beside_bytes = 0
        self.reached: tuple[str, ...] = ()
        reader = partial(RowReader, loader.source, manifest, io, metrics, dtypes=loader.dtypes, prove=loader.prove)
        self.experts = self._open_experts(loader, io, plan)
        self.rows = reader(run=lambda: self._run, scratch_bytes=rows_bytes, keep_bytes=rows_bytes)
        self._outside = reader(scratch_bytes=_OUTSIDE_BYTES, keep_bytes=0)
        self._reading = threading.Lock()  # held while a tensor is read outside of a run
        self._announce()

    def _open_tier(self, loader: Loader, io: IoThread, plan: ResidencyPlan) -> Tier:
        """The memory of the slots."""
        return HostTier(self.manifest, loader, io, self.metrics, plan)

    def _open_experts(self, loader: Loader, io: IoThread, plan: ResidencyPlan) -> ExpertPool:
        """The memory of experts."""
        return ExpertPool(
            self.manifest, loader, io=io, metrics=self.metrics, plan=plan, run=lambda: self._run, is_ahead=self._ahead
        )

    def _plan(self, needs: Needs, limit: Limit) -> ResidencyPlan:
        """The plan for these needs under this limit."""
        return plan_residency(needs, limit)

    # What a run asks for.

    @contextmanager
    def running(self, run: Run, *, prefetch: bool = True) -> Iterator[None]:
        """Work for this run, which says when to stop; without `prefetch`, fetch only what it needs."""
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
        """See whether the run that the engine works for is to end.

        Raises:
            SurfwError: it is.
        """
        self._run.check()

    def acquire(self, module: str) -> dict[str, torch.Tensor]:
        """The tensors a module needs, waiting for what is not there yet; they stay until `release`.

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
                        self._prefetch(names)  # what was waited for is no longer in flight
        except BaseException:
            with self._lock:
                self.table.let_go(names)
            raise
        return tensors

    def release(self, module: str) -> None:
        """The module has run: its chunks may be evicted, and the next ones may come."""
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
        """Note that a module runs without its chunks, looking rows up, and fetch what comes after it.

        Raises:
            SurfwError: the run was interrupted.
        """
        self._run.pause()
        with self._lock:
            self._learn(module)
            self._prefetch(())

    def foresee(self, modules: Sequence[str]) -> None:
        """Plan for these modules running again and again in this order, as in training; what runs corrects that.

        Raises:
            ConfigurationError: the limit is too small for it.
        """
        with self._lock:
            for module in [*modules, *modules]:
                self._schedule.observe(module)
            self._schedule.begin()
            self._replan(self._needs, self.limit)

    def by_rows(self, module: str) -> bool:
        """Whether a module is to look single rows up: its table is not in memory."""
        unit = self._units.get(module)
        if unit is None:
            return False
        with self._lock:
            if self.plan.tables.isdisjoint(unit.chunks):
                return False
            self._sync()
            return not self.table.is_ready(unit.chunks)

    def pin(self, module: str) -> dict[str, torch.Tensor]:
        """The tensors of a module whose weights are used outside of its own forward; they stay from now on."""
        tensors = self.acquire(module)
        self.keep(module)
        return tensors

    def keep(self, module: str) -> None:
        """Never evict the chunks that a module uses now.

        Raises:
            ConfigurationError: there is not enough memory to keep them.
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
        """Let a module that has just run keep its tensors in place until its run ends; from now on it only `passes`.

        Returns:
            Whether it may: in a run of this thread, where nothing is streamed. If not, it is to be released.
        """
        return self.plan.everything_fits and self._stay(module)

    def passes(self, modules: Sequence[str]) -> None:
        """Note that modules run, one after another, which have kept their tensors.

        Raises:
            SurfwError: the run was interrupted, or a mapped file has changed since.
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
        """Whether it works for a run of this thread."""
        return self._runner == threading.get_ident()

    def release_all(self) -> None:
        """Nothing runs: all that was acquired may be evicted."""
        with self._lock:
            self.table.release_all()

    # What others ask for, meanwhile or between runs.

    def read(self, name: str) -> torch.Tensor:
        """A copy of one tensor, which is the caller's own; what is kept, and what comes next, stays as it was.

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
            if self.manifest.home[name].form("none") is None:  # no part of it can be read alone
                return values_of(self.host.read(chunk)[name])
            return self._outside.tensor(name)

    def warm(self) -> None:
        """Start to fetch what the first modules will need."""
        with self._lock:
            self._prefetch(())

    def fetch(self, names: Sequence[str]) -> list[tuple[str, Future[None]]]:
        """Start to fetch chunks, as many as there is memory for once idle ones are evicted; the first ones go first.

        Returns:
            The chunks that are on their way, or there, in the order of the names.
        """
        with self._lock:
            if not self._closed:
                self._sync()
                self._obey(self.table.fetch(names))
            return [(name, self.host[name].load) for name in names if name in self.table]

    def keep_only(self, names: Collection[str]) -> None:
        """Forget all chunks that are not in use but these, and give the memory of all others back."""
        with self._lock:
            self._obey(self.table.clear(names))
            self.host.spare.clear()

    def clear(self) -> None:
        """Forget every chunk that is not in use, and give its memory back."""
        with self._lock:
            self._obey(self.table.clear())
            self.host.spare.clear()
            self.experts.clear()

    def close(self) -> None:
        """Cancel what is in flight and let go of all memory."""
        with self._lock:
            self._closed = True
            self.table.forget(list(self.table))
            self.experts.close()
            self.host.close()

    # The plan.

    @property
    def read_ahead(self) -> int:
        """How many chunks are ready that were read early, for their next use."""
        with self._lock:
            return sum(slot.state is SlotState.READY and not slot.is_known for slot in self.table)

    @property
    def plan(self) -> ResidencyPlan:
        """What is kept, and what passes through."""
        return self.table.plan

    @property
    def needs(self) -> Needs:
        """What the model needs, with the schedule as it is known now."""
        with self._lock:
            return self._schedule.apply_to(self._needs)

    def plan_with(self, limit: Limit) -> ResidencyPlan:
        """The plan that there would be with another limit; nothing changes.

        Raises:
            ConfigurationError: the limit is too small for the model.
        """
        with self._lock:
            return self._plan(self._schedule.apply_to(self._needs), limit)

    @property
    def least_budget_bytes(self) -> int:
        """The smallest budget that the model runs with, from any source, and that leaves what is reserved now."""
        with self._lock:
            needs = self._schedule.apply_to(self._needs)
            return least_bytes(needs.from_anywhere()) + self.limit.reserved_bytes

    @property
    def claimed_bytes(self) -> int:
        """The most memory that the plan, and what is reserved besides, may come to take."""
        plan = self.plan
        return plan.peak_bytes + plan.reserved_bytes

    def reserve(self, size_bytes: int, *, or_less: bool = False) -> None:
        """Leave so much of the budget free from now on, instead of what was left free before.

        It is free at the return, but for what is in use: loads of chunks that have to make way are cancelled.

        Args:
            size_bytes: how much.
            or_less: leave less where the model needs it to run.

        Raises:
            ConfigurationError: the model does not run with the rest; all stays as it was.
        """
        with self._lock:
            if or_less and self.limit.budget_bytes is not None:
                least = least_bytes(self._schedule.apply_to(self._needs).in_pieces())
                size_bytes = max(0, min(size_bytes, self.limit.budget_bytes - least))
            is_less = size_bytes < self.limit.reserved_bytes
            if size_bytes != self.limit.reserved_bytes:
                self._replan(self._needs, replace(self.limit, reserved_bytes=size_bytes))
        if not is_less:  # where it is the same, an interrupt may have ended the wait before
            self._make_way()

    def hold_beside(self, size_bytes: int) -> None:
        """Count so much memory beside the weights where the model computes, instead of what was counted before.

        Raises:
            ConfigurationError: the model does not run with the rest; all stays as it was.
        """
        with self._lock:
            working_bytes = self._needs.working_bytes - self._beside_bytes + size_bytes
            if working_bytes != self._needs.working_bytes:
                self._replan(replace(self._needs, working_bytes=working_bytes), self.limit)
            self._beside_bytes = size_bytes

    def resize(self, cache_layers: int) -> None:
        """Keep another number of chunks from now on: evict at once what is too much and idle, the rest after its use.

        Raises:
            ConfigurationError: fewer than one chunk is to be kept.
        """
        self.relimit(replace(self.limit, cache_layers=cache_layers, budget_bytes=None, reserved_bytes=0, reason=""))

    def relimit(self, limit: Limit) -> None:
        """Keep to another limit from now on, as `resize` does.

        Raises:
            ConfigurationError: it is too small for the model; all stays as it was.
        """
        with self._lock:
            self._replan(self._needs, limit)
            self.host.spare.clear()

    def shrink(self, size_bytes: int) -> tuple[int, int] | None:
        """Run with about so many bytes less from now on, or with as many less as there can be.

        Returns:
            The budget before and now, in bytes; None if nothing can be given back: what is mapped is not our own, and
            the model needs the rest.
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
        """Names of the chunks in memory, least recently used first."""
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
        """Memory of filled buffers that are not mapped files: what the system counts as in use."""
        with self._lock:
            return self.host.anonymous_bytes + self.experts.resident_bytes

    @property
    def mapped(self) -> Mapping[Hashable, int]:
        """Files that are mapped: the bytes of each mapping, which other models may have, too."""
        with self._lock:
            return self.host.mapped

    def _hold(self, module: str, names: Sequence[str]) -> list[tuple[Slot, Any, bool]]:
        """Mark the chunks of a module as used, starting their loads if need be; say of each whether it is ready."""
        self._run.pause()  # without the lock, which others need meanwhile
        with self._lock:
            self._learn(module)
            if absent := self.plan.absent.intersection(names):  # tables that rows are not enough of
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
                    ending = loads[0]  # cancelled by a run that was interrupted before this load had ended
            self._wait(ending)

    def _make_way(self) -> None:
        """Cancel loads until the plan has memory for the rest, and wait until theirs is free."""
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
        """As `stay`, where the chunks of the module are pinned, and in memory of their own."""
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
        """Note what runs. Another schedule gets another plan, where its cycle begins."""
        self._schedule.observe(module)
        if self._schedule.version != self._planned_version and self._schedule.starts_cycle(module):
            self._replan(self._needs, self.limit)

    def _replan(self, needs: Needs, limit: Limit) -> None:
        """Keep to another plan, for these needs under this limit and the schedule as it is known now.

        Raises:
            ConfigurationError: there is none; nothing has changed.
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
        """Tell the source what is used in each pass, and what of it stays."""
        cycle = [self.manifest.by_name[name] for name in self._needs.cycle]
        kept = [chunk for chunk in cycle if chunk.name in self.plan.pinned or not self.plan.bytes_per_pass]
        with suppress(ModelClosedError):
            self._io.submit(self._source.announce(self.manifest, cycle, kept))

    def _prefetch(self, in_use: Sequence[str]) -> None:
        """Start to fetch what runs next, as far as there is memory."""
        if self._ahead and not self.table.is_complete:
            self._sync()
            self._obey(self.table.prefetch(self._schedule.upcoming_chunks(self.plan.tables), in_use))

    def _sync(self) -> None:
        """Tell the table, before it decides, which loads have ended: if they did so, they would wait for the lock."""
        for name, failed in self.host.collect():
            self.table.ended(name, failed=failed)

    def _obey(self, decision: Decision, priority: int | None = None) -> None:
        """Carry out a decision; what is fetched ahead comes after what is needed now, and in the order of asking."""
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
