"""Where parsers of files find theirs: a folder in memory, removed with the process."""

import atexit
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path

_IN_MEMORY = Path("/dev/shm")


def in_memory() -> str | None:
    """A folder in memory, unless another is asked for: libFuzzer's processes remove nothing as they end."""
    return str(_IN_MEMORY) if "TMPDIR" not in os.environ and _IN_MEMORY.is_dir() else None


@cache
def folder(name: str) -> Path:
    """The folder of one parser."""
    made = Path(tempfile.mkdtemp(prefix=f"surfw-fuzz-{name}-", dir=in_memory()))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made
