"""A folder of the local file system as a storage: atomic writes, positioned reads, and files that can be mapped."""

import asyncio
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from surfw.errors import StorageError
from surfw.storage.base import check_key, expect_length
from surfw.storage.fsspec_backend import FsspecBackend, translate_errors


class FilesystemBackend(FsspecBackend):
    """Objects as files under a folder, which is made when the first object is written."""

    def __init__(self, base_dir: str | os.PathLike[str]) -> None:
        """Name the folder; nothing is touched yet."""
        self.base = Path(base_dir).expanduser().absolute()
        super().__init__(f"file://{self.base}")
        self.url = str(self.base)

    def local_path(self, key: str) -> Path:
        """The object's file."""
        return self.base / check_key(key)

    def spool(self) -> Path:
        """A folder on the same file system, so that adopting a file is a rename."""
        return self.base / "partial"

    async def load_range(self, key: str, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop` of a file."""
        data = bytearray(stop - start)
        await self.read_into(key, start, memoryview(data))
        return bytes(data)

    async def read_into(self, key: str, start: int, destination: memoryview) -> None:
        """Read straight into the destination, in a thread."""
        await asyncio.to_thread(read_file_into, self.local_path(key), start, destination)

    async def save(self, key: str, data: bytes | BinaryIO) -> None:
        """Write beside the final place, sync, then rename: there whole, or not at all."""

        def write() -> None:
            with translate_errors(f"writing {key} to {self.url}"), _scratch(self.spool()) as scratch:
                with scratch.open("wb") as out:
                    if isinstance(data, bytes):
                        out.write(data)
                    else:
                        shutil.copyfileobj(data, out, 8 << 20)
                    out.flush()
                    os.fsync(out.fileno())
                _move(scratch, self.local_path(key))

        await asyncio.to_thread(write)

    async def adopt(self, key: str, path: Path) -> None:
        """Rename a file of the spool, already synced by its writer, to its place."""

        def move() -> None:
            with translate_errors(f"writing {key} to {self.url}"):
                _move(path, self.local_path(key))

        await asyncio.to_thread(move)


def read_file_into(path: Path, start: int, destination: memoryview) -> None:
    """Fill `destination` from a file, starting at byte `start`.

    Raises:
        NotFoundError: there is no such file.
        StorageError: the file ends early, or cannot be read.
    """
    with translate_errors(f"reading {path}"):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            done = 0
            while done < destination.nbytes:
                count = os.preadv(fd, [destination[done:]], start + done)
                if count == 0:
                    expect_length(b"", destination.nbytes - done, path.name, str(path.parent))
                done += count
        finally:
            os.close(fd)


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A file name in `folder` that is gone afterwards, whatever happens."""
    folder.mkdir(parents=True, exist_ok=True)
    scratch = folder / f"{uuid.uuid4().hex}.tmp"
    try:
        yield scratch
    finally:
        scratch.unlink(missing_ok=True)


def _move(source: Path, target: Path) -> None:
    """Rename within a file system and make the new name durable."""
    if not source.is_file():
        raise StorageError(f"{source} vanished before it could be moved to {target}")
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(source, target)
    fd = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
