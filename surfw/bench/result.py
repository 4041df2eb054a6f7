"""The result of a benchmark as data: rows, each with a baseline from the same run, and the machine."""

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
        low: the worst round, if there were several.
        high: the best round.
        baseline: the value to compare with, measured in the same run, in alternation.
        ratio: value ÷ baseline.
        ratios: the ratio of each round, if value and baseline were measured in alternation; higher is better.
        ceiling: the highest possible value, given the limiting resource.
        share: value ÷ ceiling.
        verified: whether bytes were verified; None if that does not apply.
        note: additional information for the reader.
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
    """The fields of a row that summarise several rounds."""

    value: float
    low: float
    high: float


class Spread(NamedTuple):
    """The median and extremes of several rounds, and the value of each round in order."""

    value: float
    low: float
    high: float
    rounds: tuple[float, ...] = ()

    def figures(self) -> Figures:
        """Return the fields for a `Row`."""
        return {"value": self.value, "low": self.low, "high": self.high}

    def ratios(self, baseline: "Spread | None") -> tuple[float, ...]:
        """Return each round ÷ the same round of the baseline; empty if the numbers of rounds differ."""
        if baseline is None or len(self.rounds) != len(baseline.rounds):
            return ()
        return tuple(one / other for one, other in zip(self.rounds, baseline.rounds, strict=True))


def summarise(values: Sequence[float]) -> Spread:
    """Compute the median, minimum and maximum of some values."""
    return Spread(statistics.median(values), min(values), max(values), tuple(values))


def summarise_rates(size_bytes: int, seconds: Sequence[float]) -> Spread:
    """Summarise the rates, in GB/s, of several rounds that each moved `size_bytes`."""
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
    """Describe processor, cores, memory, and versions: of surfw, its main dependencies, and these `libraries`."""
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
