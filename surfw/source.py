"""Where weights come from: the one interface that the runtime knows, whether a storage or a server is behind it.

A `ChunkSource` delivers *verified stored bytes* into memory that the caller owns. It never decodes, and it is
read-only.
"""

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from blake3 import blake3

from surfw.config import BLOCK_BYTES, DAMAGE_RETRIES
from surfw.errors import UnknownModelError
from surfw.manifest import Chunk, Form, Manifest


@dataclass(frozen=True, slots=True)
class Read:
    """A range of a chunk's stored bytes, and the writable memory it goes to.

    `start` and `stop` (end-exclusive) count stored bytes of the form. Both lie on block boundaries (1 MiB), except that
    `stop` may be the end of the form: only whole blocks can be verified. `destination` has `stop - start` bytes.
    """

    chunk: Chunk
    form: Form
    start: int
    stop: int
    destination: memoryview

    def __post_init__(self) -> None:
        """Refuse ranges that cannot be verified."""
        ends_well = self.stop % BLOCK_BYTES == 0 or self.stop == self.form.stored_bytes
        if self.start % BLOCK_BYTES or not ends_well or not 0 <= self.start <= self.stop <= self.form.stored_bytes:
            raise ValueError(f"range {self.start}-{self.stop} of chunk {self.chunk.name} is not made of whole blocks")
        if self.destination.nbytes != self.stop - self.start:
            raise ValueError(f"destination has {self.destination.nbytes} bytes, the range {self.stop - self.start}")


def find_damage(form: Form, first: int, data: memoryview) -> dict[int, str]:
    """The blocks of a run, starting with block `first` of the form, that are not what their digests promise.

    Returns:
        The BLAKE3 of what each of them is instead, in hex, by its index.
    """
    damage = {}
    for index, start in enumerate(range(0, len(data), BLOCK_BYTES), first):
        seen = blake3(data[start : start + BLOCK_BYTES]).digest()
        if seen != form.block_digest(index):
            damage[index] = seen.hex()
    return damage


def describe_damage(chunk: Chunk, form: Form, block: int, seen: str, *, where: str) -> str:
    """A damaged block in words, without what to do about it; `seen` is the BLAKE3 that it has."""
    return (
        f"chunk {chunk.name} from {where} is damaged: block {block} has BLAKE3 {seen[:16]}…, "
        f"the manifest promises {form.block_digest(block).hex()[:16]}…"
    )


def locate_damage(seen: Sequence[object], *, stored: str = "the store") -> str:
    """Where the damage of something lies that was fetched several times, and what to do about it.

    Args:
        seen: what arrived each time: digests, for example.
        stored: where it would be stored as it arrived.
    """
    if len(set(seen)) == 1:
        return f"chunk the model again: it was the same {len(seen)} times, so the damage lies in {stored}"
    return (
        f"it differed between {len(seen)} reads, so it is damaged on the way; check the network and the memory of this "
        "machine"
    )


async def read_again(read: Callable[[], Awaitable[str | None]], seen: list[str]) -> bool:
    """Read what arrived damaged until it is right, at most `DAMAGE_RETRIES` more times; return whether it is.

    Args:
        read: reads it, past everything that may have kept it, and returns the digest of what came; None if it is right.
        seen: the digests that it had so far, to which this adds; see `locate_damage`.
    """
    while len(seen) <= DAMAGE_RETRIES:
        digest = await read()
        if digest is None:
            return True
        seen.append(digest)
    return False


@dataclass(frozen=True, slots=True)
class View:
    """Stored bytes where they are mapped.

    Attributes:
        memory: the bytes.
        expect_unchanged: call it before the bytes are used again. It is cheap, and raises `IntegrityError` or
            `StorageError` if they are not what was verified any more, as far as that can be seen.
    """

    memory: memoryview
    expect_unchanged: Callable[[], None]


class ChunkSource(ABC):
    """Manifests and verified stored bytes, from somewhere. Use it as an async context manager, or `close()` it."""

    url: str
    """Where the bytes come from, for people and for error messages."""

    @abstractmethod
    async def models(self) -> list[str]:
        """The names of the models there are, sorted."""

    @abstractmethod
    async def manifest(self, model: str) -> Manifest:
        """The manifest of the model with exactly this name.

        Raises:
            UnknownModelError: there is none.
            ManifestError: there is one, and it is not valid.
        """

    @abstractmethod
    async def file(self, manifest: Manifest, path: str) -> bytes:
        """A tokenizer file of the model, verified.

        Raises:
            IntegrityError: its bytes are not what the manifest promises.
        """

    @abstractmethod
    async def fetch(self, manifest: Manifest, reads: Sequence[Read], *, priority: int = 0) -> None:
        """Fill every read's destination with verified bytes. Lower priorities go first.

        Give all reads that are wanted in one call: a source that is far away has as many of them under way at a time as
        it finds useful, in whatever order, so that many small ones cost few round trips. How many there are does not
        change the memory that it takes beside the destinations (see `buffered_bytes`).

        Returns when all are there. If one fails, the first failure is raised and the others are given up: what their
        destinations hold then is undefined. When the call has ended, also by a failure or a cancellation, no
        destination is written to any more.

        Raises:
            IntegrityError: bytes are not what the manifest promises.
            StorageError, WireError: they could not be read.
        """

    async def view(self, manifest: Manifest, chunk: Chunk, form: Form) -> View | None:
        """The form's stored bytes, verified, where they can be mapped: no copy of them is made.

        The memory may be written to, which changes nothing but this view. It is page-aligned, and stays valid after
        `close`.

        Returns:
            None where they have to be fetched.

        Raises:
            IntegrityError: bytes are not what the manifest promises.
            StorageError: they could not be read.
        """
        del manifest, chunk, form
        return None

    @property
    def buffered_bytes(self) -> int:
        """The most memory that fetching takes beside the destinations."""
        return 0

    @property
    def refetched_blocks(self) -> int:
        """Blocks that arrived damaged and were fetched again."""
        return 0

    @abstractmethod
    async def close(self) -> None:
        """Release connections, threads and files. Closing twice is fine."""

    @property
    def fetched_bytes(self) -> int:
        """Stored bytes delivered so far."""
        return 0

    async def resolve(self, name: str | None) -> str:
        """The full name of a model given in full, by a unique last part, or (None) as the only one there is.

        Raises:
            UnknownModelError: no or several models fit.
        """
        known = await self.models()
        if name is None:
            matches = known
        else:
            matches = [name] if name in known else [one for one in known if one.rpartition("/")[2] == name]
        if len(matches) != 1:
            raise UnknownModelError(name, known, where=self.url)
        return matches[0]

    async def __aenter__(self) -> Self:
        """Enter the context; nothing is opened that was not open."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        """Close."""
        await self.close()
