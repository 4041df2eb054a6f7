"""Storage in a local folder: atomic writes, positioned reads, and files that can be mapped."""

import asyncio
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import fsspec

from surfw.config import PIECE_BYTES, display_url
from surfw.errors import ConfigurationError, NotFoundError, StorageError
from surfw.files import expand_home, open_regular, read_regular, user_name
from surfw.storage.base import ChangedObjectError, check_key, check_prefix
from surfw.storage.fsspec_backend import FsspecBackend, translate_errors
from surfw.threads import in_thread

_ATTEMPTS = 100
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


class FilesystemBackend(FsspecBackend):
    """Objects as files in a folder."""

    def __init__(self, base_dir: str | os.PathLike[str], *, create: bool = True) -> None:
        """Set the folder and create it; without `create`, it is created when the first object is written.

        Raises:
            ConfigurationError: `base_dir` is a URL or a file.
            StorageError: the folder cannot be created.
        """
        if _URL.match(os.fspath(base_dir)):
            raise ConfigurationError(
                f"{display_url(os.fspath(base_dir))} is a URL, expected a folder; S3Backend is for S3, and whatever "
                "takes a store takes its URL"
            )
        self.base = expand_home(base_dir).absolute()
        if os.path.isfile(self.base):  # noqa: PTH113 - it is False for an impossible path, which fails where it is used
            raise ConfigurationError(f"{self.base} is a file, expected a folder; name another")
        super().__init__(str(self.base))
        if create:
            with translate_errors(f"making the folder {self.base}"):
                self.base.mkdir(parents=True, exist_ok=True)

    def _open(self, **options: Any) -> tuple[Any, str]:
        return fsspec.filesystem("file", **options), self._address  # a path is never parsed as a URL

    def check_rights(self) -> None:
        """Check early, without writing anything, that a store can be written here, or created.

        Raises:
            StorageError: it cannot.
        """
        for folder in (self.base / "models", self.base / "blobs"):
            nearest = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
            may_write = os.access(nearest, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids)
            if may_write or not nearest.is_dir():
                continue
            if os.statvfs(nearest).f_flag & os.ST_RDONLY:
                raise StorageError(f"{nearest} cannot be written: its file system is read-only; use another folder")
            raise StorageError(
                f"{nearest} cannot be written: user {user_name()} lacks the rights; give that user the rights, or use "
                "another folder"
            )

    def local_path(self, key: str) -> Path | None:
        """Return the object's path."""
        return self._path(key)

    def _path(self, key: str) -> Path:
        return self.base / check_key(key)

    async def revision(self, key: str) -> str | None:
        """Return inode, mtime and size of the file; files are replaced, never modified."""
        path = self._path(key)
        with suppress(OSError):
            return file_revision(await asyncio.to_thread(path.stat))
        return None

    async def _load(self, key: str, most_bytes: int) -> bytes:
        read = translate_errors(self._name(key))(read_regular)
        return await asyncio.to_thread(read, self._path(key), most_bytes)

    def spool(self) -> Path:
        """Return a folder on the same file system, so that adopting a file is a rename."""
        return self.base / "partial"

    async def load_range(self, key: str, start: int, stop: int) -> bytes:
        """Return bytes `start` to `stop` (end-exclusive) of a file."""
        return await self._load_through_read_into(key, start, stop)

    async def read_into(self, key: str, start: int, destination: memoryview, *, revision: str | None = None) -> None:
        """Read straight into the destination, in a thread."""
        await in_thread(read_file_into, self._path(key), start, destination, revision)

    async def save(self, key: str, data: bytes | BinaryIO) -> None:
        """Write to a temporary file on the same file system, sync, then rename: the write is atomic."""

        def write() -> None:
            with translate_errors(f"writing {key} to {self.url}"), _scratch(self.spool()) as scratch:
                with os.fdopen(create_file(scratch), "wb") as out:
                    if isinstance(data, bytes):
                        out.write(data)
                    else:
                        shutil.copyfileobj(data, out, PIECE_BYTES)
                    out.flush()
                    os.fsync(out.fileno())
                    forget_pages(out.fileno())
                _move(scratch, self._path(key))

        await asyncio.to_thread(write)

    async def adopt(self, key: str, path: Path) -> None:
        """Rename a spool file, already synced by its writer, to its final path."""
        move = translate_errors(f"writing {key} to {self.url}")(_move)
        await asyncio.to_thread(move, path, self._path(key))

    async def remove(self, key: str) -> None:
        """Remove a file durably. Processes that have it open or mapped keep it. The folder remains."""
        path = self._path(key)

        def remove() -> None:
            with suppress(NotFoundError), translate_errors(f"removing {key} from {self.url}"):
                path.unlink()
                _sync_folder(path.parent)

        await asyncio.to_thread(remove)

    async def list(self, prefix: str = "") -> list[str]:
        """Return the sorted keys that start with the prefix."""
        folder = check_prefix(prefix).rpartition("/")[0]
        return sorted(await asyncio.to_thread(lambda: [key for key in self._keys(folder) if key.startswith(prefix)]))

    async def find_foreign_key(self, known: str) -> str | None:
        """Return the first key found that does not start with `known`, if any."""
        return await asyncio.to_thread(lambda: next((key for key in self._keys("") if not key.startswith(known)), None))

    def _keys(self, folder: str) -> Iterator[str]:
        """Yield the keys of all files below a folder, unsorted."""
        try:
            for path in _walk(self.base / folder):
                yield path.relative_to(self.base).as_posix()
        except OSError as exc:
            with translate_errors(f"listing {exc.filename or self.url}"):
                raise


def _walk(top: Path, *, follow: bool = True) -> Iterator[Path]:
    """Yield every path below a folder that has a key: files, and folders where a file should be.

    Symlinked folders are walked too, but links inside them are not followed, so the walk always ends.
    """
    for path, folders, names in os.walk(top, onerror=_unless_missing):
        yield from (Path(path, name) for name in names)
        for folder in (Path(path, name) for name in folders):
            if folder.suffix == ".json":  # only the last part of a key may end in .json: this should be a file
                yield folder
            elif follow and folder.is_symlink():
                yield from _walk(folder, follow=False)


def _unless_missing(error: OSError) -> None:
    """Ignore a folder that is missing or vanishes during the listing; a broken symlink is an error."""
    if not isinstance(error, FileNotFoundError) or Path(error.filename).is_symlink():
        raise error


def file_revision(found: os.stat_result) -> str:
    """Return a string that changes with a file: its inode, the time it was written, and its length."""
    return f"{found.st_ino} {found.st_mtime_ns} {found.st_size}"


def expect_file_revision(path: Path, fd: int, revision: str | None) -> None:
    """Check the revision of an open file, if one is given.

    Raises:
        ChangedObjectError: the file has another revision.
    """
    if revision is not None and (seen := file_revision(os.fstat(fd))) != revision:
        raise ChangedObjectError(str(path), revision, seen)


def read_file_into(path: Path, start: int, destination: memoryview, revision: str | None = None) -> None:
    """Fill `destination` from a file, starting at byte `start`. If a revision is given, the file must have it.

    Raises:
        NotFoundError: the file does not exist.
        StorageError: the file ends early, has another revision, or cannot be read.
    """
    with translate_errors(f"reading {path}"):
        fd = open_regular(path)
        try:
            expect_file_revision(path, fd, revision)
            read_exactly(path, fd, start, destination)
            expect_file_revision(path, fd, revision)
        finally:
            os.close(fd)


def read_exactly(path: Path, fd: int, start: int, destination: memoryview) -> None:
    """Fill `destination` from an open file, starting at byte `start`.

    Raises:
        OSError: it cannot be read.
        StorageError: it ends early.
    """
    done = 0
    while done < destination.nbytes:
        count = os.preadv(fd, [destination[done:]], start + done)
        if count == 0:
            raise StorageError(f"{path} ends at byte {start + done}, expected {start + destination.nbytes} bytes")
        done += count


def create_file(path: Path) -> int:
    """Open or create a file in a folder that another process may remove whenever it is empty."""
    for _ in range(_ATTEMPTS):
        with suppress(FileNotFoundError):
            path.parent.mkdir(parents=True, exist_ok=True)
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    raise StorageError(
        f"{path.parent} cannot be made: no folder can be made there, or something removes it again and again; use "
        "another place"
    )


def forget_pages(fd: int) -> None:
    """Drop a file's pages from the page cache, because piecewise writes leave small ones.

    A process that maps the file later then gets large pages, with which a model computed 5 % faster.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A temporary file name in `folder`; the file is always removed afterwards."""
    scratch = folder / f"{uuid.uuid4().hex}.tmp"
    try:
        yield scratch
    finally:
        scratch.unlink(missing_ok=True)


def _move(source: Path, target: Path) -> None:
    """Rename within a file system and make the new name durable."""
    if not source.is_file():
        raise StorageError(f"{source} vanished before it could be moved to {target}")
    made = [folder for folder in target.parents if not folder.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    source.replace(target)
    for folder in [target.parent, *(new.parent for new in made)]:  # a new folder is durable after its parent is synced
        _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    """Make created and removed names in a folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
