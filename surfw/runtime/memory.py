"""What memory there is for this process, and what it took."""

import resource
from contextlib import suppress
from pathlib import Path

import psutil

_CGROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)
_STATUS = Path("/proc/self/status")


def available_bytes() -> int:
    """What the machine, or the cgroup this process sees as its own, can still give."""
    available = int(psutil.virtual_memory().available)
    for limit, usage in _CGROUPS:
        try:
            available = min(available, max(0, int(limit.read_text()) - int(usage.read_text())))
        except (OSError, ValueError):
            continue
    return available


def default_budget_bytes() -> int:
    """What weights may take where nobody says: a good half of what there is, as activations need memory too."""
    return available_bytes() * 6 // 10


def peak_rss_bytes() -> int:
    """The process's own high-water mark of resident memory.

    On Linux, `ru_maxrss` starts from that of the process which started this one; `VmHWM` does not.
    """
    with suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
