"""Experts on a device: copied there for the forward that uses them, from those that host memory keeps.

One stack of memory on the device serves all modules in turn, each expert at its place as in host memory. Copies are
made in the stream that computes, so that none comes before what the module before it has still to read.
"""

from collections.abc import Mapping, Sequence

import torch

from surfw.metrics import Metrics
from surfw.runtime.device import Device
from surfw.runtime.experts import ExpertPool
from surfw.runtime.plan import ResidencyPlan


class DeviceExperts(ExpertPool):
    """The experts of a model that computes on a device; used as a pool of host memory is."""

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
        """As of `ExpertPool`: on a device, guesses would wait for it to compute."""
        return False

    def stack(self, name: str) -> torch.Tensor | None:
        """As of `ExpertPool`, on the device."""
        return self._on_device.get(name.rpartition(".")[0], {}).get(name)

    def acquire(self, path: str, counts: Sequence[int], used: Sequence[int]) -> Mapping[str, torch.Tensor]:
        """As of `ExpertPool`, on the device."""
        self._below.acquire(path, counts, used)
        if self._memory is None:
            with torch.inference_mode(mode=False):
                self._memory = self._device.allocate(self._below.largest_bytes)
            self._device.synchronize()  # earlier copies may still come to what was there before
        if path not in self._on_device:
            self._on_device[path] = self._below.stacks_over(path, self._memory)
        if path in self.read_whole:
            self._memory.zero_()
        for start, place in self._below.places(path, used):
            self._memory[start : start + len(place)].copy_(place)
            self._metrics.add("copied_bytes", len(place))
        return self._on_device[path]

    def release(self, path: str) -> None:
        """As of `ExpertPool`."""
        self._below.release(path)

    def release_all(self) -> None:
        """As of `ExpertPool`."""
        self._below.release_all()

    def counts(self) -> dict[str, tuple[float, ...]]:
        """As of `ExpertPool`."""
        return self._below.counts()

    def warm(self, counts: Mapping[str, Sequence[float]]) -> None:
        """As of `ExpertPool`: in host memory."""
        self._below.warm(counts)

    @property
    def tokens(self) -> int:  # type: ignore[override]  # read only here
        """As of `ExpertPool`."""
        return self._below.tokens

    def read(self, name: str) -> torch.Tensor:
        """As of `ExpertPool`, on the device."""
        return self._below.read(name).to(self._device.torch_device)

    def adopt(self, plan: ResidencyPlan) -> None:
        """The plan of the device says nothing of experts: it keeps none."""

    def clear(self) -> None:
        """Host memory lets go of its experts itself."""

    def close(self) -> None:
        """Let go of the device's memory."""
        self._on_device.clear()
        self._memory = None

    @property
    def resident_bytes(self) -> int:
        """What stays on the device: nothing."""
        return 0

    def resident(self) -> list[str]:
        """The experts that stay on the device: none."""
        return []
