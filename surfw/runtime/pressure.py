"""Memory pressure while models are open: detects it from the kernel's reports, and makes models free memory.

A budget is decided once, but other processes may take memory later. While a model is open, a thread checks the limits
of this process every half second. There is pressure if the kernel reports it, as stalls (PSI) or as a limit that was
reached, and little memory is left besides what cannot be reclaimed. Reaching a limit alone is no sign: reading files
through the page cache does so all the time. If only half of that memory is left, no report is needed: with no page
cache left to drop, the kernel kills processes next.

Models then free the missing memory, the largest first, and stream more. They keep what they need to run, and do not
take the memory again by themselves.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakSet

from surfw.config import MIB, format_size
from surfw.runtime.memory import MemoryLimit, read_limits

logger = logging.getLogger("surfw.runtime")

INTERVAL_SECONDS = 0.5

_LOW_BYTES, _LOW_SHARE = 48 * MIB, 0.02
"""How much of a limit must stay free; the larger value counts. With less, the kernel keeps rereading library code."""

_STALLED_SHARE = 0.1
"""The share of time for which some task waited for memory; from here on it counts as pressure."""

_PAUSE = 2
"""The number of checks to skip after models have freed memory."""


@dataclass(frozen=True, slots=True)
class Look:
    """The state of one limit, as reported by the kernel.

    Attributes:
        limit: the limit, and how much of it is in use and cannot be reclaimed.
        reached: how often it was reached so far.
        stalled_seconds: how long some task under it has waited for memory so far.
        at_seconds: the time of the report.
    """

    limit: MemoryLimit
    reached: int
    stalled_seconds: float
    at_seconds: float

    @property
    def left_bytes(self) -> int:
        """How much memory can still be taken."""
        return self.limit.limit_bytes - self.limit.in_use_bytes


def missing_bytes(before: Look, now: Look) -> int:
    """How much memory is missing under a limit, from two reports; 0 if there is no pressure."""
    low = max(_LOW_BYTES, int(now.limit.limit_bytes * _LOW_SHARE))
    passed = now.at_seconds - before.at_seconds
    is_stalled = passed > 0 and (now.stalled_seconds - before.stalled_seconds) / passed >= _STALLED_SHARE
    is_reported = is_stalled or now.reached > before.reached
    is_short = now.left_bytes < (low if is_reported else low // 2)
    return 2 * low - now.left_bytes if is_short else 0


def look(root: Path = Path("/")) -> dict[Path, Look]:
    """The current state of all limits, by place."""
    return {one.place: _look_at(one) for one in read_limits(root)}


def _look_at(limit: MemoryLimit) -> Look:
    machine = limit.place.name == "meminfo"
    psi = limit.place.parent / "pressure/memory" if machine else limit.place / "memory.pressure"
    reached = 0 if machine else _read_reached(limit.place)
    return Look(limit, reached, _read_stalled(psi), time.monotonic())


def _read_stalled(file: Path) -> float:
    """Seconds from a line such as `some avg10=0.00 avg60=0.00 avg300=0.00 total=1234`, whose total is microseconds."""
    try:
        (line,) = (one for one in file.read_text().splitlines() if one.startswith("some "))
        return int(line.rpartition("total=")[2]) / 1e6
    except (OSError, ValueError):
        return 0.0


def _read_reached(folder: Path) -> int:
    """How often a group's limit was reached: `memory.failcnt`, or `high` and `max` of `memory.events`."""
    try:
        return int((folder / "memory.failcnt").read_text())
    except (OSError, ValueError):
        pass
    try:
        lines = dict(line.split() for line in (folder / "memory.events").read_text().splitlines())
        return int(lines.get("high", 0)) + int(lines.get("max", 0))
    except (OSError, ValueError):
        return 0


@dataclass(frozen=True, eq=False, slots=True, weakref_slot=True)
class Yielder:
    """A model that can free memory, as long as this object is alive. Its functions are called from the watch's thread.

    Attributes:
        name: of the model.
        held_bytes: returns how much memory it holds that the kernel counts as in use.
        give_back: frees about this many bytes, and returns the budget before and after; None if it can free nothing.
    """

    name: str
    held_bytes: Callable[[], int]
    give_back: Callable[[int], tuple[int, int] | None]


class PressureWatch:
    """Checks for memory pressure in a thread, while there are models that can free memory."""

    def __init__(self, root: Path = Path("/"), interval_seconds: float = INTERVAL_SECONDS) -> None:
        """Start no thread yet; `root` is a folder that stands for a machine."""
        self._root, self._interval = root, interval_seconds
        self._lock = threading.Lock()
        self._yielders: WeakSet[Yielder] = WeakSet()
        self._wake: threading.Event | None = None
        self._thread: threading.Thread | None = None

    def add(self, yielder: Yielder) -> None:
        """Include this model from now on."""
        with self._lock:
            self._yielders.add(yielder)
            if self._thread is None:
                self._wake = threading.Event()
                self._thread = threading.Thread(
                    target=self._watch, args=(self._wake,), name="surfw-pressure", daemon=True
                )
                self._thread.start()

    def remove(self, yielder: Yielder) -> None:
        """Exclude this model from now on; the watch's thread may still be calling its functions."""
        with self._lock:
            self._yielders.discard(yielder)
            if self._yielders or self._thread is None or self._wake is None:
                return
            thread, self._thread = self._thread, None
            self._wake.set()
        if thread is not threading.current_thread():
            thread.join()

    def _watch(self, wake: threading.Event) -> None:
        before, pause = look(self._root), 0
        while not wake.wait(self._interval):
            now = look(self._root)
            pause = max(0, pause - 1)
            found = [(missing_bytes(before[place], one), one) for place, one in now.items() if place in before]
            missing, where = max(found, key=lambda one: one[0], default=(0, None))
            if missing and where is not None and not pause:
                with self._lock:
                    yielders = list(self._yielders)
                relieve(missing, where, yielders)
                pause = _PAUSE
            before = now


def relieve(missing: int, where: Look, yielders: Sequence[Yielder]) -> None:
    """Make models free what is missing, those that hold the most first."""
    for one in sorted(yielders, key=lambda one: -one.held_bytes()):
        if missing <= 0:
            return
        changed = one.give_back(min(missing, one.held_bytes()))
        if changed is None:
            continue
        before, now = changed
        missing -= before - now
        logger.warning(
            "%s: memory runs short (%s allows %s, and %s of it is left): its budget goes from %s down to %s",
            one.name, where.limit.place, format_size(where.limit.limit_bytes),
            format_size(max(0, where.left_bytes)), format_size(before), format_size(now),
        )  # fmt: skip


watch = PressureWatch()
"""The watch of this process."""
