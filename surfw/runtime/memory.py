"""What memory weights may take where nobody says, what open models lay claim to, and what this process took.

The default budget is the smallest, over the machine and this process's control groups and their ancestors, of the limit
less the memory in use there, less a headroom; and from that, what open models of this process may still come to take.
"""

import resource
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakSet

import psutil

from surfw.config import MIB, format_size
from surfw.runtime.limits import MemoryLimit, read_limits

HEADROOM_BYTES = 192 * MIB
HEADROOM_SHARE = 0.05

deciding = threading.RLock()
"""Held from asking for the default budget until the claim is laid, so that two models do not get the same memory."""

_claims: "WeakSet[MemoryClaim]" = WeakSet()
_state = threading.Lock()  # guards the set of claims; never held while one is asked something


class MemoryClaim:
    """Memory that an open model may come to take, a part of which it holds already. Any thread may use it.

    A model lays its claim like this, and gives it up when it is closed:

        with deciding:
            plan = make_a_plan(default_budget_bytes())
            claim = MemoryClaim(plan.peak_bytes, held_bytes)

    A claim that nobody refers to any more is given up too.

    Attributes:
        peak_bytes: the most it may take; set it anew when the plan changes.
    """

    def __init__(self, peak_bytes: int, held_bytes: Callable[[], int]) -> None:
        """Lay claim to memory.

        Args:
            peak_bytes: the most memory it may take, weights that are mapped from a file included: they are page cache,
                which the kernel can take back, and the model is slow without.
            held_bytes: tells what it holds of that in anonymous memory now, which the kernel counts as in use; it does
                not count page cache. Called from any thread, it neither raises nor waits long.
        """
        self.peak_bytes = peak_bytes
        self._held_bytes = held_bytes
        with _state:
            _claims.add(self)

    @property
    def open_bytes(self) -> int:
        """What it may still come to take; what it holds counts as memory in use."""
        return max(0, self.peak_bytes - self._held_bytes())

    def close(self) -> None:
        """Give the claim up; a second time does nothing."""
        with _state:
            _claims.discard(self)


def claimed_bytes() -> int:
    """What all open models of this process may still come to take."""
    with _state:
        claims = list(_claims)
    return sum(claim.open_bytes for claim in claims)


@dataclass(frozen=True, slots=True)
class DefaultBudget:
    """What weights may take where nobody says.

    Attributes:
        budget_bytes: 0 if there is no memory to spare.
        reason: what limits it, for people.
    """

    budget_bytes: int
    reason: str


def find_default_budget(root: Path = Path("/")) -> DefaultBudget:
    """What weights may take where nobody says.

    Args:
        root: the folder that holds `proc` and what `proc` names.
    """
    limit, claimed = min(read_limits(root), key=_spare_bytes), claimed_bytes()
    open_models = f", {format_size(claimed)} may still be taken by other open models" if claimed else ""
    return DefaultBudget(
        max(0, _spare_bytes(limit) - claimed),
        f"{limit.place} allows {format_size(limit.limit_bytes)}, {format_size(limit.in_use_bytes)} of it is in use, "
        f"{format_size(headroom_bytes(limit.limit_bytes))} is headroom{open_models}",
    )


def default_budget_bytes(root: Path = Path("/")) -> int:
    """What weights may take where nobody says; 0 if there is no memory to spare.

    Args:
        root: the folder that holds `proc` and what `proc` names.
    """
    return find_default_budget(root).budget_bytes


def headroom_bytes(limit_bytes: int) -> int:
    """What of a limit weights leave alone: 192 MiB, or 5 % where that is more.

    It is for the code of torch and transformers (116 MB of page cache that is in use all the time), for activations,
    for what the allocator keeps, and for what others under the same limit take meanwhile. A KV cache that may become
    large is not in it; see `surfw.runtime.kv_cache`.
    """
    return max(HEADROOM_BYTES, int(limit_bytes * HEADROOM_SHARE))


def anonymous_bytes(root: Path = Path("/")) -> int:
    """The process's own resident memory that is no page cache: its heaps, buffers and stacks."""
    found = _status_bytes("RssAnon", root)
    return rss_bytes() if found is None else found


def rss_bytes() -> int:
    """The process's own resident memory now, the code of its libraries included."""
    return int(psutil.Process().memory_info().rss)


def peak_rss_bytes(root: Path = Path("/")) -> int:
    """The process's own high-water mark of resident memory.

    On Linux, `ru_maxrss` starts from that of the process which started this one; `VmHWM` does not.
    """
    found = _status_bytes("VmHWM", root)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if found is None else found


def _spare_bytes(limit: MemoryLimit) -> int:
    return limit.limit_bytes - limit.in_use_bytes - headroom_bytes(limit.limit_bytes)


def _status_bytes(name: str, root: Path) -> int | None:
    """A size of `/proc/self/status`; None if it is not there."""
    with suppress(OSError):
        for line in (root / "proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return None
