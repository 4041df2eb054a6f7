"""The engine of host memory where a device computes: it lends chunks to be copied.

Here a chunk is used when it is copied, whatever module it is for: in the engine's schedule, each chunk stands for
itself. Chunks that stay on the device are only passed on (`Needs.passing`).

A chunk that was coded on the device (`coding`) waits here in that form, beside the slots, which it only passes through
from then on. There is memory for it before it is coded: `claim`, then `settle`.
"""

from collections.abc import Collection, Mapping
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import torch

from surfw.errors import ConfigurationError, ModelClosedError
from surfw.manifest import Manifest, Use
from surfw.metrics import Metrics
from surfw.runtime.coding import Coded, most_bytes
from surfw.runtime.coding_plan import choose_coded, with_coded
from surfw.runtime.device import Device
from surfw.runtime.engine import Engine
from surfw.runtime.host import Contents, HostTier, Tier
from surfw.runtime.loader import Loader
from surfw.runtime.plan import Limit, Needs, ResidencyPlan, plan_residency
from surfw.runtime.run import IoThread, Run, wait_until_done
from surfw.runtime.schedule import Phases

_DEMAND = 0


class Lender(Engine):
    """Chunks of one model in host memory, lent to a device. Any thread may borrow.

    Attributes:
        device: reads its memory.
        coded: the chunks that wait in coded form.
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
        codable: Mapping[str, int] | None = None,
        is_coding: bool = False,
    ) -> None:
        """Make a plan; arguments as of `Engine`.

        `needs` are those behind the plan of the device, see `plan.needs_behind`; `codable` says how many bytes each
        chunk that can be coded is expected to take then; and `is_coding`, whether the device has memory for coding.

        Raises:
            ConfigurationError: the limit is too small for the model.
        """
        self.device = device
        self.coded: dict[str, Coded] = {}
        self._claimed: dict[str, int] = {}  # what chunks that are, or become, coded take
        self._codable = dict(codable or {})
        self._is_coding = is_coding
        self._choice: frozenset[str] | None = None  # see `_to_be_coded`
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
            return name in self.coded or self.table.is_ready([name])

    def lend_ready(self, name: str) -> Contents | Coded | None:
        """A chunk that is in memory, to be copied: coded, or contents that stay until they are given back."""
        with self._lock:
            return self.coded.get(name) or self._lend_ready(name, for_copy=True)

    def lend_rows(self, name: str) -> Contents | None:
        """The contents of a chunk that is in memory, to be looked up in; they stay until they are given back."""
        with self._lock:
            return self._lend_ready(name, for_copy=False)

    async def lend(self, name: str, priority: int) -> Contents | Coded:
        """A chunk to be copied, brought into memory if need be: coded, or contents that stay until they are given back.

        Raises:
            ModelClosedError: this was closed.
            SurfwError: the chunk could not be loaded.
        """
        while True:
            with self._lock:
                if self._closed:
                    raise ModelClosedError(f"the source of {self.manifest.name} was closed while it was read")
                if (coded := self.coded.get(name)) is not None:
                    return coded
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
        try:
            self.release(name)
        finally:  # whoever waits for a place looks again, also where the next chunk could not be asked for
            with self._lock:
                returned, self._returned = self._returned, Future()
            returned.set_result(None)

    def tensors(self, contents: Contents) -> dict[str, torch.Tensor]:
        """Tensors in host memory over a chunk that was lent."""
        with self._lock:
            return self.host.tensors(contents)

    def pass_on(self, kept: Collection[str], tables: Collection[str], *, is_coding: bool) -> None:
        """From now on these chunks stay on the device, those tables do not, and others may be coded or not.

        Raises:
            ConfigurationError: what does not stay there does not fit the limit.
        """
        with self._lock:
            if self._needs.passing == frozenset(kept) and self._is_coding == is_coding:
                return
            self._is_coding = is_coding
            for name in [name for name in self._claimed if name in kept or not is_coding]:
                self._forget(name)
            self._replan(replace(self._needs, passing=frozenset(kept), tables=frozenset(tables)), self.limit)

    # Chunks in coded form.

    def is_to_be_coded(self, name: str) -> bool:
        """Whether a chunk is to wait in coded form, and does not yet."""
        with self._lock:
            return name not in self._claimed and name in self._to_be_coded()

    def claim(self, name: str) -> bool:
        """Have memory for a chunk in coded form, if it is one that is to wait in it; then it is to be settled."""
        with self._lock:
            if self._closed or not self.is_to_be_coded(name):
                return False
            self._claimed[name] = most_bytes(self._needs.sizes[name])
            self._replan(self._needs, self.limit)
            if name in self._claimed:
                return True
            del self._codable[name]  # there was no memory
            return False

    def settle(self, name: str, coded: Coded | None, *, is_gone: bool) -> None:
        """Keep a chunk for which there is memory. Without one, never code it again, unless it went before its time."""
        with self._lock:
            if self._closed or name not in self._claimed:
                return  # there is no memory for it any more
            if coded is None or is_gone:
                self._forget(name)
                if not is_gone:
                    self._codable.pop(name, None)
            else:
                self.coded[name] = coded
                self._claimed[name] = coded.capacity_bytes
            self._replan(self._needs, self.limit)

    def code_no_more(self) -> None:
        """Leave all other chunks as they are."""
        with self._lock:
            self._codable = {name: size for name, size in self._codable.items() if name in self.coded}
            self._choice = None

    @property
    def anonymous_bytes(self) -> int:
        """As of `Engine`, with what is coded."""
        with self._lock:
            return super().anonymous_bytes + sum(coded.capacity_bytes for coded in self.coded.values())

    def copied_bytes(self) -> dict[str, int]:
        """What is copied of each chunk that waits in coded form, or will."""
        with self._lock:
            will = {name: self._codable[name] for name in self._to_be_coded()}
            return will | {name: coded.nbytes for name, coded in self.coded.items()}

    def settled_plan(self) -> ResidencyPlan:
        """The plan that there will be once all is coded that is to be."""
        with self._lock:
            coded = {name: self._codable[name] for name in self._to_be_coded()} | self._claimed
            return plan_residency(with_coded(self.needs, coded), self.limit)

    def clear(self) -> None:
        """As of `Engine`; coded chunks, too."""
        with self._lock:
            for name in list(self._claimed):
                self._forget(name)
            self._replan(self._needs, self.limit)
            super().clear()

    def close(self) -> None:
        """As of `Engine`."""
        with self._lock:
            super().close()
            self.coded.clear()

    def _to_be_coded(self) -> frozenset[str]:
        """The chunks that are to wait in coded form; not all of them do yet."""
        if self._choice is None:
            self._choice = frozenset()
            if self._is_coding:
                sizes = self._needs.sizes
                on_its_way = max((most_bytes(sizes[one]) - size for one, size in self._codable.items()), default=0)
                limit = replace(self.limit, reserved_bytes=self.limit.reserved_bytes + on_its_way)
                self._choice = choose_coded(self._schedule.apply_to(self._needs), limit, self._codable)
        return self._choice

    def _forget(self, name: str) -> None:
        del self._claimed[name]
        self.coded.pop(name, None)

    def _plan(self, needs: Needs, limit: Limit) -> ResidencyPlan:
        return plan_residency(with_coded(needs, self._claimed), limit)

    def _replan(self, needs: Needs, limit: Limit) -> None:
        """As of `Engine`; chunks in coded form go where there is no memory for them any more."""
        self._choice = None
        while True:
            try:
                super()._replan(needs, limit)
            except ConfigurationError:
                if not self._claimed:
                    raise
                self._forget([*self._claimed][-1])
            else:
                return

    def _lend_ready(self, name: str, *, for_copy: bool) -> Contents | None:
        self._sync()
        if self._closed or not self.table.is_ready([name]):
            return None
        return self._lend(name, for_copy=for_copy)

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
