"""A model that streams to a device: against the copy rate, against all of it on the device, and against other tools.

One model with random weights is made on the device and written to a folder; surfw reads it there. Everything runs in
this process, one after the other, the most telling figures first, since the device may be lent for minutes only: each
row is handed on as soon as it is known, what fails becomes a row that says so, and what would begin too late is left
out.
"""

import asyncio
import gc
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from surfw.bench.device_model import (
    SHAPES,
    Outcome,
    Timing,
    generate,
    make_model,
    outcome,
    prompt,
    save_model,
    time_generation,
)
from surfw.bench.device_peers import PEERS, Peer
from surfw.bench.result import Result, Row, describe_machine
from surfw.config import GB, MIB
from surfw.errors import ConfigurationError
from surfw.models.client import WeightClient
from surfw.models.streaming import StreamingModel
from surfw.runtime.buffers import Buffer
from surfw.runtime.device import SIMULATED, Device, open_device
from surfw.runtime.kv_cache import kv_cost
from surfw.runtime.loader import flat_view
from surfw.runtime.plan import Limit, least_bytes
from surfw.runtime.simulated import SimulatedDevice

_COPIED_BYTES = {"tiny": 16 * MIB}
_MOST_COPIED_BYTES = 1024 * MIB
_NEW_TOKENS = 24
_LIBRARIES = ("accelerate", "diffusers", "triton")

OnRow = Callable[[Row], object]


def bench_device(
    device: str = "cuda",
    *,
    shape: str = "8b",
    folder: str | None = None,
    disk: str | None = None,
    seconds: float = 480.0,
    on_row: OnRow = lambda _: None,
    on_progress: Callable[[str], object] = lambda _: None,
) -> Result:
    """Measure.

    Args:
        device: where to compute; `simulated` shows that all of this runs, its figures mean nothing.
        shape: one of `SHAPES`.
        folder: where the checkpoint is written, best into memory; default: the temporary folder.
        disk: a folder on a disk, for the figures from disk to device; None leaves them out.
        seconds: nothing is begun after so long.
        on_row: called with each row as soon as it is known.
        on_progress: called with a line whenever something begins.

    Raises:
        ConfigurationError: there is no such shape or device.
    """
    if shape not in SHAPES:
        raise ConfigurationError(f"shape {shape!a:.40} is not known; expected one of {', '.join(SHAPES)}")
    if (opened := open_device(device)) is None:
        raise ConfigurationError(f"device {device!r} is the CPU; name a CUDA device, or {SIMULATED!r}")
    with tempfile.TemporaryDirectory(prefix="surfw-bench-", dir=folder) as place:
        bench = _Bench(opened, device, shape, Path(place), on_row)
        until = time.monotonic() + seconds
        parts: list[tuple[str, Callable[[], object]]] = [
            ("copy rates", bench.copies),
            ("the model", bench.make),
            ("everything streamed", bench.streamed),
            ("half on the device", bench.half),
            ("everything on the device", bench.everything),
            *((name, lambda peer=peer: bench.peer(peer)) for name, peer in PEERS.items()),
            ("from a server", bench.server),
            *((("from disk", lambda: bench.disk(disk)),) if disk is not None else ()),
        ]
        try:
            for name, measure in parts:
                if time.monotonic() > until:
                    bench.say(Row(name=name, value=0, unit="", note="left out: the time was over"))
                    continue
                on_progress(name)
                try:
                    measure()
                except Exception as exc:  # noqa: BLE001 - whatever fails must not end the others
                    bench.say(Row(name=name, value=0, unit="", note=f"failed: {exc!r:.300}"))
        finally:
            bench.close()
    return Result(benchmark="device", machine=describe_machine(*_LIBRARIES) | bench.machine(), rows=tuple(bench.rows))


class _Bench:
    """What is measured, and what one part knows of the others."""

    def __init__(self, device: Device, name: str, shape: str, folder: Path, on_row: OnRow) -> None:
        self.rows: list[Row] = []
        self._device = device
        self._name = name
        self._shape = shape
        self._folder = folder
        self._on_row = on_row
        self._batch = 2 if shape == "tiny" else 16
        self._rate = 0.0  # bytes per second of a copy out of page-locked memory
        self._resident: Any = None
        self._want: dict[int, Outcome] = {}
        self._resident_rate: dict[int, float] = {}
        self._client: WeightClient | None = None
        self._streaming: StreamingModel | None = None
        self._outside_bytes = 0

    def say(self, row: Row) -> None:
        """A row is known."""
        self.rows.append(row)
        self._on_row(row)

    def machine(self) -> dict[str, str]:
        """The device, and the model."""
        return {"device": self._device.name, "shape": self._shape}

    def copies(self) -> None:
        """How fast memory is copied to the device."""
        size = _COPIED_BYTES.get(self._shape, _MOST_COPIED_BYTES)
        locked, pageable = Buffer(size), Buffer(size)
        for buffer in (locked, pageable):
            flat_view(buffer).fill_(1)
        start = time.perf_counter()
        self._device.page_lock(locked)
        self.say(_row("page-locking", size / (time.perf_counter() - start) / GB, "GB/s"))
        memory = self._device.allocate(size)
        for name, buffer, rounds in (
            ("copies of page-locked memory", locked, 5),
            ("copies of pageable memory", pageable, 2),
        ):
            self._device.copy(memory, flat_view(buffer)).synchronize()
            start = time.perf_counter()
            for _ in range(rounds):
                copied = self._device.copy(memory, flat_view(buffer))
            copied.synchronize()
            rate = rounds * size / (time.perf_counter() - start)
            self._rate = self._rate or rate
            self.say(_row(name, rate / GB, "GB/s"))

    def make(self) -> None:
        """The model on the device, its speed there, and its checkpoint."""
        place = self._device.torch_device
        start = time.perf_counter()
        self._resident = make_model(self._shape, place)
        size = sum(one.numel() * one.element_size() for one in self._resident.parameters())
        self.say(_row("the model", size / GB, "GB", note=f"made in {time.perf_counter() - start:.1f} s"))
        for rows in (1, self._batch):
            found = self._time(self._resident, rows, 32 if rows == 1 else 16)
            self._resident_rate[rows] = found.per_second
            self._want[rows] = outcome(self._resident, prompt(rows, place), _NEW_TOKENS if rows == 1 else 16)
            self.say(_row(f"resident, {_rows(rows)}", found.per_second, "tok/s"))
        start = time.perf_counter()
        save_model(self._resident, self._folder / "model")
        self.say(_row("the checkpoint written", size / (time.perf_counter() - start) / GB, "GB/s"))

    def streamed(self) -> None:
        """As little of the device's memory as the model runs with."""
        self._outside_bytes = self._allocated_bytes()
        self._client = WeightClient(self._folder / "model")
        start = time.perf_counter()
        self._streaming = StreamingModel.open(self._client, device=self._name, cache_size=1)
        least = self._limit(0)
        generate(self._streaming, prompt(1, self._device.torch_device), 1)
        took = time.perf_counter() - start
        self.say(_row("opened, and read into page-locked memory", took, "s"))
        self._measure("everything streamed", least, batch=True)

    def half(self) -> None:
        """Half of the layers stay on the device; and three quarters."""
        layers = len(self._open().layers)
        for name, kept in (("half on the device", layers // 2), ("three quarters on the device", layers * 3 // 4)):
            self._measure(name, self._limit(kept))

    def everything(self) -> None:
        """All of it stays on the device; beside resident, in turns."""
        whole = replace(self._limit(0), budget_bytes=2 * sum(self._parts.plan.sizes.values()) + 4 * GB)
        self._measure("everything on the device", whole)
        ours, theirs = [], []
        for _ in range(3):
            ours.append(self._time(self._open(), 1, 32).per_second)
            theirs.append(self._time(self._resident, 1, 32).per_second)
        value, base = sorted(ours)[1], sorted(theirs)[1]
        self.say(
            _row(
                "everything on the device, in turns with resident", value, "tok/s", baseline=base, ratio=value / base,
                low=min(ours), high=max(ours),
            )
        )  # fmt: skip

    def peer(self, measure: Peer) -> None:
        """Another tool, with the resident model's own weights; the rows of surfw that it is to be compared with."""
        self._close_streaming()
        for name, found, ours in measure(self._resident, self._device.torch_device):
            equal = found.tokens[0] == self._want[1].tokens[0][: len(found.tokens[0])]
            self.say(_row(name, found.per_second, "tok/s", note=f"same tokens as resident: {equal}"))
            mine = next((one for one in self.rows if one.name == ours), None)
            if mine is not None:
                ratio = mine.value / found.per_second
                self.say(_row(f"{ours}, against {name}", mine.value, "tok/s", baseline=found.per_second, ratio=ratio))

    def server(self) -> None:
        """From a server on this machine, with little host memory, and little of the device's."""
        from surfw.bench.wire import peer, serve_store
        from surfw.chunking.in_place import publish_place

        self._close_streaming()
        store = asyncio.run(publish_place(str(self._folder / "model")))
        with peer(serve_store, str(store), 256) as served:
            self._capped("over a server", f"ws://127.0.0.1:{served.port}", None)

    def disk(self, folder: str | None) -> None:
        """From a disk, with little host memory, and little of the device's."""
        from surfw.bench.peers.reads import read_files

        self._close_streaming()
        with tempfile.TemporaryDirectory(prefix="surfw-bench-", dir=folder) as place:
            copy = Path(place) / "model"
            start = time.perf_counter()
            shutil.copytree(self._folder / "model", copy)
            size = sum(one.stat().st_size for one in copy.glob("*.safetensors"))
            self.say(_row("copied to the disk", size / (time.perf_counter() - start) / GB, "GB/s"))
            rate = read_files(sorted(copy.glob("*.safetensors")), seconds=3.0).bytes_per_second
            self.say(_row("reads of the disk", rate / GB, "GB/s"))
            self._capped("from disk", str(copy), rate)

    def close(self) -> None:
        """Let go of everything."""
        self._close_streaming()
        if self._client is not None:
            self._client.close()
        self._resident = None
        self._device.close()

    @property
    def _parts(self) -> Any:
        """The engine of the device's memory."""
        return self._open()._engine  # noqa: SLF001 - ours

    def _open(self) -> StreamingModel:
        assert self._streaming is not None, "it was opened before"
        return self._streaming

    def _close_streaming(self) -> None:
        if self._streaming is not None:
            self._streaming.close()
            self._streaming = None
            gc.collect()

    def _limit(self, kept_layers: int) -> Limit:
        """A budget of device memory with which so many layers stay, and the KV cache of a batch has its place."""
        engine = self._parts
        needs = engine.needs
        layer = max(engine.plan.sizes[name] for name in self._open().layers)
        cost = kv_cost(self._open().model.config, torch.bfloat16)
        reserve = cost.total_bytes(16, 48, sequences=self._batch)
        budget = least_bytes(needs) + reserve + kept_layers * layer
        return Limit(budget_bytes=budget, tier="device")

    def _time(self, model: Any, rows: int, count: int) -> Timing:
        return time_generation(model, prompt(rows, self._device.torch_device), count, self._device.synchronize)

    def _measure(self, name: str, limit: Limit, *, batch: bool = False) -> None:
        """One budget: speed, share of the copy rate, equality, peak."""
        streaming, engine = self._open(), self._parts
        engine.relimit(limit)
        budget = limit.budget_bytes or 0
        self._reset_peak()
        metrics, start = streaming.metrics, time.perf_counter()
        before = metrics.count("copied_bytes"), metrics.seconds("copy")
        found = self._time(streaming, 1, _NEW_TOKENS)
        took = time.perf_counter() - start
        moved, copying = metrics.count("copied_bytes") - before[0], metrics.seconds("copy") - before[1]
        plan = engine.plan
        ceiling = self._rate / plan.bytes_per_pass if plan.bytes_per_pass else None
        kept = len(plan.pinned.intersection(streaming.layers))
        note = (
            f"{kept} of {len(streaming.layers)} layers stay, {plan.bytes_per_pass / GB:.2f} GB are copied for each "
            f"token, budget {budget / GB:.2f} GB, first token after {found.first_seconds:.3f} s, copies ran "
            f"{copying / took:.0%} of the time, at {moved / max(copying, 1e-9) / GB:.1f} GB/s"
        )
        self.say(
            _row(
                name, found.per_second, "tok/s", ceiling=ceiling, share=found.per_second / ceiling if ceiling else None,
                baseline=self._resident_rate[1], ratio=found.per_second / self._resident_rate[1], note=note,
            )
        )  # fmt: skip
        for rows in (1, self._batch) if batch else (1,):
            ids = prompt(rows, self._device.torch_device)
            seen = outcome(streaming, ids, 8 if rows == 1 else 4)
            self.say(_row(f"{name}: equal to resident, {_rows(rows)}", float(seen.equals(self._want[rows])), "equal"))
        if batch:
            found = self._time(streaming, self._batch, 12)
            self.say(_row(f"{name}, {_rows(self._batch)}", found.per_second, "tok/s"))
        peak = self._peak_bytes()
        self.say(_row(f"{name}: peak of device memory", peak / GB, "GB", ceiling=budget / GB, share=peak / budget))

    def _capped(self, name: str, source: str, rate: float | None) -> None:
        """Little memory everywhere: all but a few layers come from the source in every pass."""
        with StreamingModel.open(source, device=self._name, cache_size=1) as streaming:
            behind: Any = streaming._engine  # noqa: SLF001 - ours
            least = behind.below.least_budget_bytes
        with StreamingModel.open(source, device=self._name, cache_size=1, memory_budget=least) as streaming:
            engine: Any = streaming._engine  # noqa: SLF001 - ours
            ids = prompt(1, self._device.torch_device)
            generate(streaming, ids, 1)
            before, start = streaming.statistics()["cache"]["fetched_bytes"], time.perf_counter()
            tokens = generate(streaming, ids, 2)
            self._device.synchronize()
            seconds = time.perf_counter() - start
            read = streaming.statistics()["cache"]["fetched_bytes"] - before
            reached = read / seconds
            same = tokens[0] == self._want[1].tokens[0][:2]
            self.say(
                _row(
                    f"{name}, host memory capped", reached / GB, "GB/s", ceiling=None if rate is None else rate / GB,
                    share=None if rate is None else reached / rate,
                    note=f"host budget {least / GB:.2f} GB, {engine.below.plan.bytes_per_pass / GB:.2f} GB a pass, "
                    f"{2 / seconds:.3f} tok/s, same tokens as resident: {same}",
                )
            )  # fmt: skip

    def _allocated_bytes(self) -> int:
        if self._device.torch_device.type == "cuda":
            return torch.cuda.memory_allocated(self._device.torch_device)
        return 0

    def _reset_peak(self) -> None:
        self._device.synchronize()
        if self._device.torch_device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device.torch_device)
        else:
            _simulated(self._parts.device).reset_peak()

    def _peak_bytes(self) -> int:
        """What the streaming model has taken of the device since then, at most."""
        if self._device.torch_device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device.torch_device) - self._outside_bytes
        return _simulated(self._parts.device).peak_bytes


def _simulated(device: Device) -> SimulatedDevice:
    assert isinstance(device, SimulatedDevice), f"{device.name} is neither CUDA's nor simulated"
    return device


def _row(name: str, value: float, unit: str, **more: Any) -> Row:
    return Row(name=name, value=value, unit=unit, **more)


def _rows(count: int) -> str:
    return "one prompt" if count == 1 else f"{count} prompts"
