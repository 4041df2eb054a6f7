"""The engine of host memory where a device computes: it lends chunks to be copied.

Here a chunk is used when it is copied, whatever module it is for: in the engine's schedule, each chunk stands for
itself. Chunks that stay on the device are only passed on (`Needs.passing`).
"""

from collections.abc import Collection
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import torch

from surfw.errors import ModelClosedError
from surfw.manifest import Manifest, Use
from surfw.metrics import Metrics
from surfw.runtime.device import Device
from surfw.runtime.engine import Engine
from surfw.runtime.host import Contents, HostTier, Tier
from surfw.runtime.loader import Loader
from surfw.runtime.plan import Limit, Needs, ResidencyPlan
from surfw.runtime.run import IoThread, Run, wait_until_done
from surfw.runtime.schedule import Phases

_DEMAND = 0


class Lender(Engine):
    """Chunks of one model in host memory, lent to a device. Any thread may borrow.

    Attributes:
        device: reads its memory.
    """

    def __init__(
        self,
        manifest: Manifest,
        needs: Needs,
        limit: Limit,
        loader: Loader,
        *,
        device: Device,
        io: IoThread,
        metrics: Metrics,
        rows_bytes: int,
        prefetch: bool,
    ) -> None:
        """Make a plan; `needs` are those behind the plan of the device, see `plan.needs_behind`.

        Raises:
            ConfigurationError: the limit is too small for the model.
        """
        self.device = device
        self._returned: Future[None] = Future()  # done when a chunk is given back
        tables = [name for name in needs.tables if name not in {*needs.cycle, *needs.before}]
        super().__init__(
            manifest,
            needs,
            limit,
            loader,
            io=io,
            metrics=metrics,
            phases=Phases(once=needs.before, cycle=(*needs.cycle, *sorted(tables))),
            rows_bytes=rows_bytes,
            prefetch=prefetch,
            order=[Use(chunk.name, (chunk.name,)) for chunk in manifest.chunks if chunk.kind != "expert"],
        )

    @property
    def run(self) -> Run:
        """The run that rows of tables are read for."""
        return self._run

    @run.setter
    def run(self, run: Run) -> None:
        self._run = run

    def _open_tier(self, loader: Loader, io: IoThread, plan: ResidencyPlan) -> Tier:
        return HostTier(self.manifest, loader, io, self.metrics, plan, device=self.device)

    def has(self, name: str) -> bool:
        """Whether a chunk is in memory."""
        with self._lock:
            self._sync()
            return self.table.is_ready([name])

    def lend_ready(self, name: str, *, for_copy: bool = True) -> Contents | None:
        """The contents of a chunk that is in memory, which stays until it is given back; None if it is not there.

        Args:
            name: the chunk.
            for_copy: whether this is the use that its schedule is about.
        """
        with self._lock:
            self._sync()
            if self._closed or not self.table.is_ready([name]):
                return None
            return self._lend(name, for_copy=for_copy)

    async def lend(self, name: str, priority: int) -> Contents:
        """The contents of a chunk, brought into memory if need be; it stays until it is given back.

        Raises:
            ModelClosedError: this was closed.
            SurfwError: the chunk could not be loaded.
        """
        while True:
            with self._lock:
                if self._closed:
                    raise ModelClosedError(f"the source of {self.manifest.name} was closed while it was read")
                self._sync()
                found = self._find_place(name)
                if isinstance(found, Contents):
                    break
            await wait_until_done(found)
        try:
            await wait_until_done(found.load)
            self.host.check(found)
        except BaseException:
            self.give_back(name)
            raise
        return found

    def give_back(self, name: str) -> None:
        """The chunk is not read any more: it may be evicted, and the next ones may come."""
        self.release(name)
        with self._lock:
            returned, self._returned = self._returned, Future()
        returned.set_result(None)

    def tensors(self, contents: Contents) -> dict[str, torch.Tensor]:
        """Tensors in host memory over a chunk that was lent."""
        with self._lock:
            return self.host.tensors(contents)

    def pass_on(self, passing: Collection[str], tables: Collection[str]) -> None:
        """From now on these chunks stay on the device, and those tables do not.

        Raises:
            ConfigurationError: what does not, does not fit the limit.
        """
        with self._lock:
            needs = replace(self._needs, passing=frozenset(passing), tables=frozenset(tables))
            if needs.passing != self._needs.passing:
                self._replan(needs, self.limit)

    def _find_place(self, name: str) -> Any:
        """Have a chunk on its way and lend it, or what to wait for before that can be."""
        if not self.table.has_place(name):
            return self._returned
        decision = self.table.make_ready([name])
        self._obey(decision, _DEMAND)
        if decision.cancel is not None:
            guess = self.host[decision.cancel.name].load
            guess.cancel()
            return guess
        if (load := self.host[name].load).is_ending:
            return load
        return self._lend(name)

    def _lend(self, name: str, *, for_copy: bool = True) -> Contents:
        self.table.hold([name])
        try:
            if for_copy and name not in self.plan.passing:
                self._learn(name)
            if for_copy:
                self._prefetch([name])
        except BaseException:
            self.table.let_go([name])
            raise
        contents: Contents = self.host[name]
        return contents
