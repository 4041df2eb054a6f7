"""The kernel enforces the cap: a process that exceeds it is killed, and the group is always removed."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from surfw.bench.cap import LEAST_BYTES, memory_group
from surfw.config import MB
from surfw.errors import ConfigurationError

CAP = 200 * MB
_FILL = "import sys; held = b'x' * int(sys.argv[1]); print(len(held))"


@pytest.fixture
def _caps() -> None:
    """Skip the tests if memory cannot be capped."""
    try:
        with memory_group(LEAST_BYTES):
            pass
    except ConfigurationError as exc:
        pytest.skip(str(exc))


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    """A file that is larger than the cap."""
    path = tmp_path / "file"
    path.write_bytes(os.urandom(1 << 20) * 300)
    yield path
    path.unlink()


@pytest.mark.usefixtures("_caps")
def test_who_stays_below_the_cap_ends_well_and_its_peak_is_known() -> None:
    with memory_group(CAP) as group:
        done = subprocess.run(
            group.command([sys.executable, "-c", _FILL, str(100 * MB)]), capture_output=True, text=True, check=True
        )
        assert done.stdout == f"{100 * MB}\n"
        assert group.kills == 0
        assert group.peak_bytes is None or 100 * MB < group.peak_bytes <= CAP
    assert not group.path.exists()


@pytest.mark.usefixtures("_caps")
def test_who_wants_more_is_killed() -> None:
    with memory_group(CAP) as group:
        done = subprocess.run(group.command([sys.executable, "-c", _FILL, str(2 * CAP)]), check=False)
        assert done.returncode == -9
        assert group.kills == 1
    assert not group.path.exists()


@pytest.mark.usefixtures("_caps")
def test_the_page_cache_counts_and_kills_nobody(file: Path) -> None:
    with file.open("rb") as read:
        os.fsync(read.fileno())
        os.posix_fadvise(read.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    reading = "import sys; print(sum(len(p) for p in iter(lambda f=open(sys.argv[1], 'rb'): f.read(1 << 20), b'')))"
    with memory_group(CAP) as group:
        done = subprocess.run(
            group.command([sys.executable, "-c", reading, str(file)]), capture_output=True, text=True, check=True
        )
        assert done.stdout == f"{300 << 20}\n"
        assert group.kills == 0
        assert group.peak_bytes is None or CAP * 0.8 < group.peak_bytes <= CAP


@pytest.mark.usefixtures("_caps")
def test_the_group_is_removed_when_the_body_fails_with_what_runs_in_it() -> None:
    waiting = "print('up', flush=True); import sys; sys.stdin.read()"
    with pytest.raises(KeyboardInterrupt), memory_group(CAP) as group:  # noqa: PT012 - what runs is part of it
        child = subprocess.Popen(
            group.command([sys.executable, "-c", waiting]), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        assert child.stdout.readline() == "up\n"
        raise KeyboardInterrupt
    assert not group.path.exists()
    child.communicate()
    assert child.returncode == -9


def test_a_cap_in_which_nothing_can_start_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"a cap of 100\.0 MB is too small, expected 128\.0 MB"):
        memory_group(100 * MB).__enter__()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody who may not make groups")
def test_where_no_group_can_be_made_it_says_so() -> None:
    code = (
        "import os; from surfw.bench.cap import memory_group; os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "try: memory_group(1 << 30).__enter__()\n"
        "except Exception as exc: print(type(exc).__name__, exc)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("ConfigurationError memory cannot be capped here: ")
    assert "run this as root" in done.stdout
