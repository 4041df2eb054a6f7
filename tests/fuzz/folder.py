"""The folder for parsers of files: in memory, and removed with the process."""

import atexit
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path

_IN_MEMORY = Path("/dev/shm")


def in_memory() -> str | None:
    """Make a folder in memory, unless one is given: libFuzzer's processes remove nothing when they end."""
    return str(_IN_MEMORY) if "TMPDIR" not in os.environ and _IN_MEMORY.is_dir() else None


@cache
def folder(name: str) -> Path:
    """The folder of one parser."""
    made = Path(tempfile.mkdtemp(prefix=f"surfw-fuzz-{name}-", dir=in_memory()))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made
