"""Run the `surfw` command in a process of its own, with a temporary home."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.services import warm

SURFW = str(Path(sys.executable).parent / "surfw")
_NO_SERVER = "1"
"""A port without a server, whatever else runs on this machine."""


def environment(home: Path, **extra: str) -> dict[str, str]:
    """A command's environment: without the tester's settings, a hub, a server, or the size of another window."""
    not_ours = ("SURFW_", "HF_", "COLUMNS", "LINES")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(not_ours)}
    own = {"SURFW_HOME": str(home), "SURFW_PORT": _NO_SERVER, "HF_HUB_OFFLINE": "1", "HF_HOME": str(home / "hf")}
    own["OMP_NUM_THREADS"] = "1"  # so that no summary mentions other work on the tester's machine
    return clean | own | {"TERM": "dumb"} | extra


def imports(command: Sequence[str]) -> Sequence[str]:
    """The modules that a command imports."""
    return warm.MODELS if {"bench", "chat", "chunk", "infer"} & set(command) else warm.COMMANDS


def surfw(home: Path, *arguments: str, stdin: str = "", **extra: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, in a process that has its imports done; JSON output is checked against its schema."""
    command = [SURFW, *arguments]
    done = warm.run(command, modules=imports(command), input=stdin, env=environment(home, **extra))
    if "--json" in arguments:
        from tests.cli import schemas  # imported here because it imports all commands

        schemas.check(arguments, done.stdout)
    return done


def complaint(done: subprocess.CompletedProcess[str], code: int = 1) -> str:
    """Return the one-line error of a failed command; fails the test if there are more lines, or another exit code."""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("surfw: error: ")]
    rest = [line for line in lines if not line.startswith(("surfw: error: ", "surfw: source: ", "surfw: warning: "))]
    assert (done.returncode, len(errors), rest) == (code, 1, []), (done.returncode, done.stderr[-2000:])
    return errors[0].removeprefix("surfw: error: ")
