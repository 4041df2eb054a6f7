"""The memory for weights on all kinds of machines, the memory that others may still take, and this process's use."""

import gc
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from weakref import WeakSet

import psutil
import pytest

from surfw.runtime import memory
from surfw.runtime.memory import (
    MemoryClaim,
    MemoryLimit,
    claimed_bytes,
    deciding,
    find_default_budget,
    headroom_bytes,
    peak_rss_bytes,
    read_limits,
    read_smallest_limit,
)
from tests.runtime.machines import (
    HYBRID_MOUNTS,
    MIB,
    NO_LIMIT,
    V1_MOUNTS,
    V2_MOUNTS,
    group_v1,
    group_v2,
    machine,
    write,
)

GROUPS = Path("/sys/fs/cgroup/memory")


def spare_bytes(root: Path) -> int:
    """A machine's default budget."""
    return find_default_budget(root).budget_bytes


def test_the_smallest_limit_is_that_of_the_machine_or_of_a_group(tmp_path: Path) -> None:
    root = machine(tmp_path, groups="0::/a/b\n", mounts=V2_MOUNTS)
    group_v2(root, "a/b", high=9_000 * MIB)
    assert read_smallest_limit(root).limit_bytes == 9_000 * MIB
    group_v2(root, "a/b", limit=90_000 * MIB)
    assert read_smallest_limit(root) == MemoryLimit(root / "proc/meminfo", 16_000 * MIB, 4_000 * MIB)


@pytest.fixture(autouse=True)
def _nothing_is_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the claims of models that other tests left open."""
    monkeypatch.setattr(memory, "_claims", WeakSet())


def test_the_peak_remembers_what_was_given_back() -> None:
    before = peak_rss_bytes()
    block = bytearray(64 * MIB)
    block[::4096] = b"1" * len(block[::4096])
    del block
    assert peak_rss_bytes() >= max(before, 64 * MIB)


def test_the_peak_is_the_processs_own() -> None:
    """`ru_maxrss` would start from the peak of the parent process."""
    held = bytearray(b"1") * (200 * MIB)
    program = "from surfw.runtime.memory import peak_rss_bytes; print(peak_rss_bytes())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert MIB < int(done.stdout) < 100 * MIB
    assert len(held) == 200 * MIB


def test_without_proc_the_system_is_asked(tmp_path: Path) -> None:
    assert peak_rss_bytes(tmp_path) > MIB


def test_the_headroom_is_a_share_of_what_is_large() -> None:
    assert headroom_bytes(0) == headroom_bytes(1000 * MIB) == 192 * MIB
    assert headroom_bytes(16_000 * MIB) == 800 * MIB


def test_the_default_is_what_the_machine_has_where_no_group_has_less(tmp_path: Path) -> None:
    root = machine(tmp_path, groups="4:memory:/a\n", mounts=V1_MOUNTS)
    group_v1(root, "a", NO_LIMIT, total_rss=100 * MIB)
    assert spare_bytes(root) == (12_000 - 800) * MIB


def test_the_default_is_the_smallest_over_the_levels(tmp_path: Path) -> None:
    """The group's limit is far away; its parent's limit is near, and another process of it has taken 500 MiB."""
    root = machine(tmp_path, groups="0::/a/b\n", mounts=V2_MOUNTS)
    group_v2(root, "a/b", limit=4000 * MIB, anon=100 * MIB)
    group_v2(root, "a", limit=1200 * MIB, anon=600 * MIB)
    assert spare_bytes(root) == (1200 - 600 - 192) * MIB


@pytest.mark.parametrize("in_use", [9, 500, 5000])
def test_the_default_is_never_negative(in_use: int, tmp_path: Path) -> None:
    root = machine(tmp_path, groups="0::/a\n", mounts=V2_MOUNTS)
    group_v2(root, "a", limit=200 * MIB, anon=in_use * MIB)
    assert spare_bytes(root) == 0


def test_other_models_claim_what_they_do_not_hold_yet(tmp_path: Path) -> None:
    root = machine(tmp_path, groups="", mounts=())
    all_of_it = spare_bytes(root)
    peak, held = {"first": 1000 * MIB}, {"first": 0, "second": 900 * MIB}
    with closing(MemoryClaim(lambda: peak["first"], lambda: held["first"])) as first:
        assert spare_bytes(root) == all_of_it - 1000 * MIB
        held["first"] = 400 * MIB
        assert spare_bytes(root) == all_of_it - 600 * MIB, "what it holds counts as memory in use"
        with closing(MemoryClaim(lambda: 500 * MIB, lambda: held["second"])):
            assert spare_bytes(root) == all_of_it - 600 * MIB, "who holds more than it claimed gives nothing"
            peak["first"] = 10**18
            assert spare_bytes(root) == 0
        peak["first"] = 401 * MIB
        assert spare_bytes(root) == all_of_it - MIB
    assert spare_bytes(root) == all_of_it
    first.close()
    assert claimed_bytes() == 0


def test_what_several_models_have_mapped_is_claimed_once() -> None:
    mapped = {"one": {1: 300, 2: 100}, "two": {1: 300, 3: 50}}
    with closing(MemoryClaim(lambda: 1000, lambda: 0, lambda: mapped["one"])) as one:
        assert claimed_bytes() == 1000
        with closing(MemoryClaim(lambda: 400, lambda: 20, lambda: mapped["two"])):
            assert claimed_bytes() == 1000 + 380 - 300
            one.close()
            assert claimed_bytes() == 380
    assert claimed_bytes() == 0


def test_a_claim_that_nobody_refers_to_is_given_up() -> None:
    claim = MemoryClaim(lambda: 1000, lambda: 0)
    assert claimed_bytes() == 1000
    del claim
    gc.collect()
    assert claimed_bytes() == 0


def test_models_that_open_at_the_same_time_divide_the_memory(tmp_path: Path) -> None:
    """Each takes two thirds of the free memory, and none of it is taken twice."""
    root = machine(tmp_path, groups="", mounts=())
    all_of_it = spare_bytes(root)
    start, claims = threading.Barrier(8), []

    def open_one() -> None:
        start.wait()
        with deciding:
            two_thirds = spare_bytes(root) * 2 // 3
            claims.append(MemoryClaim(lambda: two_thirds, lambda: 0))

    threads = [threading.Thread(target=open_one) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected, left = [], all_of_it
    for _ in range(8):
        expected.append(left * 2 // 3)
        left -= expected[-1]
    assert [claim.open_bytes for claim in claims] == expected
    assert spare_bytes(root) == left
    for claim in claims:
        claim.close()


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Path]:
    """A group of version 1 with a limit of 500 MiB, and a child without its own limit."""
    outer = GROUPS / f"surfw-{os.getpid()}"
    if not (GROUPS / "memory.limit_in_bytes").exists():
        pytest.skip("there is no hierarchy of version 1 at /sys/fs/cgroup/memory")
    with ExitStack() as made:
        try:
            for folder in (outer, outer / "inner"):
                folder.mkdir()
                made.callback(folder.rmdir)
            (outer / "memory.limit_in_bytes").write_text(str(500 * MIB))
        except OSError as exc:
            pytest.skip(f"control groups cannot be made here: {exc}")
        yield outer / "inner"


INSIDE = """
import json, mmap, os, sys
from pathlib import Path
from surfw.runtime.memory import find_default_budget

group, file, MIB = Path(sys.argv[1]), Path(sys.argv[2]), 1 << 20
def anonymous():
    (line,) = (one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith("RssAnon"))
    return int(line.split()[1]) * 1024
def cached():
    rows = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    return int(rows["total_inactive_file"]) + int(rows["total_active_file"])
told = {"empty": find_default_budget().budget_bytes, "own": anonymous()}
with file.open("wb") as written:
    for _ in range(300):
        written.write(bytes(MIB))
    written.flush()
    os.fsync(written.fileno())
told |= {"cached": cached(), "full": find_default_budget().budget_bytes}
shared = mmap.mmap(-1, 50 * MIB)
shared[::4096] = b"1" * len(shared[::4096])
told["shared"] = find_default_budget().budget_bytes
shared.close()
block = mmap.mmap(-1, find_default_budget().budget_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
block[::4096] = b"1" * len(block[::4096])
told |= {"taken": find_default_budget().budget_bytes, "block": len(block)}
file.unlink()
print(json.dumps(told))
"""


def test_a_real_group_is_respected_and_its_page_cache_is_not_counted(group: Path, tmp_path: Path) -> None:
    enter = f'echo $$ > {group}/cgroup.procs && exec "$@"'
    command = ["sh", "-c", enter, "-", sys.executable, "-c", INSIDE, str(group), str(tmp_path / "file")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    slack = 16 * MIB
    assert told["cached"] > 250 * MIB, "the group is full of page cache"
    assert told["empty"] == pytest.approx(500 * MIB - 192 * MIB - told["own"], abs=slack)
    assert told["full"] == pytest.approx(told["empty"], abs=slack)
    assert told["shared"] == pytest.approx(told["full"] - 50 * MIB, abs=slack), "shared memory is no page cache"
    assert told["block"] == pytest.approx(told["full"], abs=slack), "all of it can be taken: the page cache makes way"
    assert told["taken"] < slack


V1_GROUPS = "9:name=systemd:/a\n4:memory:/a/b\n1:cpu,cpuacct:/elsewhere\n"


def limits(root: Path) -> list[tuple[str, int, int]]:
    """The limits of the groups, starting with the process's own."""
    found = read_limits(root)
    assert found[0] == MemoryLimit(root / "proc/meminfo", 16_000 * MIB, 4_000 * MIB)
    groups = root / "sys/fs/cgroup"
    return [(str(one.place.relative_to(groups)), one.limit_bytes // MIB, one.in_use_bytes // MIB) for one in found[1:]]


def test_a_machine_without_groups(tmp_path: Path) -> None:
    assert limits(machine(tmp_path, groups="", mounts=())) == []
    assert limits(machine(tmp_path / "with", groups="0::/\n", mounts=V1_MOUNTS)) == [], (
        "a group, but nowhere to be seen"
    )


def test_version_1_counts_anonymous_memory_at_each_level_and_no_page_cache(tmp_path: Path) -> None:
    root = machine(tmp_path, groups=V1_GROUPS, mounts=V1_MOUNTS)
    group_v1(root, "a/b", 2000 * MIB, total_rss=300 * MIB, total_shmem=20 * MIB)
    group_v1(root, "a", 1000 * MIB, total_rss=700 * MIB)
    group_v1(root, ".", NO_LIMIT, total_rss=900 * MIB)
    assert limits(root) == [("memory/a/b", 2000, 320), ("memory/a", 1000, 700), ("memory", NO_LIMIT // MIB, 900)]


def test_version_2_counts_what_cannot_be_reclaimed(tmp_path: Path) -> None:
    root = machine(tmp_path, groups="0::/user.slice/app\n", mounts=V2_MOUNTS)
    group_v2(
        root, "user.slice/app", limit=2000 * MIB, anon=300 * MIB, shmem=20 * MIB, kernel_stack=MIB, pagetables=2 * MIB,
        sec_pagetables=MIB, percpu=MIB, sock=5 * MIB, vmalloc=MIB, slab_unreclaimable=9 * MIB, zswap=10 * MIB,
    )  # fmt: skip
    group_v2(root, "user.slice", high=900 * MIB, anon=400 * MIB)
    (root / "sys/fs/cgroup/memory.stat").write_text("anon 1\n")  # the root group has neither a limit nor a file for one
    assert limits(root) == [("user.slice/app", 2000, 350), ("user.slice", 900, 400)]


def test_the_lower_of_max_and_high_counts_and_a_group_without_both_has_no_limit(tmp_path: Path) -> None:
    root = machine(tmp_path, groups="0::/a/b/c\n", mounts=V2_MOUNTS)
    group_v2(root, "a/b/c", limit=800 * MIB, high=900 * MIB)
    group_v2(root, "a/b", anon=5 * MIB)
    group_v2(root, "a", limit=900 * MIB, high=700 * MIB)
    assert limits(root) == [("a/b/c", 800, 0), ("a", 700, 0)]


def test_a_hybrid_machine_has_its_memory_in_version_1(tmp_path: Path) -> None:
    root = machine(tmp_path, groups=f"{V1_GROUPS}0::/a\n", mounts=HYBRID_MOUNTS)
    group_v1(root, "a/b", 500 * MIB, total_rss=100 * MIB)
    write(root / "sys/fs/cgroup/unified/a", {"cgroup.controllers": "", "cgroup.procs": "1"})
    assert limits(root) == [("memory/a/b", 500, 100)]


@pytest.mark.parametrize("shown", ["/docker/1f", "/"])
def test_a_container_sees_its_own_group_as_the_outermost(shown: str, tmp_path: Path) -> None:
    """Docker mounts a container's own group of version 1 as if it were the root; in a namespace, the path is `/`."""
    mount = f"35 31 0:32 {shown} /sys/fs/cgroup/memory ro,relatime - cgroup cgroup rw,memory"
    root = machine(tmp_path, groups="4:memory:/docker/1f\n", mounts=(mount,))
    group_v1(root, ".", 500 * MIB, total_rss=100 * MIB, hierarchical_memory_limit=400 * MIB)
    assert limits(root) == [("memory", 400, 100)], "and the limit of the ancestor that it does not see"


@pytest.mark.parametrize(
    ("path", "shown"), [("/docker/1f", "/kubepods/7"), ("/../../other", "/"), ("/gone (deleted)", "/"), ("/", "/../..")]
)
def test_a_group_that_is_not_below_the_mount_is_taken_for_the_mount(path: str, shown: str, tmp_path: Path) -> None:
    mount = f"30 23 0:26 {shown} /sys/fs/cgroup ro,nosuid - cgroup2 cgroup rw"
    root = machine(tmp_path, groups=f"0::{path}\n", mounts=(mount,))
    group_v2(root, ".", limit=500 * MIB, anon=100 * MIB)
    assert limits(root) == [(".", 500, 100)]


def test_of_several_mounts_those_that_show_the_group_count(tmp_path: Path) -> None:
    others = ("36 23 0:26 /b /sys/fs/cgroup/other\\040group ro - cgroup2 cgroup rw", "malformed")
    root = machine(tmp_path, groups="0::/b/c\n", mounts=("35 23 0:26 /a /sys/fs/cgroup/x ro - cgroup2 x rw", *others))
    group_v2(root, "x", limit=100 * MIB)
    group_v2(root, "other group/c", limit=300 * MIB)
    group_v2(root, "other group", limit=200 * MIB)
    assert limits(root) == [("other group/c", 300, 0), ("other group", 200, 0)]


def test_without_proc_the_system_is_asked_for_its_limit(tmp_path: Path) -> None:
    (found,) = read_limits(tmp_path)
    assert found.limit_bytes == psutil.virtual_memory().total
    assert 0 < found.in_use_bytes < found.limit_bytes


def test_this_machine_has_a_limit_that_psutil_sees_too() -> None:
    found = read_limits()
    assert found[0].limit_bytes == psutil.virtual_memory().total
    assert all(one.in_use_bytes >= 0 and one.limit_bytes > 0 for one in found)


_PRODUCTS = """
import sys, torch
from surfw.runtime.memory import bound_kernels, rss_bytes
bound_kernels()
weights = torch.randn(352, 128, dtype=torch.bfloat16)
before = rss_bytes()
with torch.inference_mode():
    for rows in range(1, 1200):
        torch.nn.functional.linear(torch.randn(rows, 128, dtype=torch.bfloat16), weights)
print(rss_bytes() - before)
"""


def test_products_of_many_shapes_keep_few_kernels() -> None:
    """Without the bound it takes 0.8 GB on a CPU with AMX; other CPUs compile less."""
    done = subprocess.run([sys.executable, "-c", _PRODUCTS], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 200 * MIB
