"""The result of a benchmark, as data: rows with a baseline from the same run, and the machine."""

import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple, TypedDict

import psutil

from surfw.config import GB, GIB

_LIBRARIES = ("surfw", "torch", "transformers", "websockets", "blake3")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One measurement.

    Attributes:
        name: what was measured.
        value: the median of all rounds.
        unit: of value, low, high, baseline and ceiling.
        low: the worst round, where there were several.
        high: the best round.
        baseline: what it is compared with, measured in the same run, in alternation.
        ratio: value ÷ baseline.
        ratios: the same of each round, where value and baseline were measured in turn; a higher one is better.
        ceiling: the most that was possible, given what limits it.
        share: value ÷ ceiling.
        verified: whether bytes were verified, where there are any.
        note: what a reader has to know about it.
    """

    name: str
    value: float
    unit: str
    low: float | None = None
    high: float | None = None
    baseline: float | None = None
    ratio: float | None = None
    ceiling: float | None = None
    share: float | None = None
    verified: bool | None = None
    note: str = ""
    ratios: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """The rows of a benchmark, and the machine they were measured on."""

    benchmark: str
    machine: dict[str, str]
    rows: tuple[Row, ...]


class Figures(TypedDict):
    """What a row says of several rounds."""

    value: float
    low: float
    high: float


class Spread(NamedTuple):
    """The median of several rounds, the extremes, and all of them, in the order they were."""

    value: float
    low: float
    high: float
    rounds: tuple[float, ...] = ()

    def figures(self) -> Figures:
        """Return what a row says of it."""
        return {"value": self.value, "low": self.low, "high": self.high}

    def ratios(self, baseline: "Spread | None") -> tuple[float, ...]:
        """Return each round ÷ the same round of the baseline; nothing if those are not as many."""
        if baseline is None or len(self.rounds) != len(baseline.rounds):
            return ()
        return tuple(one / other for one, other in zip(self.rounds, baseline.rounds, strict=True))


def summarise(values: Sequence[float]) -> Spread:
    """The median of some values, the lowest and the highest."""
    return Spread(statistics.median(values), min(values), max(values), tuple(values))


def summarise_rates(size_bytes: int, seconds: Sequence[float]) -> Spread:
    """The rates of several rounds that moved as many bytes, in GB/s."""
    return summarise([size_bytes / one / GB for one in seconds])


def rate_row(
    name: str,
    rate: Spread,
    baseline: Spread | None = None,
    *,
    ceiling: float | None = None,
    verified: bool | None = None,
    note: str = "",
) -> Row:
    """Make the row of a rate in GB/s, with its ratio to the baseline and its share of the ceiling."""
    return Row(
        name=name,
        unit="GB/s",
        **rate.figures(),
        baseline=None if baseline is None else baseline.value,
        ratio=None if baseline is None else rate.value / baseline.value,
        ceiling=ceiling,
        share=None if ceiling is None else rate.value / ceiling,
        verified=verified,
        note=note,
        ratios=rate.ratios(baseline),
    )


def describe_machine(*libraries: str) -> dict[str, str]:
    """Processor, cores, memory, and the versions that matter: surfw's, what it stands on, and these `libraries`."""
    versions = {name: found for name in (*_LIBRARIES, *libraries) if (found := _version(name))}
    return {
        "cpu": _processor(),
        "cores": str(psutil.cpu_count()),
        "memory": f"{psutil.virtual_memory().total / GIB:.0f} GiB",
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        **versions,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None
