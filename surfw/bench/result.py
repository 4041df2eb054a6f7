"""What a benchmark found, as data: rows with a baseline from the same run, and the machine. Nothing here renders."""

import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from surfw.config import GB, GIB

_LIBRARIES = ("surfw", "torch", "transformers", "websockets", "blake3")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One measurement.

    Attributes:
        name: what was measured, and how it varied.
        value: the median.
        unit: of value, baseline and ceiling.
        baseline: what it is compared with, measured in the same run, in alternation.
        ratio: value ÷ baseline.
        ceiling: the most that was possible, given what limits it.
        share: value ÷ ceiling.
        verified: whether bytes were verified, where there are any.
    """

    name: str
    value: float
    unit: str
    baseline: float | None = None
    ratio: float | None = None
    ceiling: float | None = None
    share: float | None = None
    verified: bool | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """The rows of a benchmark, and the machine they were measured on."""

    benchmark: str
    machine: dict[str, str]
    rows: tuple[Row, ...]

    def as_dict(self) -> dict[str, Any]:
        """The same as plain data, for JSON."""
        return asdict(self)


def spread(size_bytes: int, seconds: Sequence[float]) -> str:
    """The slowest and the fastest of several rounds that moved as many bytes, in GB/s."""
    return f"{size_bytes / max(seconds) / GB:.2f} to {size_bytes / min(seconds) / GB:.2f}"


def describe_machine() -> dict[str, str]:
    """Processor, cores, memory, and the versions that matter."""
    libraries = {name: found for name in _LIBRARIES if (found := _version(name))}
    return {
        "cpu": _processor(),
        "cores": str(psutil.cpu_count()),
        "memory": f"{psutil.virtual_memory().total / GIB:.0f} GiB",
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        **libraries,
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
