"""Experts on a device: copied from host memory for each forward that uses them.

One stack of device memory serves all modules in turn, with each expert at the same place as in host memory. Copies are
issued on the computing stream, so that they wait until the previous module has read its experts.
"""

from collections.abc import Mapping, Sequence

import torch

from surfw.metrics import Metrics
from surfw.runtime.device import Device
from surfw.runtime.experts import ExpertPool
from surfw.runtime.plan import ResidencyPlan


class DeviceExperts(ExpertPool):
    """The experts of a model that computes on a device; used like the pool of host memory."""

    def __init__(self, below: ExpertPool, device: Device, metrics: Metrics) -> None:
        """Copy from the pool of host memory; nothing is allocated yet."""
        self._below = below
        self._device = device
        self._metrics = metrics
        self._memory: torch.Tensor | None = None
        self._on_device: dict[str, dict[str, torch.Tensor]] = {}
        self.read_whole = below.read_whole

    @property
    def foresees(self) -> bool:
        """Always False: on a device, a guess would have to wait for its computation."""
        return False

    def stack(self, name: str) -> torch.Tensor | None:
        """As for `ExpertPool`, on the device."""
        return self._on_device.get(name.rpartition(".")[0], {}).get(name)

    def acquire(self, path: str, counts: Sequence[int], used: Sequence[int]) -> Mapping[str, torch.Tensor]:
        """As for `ExpertPool`, on the device."""
        self._below.acquire(path, counts, used)
        if self._memory is None:
            with torch.inference_mode(mode=False):
                self._memory = self._device.allocate(self._below.largest_bytes)
            self._device.synchronize()  # earlier copies may still write to reused memory
        if path not in self._on_device:
            self._on_device[path] = self._below.stacks_over(path, self._memory)
        if path in self.read_whole:
            self._memory.zero_()
        for start, place in self._below.places(path, used):
            self._memory[start : start + len(place)].copy_(place)
            self._metrics.add("copied_bytes", len(place))
        return self._on_device[path]

    def release(self, path: str) -> None:
        """As for `ExpertPool`."""
        self._below.release(path)

    def release_all(self) -> None:
        """As for `ExpertPool`."""
        self._below.release_all()

    def counts(self) -> dict[str, tuple[float, ...]]:
        """As for `ExpertPool`."""
        return self._below.counts()

    def warm(self, counts: Mapping[str, Sequence[float]]) -> None:
        """As for `ExpertPool`, in host memory."""
        self._below.warm(counts)

    @property
    def tokens(self) -> int:  # type: ignore[override]  # read only here
        """As for `ExpertPool`."""
        return self._below.tokens

    def read(self, name: str) -> torch.Tensor:
        """As for `ExpertPool`, on the device."""
        return self._below.read(name).to(self._device.torch_device)

    def adopt(self, plan: ResidencyPlan) -> None:
        """Do nothing: the device keeps no experts, so its plan does not cover them."""

    def clear(self) -> None:
        """Do nothing: the pool of host memory evicts its experts itself."""

    def close(self) -> None:
        """Free the device's memory."""
        self._on_device.clear()
        self._memory = None

    @property
    def resident_bytes(self) -> int:
        """Always 0: no experts are kept on the device."""
        return 0

    def resident(self) -> list[str]:
        """Always empty: no experts are kept on the device."""
        return []
