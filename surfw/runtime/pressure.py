"""Memory that runs short while models are open: what the kernel reports of it, and which models give some back.

A budget is decided once, and others may take memory later. While a model is open, a thread looks every half second at
the limits that this process is under. There is pressure where the kernel reports it, as stalls (PSI) or as a limit that
was reached, and little is left besides what cannot be reclaimed: reaching a limit alone is what reading files through
the page cache does all the time. Half as little is enough without a report: where no page cache is left, the next thing
that the kernel does is to kill.

Then models give back what is missing, the largest first, and stream more. They keep what they need to run, and do not
take it again by themselves.
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
"""So much of a limit has to be left, whichever is more: with less, code of libraries is read again and again."""

_STALLED_SHARE = 0.1
"""The part of the time that some task waited for memory."""

_PAUSE = 2
"""After models have given memory back, so many looks go by until they may again."""


@dataclass(frozen=True, slots=True)
class Look:
    """What the kernel said of one limit.

    Attributes:
        limit: the limit, and what of it cannot be reclaimed.
        reached: how often it was reached so far.
        stalled_seconds: how long some task waited for memory under it so far.
        at_seconds: when that was.
    """

    limit: MemoryLimit
    reached: int
    stalled_seconds: float
    at_seconds: float

    @property
    def left_bytes(self) -> int:
        """What could still be taken."""
        return self.limit.limit_bytes - self.limit.in_use_bytes


def missing_bytes(before: Look, now: Look) -> int:
    """How much is missing under a limit, by two looks at it; 0 where there is no pressure."""
    low = max(_LOW_BYTES, int(now.limit.limit_bytes * _LOW_SHARE))
    passed = now.at_seconds - before.at_seconds
    is_stalled = passed > 0 and (now.stalled_seconds - before.stalled_seconds) / passed >= _STALLED_SHARE
    is_reported = is_stalled or now.reached > before.reached
    is_short = now.left_bytes < (low if is_reported else low // 2)
    return 2 * low - now.left_bytes if is_short else 0


def look(root: Path = Path("/")) -> dict[Path, Look]:
    """What the kernel says now of all limits, by their places."""
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
    """A model that can give memory back, as long as this is kept; its functions are called from a thread of the watch.

    Attributes:
        name: of the model.
        held_bytes: tells what it holds that the system counts as in use.
        give_back: gives about so many bytes back, and returns what its budget was before and is now; None if it can
            give nothing.
    """

    name: str
    held_bytes: Callable[[], int]
    give_back: Callable[[int], tuple[int, int] | None]


class PressureWatch:
    """Watches while there is somebody who can give memory back."""

    def __init__(self, root: Path = Path("/"), interval_seconds: float = INTERVAL_SECONDS) -> None:
        """Watch nothing yet; `root` is a folder that stands for a machine."""
        self._root, self._interval = root, interval_seconds
        self._lock = threading.Lock()
        self._yielders: WeakSet[Yielder] = WeakSet()
        self._wake: threading.Event | None = None
        self._thread: threading.Thread | None = None

    def add(self, yielder: Yielder) -> None:
        """Ask this one too, from now on."""
        with self._lock:
            self._yielders.add(yielder)
            if self._thread is None:
                self._wake = threading.Event()
                self._thread = threading.Thread(
                    target=self._watch, args=(self._wake,), name="surfw-pressure", daemon=True
                )
                self._thread.start()

    def remove(self, yielder: Yielder) -> None:
        """Do not ask this one any more; a thread of the watch may be asking it still."""
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
    """Have models give back what is missing, those that hold most first."""
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
"""Of this process."""
