"""Caps the memory of one process, page cache included, with its own control group (cgroup v1 or v2).

The group is created directly below the mount of the memory controller. At the end, all processes still in it are killed
and the group is removed.
"""

import os
import shutil
import signal
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from surfw.config import MB, format_size
from surfw.errors import ConfigurationError, SurfwError

LEAST_BYTES = 128 * MB
"""The least cap: Python with the imports of any peer takes this much."""

_ENTER = 'echo $$ > "$0" && exec "$@"'
_DROP_CACHES = Path("/proc/sys/vm/drop_caches")
_REMOVALS = 50
_REMOVAL_SECONDS = 0.1


class _Controls(NamedTuple):
    """The names of the memory controller's files."""

    limit: str  # the memory limit
    swap: str  # the swap limit, set to prevent swapping; absent in some kernels
    swap_counts_memory: bool  # whether the swap limit covers memory and swap together, or swap alone
    peak: str  # the peak memory use
    events: str  # has a line `oom_kill` with the number of killed processes


_V1 = _Controls(
    "memory.limit_in_bytes", "memory.memsw.limit_in_bytes", True, "memory.max_usage_in_bytes", "memory.oom_control"
)
_V2 = _Controls("memory.max", "memory.swap.max", False, "memory.peak", "memory.events")


@dataclass(frozen=True, slots=True)
class MemoryGroup:
    """A group with a cap; its folder exists while the context of `memory_group` is open."""

    path: Path
    controls: _Controls

    def command(self, arguments: Sequence[str]) -> list[str]:
        """Return the command line that starts these arguments inside the group."""
        return [shutil.which("sh") or "/bin/sh", "-c", _ENTER, str(self.path / "cgroup.procs"), *arguments]

    @property
    def peak_bytes(self) -> int | None:
        """The peak memory use, page cache included; None if the kernel does not report it."""
        with suppress(OSError):
            return int((self.path / self.controls.peak).read_text())
        return None

    @property
    def kills(self) -> int:
        """The number of processes killed because they exceeded the cap."""
        events = dict(line.split() for line in (self.path / self.controls.events).read_text().splitlines())
        return int(events.get("oom_kill", 0))

    def limit(self, cap_bytes: int) -> None:
        """Set the cap."""
        (self.path / self.controls.limit).write_text(str(cap_bytes))
        with suppress(OSError):  # a kernel without swap accounting
            (self.path / self.controls.swap).write_text(str(cap_bytes if self.controls.swap_counts_memory else 0))

    def remove(self) -> None:
        """Kill all processes still in the group, and remove it.

        Raises:
            SurfwError: the group cannot be removed.
        """
        for _ in range(_REMOVALS):
            for process in (self.path / "cgroup.procs").read_text().split():
                with suppress(ProcessLookupError):
                    os.kill(int(process), signal.SIGKILL)
            with suppress(OSError):
                self.path.rmdir()
                return
            time.sleep(_REMOVAL_SECONDS)  # a killed process leaves its group a moment later
        raise SurfwError(f"the control group {self.path} cannot be removed; remove it with rmdir")


@contextmanager
def memory_group(cap_bytes: int) -> Iterator[MemoryGroup]:
    """Create a group whose processes can use at most this much memory together.

    Raises:
        ConfigurationError: the cap is too small for any peer, or cannot be set here.
    """
    if cap_bytes < LEAST_BYTES:
        raise ConfigurationError(
            f"a cap of {format_size(cap_bytes)} is too small, expected {format_size(LEAST_BYTES)} or more: no "
            "peer can start in less"
        )
    root, controls = _find_controller()
    group = MemoryGroup(root / f"surfw-bench-{uuid.uuid4().hex}", controls)
    try:
        group.path.mkdir()
    except OSError as exc:
        raise _no_cap(f"{root} takes no new group: {exc.strerror}") from exc
    try:
        try:
            group.limit(cap_bytes)
        except OSError as exc:
            raise _no_cap(f"{group.path} takes no limit: {exc.strerror}") from exc
        yield group
    finally:
        group.remove()


def drop_page_cache() -> bool:
    """Drop the kernel's page cache: files already in it would not count against a process's cap.

    Returns:
        Whether it was dropped, which takes root.
    """
    os.sync()
    with suppress(OSError):
        _DROP_CACHES.write_text("3")
        return True
    return False


def _find_controller() -> tuple[Path, _Controls]:
    """Return the mount of the memory controller, and the names of its files."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, _, kind = line.partition(" - ")
        folder = Path(mount.split()[4])
        system, _, options = kind.split(maxsplit=2)
        if system == "cgroup" and "memory" in options.split(","):
            return folder, _V1
        with suppress(OSError):
            if system == "cgroup2" and "memory" in (folder / "cgroup.subtree_control").read_text().split():
                return folder, _V2
    raise _no_cap("no control group hierarchy with a memory controller is mounted")


def _no_cap(reason: str) -> ConfigurationError:
    return ConfigurationError(
        f"memory cannot be capped here: {reason}; run this as root where cgroups have the memory controller, or leave "
        "the cap out"
    )
