"""Peers in these tests start in processes that have their imports done."""

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from surfw.bench import process
from tests.services import warm


def _start(command: list[str], *, stdin: int, stdout: int, stderr: int, **_: Any) -> Any:
    if command[0] != sys.executable:  # it enters a memory-capped group, where its imports must count
        return subprocess.Popen(command, stdin=stdin, stdout=stdout, stderr=stderr, text=True, start_new_session=True)
    return warm.start(command, stdin=stdin, stdout=stdout, stderr=stderr)


@pytest.fixture(autouse=True)
def _warm_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peers of the command `surfw bench`, and peers under a cap, start normally."""
    parts = {"Popen": _start, "PIPE": subprocess.PIPE, "TimeoutExpired": subprocess.TimeoutExpired}
    monkeypatch.setattr(process, "subprocess", SimpleNamespace(**parts))
