"""Which limits a process is under, and what is in use there, on machines of every kind."""

from pathlib import Path

import psutil
import pytest

from surfw.runtime.memory import MemoryLimit, read_limits
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

V1_GROUPS = "9:name=systemd:/a\n4:memory:/a/b\n1:cpu,cpuacct:/elsewhere\n"


def limits(root: Path) -> list[tuple[str, int, int]]:
    """The limits of the groups, from the process's own outwards."""
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
    (root / "sys/fs/cgroup/memory.stat").write_text("anon 1\n")  # the outermost group has no limit, and no file of one
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
    """Docker mounts a container's own group of version 1 as if it were the whole; a namespace says `/` besides."""
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


def test_without_proc_the_system_is_asked(tmp_path: Path) -> None:
    (found,) = read_limits(tmp_path)
    assert found.limit_bytes == psutil.virtual_memory().total
    assert 0 < found.in_use_bytes < found.limit_bytes


def test_this_machine_has_a_limit_that_psutil_sees_too() -> None:
    found = read_limits()
    assert found[0].limit_bytes == psutil.virtual_memory().total
    assert all(one.in_use_bytes >= 0 and one.limit_bytes > 0 for one in found)
