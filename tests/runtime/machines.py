"""Folders that simulate a machine's files about memory and control groups."""

from collections.abc import Mapping
from pathlib import Path

MIB = 1 << 20
NO_LIMIT = 9223372036854771712
"""The value in version 1 for no limit."""

V1_MOUNTS = (
    "31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755",
    "32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu",
    "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory",
)
HYBRID_MOUNTS = (*V1_MOUNTS, "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw,nsdelegate")
V2_MOUNTS = ("30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot",)


def machine(
    root: Path, *, groups: str, mounts: tuple[str, ...], total: int = 16_000 * MIB, available: int = 12_000 * MIB
) -> Path:
    """A machine with this many bytes of memory, and these control groups of the process."""
    own = root / "proc/self"
    own.mkdir(parents=True)
    (root / "proc/meminfo").write_text(
        f"MemTotal:       {total // 1024} kB\nMemFree:        5 kB\n"
        f"MemAvailable:   {available // 1024} kB\nHugePages_Total:       0\n"
    )
    (own / "cgroup").write_text(groups)
    (own / "mountinfo").write_text("".join(f"{line}\n" for line in ("22 27 0:21 / /proc rw - proc proc rw", *mounts)))
    return root


def group_v1(root: Path, path: str, limit: int, **stat: int) -> None:
    """A control group of version 1, with entries of its `memory.stat`."""
    folder = root / "sys/fs/cgroup/memory" / path
    write(folder, {"memory.limit_in_bytes": str(limit), "memory.usage_in_bytes": str(NO_LIMIT)})
    _write_stat(folder, {"cache": 900 * MIB, "rss": 1, "shmem": 1, "total_cache": 7_000 * MIB} | stat)


def group_v2(root: Path, path: str, *, limit: int | None = None, high: int | None = None, **stat: int) -> None:
    """A control group of version 2."""
    folder = root / "sys/fs/cgroup" / path
    write(
        folder,
        {"memory.max": str(limit or "max"), "memory.high": str(high or "max"), "memory.current": str(NO_LIMIT)},
    )
    _write_stat(folder, {"file": 7_000 * MIB, "slab_reclaimable": 900 * MIB, "file_mapped": 50 * MIB} | stat)


def write(folder: Path, files: Mapping[str, str]) -> None:
    """Write files of one line each."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(f"{text}\n")


def _write_stat(folder: Path, stat: Mapping[str, int]) -> None:
    write(folder, {"memory.stat": "\n".join(f"{name} {value}" for name, value in stat.items())})
