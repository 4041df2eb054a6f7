"""What memory there is for this process, and what it took."""

import resource
from pathlib import Path

import psutil

_CGROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)


def available_bytes() -> int:
    """What the machine, or the cgroup this process sees as its own, can still give."""
    available = int(psutil.virtual_memory().available)
    for limit, usage in _CGROUPS:
        try:
            available = min(available, max(0, int(limit.read_text()) - int(usage.read_text())))
        except (OSError, ValueError):
            continue
    return available


def peak_rss_bytes() -> int:
    """The process's own high-water mark of resident memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
