"""Memory pressure: what counts as pressure, who frees memory, and when nobody is asked any more."""

import threading
from pathlib import Path

import pytest

from surfw.runtime.memory import MemoryLimit
from surfw.runtime.pressure import Look, PressureWatch, Yielder, look, missing_bytes, relieve
from tests.runtime.machines import MIB, V1_MOUNTS, V2_MOUNTS, group_v1, group_v2, machine, write

LIMIT = 1_000 * MIB


def seen(left: int, *, reached: int = 0, stalled: float = 0.0, at: float = 0.0, limit: int = LIMIT) -> Look:
    return Look(MemoryLimit(Path("/group"), limit, limit - left), reached, stalled, at)


@pytest.mark.parametrize(
    ("before", "now", "missing"),
    [
        (seen(40 * MIB), seen(40 * MIB, at=1), 0),  # little is left, but no task waits
        (seen(40 * MIB), seen(40 * MIB, reached=1, at=1), 56 * MIB),
        (seen(40 * MIB), seen(40 * MIB, stalled=0.2, at=1), 56 * MIB),
        (seen(40 * MIB), seen(40 * MIB, stalled=0.05, at=1), 0),
        (seen(40 * MIB, stalled=5), seen(40 * MIB, stalled=5, at=1), 0),
        (seen(900 * MIB), seen(900 * MIB, reached=99, stalled=1, at=1), 0),  # page cache often reaches the limits
        (seen(20 * MIB), seen(20 * MIB, at=1), 76 * MIB),  # the next step is a kill
        (seen(20 * MIB), seen(-10 * MIB, at=1), 106 * MIB),
        (seen(0), seen(300 * MIB, reached=1, at=1, limit=20_000 * MIB), 500 * MIB),
    ],
)
def test_what_is_missing(before: Look, now: Look, missing: int) -> None:
    assert missing_bytes(before, now) == missing


def stalls(microseconds: int) -> str:
    return f"some avg10=1.00 avg60=0.00 avg300=0.00 total={microseconds}\nfull avg10=0.00 total=7"


def test_what_the_kernel_says_of_groups_and_of_the_machine(tmp_path: Path) -> None:
    root = machine(tmp_path / "two", groups="0::/a\n", mounts=V2_MOUNTS)
    group_v2(root, "a", limit=LIMIT, anon=600 * MIB)
    group = root / "sys/fs/cgroup/a"
    write(group, {"memory.events": "low 0\nhigh 3\nmax 4\noom 0", "memory.pressure": stalls(2_500_000)})
    write(root / "proc/pressure", {"memory": stalls(1_000_000)})
    found = look(root)
    assert (found[group].reached, found[group].stalled_seconds) == (7, 2.5)
    assert found[group].left_bytes == 400 * MIB
    assert (found[root / "proc/meminfo"].reached, found[root / "proc/meminfo"].stalled_seconds) == (0, 1.0)

    root = machine(tmp_path / "one", groups="4:memory:/b\n", mounts=V1_MOUNTS)
    group_v1(root, "b", LIMIT, total_rss=100 * MIB)
    group = root / "sys/fs/cgroup/memory/b"
    assert look(root)[group].reached == 0
    write(group, {"memory.failcnt": "12"})
    assert (look(root)[group].reached, look(root)[group].stalled_seconds) == (12, 0.0)


def test_those_that_hold_most_give_back_first(caplog: pytest.LogCaptureFixture) -> None:
    asked: list[tuple[str, int]] = []

    def yielder(name: str, held: int, most: int) -> Yielder:
        def give(size: int) -> tuple[int, int] | None:
            asked.append((name, size))
            return (held, held - min(size, most)) if most else None

        return Yielder(name, lambda: held, give)

    models = [yielder("small", 10, 10), yielder("large", 100, 30), yielder("fixed", 50, 0), yielder("other", 40, 40)]
    relieve(60, seen(5 * MIB), models)
    assert asked == [("large", 60), ("fixed", 30), ("other", 30)]
    said = "memory runs short (/group allows 1.0 GB, and 5.2 MB of it is left): its budget goes from"
    assert caplog.messages == [f"large: {said} 100 B down to 70 B", f"other: {said} 40 B down to 10 B"]


def test_a_model_is_asked_while_it_is_watched_and_only_then(tmp_path: Path) -> None:
    root = machine(tmp_path, groups="0::/a\n", mounts=V2_MOUNTS)
    group_v2(root, "a", limit=LIMIT, anon=500 * MIB)
    watch, asked, amounts = PressureWatch(root, interval_seconds=0.001), threading.Event(), []

    def give(size: int) -> tuple[int, int]:
        amounts.append(size)
        asked.set()
        return 300 * MIB, 200 * MIB

    one = Yielder("one", lambda: 300 * MIB, give)
    watch.add(one)
    assert [thread.name for thread in threading.enumerate()].count("surfw-pressure") == 1
    group_v2(root, "a", limit=LIMIT, anon=990 * MIB)
    assert asked.wait(20)
    assert amounts[0] == 86 * MIB
    watch.remove(one)
    assert "surfw-pressure" not in [thread.name for thread in threading.enumerate()]
    count = len(amounts)
    watch.remove(one)
    assert len(amounts) == count
