"""Downloads: a chunk's stored bytes into the caller's memory, or a whole document.

A download may take several attempts. A link writes to it only while it waits for the answer. Threads verify a chunk's
bytes in runs of blocks while the next ones arrive; `settle` waits until no thread reads the caller's memory any more.
"""

import asyncio
from collections import defaultdict
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field

from surfw.config import BLOCK_BYTES, DAMAGE_RETRIES, MIB, PAGE_BYTES
from surfw.errors import ConnectionFailedError, IntegrityError
from surfw.manifest import payload_digest
from surfw.source import Read, check_blocks
from surfw.threads import to_its_end
from surfw.wire import Begin

_VERIFY_BYTES = 4 * MIB


def most_read(size: int, parts: int = 1) -> int:
    """Return the most that a server reads for `size` bytes in `parts` places: whole pages, again for each retry."""
    return (size + 2 * parts * PAGE_BYTES) * (1 + DAMAGE_RETRIES)


@dataclass
class DocumentDownload:
    """A manifest, a file or digests, held in memory. The server announces its length, within the session's limits.

    Attributes:
        what: its name, for errors.
        most_read_bytes: the most that a server reads from its storage for it.
        listed: its size and BLAKE3 in the manifest, if the manifest lists it.
        most_bytes: its maximum length, if known to be less than the session's limits.
        damage: what arrived in each damaged attempt: a digest, or an announced size and digest.
    """

    what: str
    most_read_bytes: int
    listed: tuple[int, str] | None = None
    most_bytes: int | None = None
    damage: list[object] = field(default_factory=list)
    _digest: str = ""
    _data: bytearray = field(default_factory=bytearray)

    def begin(self, message: Begin) -> None:
        """Allocate its memory.

        Raises:
            IntegrityError: it is not the one in the manifest, or too long.
        """
        announced = (message.size, message.digest)
        if self.listed not in {None, announced}:
            self.damage.append(announced)
            raise IntegrityError(f"{self.what} is not the one its manifest lists")
        if self.most_bytes is not None and message.size > self.most_bytes:
            self.damage.append(announced)
            raise IntegrityError(f"{self.what} has {message.size} bytes, expected at most {self.most_bytes}")
        self._digest = message.digest
        self._data = bytearray(message.size)

    def place(self, offset: int, size: int) -> memoryview:
        """Return the memory for a part."""
        return memoryview(self._data)[offset : offset + size]

    def arrived(self, stop: int) -> None:
        """Do nothing: a document is verified as a whole."""

    def verified(self) -> bytes:
        """Return the document, once all of it has arrived.

        Raises:
            IntegrityError: its digest is not the one that the server announced.
        """
        data = bytes(self._data)
        digest = payload_digest(data)
        if digest != self._digest:
            self.damage.append(digest)
            raise IntegrityError(f"{self.what} is damaged: its BLAKE3 is not the one that was announced with it")
        return data


class ChunkDownload:
    """A range of a chunk's stored bytes, over as many attempts as it takes.

    Attributes:
        read: the range and its destination.
        missing: the blocks that still have to arrive. Empty once everything is verified.
        damage: the damaged blocks, with the BLAKE3 that each had each time.
        first_failure: the error of the first broken attempt.
        reached_bytes: how far the broken attempts got, from the start of the range.
    """

    def __init__(self, read: Read, verifiers: Executor | None) -> None:
        """Start without any bytes. Without `verifiers` they stay unverified, for measurements only."""
        first = read.start // BLOCK_BYTES
        self.read = read
        self.missing = set(range(first, max(-(-read.stop // BLOCK_BYTES), first + 1)))  # one for an empty range too
        self.damage: defaultdict[int, list[str]] = defaultdict(list)
        self.first_failure = ""
        self.reached_bytes = 0
        self.most_read_bytes = 0
        self._verifiers = verifiers
        self._blocks = range(0)
        self._start = self._stop = self._at = self._checked = read.start
        self._checks: list[Future[dict[int, str]]] = []
        self._progressed = False

    def next_range(self) -> tuple[int, int, bool]:
        """Begin an attempt: return the range to request, and whether because it arrived damaged."""
        first = last = min(self.missing)
        fresh = first in self.damage
        while last + 1 in self.missing and (last + 1 in self.damage) == fresh:
            last += 1
        self._blocks = range(first, last + 1)
        self._start = self._at = self._checked = first * BLOCK_BYTES
        self._stop = min((last + 1) * BLOCK_BYTES, self.read.stop)
        self._checks = []
        self.most_read_bytes = most_read(self._stop - self._start, 1 + len(self.read.chunk.tensors))
        return self._start, self._stop, fresh

    def place(self, offset: int, size: int) -> memoryview:
        """Return the part of the destination."""
        start = offset - self.read.start
        return self.read.destination[start : start + size]

    def arrived(self, stop: int) -> None:
        """Submit whole blocks to the verifiers, several at a time."""
        self._at = stop
        last = stop == self._stop
        if not last and stop - self._checked < _VERIFY_BYTES:
            return
        end = stop if last else stop - stop % BLOCK_BYTES
        if self._verifiers is not None:
            run = self.place(self._checked, end - self._checked)
            self._checks.append(self._verifiers.submit(check_blocks, self.read, self._checked // BLOCK_BYTES, run))
        self._checked = end

    async def verify(self) -> dict[int, str]:
        """Wait until what arrived in this attempt is verified, and update `missing`.

        Returns:
            The blocks that are damaged, with the BLAKE3 of each.
        """
        found: dict[int, str] = {}
        for check in self._checks:
            damaged: dict[int, str] = await asyncio.wrap_future(check)
            found |= damaged
        for block, seen in found.items():
            self.damage[block].append(seen)
        self._progressed |= self._checked - self._start > len(found) * BLOCK_BYTES
        whole = len(self._blocks) if self._checked == self._stop else (self._checked - self._start) // BLOCK_BYTES
        self.missing.difference_update(block for block in self._blocks[:whole] if block not in found)
        return found

    async def settle(self) -> None:
        """Wait until no thread reads the destination any more."""
        running = [check for check in self._checks if not check.cancel() and not check.done()]
        await to_its_end(asyncio.gather(*map(asyncio.wrap_future, running), return_exceptions=True))

    def failed(self, error: ConnectionFailedError) -> bool:
        """Record a broken attempt; return whether anything was verified since the previous one."""
        self.first_failure = self.first_failure or str(error)  # the error itself would keep frames and memory alive
        self.reached_bytes = max(self.reached_bytes, self._at - self.read.start)
        progressed, self._progressed = self._progressed, False
        return progressed


Download = DocumentDownload | ChunkDownload
