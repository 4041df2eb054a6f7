"""The storage interface: four required methods, and optional ones whose defaults use only these four.

A key is a relative path of plain parts (`blobs/ab/abcd.safetensors`). `check_key` checks every key before it is used,
in surfw's own backends and before a custom one (see `custom`), so a key such as `../x` or `/etc/passwd` never reaches
a storage.

Stored bytes are read by `RangedBackend.read_all`. It cuts reads into ranges (see `ranges`), keeps up to
`parallel_reads` of them in flight, and verifies them. `read_range` reads one range: surfw's remote storages implement
it with retries (see `far_reads`); elsewhere it calls `read_into`.
"""

import asyncio
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import BinaryIO, TypeVar

from blake3 import blake3

from surfw.config import DEFAULT_SILENCE_SECONDS, MIB, PIECE_BYTES, display_url, surfw_home
from surfw.errors import StorageError
from surfw.storage.ranges import Check, ObjectRange, ObjectRead, cut, most_range_bytes
from surfw.threads import in_thread, to_its_end, together

Data = TypeVar("Data", bytes, memoryview)

_STREAM_BYTES = 2 * MIB
"""How many bytes a connection may have received but not yet written to the destination."""

_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_MAX_KEY = 512


def check_key(key: str) -> str:
    """Return the key after checking that it is a relative path of plain parts.

    Raises:
        StorageError: it is absolute, contains `..`, is empty or has forbidden characters.
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
    """Return the prefix after checking that a key can start with it. The empty prefix matches all keys.

    Raises:
        StorageError: no key can start with it.
    """
    if prefix:
        check_key(prefix.removesuffix("/"))
    return prefix


class StorageBackend(ABC):
    """Named objects of bytes. A subclass must implement `load`, `save`, `exists` and `list`, and nothing else.

    What surfw guarantees to a custom backend:

    - **Keys** are relative paths of plain parts, such as `blobs/ab/abcd.safetensors`: ASCII letters, digits, `.`, `_`
      and `-`, joined by `/`, at most 512 characters; no part starts with `.` or `-`. They are checked before the
      backend sees them, as are prefixes, so none is absolute or contains `..`.
    - **Calls** run on an event loop: that of surfw's own thread in a model, the server's in a server, the caller's in a
      chunker. Several calls may be in flight at once. One backend may be used on several loops in succession, so it
      must not keep anything that belongs to a loop, such as a connection, for the next loop.
    - **Whole objects** are loaded once for all ranges that are read from them, if the backend has no `load_range` or
      `read_into`. Objects that are being read are cached: up to 256 MB in all, or the most recent one if it is larger.

    **Sizes** are limited: surfw loads every object with `load_capped`. That calls `size` first, if the backend
    implements it; otherwise an oversized object is refused only after it was loaded.

    **Errors**: raise `surfw.NotFoundError` for a missing object (`KeyError` and `FileNotFoundError` are treated the
    same), `surfw.StorageFullError` if no space is left, and `surfw.StorageError` for everything else. Any other
    exception is reported as a `StorageError` with the backend's class, the key, and the exception.

    `surfw.testing.StorageBackendSuite` is a test suite for custom backends.
    """

    url: str = "custom storage"
    """The location of the objects, for display and error messages; without secrets."""

    parallel_reads: int = 1
    """How many reads to keep in flight; more than 1 for remote storage."""

    reads_in_place: bool = False
    """Whether `read_into` needs little memory besides its destination, and writes nothing after its cancellation."""

    silence_timeout: float = DEFAULT_SILENCE_SECONDS
    """Seconds without progress after which a read of surfw's own remote storages fails; others set their own limits."""

    def __repr__(self) -> str:
        """Show the class and the location, without secrets."""
        return f"<{type(self).__name__} {display_url(str(self.url))}>"

    @abstractmethod
    async def load(self, key: str) -> bytes:
        """Return the whole object, as bytes, bytearray or memoryview.

        Raises:
            NotFoundError: the object does not exist.
            StorageError: it could not be read.
        """

    @abstractmethod
    async def save(self, key: str, data: bytes | BinaryIO) -> None:
        """Write or replace an object atomically: a reader never sees a part of it.

        Args:
            key: the object's name.
            data: the bytes, or a binary file to read to its end, which the caller closes. If reading the file fails,
                nothing may be written.

        Raises:
            StorageFullError: no space is left.
            StorageError: it could not be written.
        """

    @abstractmethod
    async def exists(self, key: str) -> bool:
        """Return whether the object exists.

        Raises:
            StorageError: this could not be determined.
        """

    @abstractmethod
    async def list(self, prefix: str = "") -> list[str]:
        """Return the full keys, in any order, of all objects whose keys start with the prefix.

        A prefix is the beginning of a string, not a folder: `models/a` lists `models/a.json` and `models/ab/c.json`.

        Raises:
            StorageError: they could not be listed.
        """

    async def remove(self, key: str) -> None:
        """Remove an object permanently. A missing object is not an error.

        Only `surfw chunk --remove` and `--prune` need it.

        Raises:
            StorageError: it could not be removed, or this backend cannot remove objects.
        """
        raise StorageError(
            f"{key} in {self.url} is not removed: {type(self).__name__} cannot do that; implement "
            "'async def remove(self, key)' in it, or remove the object with the storage's own tools"
        )

    async def load_capped(self, key: str, most_bytes: int) -> bytes:
        """Return the whole object, which may have at most `most_bytes`.

        Raises:
            NotFoundError: the object does not exist.
            StorageError: it is larger, or could not be read.
        """
        data = await self.load(key)
        refuse_size(len(data), most_bytes, f"{key} in {self.url}")
        return data

    def forget(self, key: str) -> None:
        """Drop all cached bytes of an object, which may be damaged, so that the next read goes to the storage."""
        check_key(key)

    async def size(self, key: str) -> int:
        """Return the object's length in bytes."""
        return len(await self.load(key))

    async def revision(self, key: str) -> str | None:
        """Return a string that changes whenever the object does, without reading it; None if the storage has none."""
        check_key(key)
        return None

    async def load_range(self, key: str, start: int, stop: int) -> bytes:
        """Return bytes `start` to `stop` (end-exclusive) of an object.

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
            destination: the memory to fill. Nothing is written to it after the call has ended, even by a failure.
            revision: the result of an earlier `revision()`; None accepts any.

        Raises:
            StorageError: the object is too short, or has another revision.
        """
        destination[:] = await self.load_range(key, start, start + destination.nbytes)
        if revision is not None:
            await self.expect_revision(key, revision)

    async def _load_through_read_into(self, key: str, start: int, stop: int) -> bytes:
        """`load_range` for backends that implement `read_into`."""
        memory = bytearray(stop - start)
        await self.read_into(key, start, memoryview(memory))
        return bytes(memory)

    async def expect_revision(self, key: str, revision: str) -> None:
        """Check, after a read, that the object still has this revision.

        Raises:
            ChangedObjectError: it has another.
        """
        seen = await self.revision(key)
        if seen != revision:
            raise ChangedObjectError(f"{key} in {self.url}", revision, str(seen))

    async def find_foreign_key(self, known: str) -> str | None:
        """Return a key that does not start with `known`, if any: a sign that the place is used for something else."""
        return next((key for key in await self.list() if not key.startswith(known)), None)

    def check_rights(self) -> None:
        """Check early that a store can be written here, without writing; by default, this is found out by writing.

        Raises:
            StorageError: it cannot.
        """
        return

    def local_path(self, key: str) -> Path | None:
        """Return the object's path if objects are local files, otherwise None.

        The file is read or mapped directly, so a backend that transforms bytes must return None.
        """
        check_key(key)
        return None

    def spool(self) -> Path:
        """Return the local spool folder for files that will be moved into the storage; each storage has its own."""
        return spool_folder(self.url)

    async def adopt(self, key: str, path: Path) -> None:
        """Move a finished local file into the storage."""
        with path.open("rb") as file:
            await self.save(key, file)
        await asyncio.to_thread(path.unlink)

    async def close(self) -> None:
        """Release connections, threads and files."""
        return


class RangedBackend(StorageBackend):
    """The base of surfw's own backends, and of the adapter for all others: concurrent reads, cut into ranges."""

    @property
    def range_bytes(self) -> int:
        """The size of the largest range."""
        if self.parallel_reads == 1:
            return PIECE_BYTES
        return most_range_bytes(self.parallel_reads, streamed=self.reads_in_place)

    @property
    def buffered_bytes(self) -> int:
        """The most memory that one `read_all` takes, not counting its destinations."""
        return self.parallel_reads * (_STREAM_BYTES if self.reads_in_place else self.range_bytes)

    async def read_all(self, reads: Sequence[ObjectRead]) -> None:
        """Fill the destinations of all reads, and verify those that have a check.

        Up to `parallel_reads` ranges, over all reads, are in flight at a time. The first failure cancels the others.
        Once this has ended, even by cancellation, nothing more is written to any destination.

        Raises:
            StorageError: see `read_into`.
            Exception: any error of a check.
        """
        pieces = [piece for read in reads for piece in cut(read, self.range_bytes)]
        if len(pieces) == 1:
            await self._read_piece(pieces[0])
            return
        left = iter(pieces)

        async def take() -> None:
            for piece in left:
                await self._read_piece(piece)

        await together(take() for _ in range(min(len(pieces), self.parallel_reads)))

    def run_bytes(self, key: str) -> int:
        """Return the most bytes that one `read_pieces` should read; 0 if it has no advantage over single reads."""
        check_key(key)
        return 0

    async def read_pieces(
        self,
        key: str,
        start: int,
        pieces: Iterable[memoryview],
        on_filled: Callable[[int], object],
        *,
        revision: str | None = None,
    ) -> None:
        """Fill several pieces of memory with consecutive bytes of an object, from `start` on.

        `on_filled` is called repeatedly, in any thread, with the number of bytes filled. A full piece is released and
        never written again, so it can be used while the rest arrives; pass an iterator so that no list holds it.

        Raises:
            StorageError: see `read_into`.
        """
        done = 0
        pinned = {} if revision is None else {"revision": revision}
        for piece in pieces:
            await self.read_into(key, start + done, piece, **pinned)
            done += piece.nbytes
            on_filled(done)

    async def _read_piece(self, piece: ObjectRead) -> None:
        if len(piece.parts) == 1:
            await self.read_range(piece.parts[0], piece.destination, piece.check)
            return
        at = 0
        for part in piece.parts:
            await self.read_range(part, piece.destination[at : at + part.length])
            at += part.length
        if piece.check is not None:
            await in_thread(piece.check, 0, piece.destination)

    async def read_range(self, part: ObjectRange, destination: memoryview, check: Check | None = None) -> None:
        """Fill the destination with one range of an object, and verify it.

        Raises:
            StorageError: see `read_into`.
            Exception: any error of the check.
        """
        pinned = {} if part.pin.revision is None else {"revision": part.pin.revision}  # not all backends take one
        reading = self.read_into(part.key, part.start, destination, **pinned)
        await (reading if self.reads_in_place else to_its_end(reading))
        if check is not None:
            await in_thread(check, 0, destination)


class ChangedObjectError(StorageError):
    """An object does not have the expected revision.

    Attributes:
        name: the object.
        expected: its revision when it was first read.
        seen: its revision now.
    """

    def __init__(self, name: str, expected: str, seen: str, advice: str = "; read it again from its beginning") -> None:
        """Set the object and both revisions; `advice` ends the message."""
        self.name, self.expected, self.seen = name, expected, seen
        super().__init__(f"{name} was changed: its revision is {seen[:80]} now, expected {expected[:80]}{advice}")


def spool_folder(place: str) -> Path:
    """Return the local spool folder of a place."""
    return surfw_home() / "partial" / blake3(place.encode()).hexdigest()[:16]


def refuse_size(size: int, most_bytes: int, name: str) -> None:
    """Check the size of an object against its limit.

    Raises:
        StorageError: it is larger.
    """
    if size > most_bytes:
        raise StorageError(f"{name} has {size} bytes, expected at most {most_bytes}; it is not loaded")


def expect_length(data: Data, length: int, key: str, url: str) -> Data:
    """Return the data after checking its length.

    Raises:
        StorageError: the length is wrong.
    """
    if len(data) != length:
        raise StorageError(f"{key} in {url} ends early: asked for {length} bytes, got {len(data)}")
    return data
