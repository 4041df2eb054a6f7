"""Answers on their way into memory: a chunk's range into a destination that the caller owns, or a whole document.

A chunk's bytes are verified in runs of blocks by threads, while the next ones arrive. Once a transfer is abandoned,
nothing writes to its destination any more; `settle` waits until nothing reads from it either.
"""

import asyncio
from concurrent.futures import Executor, Future
from typing import Protocol

from surfw.config import BLOCK_BYTES, DAMAGE_RETRIES, MIB, PAGE_BYTES
from surfw.errors import IntegrityError
from surfw.manifest import count_blocks, payload_digest
from surfw.source import Read, find_damage
from surfw.threads import to_its_end
from surfw.wire import Begin

_VERIFY_BYTES = 4 * MIB
_AROUND_DIGESTS_BYTES = 1024
"""What a document has beside the digests of blocks."""


class Transfer(Protocol):
    """Where the bytes of an answer go."""

    received: int
    """How many bytes have arrived."""

    most_read_bytes: int
    """The most that a server can have to read from its storage for the answer."""

    def begin(self, message: Begin) -> None:
        """The answer's size and digest are known; only documents are begun. `IntegrityError` refuses the answer."""

    def place(self, offset: int, size: int) -> memoryview:
        """The memory for `size` bytes of the answer from `offset` on."""

    def arrived(self, stop: int) -> None:
        """The bytes before offset `stop` are there."""


def most_read(size: int, parts: int = 1) -> int:
    """What is read for so many bytes that lie in some places: whole pages, and more than once if they are damaged."""
    return (size + 2 * parts * PAGE_BYTES) * (1 + DAMAGE_RETRIES)


def most_digests_bytes(stored_bytes: int) -> int:
    """How long the document with the digests of so many stored bytes may be: two characters for each byte of them."""
    return 64 * count_blocks(stored_bytes) + _AROUND_DIGESTS_BYTES


class Document:
    """A manifest or a file: held in memory, and as long as the server says, within the session's limits.

    Attributes:
        seen: what came in place of what was announced or listed, once that is known: a size or a digest.
    """

    def __init__(
        self,
        what: str,
        *,
        listed: tuple[int, str] | None = None,
        most_bytes: int | None = None,
        made_from_bytes: int,
    ) -> None:
        """Name it for errors.

        Args:
            what: its name.
            listed: the size and BLAKE3 that a manifest lists for it.
            most_bytes: how long it can be, if less than the session's limits is known.
            made_from_bytes: how much of the storage a server reads to make it.
        """
        self.received = 0
        self.most_read_bytes = most_read(made_from_bytes)
        self.seen: object = None
        self._what = what
        self._listed = listed
        self._most_bytes = most_bytes
        self._digest = ""
        self._data = bytearray()

    def begin(self, message: Begin) -> None:
        """Make room.

        Raises:
            IntegrityError: what is announced is not what is listed, or longer than it can be.
        """
        if self._listed not in {None, (message.size, message.digest)}:
            self.seen = (message.size, message.digest)
            raise IntegrityError(f"{self._what} is not the one its manifest lists")
        if self._most_bytes is not None and message.size > self._most_bytes:
            self.seen = (message.size, message.digest)
            raise IntegrityError(f"{self._what} has {message.size} bytes, expected at most {self._most_bytes}")
        self._digest = message.digest
        self._data = bytearray(message.size)

    def place(self, offset: int, size: int) -> memoryview:
        """The memory for a part."""
        return memoryview(self._data)[offset : offset + size]

    def arrived(self, stop: int) -> None:
        """Count."""
        self.received = stop

    def verified(self) -> bytes:
        """The whole, once it is there.

        Raises:
            IntegrityError: it is not what the server said it would be.
        """
        data = bytes(self._data)
        self.seen = payload_digest(data)
        if self.seen != self._digest:
            raise IntegrityError(f"{self._what} is damaged: its BLAKE3 is not the one that was announced with it")
        return data


class ChunkTransfer:
    """A range of a chunk's stored bytes, verified as they come."""

    def __init__(self, read: Read, verifiers: Executor | None) -> None:
        """Name what is read; `verifiers` None leaves the bytes unverified, for measurements only."""
        self.received = 0
        self.most_read_bytes = most_read(read.stop - read.start, 1 + len(read.chunk.tensors))
        self._read = read
        self._verifiers = verifiers
        self._checked = 0
        self._checks: list[tuple[int, Future[dict[int, str]]]] = []

    def begin(self, message: Begin) -> None:
        """Sessions let no `begin` through for a chunk."""
        raise AssertionError(message)

    def place(self, offset: int, size: int) -> memoryview:
        """The part of the destination."""
        start = offset - self._read.start
        return self._read.destination[start : start + size]

    def arrived(self, stop: int) -> None:
        """Have whole blocks verified, some at a time."""
        self.received = stop - self._read.start
        last = stop == self._read.stop
        if self._verifiers is None or not (last or self.received - self._checked >= _VERIFY_BYTES):
            return
        end = self.received if last else self.received - self.received % BLOCK_BYTES
        first = (self._read.start + self._checked) // BLOCK_BYTES
        run = self._read.destination[self._checked : end]
        self._checks.append((end, self._verifiers.submit(find_damage, self._read.form, first, run)))
        self._checked = end

    async def damage(self) -> dict[int, str]:
        """Wait until all that arrived is verified: the blocks that are damaged, and the BLAKE3 that each has."""
        damage: dict[int, str] = {}
        for _, check in self._checks:
            found: dict[int, str] = await asyncio.wrap_future(check)
            damage |= found
        return damage

    @property
    def verified_bytes(self) -> int:
        """How many bytes from the start of the range on are verified, and what they should be."""
        verified = 0
        for end, check in self._checks:
            if not check.done() or check.cancelled() or check.exception():
                break
            if damage := check.result():
                return min(damage) * BLOCK_BYTES - self._read.start
            verified = end
        return verified

    async def settle(self) -> None:
        """Wait until no thread looks at the destination any more."""
        running = [check for _, check in self._checks if not check.cancel() and not check.done()]
        await to_its_end(asyncio.gather(*map(asyncio.wrap_future, running), return_exceptions=True))
