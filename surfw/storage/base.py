"""What a storage has to be: four methods, and optional ones with working defaults built on the four.

A key is a relative path of plain parts (`blobs/ab/abcd.safetensors`). `check_key` is the one gate: every key passes it
before it touches anything, in surfw's own backends or before a custom one (see `custom`), so a key such as `../x` or
`/etc/passwd` reaches no storage.
"""

import asyncio
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, TypeVar

from blake3 import blake3

from surfw.config import DEFAULT_SILENCE_SECONDS, display_url, surfw_home
from surfw.errors import StorageError
from surfw.threads import in_thread, to_its_end

Data = TypeVar("Data", bytes, memoryview)

Check = Callable[[int, memoryview], None]
"""Verifies a piece, given the offset of its first byte and the bytes themselves; raises if they are not right."""

_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_MAX_KEY = 512


def shifted(check: Check, begin: int) -> Check:
    """The check of what begins there: offsets of its pieces are counted from `begin`."""
    return lambda at, piece: check(begin + at, piece)


def check_key(key: str) -> str:
    """The key itself, if it is a relative path of plain parts.

    Raises:
        StorageError: it is absolute, leads upwards, is empty or has characters a key may not have.
    """
    if not isinstance(key, str):
        raise StorageError(f"storage key {key!a:.80} is refused: expected a text")
    if not is_key(key):
        raise StorageError(
            f"storage key {key[:80]!r} is refused: expected a relative path of plain parts, such as blobs/ab/abcd"
        )
    return key


def is_key(text: str) -> bool:
    """Whether a text is a relative path of plain parts."""
    return len(text) <= _MAX_KEY and all(_PART.fullmatch(part) for part in text.split("/"))


def check_prefix(prefix: str) -> str:
    """The prefix itself, if a key may start with it; the empty one is the prefix of all keys.

    Raises:
        StorageError: no key starts so.
    """
    if prefix:
        check_key(prefix.removesuffix("/"))
    return prefix


class StorageBackend(ABC):
    """Named objects of bytes. Subclass it, and implement `load`, `save`, `exists` and `list`: nothing else is needed.

    What surfw guarantees to a custom backend:

    - **Keys** are relative paths of plain parts, such as `blobs/ab/abcd.safetensors`: ASCII letters, digits, `.`, `_`
      and `-`, joined by `/`, at most 512 characters; no part starts with `.` or `-`. They are checked before the
      backend sees them, as are prefixes, so none is absolute or leads upwards.
    - **Calls** come on an event loop: surfw's own thread in a model, the server's loop in a server, the caller's in a
      chunker. Several calls may be under way at once. One backend may be used on several loops one after another, so
      whatever belongs to a loop, such as a connection, must not be kept for the next one.
    - **Whole objects** are loaded once for all the ranges that are read of them, if the backend has no faster
      `load_range` or `read_into`. While they are being read, objects of 256 MB in all are kept, or the last one.

    **Sizes** are not believed: surfw loads every object with `load_capped`. That asks `size` first, if the backend has
    one of its own; otherwise an object that is too large is refused only once it is in memory.

    **Errors**: raise `surfw.NotFoundError` for an object that is not there (`KeyError` and `FileNotFoundError` are
    taken for it), `surfw.StorageFullError` if there is no space, `surfw.StorageError` for everything else. Any other
    exception is reported as a `StorageError` with the backend's class, the key, and the exception.

    `surfw.testing.StorageBackendSuite` is a test suite for custom backends.
    """

    url: str = "custom storage"
    """Where the objects lie, for people and for error messages; without secrets."""

    parallel_reads: int = 1
    """How many reads of one object are worth having under way at a time; more than 1 where it is far away."""

    reads_in_place: bool = False
    """Whether `read_into` needs hardly any memory beside its destination, and writes nothing once it is cancelled."""

    silence_timeout: float = DEFAULT_SILENCE_SECONDS
    """Seconds without progress after which surfw's own remote storages give a read up; others bound their own waits."""

    def __repr__(self) -> str:
        """The class and the place, without secrets."""
        return f"<{type(self).__name__} {display_url(str(self.url))}>"

    @abstractmethod
    async def load(self, key: str) -> bytes:
        """The whole object, as bytes, bytearray or memoryview.

        Raises:
            NotFoundError: there is no such object.
            StorageError: it could not be read.
        """

    @abstractmethod
    async def save(self, key: str, data: bytes | BinaryIO) -> None:
        """Write an object, or replace it, whole or not at all: a reader never sees half of it.

        Args:
            key: the object's name.
            data: the bytes, or a binary file to read to its end; the caller closes it. If reading it fails, nothing
                may be written.

        Raises:
            StorageFullError: no space is left.
            StorageError: it could not be written.
        """

    @abstractmethod
    async def exists(self, key: str) -> bool:
        """Whether the object is there.

        Raises:
            StorageError: that could not be found out.
        """

    @abstractmethod
    async def list(self, prefix: str = "") -> list[str]:
        """The whole keys of all objects that start with the prefix, in any order; nothing is left out.

        A prefix is the beginning of a text, not a folder: `models/a` lists `models/a.json` and `models/ab/c.json`.

        Raises:
            StorageError: they could not be listed.
        """

    async def remove(self, key: str) -> None:
        """Remove an object for good; where there is none, nothing is to be done.

        Only `surfw chunk --remove` and `--prune` need it.

        Raises:
            StorageError: it could not be removed, or this backend cannot remove objects.
        """
        raise StorageError(
            f"{key} in {self.url} is not removed: {type(self).__name__} cannot do that; implement "
            "'async def remove(self, key)' in it, or remove the object with the storage's own tools"
        )

    async def load_capped(self, key: str, most_bytes: int) -> bytes:
        """The whole object, which may have at most so many bytes.

        Raises:
            NotFoundError: there is no such object.
            StorageError: it is larger, or could not be read.
        """
        return expect_at_most(await self.load(key), most_bytes, key, self.url)

    def forget(self, key: str) -> None:
        """What is kept of an object, if anything, may be damaged: the next read asks the storage."""
        check_key(key)

    async def size(self, key: str) -> int:
        """The object's length in bytes."""
        return len(await self.load(key))

    async def revision(self, key: str) -> str | None:
        """A text that changes whenever the object does, told without reading it; None if that cannot be told."""
        check_key(key)
        return None

    async def load_range(self, key: str, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop` (end-exclusive) of an object.

        Raises:
            StorageError: the object is shorter than `stop`.
        """
        data = (await self.load(key))[start:stop]
        return expect_length(data, stop - start, key, self.url)

    async def read_into(self, key: str, start: int, destination: memoryview, *, revision: str | None = None) -> None:
        """Fill `destination` with the object's bytes from `start` on.

        Args:
            key: the object's name.
            start: the first byte.
            destination: what to fill; it is not written to any more when this has ended, however it did.
            revision: what `revision()` gave; None for whichever it is now.

        Raises:
            StorageError: the object is shorter, or of another revision.
        """
        destination[:] = await self.load_range(key, start, start + destination.nbytes)
        if revision is not None:
            await self.expect_revision(key, revision)

    async def read_verified(
        self, key: str, start: int, destination: memoryview, check: Check, *, revision: str | None = None
    ) -> None:
        """As `read_into`, with bytes that are verified by `check` before this ends.

        Raises:
            StorageError: as in `read_into`.
            Exception: what `check` raises.
        """
        pinned = {} if revision is None else {"revision": revision}
        reading = self.read_into(key, start, destination, **pinned)
        await (reading if self.reads_in_place else to_its_end(reading))
        await in_thread(check, 0, destination)

    async def expect_revision(self, key: str, revision: str) -> None:
        """Make sure, after a read, that the object is still what it was when `revision()` gave this.

        Raises:
            StorageError: it is not.
        """
        seen = await self.revision(key)
        if seen != revision:
            raise changed(f"{key} in {self.url}", revision, str(seen))

    async def find_foreign_key(self, known: str) -> str | None:
        """A key that does not start with `known`, if there is one: whether the place is in use for something else."""
        return next((key for key in await self.list() if not key.startswith(known)), None)

    def local_path(self, key: str) -> Path | None:
        """The object's file, where objects are local files; None elsewhere.

        It is read, or mapped, past the backend: a backend that changes bytes on their way has none.
        """
        check_key(key)
        return None

    def spool(self) -> Path:
        """A local folder for files on their way into the storage; another one for each storage."""
        return spool_folder(self.url)

    async def adopt(self, key: str, path: Path) -> None:
        """Move a finished local file into the storage."""
        with path.open("rb") as file:
            await self.save(key, file)
        await asyncio.to_thread(path.unlink)

    async def close(self) -> None:
        """Release what the backend holds."""
        return


class ChangedObjectError(StorageError):
    """The object is not the one it was."""


def changed(name: str, expected: str, seen: str) -> ChangedObjectError:
    """The error for an object that is not the one it was."""
    return ChangedObjectError(
        f"{name} was changed: its revision is {seen[:80]} now, expected {expected[:80]}; "
        "read it anew from its beginning"
    )


def spool_folder(place: str) -> Path:
    """A local folder for files on their way to a place, of its own for each."""
    return surfw_home() / "partial" / blake3(place.encode()).hexdigest()[:16]


def expect_at_most(data: Data, most_bytes: int, key: str, url: str) -> Data:
    """The data, if they are no more than what may be loaded.

    Raises:
        StorageError: they are.
    """
    refuse_size(len(data), most_bytes, f"{key} in {url}")
    return data


def refuse_size(size: int, most_bytes: int, name: str) -> None:
    """Refuse an object that is larger than anything of its kind.

    Raises:
        StorageError: it is.
    """
    if size > most_bytes:
        raise StorageError(f"{name} has {size} bytes, expected at most {most_bytes}; it is not loaded")


def expect_length(data: Data, length: int, key: str, url: str) -> Data:
    """The data, if it has the length that was asked for.

    Raises:
        StorageError: it is shorter.
    """
    if len(data) != length:
        raise StorageError(f"{key} in {url} ends early: asked for {length} bytes, got {len(data)}")
    return data
