"""What the process took, and what there still is."""

import subprocess
import sys
from pathlib import Path

import pytest

from surfw.runtime import memory
from surfw.runtime.memory import available_bytes, peak_rss_bytes

MIB = 1 << 20


def test_the_peak_remembers_what_was_given_back() -> None:
    before = peak_rss_bytes()
    block = bytearray(64 * MIB)
    block[::4096] = b"1" * len(block[::4096])
    del block
    assert peak_rss_bytes() >= max(before, 64 * MIB)


def test_the_peak_is_the_processs_own() -> None:
    """`ru_maxrss` would start from the peak of the process that started this one."""
    held = bytearray(b"1") * (200 * MIB)
    program = "from surfw.runtime.memory import peak_rss_bytes; print(peak_rss_bytes())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert MIB < int(done.stdout) < 100 * MIB
    assert len(held) == 200 * MIB


def test_without_proc_the_system_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "nothing")
    assert peak_rss_bytes() > MIB


def cgroup(folder: Path, limit: str, usage: str) -> tuple[Path, Path]:
    (folder / "limit").write_text(limit)
    (folder / "usage").write_text(usage)
    return folder / "limit", folder / "usage"


@pytest.mark.parametrize(
    ("limit", "usage", "expected"), [("1000\n", "400\n", 600), ("1000", "1500", 0), ("max\n", "400\n", 12345)]
)
def test_a_cgroup_limits_what_is_available(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limit: str, usage: str, expected: int
) -> None:
    class Machine:
        available = 12345

    monkeypatch.setattr(memory.psutil, "virtual_memory", Machine)
    missing = (tmp_path / "no", tmp_path / "no")
    monkeypatch.setattr(memory, "_CGROUPS", (missing, cgroup(tmp_path, limit, usage)))
    assert available_bytes() == expected
