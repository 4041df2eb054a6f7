"""What the machine and the control groups of this process allow it, and how much of that nobody can give back.

Beside the loading of weights: a default budget is made of it. Everything here is read from text files below a root, so
that a folder can stand for a machine. Page cache never counts as in use, as the kernel drops it before it refuses
memory; memory in tmpfs and shared memory does, though the kernel counts it as cache. Swap is nobody's memory.
"""

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil

_IN_USE_V2 = (
    "anon", "shmem", "kernel_stack", "pagetables", "sec_pagetables", "percpu", "sock", "vmalloc", "slab_unreclaimable",
    "zswap",
)  # fmt: skip
"""Entries of a `memory.stat` (version 2) that the kernel cannot give to somebody else. A kernel need not have all."""


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """A limit that this process is under, together with others.

    Attributes:
        place: the control group's folder, or the machine's `/proc/meminfo`.
        limit_bytes: what all under it may take; beyond any memory there is, where the kernel sets no limit.
        in_use_bytes: what they have taken that cannot be reclaimed.
    """

    place: Path
    limit_bytes: int
    in_use_bytes: int


@dataclass(frozen=True, slots=True)
class _Mount:
    """A hierarchy of control groups, or a part of one, that can be seen below a folder."""

    shown: PurePosixPath
    folder: Path

    def inside(self, group: PurePosixPath) -> PurePosixPath | None:
        """Where a group lies below the folder; None if this is not a place that shows it."""
        if not group.is_relative_to(self.shown):
            return None
        inside = group.relative_to(self.shown)
        return None if ".." in inside.parts else inside


def read_limits(root: Path = Path("/")) -> list[MemoryLimit]:
    """The limit of the machine, and those of this process's control groups, from its own to the outermost to be seen.

    Args:
        root: the folder that holds `proc` and what `proc` names.
    """
    return [_machine_limit(root), *_group_limits(root, 1), *_group_limits(root, 2)]


def _machine_limit(root: Path) -> MemoryLimit:
    """The whole memory, of which what is not available is in use.

    `MemAvailable` is the kernel's estimate of what can be had without swapping: what is free, and caches that can be
    dropped, less what it keeps for itself. A sum of what is in use would be too small, as drivers and balloons take
    pages that stand in no other line.
    """
    place = root / "proc/meminfo"
    found = _read_table(place)
    if "MemTotal" in found and "MemAvailable" in found:
        total, available = found["MemTotal"] * 1024, found["MemAvailable"] * 1024
    else:
        memory = psutil.virtual_memory()
        total, available = int(memory.total), int(memory.available)
    return MemoryLimit(place, total, total - available)


def _group_limits(root: Path, version: int) -> Iterator[MemoryLimit]:
    """The limits in one of the two kinds of hierarchies; both are there on a hybrid machine.

    Where no mount shows the group, as when a container sees only a part of the hierarchy under another name, the folder
    that is mounted is taken for it. Levels that are not there are passed over.
    """
    read = _read_v1 if version == 1 else _read_v2
    group = _own_group(root, version)
    if group is None:
        return
    mounts = list(_mounts(root, version))
    shown = [mount for mount in mounts if mount.inside(group) is not None] or mounts[:1]
    for mount in shown:
        own = mount.inside(group) or PurePosixPath()
        for level in (own, *own.parents):
            found = read(mount.folder / level)
            if found is not None:
                yield found


def _own_group(root: Path, version: int) -> PurePosixPath | None:
    """The path of this process's group: `4:memory:/path` in version 1, `0::/path` in version 2."""
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if ("memory" in controllers.split(",")) if version == 1 else not controllers:
                return PurePosixPath(path)
    return None


def _mounts(root: Path, version: int) -> Iterator[_Mount]:
    """Where the hierarchy is mounted, of `/proc/self/mountinfo` (proc_pid_mountinfo(5) has its format)."""
    try:
        lines = (root / "proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        place, _, system = line.partition(" - ")
        kind, _, options = [*system.split(" "), "", ""][:3]
        is_it = kind == "cgroup2" if version == 2 else kind == "cgroup" and "memory" in options.split(",")
        if is_it:
            shown, folder = (_unescape(field) for field in place.split(" ")[3:5])
            yield _Mount(PurePosixPath(shown), root / folder.lstrip("/"))


def _read_v1(folder: Path) -> MemoryLimit | None:
    """A group of version 1; the limit of an ancestor that cannot be seen stands in its statistics.

    Memory of the kernel is not told apart from the kernel's caches there, and is left out.
    """
    limit = _read_number(folder / "memory.limit_in_bytes")
    if limit is None:
        return None
    found = _read_table(folder / "memory.stat")
    in_use = found.get("total_rss", 0) + found.get("total_shmem", 0)
    return MemoryLimit(folder, min(limit, found.get("hierarchical_memory_limit", limit)), in_use)


def _read_v2(folder: Path) -> MemoryLimit | None:
    """A group of version 2; over `memory.high` its processes are slowed down until they barely move."""
    limits = [_read_number(folder / name) for name in ("memory.max", "memory.high")]
    if not (known := [limit for limit in limits if limit is not None]):
        return None
    found = _read_table(folder / "memory.stat")
    return MemoryLimit(folder, min(known), sum(found.get(name, 0) for name in _IN_USE_V2))


def _read_number(file: Path) -> int | None:
    """The number in a file; None if there is no file, or it says `max`."""
    with suppress(OSError, ValueError):
        return int(file.read_text())
    return None


def _read_table(file: Path) -> dict[str, int]:
    """Numbers by their names, from lines such as `anon 4096` or `MemTotal: 4 kB`."""
    with suppress(OSError):
        rows = (line.split() for line in file.read_text().splitlines())
        return {row[0].rstrip(":"): int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}
    return {}


def _unescape(field: str) -> str:
    r"""A path as it is, from one with `\040` for a space."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)
