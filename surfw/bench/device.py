"""A model streamed to a device: against the copy rate, against a fully resident model, and against other tools.

A model with random weights is made on the device and written to a folder, from which surfw reads it. All parts run in
this process, one after another. The device may be available for minutes only, so the most important figures come
first, each row is reported as soon as it is known, a failed part becomes a row that says so, and no part starts after
the time limit.
"""

import asyncio
import gc
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from surfw.bench.device_forms import measure_forms, measure_larger
from surfw.bench.device_model import (
    SHAPES,
    Outcome,
    Timing,
    make_model,
    outcome,
    prompt,
    save_model,
    time_generation,
)
from surfw.bench.device_peers import LAST_PEER, PEERS
from surfw.bench.device_streaming import NEW_TOKENS, Measuring, OnRow, Streaming, make_row
from surfw.bench.result import Result, Row, describe_machine, summarise
from surfw.config import GB, MIB
from surfw.errors import ConfigurationError
from surfw.runtime.buffers import Buffer
from surfw.runtime.device import SIMULATED, Device, open_device
from surfw.runtime.loader import flat_view
from surfw.runtime.plan import least_bytes

PARTS = (
    "streamed", "accelerate", "half", "accelerate-half", "whole", "packed", "diffusers", "server", "disk", "70b",
)  # fmt: skip
"""The parts of the benchmark, in the order in which they run."""

_COPIED_BYTES, _MOST_COPIED_BYTES = {"tiny": 16 * MIB}, 1024 * MIB
_LIBRARIES = ("accelerate", "diffusers", "triton")
_HOST_LAYERS = 2
_TURNS, _MOST_TURNS = {"tiny": 2}, 6


def bench_device(
    device: str = "cuda",
    *,
    shape: str = "8b",
    parts: Sequence[str] | None = None,
    folder: str | None = None,
    disk: str | None = None,
    seconds: float = 480.0,
    on_row: OnRow = lambda _: None,
    on_progress: Callable[[str], object] = lambda _: None,
) -> Result:
    """Run the benchmark.

    Args:
        device: where to compute; `simulated` only shows that everything runs, its figures mean nothing.
        shape: one of `SHAPES`.
        parts: a subset of `PARTS`; default: all, but `disk` only if its folder is given.
        folder: where to write the checkpoint, ideally in memory; default: the temporary folder.
        disk: a folder on a disk, for the figures from disk to device.
        seconds: no part starts after this time.
        on_row: called with each row as soon as it is known.
        on_progress: called with a line whenever a part starts.

    Raises:
        ConfigurationError: the shape, a part or the device is unknown, or the folder for `disk` is missing.
    """
    if shape not in SHAPES:
        raise ConfigurationError(f"shape {shape!a:.40} is not known; expected one of {', '.join(SHAPES)}")
    chosen = PARTS if parts is None else parts
    if unknown := [one for one in chosen if one not in PARTS]:
        raise ConfigurationError(f"part {unknown[0]!a:.40} is not known; expected some of {', '.join(PARTS)}")
    if parts is not None and "disk" in parts and disk is None:
        raise ConfigurationError("the part 'disk' needs a folder on a disk (disk, --disk)")
    if (opened := open_device(device)) is None:
        raise ConfigurationError(f"device {device!r} is the CPU; name a CUDA device, or {SIMULATED!r}")
    with tempfile.TemporaryDirectory(prefix="surfw-bench-", dir=folder) as place:
        bench = _Bench(opened, shape, Path(place), disk, on_row)
        until = time.monotonic() + seconds
        works = bench.works([one for one in PARTS if one in chosen and (one != "disk" or disk is not None)])
        try:
            for name, measure in works:
                if time.monotonic() > until:
                    bench.say(Row(name=name, value=0, unit="", note="left out: the time was over"))
                    continue
                on_progress(name)
                try:
                    measure()
                except Exception as exc:  # noqa: BLE001 - one failure must not stop the other parts
                    bench.say(Row(name=name, value=0, unit="", note=f"failed: {exc!r:.300}"))
        finally:
            bench.close()
    return Result(benchmark="device", machine=describe_machine(*_LIBRARIES) | bench.machine(), rows=tuple(bench.rows))


class _Bench(Measuring):
    """The parts, and the results that they share."""

    def __init__(self, device: Device, shape: str, folder: Path, disk: str | None, on_row: OnRow) -> None:
        super().__init__(device, shape, folder, on_row)
        self._disk = disk
        self._resident: Any = None
        self._want: dict[int, Outcome] = {}
        self._resident_rate: dict[int, float] = {}
        self._streaming: Streaming | None = None

    def works(self, parts: Sequence[str]) -> list[tuple[str, Callable[[], object]]]:
        """The named steps that these parts need, in order."""
        known: dict[str, Callable[[], object]] = {
            "streamed": self.streamed, "half": self.half, "whole": self.whole,
            "packed": partial(self._alone, measure_forms), **{name: partial(self.peer, name) for name in PEERS},
            "server": self.server, "disk": self.disk, "70b": self.larger,
        }  # fmt: skip
        first: list[tuple[str, Callable[[], object]]] = [("copies", self.copies)]
        if {*parts} - {"packed", "70b"}:
            first.append(("model", self.make))
        if {*parts} - {"packed", "70b", *PEERS}:
            first.append(("checkpoint", self.write))
        return [*first, *((one, known[one]) for one in parts)]

    def machine(self) -> dict[str, str]:
        """The device and the model's shape."""
        return {"device": self.device.name, "shape": self.shape}

    def copies(self) -> None:
        """Measure how fast memory is copied to the device."""
        size = _COPIED_BYTES.get(self.shape, _MOST_COPIED_BYTES)
        locked, pageable = Buffer(size), Buffer(size)
        for buffer in (locked, pageable):
            flat_view(buffer).fill_(1)
        start = time.perf_counter()
        self.device.page_lock(locked)
        self.say(make_row("page-locking", size / (time.perf_counter() - start) / GB, "GB/s"))
        memory = self.device.allocate(size)
        for name, buffer, rounds in (
            ("copies of page-locked memory", locked, 5),
            ("copies of pageable memory", pageable, 2),
        ):
            self.device.copy(memory, flat_view(buffer)).synchronize()
            start = time.perf_counter()
            for _ in range(rounds):
                copied = self.device.copy(memory, flat_view(buffer))
            copied.synchronize()
            rate = rounds * size / (time.perf_counter() - start)
            self.rate = self.rate or rate
            self.say(make_row(name, rate / GB, "GB/s"))

    def make(self) -> None:
        """Make the model on the device, and measure its speed there."""
        place = self.device.torch_device
        start = time.perf_counter()
        self._resident = make_model(SHAPES[self.shape], place)
        size = _size_bytes(self._resident)
        self.say(make_row("the model", size / GB, "GB", note=f"made in {time.perf_counter() - start:.1f} s"))
        for rows in (1, self.batch):
            found = self._time_resident(rows, 32 if rows == 1 else 16)
            self._resident_rate[rows] = found.per_second
            self._want[rows] = outcome(self._resident, prompt(rows, place), NEW_TOKENS if rows == 1 else 16)
            self.say(make_row(f"resident, {_rows(rows)}", found.per_second, "tok/s"))

    def write(self) -> None:
        """Write the model's checkpoint."""
        start = time.perf_counter()
        save_model(self._resident, self._checkpoint)
        rate = _size_bytes(self._resident) / (time.perf_counter() - start)
        self.say(make_row("the checkpoint written", rate / GB, "GB/s"))

    def streamed(self) -> None:
        """Measure with the smallest device budget that the model runs with."""
        name, streaming = "everything streamed", self._open()
        self._measure(name, streaming, 0)
        self._compare(name, streaming, 1)
        self._compare(name, streaming, self.batch)
        found = streaming.time(self.batch, 12)
        self.say(make_row(f"{name}, {_rows(self.batch)}", found.per_second, "tok/s"))
        self.say_peak(name, streaming)

    def half(self) -> None:
        """Measure with half of the layers resident on the device, and with three quarters."""
        streaming = self._open()
        layers = len(streaming.model.layers)
        for name, kept in (("half on the device", layers // 2), ("three quarters on the device", layers * 3 // 4)):
            self._measure(name, streaming, kept)
            self._compare(name, streaming, 1)
            self.say_peak(name, streaming)

    def whole(self) -> None:
        """Measure with all weights on the device, in alternation with the plain resident model."""
        name, streaming = "everything on the device", self._open()
        self._measure(name, streaming, None)
        self._compare(name, streaming, 1)
        self.say_peak(name, streaming)
        ours: list[float] = []
        theirs: list[float] = []
        turns: list[Callable[[], None]] = [lambda: ours.append(streaming.time(1, 32).per_second)]
        turns.append(lambda: theirs.append(self._time_resident(1, 32).per_second))
        for index in range(_TURNS.get(self.shape, _MOST_TURNS)):
            for turn in turns if index % 2 else turns[::-1]:  # each goes first equally often
                turn()
        found, base = summarise(ours), summarise(theirs)
        note = f"resident {base.low:.2f} to {base.high:.2f}"
        self.say(
            make_row(
                f"{name}, in turns with resident", found.value, "tok/s", base.value, low=found.low, high=found.high,
                note=note,
            )
        )  # fmt: skip

    def peer(self, name: str) -> None:
        """Measure another tool with the resident model's weights, and compare surfw's matching rows with it."""
        timed = PEERS[name](self._resident, self.device.torch_device)
        if name != LAST_PEER:
            self._resident.to(self.device.torch_device)
        for label, found, ours in timed:
            equal = found.tokens[0] == self._want[1].tokens[0][: len(found.tokens[0])]
            self.say(make_row(label, found.per_second, "tok/s", note=f"same tokens as resident: {equal}"))
            mine = next((one for one in self.rows if one.name == ours), None)
            if mine is not None:
                self.say(make_row(f"{ours}, against {label}", mine.value, "tok/s", found.per_second))

    def server(self) -> None:
        """Measure from a server on this machine, with small host and device budgets."""
        from surfw.bench.wire import peer, serve_store
        from surfw.chunking.in_place import publish_place

        self._close_streaming()
        store = asyncio.run(publish_place(str(self._checkpoint)))
        with peer(serve_store, str(store), 256) as served:
            self._capped("over a server", f"ws://127.0.0.1:{served.port}", None)

    def disk(self) -> None:
        """Measure from a disk, with small host and device budgets."""
        from surfw.bench.peers.reads import read_files

        self._close_streaming()
        with tempfile.TemporaryDirectory(prefix="surfw-bench-", dir=self._disk) as place:
            copy = Path(place) / "model"
            start = time.perf_counter()
            shutil.copytree(self._checkpoint, copy)
            size = sum(one.stat().st_size for one in copy.glob("*.safetensors"))
            self.say(make_row("copied to the disk", size / (time.perf_counter() - start) / GB, "GB/s"))
            rate = read_files(sorted(copy.glob("*.safetensors")), seconds=3.0).bytes_per_second
            self.say(make_row("reads of the disk", rate / GB, "GB/s"))
            self._capped("from disk", str(copy), rate)

    def larger(self) -> None:
        """Measure a model that needs most of the memory; must run last, since it drops the shared model."""
        self._resident = None
        shutil.rmtree(self._checkpoint, ignore_errors=True)
        self._alone(measure_larger)

    def close(self) -> None:
        """Release the models and the device."""
        self._close_streaming()
        self._resident = None
        self.device.close()

    @property
    def _checkpoint(self) -> Path:
        return self.folder / "model"

    def _alone(self, measure: Callable[[Measuring], object]) -> None:
        """Run a part that makes its own models."""
        self._close_streaming()
        measure(self)

    def _open(self) -> Streaming:
        if self._streaming is None:
            start = time.perf_counter()
            self._streaming = Streaming(self._checkpoint, self.name, self.batch)
            self._streaming.generate(1)
            self.say(make_row("opened, and read into page-locked memory", time.perf_counter() - start, "s"))
        return self._streaming

    def _close_streaming(self) -> None:
        if self._streaming is not None:
            self._streaming.close()
            self._streaming = None
            gc.collect()

    def _time_resident(self, rows: int, count: int) -> Timing:
        ids = prompt(rows, self.device.torch_device)
        return time_generation(self._resident, ids, count, self.device.synchronize)

    def _measure(self, name: str, streaming: Streaming, kept_layers: int | None) -> None:
        """Measure one budget: the speed, against the resident model's, and its share of the copy ceiling."""
        streaming.relimit(kept_layers)
        self.measure(name, streaming, self._resident_rate[1])

    def _compare(self, name: str, streaming: Streaming, rows: int) -> None:
        seen = streaming.outcome(rows, 8 if rows == 1 else 4)
        self.say(make_row(f"{name}: equal to resident, {_rows(rows)}", float(seen.equals(self._want[rows])), "equal"))

    def _capped(self, name: str, source: str, rate: float | None) -> None:
        """Measure with small budgets: all but a few layers come from the source in every pass.

        With the smallest possible host budget, the source would be read one block at a time; most hosts have memory for
        a few more layers.
        """
        probe = Streaming(source, self.name, self.batch)
        try:
            behind = probe.engine.below
            layer = max(behind.plan.sizes[one] for one in probe.model.layers)
            budget = least_bytes(behind.needs) + behind.limit.reserved_bytes + _HOST_LAYERS * layer
        finally:
            probe.close()
        streaming = Streaming(source, self.name, self.batch, memory_budget=budget)
        try:
            self._say_capped(name, streaming, budget, rate)
        finally:
            streaming.close()

    def _say_capped(self, name: str, streaming: Streaming, budget: int, rate: float | None) -> None:
        streaming.generate(1)
        before, start = streaming.model.metrics.count("fetched_bytes"), time.perf_counter()
        tokens = streaming.generate(2)
        seconds = time.perf_counter() - start
        reached = (streaming.model.metrics.count("fetched_bytes") - before) / seconds
        plan, same = streaming.engine.below.plan, tokens[0] == self._want[1].tokens[0][:2]
        note = (
            f"host budget {budget / GB:.2f} GB, {plan.bytes_per_pass / GB:.2f} GB a pass, {2 / seconds:.3f} tok/s, "
            f"same tokens as resident: {same}"
        )
        ceiling = None if rate is None else rate / GB
        self.say(make_row(f"{name}, host memory capped", reached / GB, "GB/s", ceiling=ceiling, note=note))


def _size_bytes(model: Any) -> int:
    return sum(one.numel() * one.element_size() for one in model.parameters())


def _rows(count: int) -> str:
    return "one prompt" if count == 1 else f"{count} prompts"
