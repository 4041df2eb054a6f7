"""Local leftovers of killed runs: unfinished work that nobody resumed for a week.

A folder of unfinished work belongs to whoever holds the lock in it (see `chunking.writer`), and is removed under it.
"""

import fcntl
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from surfw.storage.fsspec_backend import translate_errors
from surfw.storage.notices import ABANDONED_SECONDS

_WORK = re.compile(r"[0-9a-f]{32}")
_SCRATCH = re.compile(r"[0-9a-f]{32}\.tmp|[0-9a-f]{64}\.lock")


def remove_leftovers(spool: Path, *, dry_run: bool) -> int:
    """Remove what killed runs left in a storage's spool, and tell its size in bytes.

    Raises:
        StorageError: it cannot be removed.
    """
    freed = 0
    with translate_errors(f"looking for leftovers in {spool}"):
        for path in sorted(spool.iterdir()) if spool.is_dir() else ():
            with suppress(FileNotFoundError), _claimed(path) as ours:
                if ours and _idle_seconds(path) > ABANDONED_SECONDS:
                    freed += sum(one.stat().st_size for one in _with_all(path) if one.is_file())
                    if not dry_run:
                        _remove(path)
    return freed


@contextmanager
def _claimed(path: Path) -> Iterator[bool]:
    """Whether it is a leftover by its name, and nobody's; it stays so meanwhile."""
    if path.is_symlink():
        yield False
    elif path.is_file():
        yield bool(_SCRATCH.fullmatch(path.name))
    elif not _WORK.fullmatch(path.name):
        yield False
    else:
        fd = os.open(path / "lock", os.O_RDWR | os.O_CLOEXEC)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True
        finally:
            os.close(fd)


def _with_all(path: Path) -> Iterator[Path]:
    yield path
    yield from path.rglob("*")


def _idle_seconds(path: Path) -> float:
    return time.time() - max(one.stat().st_mtime for one in _with_all(path))


def _remove(path: Path) -> None:
    if path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path)
