"""The interface of a storage: four methods, and optional ones with working defaults built on the four.

A key is a relative path of plain parts (`blobs/ab/abcd.safetensors`). `check_key` is the one gate: every key passes it
before it touches anything, in surfw's own backends or before a custom one (see `custom`), so a key such as `../x` or
`/etc/passwd` reaches no storage.

Stored bytes are read by `RangedBackend.read_all`. It cuts reads into ranges (see `ranges`), keeps up to
`parallel_reads` of them under way, and verifies them. A range is read by `read_range`: surfw's far storages have their
own, with retries (see `far_reads`); everywhere else it is a `read_into`.
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
"""What a connection may have received but not yet written to the destination."""

_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_MAX_KEY = 512


def check_key(key: str) -> str:
    """Return the key, which has to be a relative path of plain parts.

    Raises:
        StorageError: it is absolute, leads upwards, is empty or has characters that a key may not have.
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
    """Return the prefix, with which a key has to be able to start; the empty one is the prefix of all keys.

    Raises:
        StorageError: no key can start with it.
    """
    if prefix:
        check_key(prefix.removesuffix("/"))
    return prefix


class StorageBackend(ABC):
    """Named objects of bytes. Subclass it, and implement `load`, `save`, `exists` and `list`; nothing else is needed.

    What surfw guarantees to a custom backend:

    - **Keys** are relative paths of plain parts, such as `blobs/ab/abcd.safetensors`: ASCII letters, digits, `.`, `_`
      and `-`, joined by `/`, at most 512 characters; no part starts with `.` or `-`. They are checked before the
      backend sees them, as are prefixes, so none is absolute or leads upwards.
    - **Calls** come on an event loop: surfw's own thread in a model, the server's loop in a server, the caller's in a
      chunker. Several calls may be under way at once. One backend may be used on several loops one after another, so
      anything that belongs to a loop, such as a connection, must not be kept for the next one.
    - **Whole objects** are loaded once for all the ranges that are read of them, if the backend has no faster
      `load_range` or `read_into`. While they are being read, objects of 256 MB in all are kept, or the last one.

    **Sizes** are limited: surfw loads every object with `load_capped`. That asks `size` first, if the backend has its
    own; otherwise an object that is too large is refused only once it is in memory.

    **Errors**: raise `surfw.NotFoundError` for an object that does not exist (`KeyError` and `FileNotFoundError` count
    as that), `surfw.StorageFullError` if there is no space left, `surfw.StorageError` for everything else. Any other
    exception is reported as a `StorageError` with the backend's class, the key, and the exception.

    `surfw.testing.StorageBackendSuite` is a test suite for custom backends.
    """

    url: str = "custom storage"
    """Where the objects are, for people and for error messages; without secrets."""

    parallel_reads: int = 1
    """How many reads are worth having under way at a time; more than 1 where the storage is far away."""

    reads_in_place: bool = False
    """Whether `read_into` needs hardly any memory besides its destination, and writes nothing once it is cancelled."""

    silence_timeout: float = DEFAULT_SILENCE_SECONDS
    """Seconds without progress after which surfw's own remote storages give up a read; others bound their own waits."""

    def __repr__(self) -> str:
        """Show the class and the place, without secrets."""
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
        """Write or replace an object, whole or not at all: a reader never sees half of it.

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
        """Return whether the object exists.

        Raises:
            StorageError: that could not be found out.
        """

    @abstractmethod
    async def list(self, prefix: str = "") -> list[str]:
        """Return the keys, in full and in any order, of all objects whose keys start with the prefix.

        A prefix is the beginning of a string, not a folder: `models/a` lists `models/a.json` and `models/ab/c.json`.

        Raises:
            StorageError: they could not be listed.
        """

    async def remove(self, key: str) -> None:
        """Remove an object for good; one that does not exist is no error.

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
        """Drop anything that is cached of an object, which may be damaged: the next read asks the storage."""
        check_key(key)

    async def size(self, key: str) -> int:
        """Return the object's length in bytes."""
        return len(await self.load(key))

    async def revision(self, key: str) -> str | None:
        """Return a string that changes whenever the object does, without reading it; None if there is no such thing."""
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
            destination: the memory to fill. It is not written to any more once this has ended, also by a failure.
            revision: what `revision()` returned; None accepts any.

        Raises:
            StorageError: the object is shorter, or of another revision.
        """
        destination[:] = await self.load_range(key, start, start + destination.nbytes)
        if revision is not None:
            await self.expect_revision(key, revision)

    async def _load_through_read_into(self, key: str, start: int, stop: int) -> bytes:
        """A `load_range` for those that have a `read_into` of their own."""
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
        """Return a key that does not start with `known`, if there is one: then the place is used for something else."""
        return next((key for key in await self.list() if not key.startswith(known)), None)

    def local_path(self, key: str) -> Path | None:
        """Return the object's file, where objects are local files; None elsewhere.

        It is read or mapped directly, so a backend that changes bytes on their way must return None.
        """
        check_key(key)
        return None

    def spool(self) -> Path:
        """Return a local folder for files on their way into the storage; each storage has its own."""
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
    """What surfw's own backends, and its adapter of all others, add: many reads at once, cut into ranges."""

    @property
    def range_bytes(self) -> int:
        """Return the size of the largest range that is read at a time."""
        if self.parallel_reads == 1:
            return PIECE_BYTES
        return most_range_bytes(self.parallel_reads, streamed=self.reads_in_place)

    @property
    def buffered_bytes(self) -> int:
        """Return the most memory that one `read_all` takes besides its destinations."""
        return self.parallel_reads * (_STREAM_BYTES if self.reads_in_place else self.range_bytes)

    async def read_all(self, reads: Sequence[ObjectRead]) -> None:
        """Fill the destinations of all reads, and verify those that have a check.

        Up to `parallel_reads` ranges, of all reads together, are under way at a time. The first failure ends the
        others. Once this has ended, also by a cancellation, no destination is written to any more.

        Raises:
            StorageError: as in `read_into`.
            Exception: what a check raises.
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
        """How much one `read_pieces` of an object is to have at most; 0 if reading pieces by themselves is as good."""
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

        `on_filled` hears how many bytes are there, again and again, in any thread. A piece that is full is let go of,
        and not written to any more, so that it can be used while the rest arrives; give an iterator to keep none.

        Raises:
            StorageError: as in `read_into`.
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
        """Fill the destination with one range of an object as a whole, and verify it.

        Raises:
            StorageError: as in `read_into`.
            Exception: what the check raises.
        """
        pinned = {} if part.pin.revision is None else {"revision": part.pin.revision}  # some backends know none
        reading = self.read_into(part.key, part.start, destination, **pinned)
        await (reading if self.reads_in_place else to_its_end(reading))
        if check is not None:
            await in_thread(check, 0, destination)


class ChangedObjectError(StorageError):
    """An object has another revision than the expected one.

    Attributes:
        name: the object.
        expected: its revision when it was first read.
        seen: its revision now.
    """

    def __init__(self, name: str, expected: str, seen: str, advice: str = "; read it again from its beginning") -> None:
        """Name the object and both revisions; `advice` says what to do."""
        self.name, self.expected, self.seen = name, expected, seen
        super().__init__(f"{name} was changed: its revision is {seen[:80]} now, expected {expected[:80]}{advice}")


def spool_folder(place: str) -> Path:
    """Return a local folder for files on their way to a place; each place has its own."""
    return surfw_home() / "partial" / blake3(place.encode()).hexdigest()[:16]


def refuse_size(size: int, most_bytes: int, name: str) -> None:
    """Refuse an object that is larger than objects of its kind may be.

    Raises:
        StorageError: it is larger.
    """
    if size > most_bytes:
        raise StorageError(f"{name} has {size} bytes, expected at most {most_bytes}; it is not loaded")


def expect_length(data: Data, length: int, key: str, url: str) -> Data:
    """Return the data, which has to be as long as it was asked for.

    Raises:
        StorageError: it is not.
    """
    if len(data) != length:
        raise StorageError(f"{key} in {url} ends early: asked for {length} bytes, got {len(data)}")
    return data
