"""Answers on their way into memory: a chunk's range into a destination that the caller owns, or a whole document.

A chunk's bytes are verified in runs of blocks by threads, while the next ones arrive. Once a transfer is abandoned,
nothing writes to its destination any more; `settle` waits until nothing reads from it either.
"""

import asyncio
import contextlib
from concurrent.futures import Executor, Future
from typing import Protocol

from surfw.config import BLOCK_BYTES, MIB
from surfw.errors import IntegrityError
from surfw.manifest import payload_digest
from surfw.source import Read, verify_blocks
from surfw.wire import Begin

_VERIFY_BYTES = 4 * MIB


class Transfer(Protocol):
    """Where the bytes of an answer go."""

    received: int
    """How many bytes have arrived."""

    def begin(self, message: Begin) -> None:
        """The answer's size and digest are known; only documents are begun. `IntegrityError` refuses the answer."""

    def place(self, offset: int, size: int) -> memoryview:
        """The memory for `size` bytes of the answer from `offset` on."""

    def arrived(self, stop: int) -> None:
        """The bytes before offset `stop` are there."""


class Document:
    """A manifest or a file: held in memory, and as long as the server says, within the session's limits."""

    def __init__(self, what: str, *, listed: tuple[int, str] | None = None) -> None:
        """Name it for errors; `listed` has the size and BLAKE3 that a manifest lists for it."""
        self.received = 0
        self._what = what
        self._listed = listed
        self._digest = ""
        self._data = bytearray()

    def begin(self, message: Begin) -> None:
        """Make room.

        Raises:
            IntegrityError: what is announced is not what is listed.
        """
        if self._listed not in {None, (message.size, message.digest)}:
            raise IntegrityError(f"{self._what} is not the one its manifest lists")
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
        if payload_digest(data) != self._digest:
            raise IntegrityError(
                f"{self._what} is damaged: its BLAKE3 is not the one that was announced with it; try again"
            )
        return data


class ChunkTransfer:
    """A range of a chunk's stored bytes, verified as they come."""

    def __init__(self, read: Read, verifiers: Executor | None, *, where: str) -> None:
        """Name what is read; `verifiers` None leaves the bytes unverified, for measurements only."""
        self.received = 0
        self._read = read
        self._verifiers = verifiers
        self._where = where
        self._checked = 0
        self._checks: list[Future[None]] = []
        self._ends: list[int] = []

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
        chunk, form = self._read.chunk, self._read.form
        check = self._verifiers.submit(verify_blocks, chunk, form, first, run, where=self._where)
        self._checks.append(check)
        self._ends.append(end)
        self._checked = end

    async def verified(self) -> None:
        """Wait until all that arrived is verified.

        Raises:
            IntegrityError: some of it is not what the manifest promises.
        """
        for check in self._checks:
            await asyncio.wrap_future(check)

    @property
    def verified_bytes(self) -> int:
        """How many bytes from the start of the range on are verified."""
        verified = 0
        for check, end in zip(self._checks, self._ends, strict=True):
            if not check.done() or check.cancelled() or check.exception():
                break
            verified = end
        return verified

    async def settle(self) -> None:
        """Wait until no thread looks at the destination any more."""
        running = [check for check in self._checks if not check.cancel() and not check.done()]
        for check in running:
            with contextlib.suppress(IntegrityError):
                await asyncio.wrap_future(check)
