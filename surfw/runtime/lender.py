"""The engine of host memory for a model that computes on a device: it lends chunks to be copied there.

A chunk is used when it is copied, for whatever module: in this engine's schedule, each chunk is a module of its own.
Chunks that are resident on the device only pass through (`Needs.passing`).

A chunk that was coded on the device (`coding`) is kept here in coded form, outside of the slots; from then on it no
longer needs one. Its memory is reserved with `claim` before it is coded, and the result is kept with `settle`.
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
    """Lends the chunks of one model in host memory to a device. Any thread may borrow.

    Attributes:
        device: reads this memory.
        coded: the chunks that are held in coded form.
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
        """Make a plan; arguments as for `Engine`.

        `needs` are those behind the device's plan, see `plan.needs_behind`. `codable` has the expected coded size in
        bytes of each chunk that can be coded, and `is_coding` says whether the device has memory for coding.

        Raises:
            ConfigurationError: the limit is too small for the model.
        """
        self.device = device
        self.coded: dict[str, Coded] = {}
        self._claimed: dict[str, int] = {}  # memory of chunks that are, or are being, coded
        self._codable = dict(codable or {})
        self._is_coding = is_coding
        self._choice: frozenset[str] | None = None  # see `_to_be_coded`
        self._returned: Future[None] = Future()  # done when a chunk is returned
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
        """Lend a chunk that is in memory, for copying: coded, or contents that are held until `give_back`."""
        with self._lock:
            return self.coded.get(name) or self._lend_ready(name, for_copy=True)

    def lend_rows(self, name: str) -> Contents | None:
        """Lend the contents of a chunk that is in memory, for lookups; they are held until `give_back`."""
        with self._lock:
            return self._lend_ready(name, for_copy=False)

    async def lend(self, name: str, priority: int) -> Contents | Coded:
        """Lend a chunk for copying, loading it if necessary: coded, or contents that are held until `give_back`.

        Raises:
            ModelClosedError: the engine was closed.
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
        """Return a chunk that is not read any more: it may be evicted, and the next ones prefetched."""
        try:
            self.release(name)
        finally:  # wake those who wait for a slot, even if the next prefetch could not be started
            with self._lock:
                returned, self._returned = self._returned, Future()
            returned.set_result(None)

    def tensors(self, contents: Contents) -> dict[str, torch.Tensor]:
        """Tensors in host memory over a lent chunk."""
        with self._lock:
            return self.host.tensors(contents)

    def pass_on(self, kept: Collection[str], tables: Collection[str], *, is_coding: bool) -> None:
        """Adapt to the device's plan.

        Args:
            kept: the chunks that are resident on the device.
            tables: the tables that are not.
            is_coding: whether other chunks may be coded.

        Raises:
            ConfigurationError: what is not resident on the device does not fit the limit.
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
        """Whether a chunk is to be coded and is not yet."""
        with self._lock:
            return name not in self._claimed and name in self._to_be_coded()

    def claim(self, name: str) -> bool:
        """Reserve memory for a chunk in coded form, if it is to be coded; if True, the caller has to `settle` it."""
        with self._lock:
            if self._closed or not self.is_to_be_coded(name):
                return False
            self._claimed[name] = most_bytes(self._needs.sizes[name])
            self._replan(self._needs, self.limit)
            if name in self._claimed:
                return True
            del self._codable[name]  # no plan has memory for it
            return False

    def settle(self, name: str, coded: Coded | None, *, is_gone: bool) -> None:
        """Keep a coded chunk whose memory was claimed.

        Args:
            name: the chunk.
            coded: its coded form; None if coding failed or did not pay. Then it is never coded again, unless `is_gone`.
            is_gone: whether its slot on the device was evicted while it was being coded.
        """
        with self._lock:
            if self._closed or name not in self._claimed:
                return  # its claim was dropped
            if coded is None or is_gone:
                self._forget(name)
                if not is_gone:
                    self._codable.pop(name, None)
            else:
                self.coded[name] = coded
                self._claimed[name] = coded.capacity_bytes
            self._replan(self._needs, self.limit)

    def code_no_more(self) -> None:
        """Code no further chunks."""
        with self._lock:
            self._codable = {name: size for name, size in self._codable.items() if name in self.coded}
            self._choice = None

    @property
    def anonymous_bytes(self) -> int:
        """As for `Engine`, including coded chunks."""
        with self._lock:
            return super().anonymous_bytes + sum(coded.capacity_bytes for coded in self.coded.values())

    def copied_bytes(self) -> dict[str, int]:
        """How many bytes are copied of each chunk that is, or will be, coded."""
        with self._lock:
            will = {name: self._codable[name] for name in self._to_be_coded()}
            return will | {name: coded.nbytes for name, coded in self.coded.items()}

    def settled_plan(self) -> ResidencyPlan:
        """The plan once all chunks are coded that are to be."""
        with self._lock:
            coded = {name: self._codable[name] for name in self._to_be_coded()} | self._claimed
            return plan_residency(with_coded(self.needs, coded), self.limit)

    def clear(self) -> None:
        """As for `Engine`; coded chunks are dropped, too."""
        with self._lock:
            for name in list(self._claimed):
                self._forget(name)
            self._replan(self._needs, self.limit)
            super().clear()

    def close(self) -> None:
        """As for `Engine`."""
        with self._lock:
            super().close()
            self.coded.clear()

    def _to_be_coded(self) -> frozenset[str]:
        """The chunks that are, or are to be, coded."""
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
        """As for `Engine`; coded chunks are dropped as long as no plan fits beside them."""
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
        """Start to load a chunk and lend it, or return a future to wait for before trying again."""
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
