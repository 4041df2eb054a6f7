"""Measurement tools of `bench device`: a model streamed to a device under changing budgets, and the rows it gives."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from surfw.bench.device_model import Outcome, Timing, generate, outcome, prompt, time_generation
from surfw.bench.result import Row
from surfw.config import GB, CodecChoice
from surfw.models.streaming import StreamingModel
from surfw.runtime.device import SIMULATED, Device
from surfw.runtime.device_engine import DeviceEngine
from surfw.runtime.kv_cache import kv_cost
from surfw.runtime.plan import Limit, least_bytes
from surfw.runtime.simulated import SimulatedDevice

OnRow = Callable[[Row], object]

NEW_TOKENS = 24
_LONGEST = 48
"""Tokens that the budget reserves KV cache for, besides the prompt's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Streamed:
    """The measurements of a generation.

    Attributes:
        timing: its speed.
        bytes_per_token: bytes copied to the device per token.
        copied_bytes, copying_seconds: total bytes copied, and how long copies ran.
        seconds: total time.
        layers, kept_layers: number of layers, and how many of them are resident on the device.
        budget_bytes: budget of device memory.
    """

    timing: Timing
    bytes_per_token: int
    copied_bytes: int
    copying_seconds: float
    seconds: float
    layers: int
    kept_layers: int
    budget_bytes: int

    def ceiling(self, bytes_per_second: float) -> float | None:
        """The most tokens per second that this copy rate allows; None if nothing is copied."""
        return bytes_per_second / self.bytes_per_token if self.bytes_per_token else None

    def describe(self) -> str:
        """The text of its row's note."""
        share, rate = self.copying_seconds / self.seconds, self.copied_bytes / max(self.copying_seconds, 1e-9)
        return (
            f"{self.kept_layers} of {self.layers} layers stay, {self.bytes_per_token / GB:.2f} GB are copied for each "
            f"token, budget {self.budget_bytes / GB:.2f} GB, first token after {self.timing.first_seconds:.3f} s, "
            f"copies ran {share * 100:.0f} % of the time, at {rate / GB:.1f} GB/s"
        )


class Measuring:
    """The state that all parts share.

    Attributes:
        rows: the rows so far.
        device, name: the device that models compute on, and the `device` argument that opens it.
        shape: the name of the model's shape.
        folder: where to write files.
        batch: the most prompts at a time.
        rate: copy rate from page-locked memory, in bytes per second; 0 until measured.
    """

    def __init__(self, device: Device, shape: str, folder: Path, on_row: OnRow) -> None:
        self.rows: list[Row] = []
        self.device = device
        self.name: torch.device | str = SIMULATED if isinstance(device, SimulatedDevice) else device.torch_device
        self.shape = shape
        self.folder = folder
        self.batch = 2 if shape == "tiny" else 16
        self.rate = 0.0
        self._on_row = on_row

    def say(self, row: Row) -> None:
        """Add a row and report it."""
        self.rows.append(row)
        self._on_row(row)

    def measure(self, name: str, streaming: "Streaming", baseline: float | None, note: str = "") -> float:
        """Measure a generation and report its row, with the copy ceiling; return the tokens per second."""
        found = streaming.measure()
        speed = found.timing.per_second
        said = f"{note}; {found.describe()}" if note else found.describe()
        self.say(make_row(name, speed, "tok/s", baseline, found.ceiling(self.rate), note=said))
        return speed

    def say_peak(self, name: str, streaming: "Streaming") -> None:
        """Report the peak device memory, against its budget."""
        budget = streaming.engine.plan.budget_bytes or 0
        self.say(make_row(f"{name}: peak of device memory", streaming.peak_bytes / GB, "GB", ceiling=budget / GB))


def make_row(
    name: str, value: float, unit: str, baseline: float | None = None, ceiling: float | None = None, **more: Any
) -> Row:
    """Make a row, with its ratio to the baseline and its share of the ceiling."""
    return Row(
        name=name, value=value, unit=unit, baseline=baseline, ratio=value / baseline if baseline else None,
        ceiling=ceiling, share=value / ceiling if ceiling else None, **more,
    )  # fmt: skip


class Streaming:
    """An open model whose device budget can be changed between measurements."""

    def __init__(
        self,
        source: str | Path,
        device: torch.device | str,
        batch: int,
        *,
        codec: CodecChoice = "none",
        memory_budget: int | None = None,
    ) -> None:
        """Open the model with the smallest device budget that it runs with.

        Args:
            source: where its weights are.
            device: where it computes.
            batch: the most prompts at a time.
            codec: the form to read; `auto` also lets exponents be coded for the copy to the device.
            memory_budget: budget of host memory, in bytes.
        """
        self._batch = batch
        self._is_cuda = isinstance(device, torch.device) and device.type == "cuda"
        self._outside_bytes = torch.cuda.memory_allocated(device) if self._is_cuda else 0
        self.model = StreamingModel.open(source, device=device, cache_size=1, codec=codec, memory_budget=memory_budget)
        try:
            self.relimit(0)
        except BaseException:
            self.model.close()
            raise

    @property
    def engine(self) -> DeviceEngine:
        """The engine that manages device memory."""
        engine: Any = self.model._engine  # noqa: SLF001 - ours
        assert isinstance(engine, DeviceEngine), "it computes on a device"
        return engine

    @property
    def device(self) -> Device:
        """The device it computes on."""
        return self.engine.device

    def relimit(self, kept_layers: int | None) -> None:
        """Set a budget for this many resident layers and a batch's KV cache; None makes the whole model resident."""
        engine = self.engine
        cost = kv_cost(self.model.model.config, torch.bfloat16)
        budget = engine.coding_bytes + least_bytes(engine.needs) + cost.total_bytes(16, _LONGEST, sequences=self._batch)
        if kept_layers is None:
            budget += sum(engine.plan.sizes.values())
        else:
            budget += kept_layers * max(engine.plan.sizes[name] for name in self.model.layers)
        self.limit(budget)

    def limit(self, budget_bytes: int) -> None:
        """Set the budget of device memory."""
        self.engine.relimit(Limit(budget_bytes=budget_bytes, tier="device"))

    def generate(self, count: int) -> list[list[int]]:
        """Generate from one prompt, and return the tokens."""
        found = generate(self.model, self._prompt(1), count)
        self.device.synchronize()
        return found

    def time(self, rows: int, count: int) -> Timing:
        """Time a generation."""
        return time_generation(self.model, self._prompt(rows), count, self.device.synchronize)

    def measure(self) -> Streamed:
        """Time a generation from one prompt, and record what was copied for it."""
        self._reset_peak()
        metrics, plan, start = self.model.metrics, self.engine.plan, time.perf_counter()
        before = metrics.count("copied_bytes"), metrics.seconds("copy")
        timing = self.time(1, NEW_TOKENS)
        return Streamed(
            timing=timing,
            bytes_per_token=self.engine.copied_per_pass,
            copied_bytes=metrics.count("copied_bytes") - before[0],
            copying_seconds=metrics.seconds("copy") - before[1],
            seconds=time.perf_counter() - start,
            layers=len(self.model.layers),
            kept_layers=self.kept_layers,
            budget_bytes=plan.budget_bytes or 0,
        )

    @property
    def kept_layers(self) -> int:
        """The number of layers resident on the device."""
        return len(self.engine.plan.pinned.intersection(self.model.layers))

    def outcome(self, rows: int, count: int) -> Outcome:
        """The logits and tokens, to compare with another model's."""
        return outcome(self.model, self._prompt(rows), count)

    @property
    def peak_bytes(self) -> int:
        """The most device memory it used since the last measurement began."""
        if self._is_cuda:
            return torch.cuda.max_memory_allocated(self.device.torch_device) - self._outside_bytes
        return self._simulated.peak_bytes

    def close(self) -> None:
        """Close the model."""
        self.model.close()

    def _prompt(self, rows: int) -> torch.Tensor:
        return prompt(rows, self.device.torch_device)

    def _reset_peak(self) -> None:
        self.device.synchronize()
        if self._is_cuda:
            torch.cuda.reset_peak_memory_stats(self.device.torch_device)
        else:
            self._simulated.reset_peak()

    @property
    def _simulated(self) -> SimulatedDevice:
        assert isinstance(self.device, SimulatedDevice), f"{self.device.name} is neither CUDA's nor simulated"
        return self.device
