"""The default memory budget for weights, the claims of open models, and the memory usage of this process.

The default budget is the smallest spare memory over the machine, this process's control groups and their ancestors
(the limit, less the memory in use, less a headroom), less what open models of this process may still take.

Everything is read from `proc`, and from files that it names, below a root directory, so that a folder can stand for a
machine. Page cache never counts as in use, since the kernel drops it before it refuses memory; tmpfs and shared memory
do, although the kernel counts them as cache. Swap does not count as memory.
"""

import os
import re
import resource
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from weakref import WeakSet

import psutil

from surfw.config import MIB, format_size

HEADROOM_BYTES = 192 * MIB
HEADROOM_SHARE = 0.05

_KERNELS = 32
_KERNEL_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""oneDNN's cache of compiled kernels, and that of its binding in torch (ideep), as their environment variables."""

deciding = threading.RLock()
"""Held from finding the default budget until the claim is made, so that two models do not get the same memory."""

_claims: "WeakSet[MemoryClaim]" = WeakSet()
_state = threading.Lock()  # guards the set of claims; never held while a claim's functions are called

_IN_USE_V2 = (
    "anon", "shmem", "kernel_stack", "pagetables", "sec_pagetables", "percpu", "sock", "vmalloc", "slab_unreclaimable",
    "zswap",
)  # fmt: skip
"""Entries of `memory.stat` (cgroup v2) whose memory the kernel cannot reclaim. Not every kernel has all of them."""


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """A memory limit that applies to this process and possibly to others.

    Attributes:
        place: the control group's folder, or the machine's `/proc/meminfo`.
        limit_bytes: what all processes under it may take together; beyond all memory if the kernel sets no limit.
        in_use_bytes: memory that they use and that cannot be reclaimed.
    """

    place: Path
    limit_bytes: int
    in_use_bytes: int


def read_limits(root: Path = Path("/")) -> list[MemoryLimit]:
    """The limits of the machine and of this process's control groups, from its own to the outermost visible one."""
    return [_machine_limit(root), *_group_limits(root, 1), *_group_limits(root, 2)]


def read_smallest_limit(root: Path = Path("/")) -> MemoryLimit:
    """The smallest of these limits: the most memory that this process can ever have."""
    return min(read_limits(root), key=lambda one: one.limit_bytes)


def _machine_limit(root: Path) -> MemoryLimit:
    """The machine's total memory; whatever is not available counts as in use.

    `MemAvailable` is the kernel's estimate of what can be allocated without swapping. A sum of the lines for memory in
    use would miss the pages of drivers and balloons, which no line contains.
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
    """The limits in the cgroup hierarchy of this version; a hybrid machine has both versions.

    If no mount contains the group, as in a container that sees only part of the hierarchy under another name, the
    mounted folder is used instead. Missing levels are skipped.
    """
    read = _read_v1 if version == 1 else _read_v2
    group = _own_group(root, version)
    if group is None:
        return
    mounts = list(_mounts(root, version))
    inside = [(folder, group.relative_to(shown)) for shown, folder in mounts if group.is_relative_to(shown)]
    shown = [(folder, own) for folder, own in inside if ".." not in own.parts]
    for folder, own in shown or [(folder, PurePosixPath()) for _, folder in mounts[:1]]:
        for level in (own, *own.parents):
            found = read(folder / level)
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


def _mounts(root: Path, version: int) -> Iterator[tuple[PurePosixPath, Path]]:
    """The mounted groups and their mount points, from `/proc/self/mountinfo` (see proc_pid_mountinfo(5))."""
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
            yield PurePosixPath(shown), root / folder.lstrip("/")


def _read_v1(folder: Path) -> MemoryLimit | None:
    """The limit of a version 1 group, or a lower one of an ancestor, which its statistics contain.

    Kernel memory is not counted, since version 1 does not distinguish it from the kernel's caches.
    """
    limit = _read_number(folder / "memory.limit_in_bytes")
    if limit is None:
        return None
    found = _read_table(folder / "memory.stat")
    in_use = found.get("total_rss", 0) + found.get("total_shmem", 0)
    return MemoryLimit(folder, min(limit, found.get("hierarchical_memory_limit", limit)), in_use)


def _read_v2(folder: Path) -> MemoryLimit | None:
    """The limit of a version 2 group; above `memory.high`, its processes are throttled almost to a standstill."""
    limits = [_read_number(folder / name) for name in ("memory.max", "memory.high")]
    if not (known := [limit for limit in limits if limit is not None]):
        return None
    found = _read_table(folder / "memory.stat")
    return MemoryLimit(folder, min(known), sum(found.get(name, 0) for name in _IN_USE_V2))


def _read_number(file: Path) -> int | None:
    """The number in a file; None if the file is missing or says `max`."""
    with suppress(OSError, ValueError):
        return int(file.read_text())
    return None


def _read_table(file: Path) -> dict[str, int]:
    """Numbers by name, from lines such as `anon 4096` or `MemTotal: 4 kB`."""
    with suppress(OSError):
        rows = (line.split() for line in file.read_text().splitlines())
        return {row[0].rstrip(":"): int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}
    return {}


def _unescape(field: str) -> str:
    r"""A path with escapes such as `\040` for a space resolved."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)


class MemoryClaim:
    """The memory that an open model may take, part of which it already holds. Thread-safe.

    A model makes its claim like this, and closes it when the model is closed:

        with deciding:
            plan = make_a_plan(find_default_budget().budget_bytes)
            claim = MemoryClaim(peak_bytes, held_bytes, mapped)

    A claim that is garbage-collected ends as well.
    """

    def __init__(
        self,
        peak_bytes: Callable[[], int],
        held_bytes: Callable[[], int],
        mapped: Callable[[], Mapping[Hashable, int]] = dict,
    ) -> None:
        """Claim memory. The functions are called from any thread and must neither raise nor block for long.

        Args:
            peak_bytes: returns the most memory that the model may take under its current plan, including weights that
                are mapped from a file: unless they are in the page cache, the model is slow.
            held_bytes: returns how much of that it holds now in anonymous memory, which the kernel counts as in use.
            mapped: returns the bytes that it has mapped of that, keyed by mapping: several models may share one.
        """
        self._peak_bytes = peak_bytes
        self._held_bytes = held_bytes
        self.mapped = mapped
        with _state:
            _claims.add(self)

    @property
    def open_bytes(self) -> int:
        """What the model may still take; what it already holds counts as memory in use."""
        return max(0, self._peak_bytes() - self._held_bytes())

    def close(self) -> None:
        """End the claim; a second call does nothing."""
        with _state:
            _claims.discard(self)


def claimed_bytes() -> int:
    """What all open models of this process may still take; a mapping that several share is counted once."""
    with _state:
        claims = list(_claims)
    mapped: dict[Hashable, int] = {}
    own_bytes = 0
    for claim in claims:
        found = claim.mapped()
        own_bytes += max(0, claim.open_bytes - sum(found.values()))
        mapped.update(found)
    return own_bytes + sum(mapped.values())


@dataclass(frozen=True, slots=True)
class DefaultBudget:
    """What weights may take by default.

    Attributes:
        budget_bytes: 0 if there is no memory to spare.
        reason: what limits it, in words.
    """

    budget_bytes: int
    reason: str


def find_default_budget(root: Path = Path("/")) -> DefaultBudget:
    """What weights may take by default."""
    limit, claimed = min(read_limits(root), key=_spare_bytes), claimed_bytes()
    open_models = f", {format_size(claimed)} may still be taken by other open models" if claimed else ""
    return DefaultBudget(
        max(0, _spare_bytes(limit) - claimed),
        f"{limit.place} allows {format_size(limit.limit_bytes)}, {format_size(limit.in_use_bytes)} of it is in use, "
        f"{format_size(headroom_bytes(limit.limit_bytes))} is headroom{open_models}",
    )


def headroom_bytes(limit_bytes: int) -> int:
    """The part of a limit that weights leave free: 192 MiB, or 5 % if that is more.

    It is for the code of torch and transformers (116 MB of page cache that is always in use), activations, memory that
    the allocator keeps, and what other processes take meanwhile. It does not cover KV caches; see `kv_cache`.
    """
    return max(HEADROOM_BYTES, int(limit_bytes * HEADROOM_SHARE))


def bound_kernels() -> None:
    """Bound torch's caches of kernels, which it compiles per product shape, unless the environment sets their size.

    Each of the two caches keeps 1024 kernels, which came to 0.9 GB after computing with 512 lengths in bfloat16. With
    32, it is 0.02 GB: enough for the products of a dense model at two lengths; if more shapes alternate, each product
    takes 0.3 ms longer. This only has an effect before the first product in the process.
    """
    for name in _KERNEL_CACHES:
        os.environ.setdefault(name, str(_KERNELS))


def rss_bytes() -> int:
    """The current resident memory of this process, including the code of its libraries."""
    return int(psutil.Process().memory_info().rss)


def peak_rss_bytes(root: Path = Path("/")) -> int:
    """The peak resident memory of this process.

    On Linux, `ru_maxrss` starts at the value of the parent process; `VmHWM` does not.
    """
    found = _read_table(root / "proc/self/status").get("VmHWM")
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if found is None else found) * 1024


def _spare_bytes(limit: MemoryLimit) -> int:
    return limit.limit_bytes - limit.in_use_bytes - headroom_bytes(limit.limit_bytes)
