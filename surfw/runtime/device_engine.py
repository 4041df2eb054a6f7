"""The engine of a device's memory: its slot table decides what is copied there, kept, and evicted.

It works like the engine of host memory, one tier nearer: its loads are copies from the slots of a `Lender`. Each of the
two tables has its own plan. Chunks resident on the device only pass through host memory. The others are streamed to the
device in every pass: from host memory if they fit there, else from the source through host memory.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from surfw.metrics import Metrics
from surfw.runtime.coding_plan import copied_per_pass, plan_device
from surfw.runtime.device import Device
from surfw.runtime.device_experts import DeviceExperts
from surfw.runtime.device_tier import DeviceTier
from surfw.runtime.engine import Engine
from surfw.runtime.experts import ExpertPool
from surfw.runtime.host import Tier
from surfw.runtime.lender import Lender
from surfw.runtime.loader import Loader
from surfw.runtime.packed import values_of
from surfw.runtime.plan import Limit, Needs, ResidencyPlan
from surfw.runtime.rows import TableUnit
from surfw.runtime.run import IoThread, Run
from surfw.runtime.schedule import Phases


class DeviceEngine(Engine):
    """Loads and evicts the chunks of one model in a device's memory. Used as any engine.

    Attributes:
        below: the engine of host memory.
        device: where the model computes.
        coding_bytes: device memory for coding chunks, where that pays; 0 to disable coding.
    """

    watches_layers = False  # a pass takes milliseconds there, so hooks on its layers would be noticeable

    def __init__(
        self,
        below: Lender,
        device: Device,
        needs: Needs,
        limit: Limit,
        loader: Loader,
        *,
        io: IoThread,
        metrics: Metrics,
        phases: Phases | None,
        tables: Mapping[str, TableUnit],
        prefetch: bool,
        coding_bytes: int = 0,
    ) -> None:
        """Make a plan; arguments as for `Engine`, and as described for the attributes.

        Raises:
            ConfigurationError: the limit is too small for the model.
        """
        self.below = below
        self.device = device
        self.coding_bytes = coding_bytes
        super().__init__(
            below.manifest, needs, limit, loader, io=io, metrics=metrics, phases=phases, tables=tables,
            prefetch=prefetch,
        )  # fmt: skip
        self.rows: DeviceRows = DeviceRows(below, device)  # type: ignore[assignment]  # has the methods that are used

    def _open_tier(self, loader: Loader, io: IoThread, plan: ResidencyPlan) -> Tier:
        return DeviceTier(self.below, loader, io, self.device, metrics=self.metrics, plan=plan)

    def _open_experts(self, loader: Loader, io: IoThread, plan: ResidencyPlan) -> ExpertPool:
        return DeviceExperts(self.below.experts, self.device, self.metrics)

    @contextmanager
    def running(self, run: Run, *, prefetch: bool = True) -> Iterator[None]:
        """As for `Engine`; rows of tables are read for the same run."""
        with super().running(run, prefetch=prefetch):
            before, self.below.run = self.below.run, run
            try:
                yield
            finally:
                self.below.run = before

    def stay(self, module: str) -> bool:
        """As for `Engine`, but even if other chunks are streamed, as long as its own are all pinned on the device."""
        return self._stay(module)

    def read(self, name: str) -> torch.Tensor:
        """As for `Engine`; the copy is on the device."""
        with self._lock:
            self._sync()
            chunk = self.manifest.home[name].name
            if self.table.is_ready([chunk]):
                return values_of(self.host.tensors(self.host[chunk])[name])
        return self.below.read(name).to(self.device.torch_device)

    def clear(self) -> None:
        """As for `Engine`, in both tiers."""
        super().clear()
        self.below.clear()

    def close(self) -> None:
        """As for `Engine`, in both tiers."""
        try:
            super().close()
        finally:
            self.below.close()
            self.device.close()

    def shrink(self, size_bytes: int) -> tuple[int, int] | None:
        """As for `Engine`, for host memory."""
        return self.below.shrink(size_bytes)

    @property
    def claimed_bytes(self) -> int:
        """As for `Engine`, for host memory."""
        return self.below.claimed_bytes

    @property
    def anonymous_bytes(self) -> int:
        """As for `Engine`, for host memory."""
        return self.below.anonymous_bytes

    @property
    def copied_per_pass(self) -> int:
        """The bytes copied in one pass, once all chunks in host memory are coded that are to be."""
        return copied_per_pass(self.plan, self.needs, self.below.copied_bytes())

    def _plan(self, needs: Needs, limit: Limit) -> ResidencyPlan:
        return plan_device(needs, limit, self.coding_bytes)

    def _replan(self, needs: Needs, limit: Limit) -> None:
        before = self.plan.pinned
        super()._replan(needs, limit)
        new = [one.name for one in self.manifest.chunks if one.name in self.plan.pinned - before]
        self._obey(self.table.fetch([name for name in new if self.below.has(name)]))  # while they are in host memory
        pinned = self.plan.pinned
        self.below.pass_on(pinned, self._needs.tables - pinned, is_coding=bool(self.plan.coding_bytes))


class DeviceRows:
    """Looks up rows of tables that are not on the device, in host memory or in the source."""

    def __init__(self, below: Lender, device: Device) -> None:
        """Use the host engine's tables; results are on the device."""
        self._below = below
        self._device = device

    def lookup(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        """As `RowReader.lookup`, with ids on the CPU and the result on the device."""
        chunk = self._below.manifest.home[name].name
        lent = self._below.lend_rows(chunk)
        if lent is None:
            return self._below.rows.lookup(name, ids).to(self._device.torch_device)
        try:
            found = torch.nn.functional.embedding(ids, self._below.tensors(lent)[name])
        finally:
            self._below.give_back(chunk)
        return found.to(self._device.torch_device)

    def tensor(self, name: str) -> torch.Tensor:
        """As `RowReader.tensor`, on the device."""
        return self._below.rows.tensor(name).to(self._device.torch_device)

    def clear(self) -> None:
        """As for `RowReader`."""
        self._below.rows.clear()
