"""Answers on their way into memory: a chunk's stored bytes into the caller's, or a whole document.

A download outlives the attempts that it takes. The link writes through it only while it waits for an answer. A chunk's
bytes are verified in runs of blocks by threads, while the next ones arrive; `settle` waits until no thread reads them
any more.
"""

import asyncio
from collections import defaultdict
from concurrent.futures import Executor, Future
from typing import Protocol

from surfw.config import BLOCK_BYTES, DAMAGE_RETRIES, MIB, PAGE_BYTES
from surfw.errors import ConnectionFailedError, IntegrityError
from surfw.manifest import payload_digest
from surfw.source import Read, find_damage
from surfw.threads import to_its_end
from surfw.wire import Begin

_VERIFY_BYTES = 4 * MIB


class Download(Protocol):
    """Where the bytes of an answer go."""

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


class DocumentDownload:
    """A manifest, a file or digests: held in memory, and as long as the server says, within the session's limits.

    Attributes:
        damage: what came each time instead of what was announced or listed: a size and digest, or a digest.
    """

    def __init__(
        self, what: str, *, read_bytes: int, listed: tuple[int, str] | None = None, most_bytes: int | None = None
    ) -> None:
        """Name it for errors.

        Args:
            what: its name.
            read_bytes: how much of the storage a server reads to make it.
            listed: the size and BLAKE3 that a manifest lists for it.
            most_bytes: how long it can be, if less than the session's limits is known.
        """
        self.most_read_bytes = most_read(read_bytes)
        self.damage: list[object] = []
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
        announced = (message.size, message.digest)
        if self._listed not in {None, announced}:
            self.damage.append(announced)
            raise IntegrityError(f"{self._what} is not the one its manifest lists")
        if self._most_bytes is not None and message.size > self._most_bytes:
            self.damage.append(announced)
            raise IntegrityError(f"{self._what} has {message.size} bytes, expected at most {self._most_bytes}")
        self._digest = message.digest
        self._data = bytearray(message.size)

    def place(self, offset: int, size: int) -> memoryview:
        """The memory for a part."""
        return memoryview(self._data)[offset : offset + size]

    def arrived(self, stop: int) -> None:
        """Nothing has to be done before the whole is there."""

    def verified(self) -> bytes:
        """The whole, once it is there.

        Raises:
            IntegrityError: it is not what the server said it would be.
        """
        data = bytes(self._data)
        digest = payload_digest(data)
        if digest != self._digest:
            self.damage.append(digest)
            raise IntegrityError(f"{self._what} is damaged: its BLAKE3 is not the one that was announced with it")
        return data


class ChunkDownload:
    """A read of a chunk's stored bytes, over as many attempts as it takes.

    Attributes:
        read: what is read, and into which memory.
        missing: the ranges that have to come, the next one last. Empty once all is there and verified.
        damage: for each block that was damaged, the BLAKE3 that it had each time.
        first_failure: why the first attempt that failed did so.
        reached_bytes: how far from the start of the read the failed attempts got at most.
    """

    def __init__(self, read: Read, verifiers: Executor | None) -> None:
        """Nothing is there yet; `verifiers` None leaves the bytes unverified, for measurements only."""
        self.read = read
        self.missing = [(read.start, read.stop)]
        self.damage: defaultdict[int, list[str]] = defaultdict(list)
        self.first_failure = ""
        self.reached_bytes = 0
        self.most_read_bytes = 0
        self._verifiers = verifiers
        self._start = self._stop = self._at = self._checked = read.start
        self._checks: list[Future[dict[int, str]]] = []
        self._progressed = False

    def next_range(self) -> tuple[int, int, bool]:
        """Begin an attempt: the range to ask for now, and whether it is asked for because it came damaged."""
        start, stop = self._start, self._stop = self.missing[-1]
        self._at = self._checked = start
        self._checks = []
        self.most_read_bytes = most_read(stop - start, 1 + len(self.read.chunk.tensors))
        return start, stop, start // BLOCK_BYTES in self.damage

    def begin(self, message: Begin) -> None:
        """Sessions let no `begin` through for a chunk."""
        raise AssertionError(message)

    def place(self, offset: int, size: int) -> memoryview:
        """The part of the destination."""
        start = offset - self.read.start
        return self.read.destination[start : start + size]

    def arrived(self, stop: int) -> None:
        """Have whole blocks verified, some at a time."""
        self._at = stop
        last = stop == self._stop
        if not last and stop - self._checked < _VERIFY_BYTES:
            return
        end = stop if last else stop - stop % BLOCK_BYTES
        if self._verifiers is not None:
            run = self.place(self._checked, end - self._checked)
            self._checks.append(self._verifiers.submit(find_damage, self.read.form, self._checked // BLOCK_BYTES, run))
        self._checked = end

    async def verify(self) -> dict[int, str]:
        """Wait until what arrived in this attempt is verified, and let `missing` be what has still to come.

        Returns:
            The blocks of it that are damaged, and the BLAKE3 that each has.
        """
        found: dict[int, str] = {}
        for check in self._checks:
            found |= await asyncio.wrap_future(check)
        for block, seen in found.items():
            self.damage[block].append(seen)
        self._progressed |= self._checked - self._start > len(found) * BLOCK_BYTES
        self.missing.pop()
        if self._checked < self._stop:
            self.missing.append((self._checked, self._stop))
        above = 0
        for block in sorted(found, reverse=True):
            start, stop = block * BLOCK_BYTES, min((block + 1) * BLOCK_BYTES, self.read.stop)
            if stop == above:
                _, stop = self.missing.pop()
            self.missing.append((start, stop))
            above = start
        return found

    async def settle(self) -> None:
        """Wait until no thread looks at the destination any more."""
        running = [check for check in self._checks if not check.cancel() and not check.done()]
        await to_its_end(asyncio.gather(*map(asyncio.wrap_future, running), return_exceptions=True))

    def failed(self, error: ConnectionFailedError) -> bool:
        """Note that an attempt was broken off; whether anything was verified since the last one that was."""
        self.first_failure = self.first_failure or str(error)  # the error itself would keep frames and memory alive
        self.reached_bytes = max(self.reached_bytes, self._at - self.read.start)
        progressed, self._progressed = self._progressed, False
        return progressed
