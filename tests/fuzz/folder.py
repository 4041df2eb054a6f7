"""Where parsers of files find theirs: a folder in memory, removed with the process."""

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

_IN_MEMORY = Path("/dev/shm")


@cache
def folder(name: str) -> Path:
    """The folder of one parser."""
    made = Path(tempfile.mkdtemp(prefix=f"surfw-fuzz-{name}-", dir=_IN_MEMORY if _IN_MEMORY.is_dir() else None))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made
