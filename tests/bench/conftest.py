"""Peers that these tests start begin with their imports done."""

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from surfw.bench import process
from tests.services import warm


def _start(command: list[str], *, stdin: int, stdout: int, stderr: int, **_: Any) -> Any:
    if command[0] != sys.executable:  # it enters a group whose memory is capped, and what it imports counts there
        return subprocess.Popen(command, stdin=stdin, stdout=stdout, stderr=stderr, text=True, start_new_session=True)
    return warm.start(command, stdin=stdin, stdout=stdout, stderr=stderr)


@pytest.fixture(autouse=True)
def _warm_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the command `surfw bench`, which is another process, and those under a cap start as they always do."""
    parts = {"Popen": _start, "PIPE": subprocess.PIPE, "TimeoutExpired": subprocess.TimeoutExpired}
    monkeypatch.setattr(process, "subprocess", SimpleNamespace(**parts))
