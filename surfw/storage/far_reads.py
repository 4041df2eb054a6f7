"""Reads of remote objects: one range at a time, with retries, straight into the destination.

Each kind of file system supplies a `RangeReader`, whose one method requests a range and writes the response into
memory. `FarReads` does the rest. Invariants:

- All ranges that share a `Pin` have one revision: the pinned one, or that of the first response. If the object changes
  in between, the read fails; revisions are never mixed.
- The number of connections of a file system limits the ranges in flight, over all reads of all objects.
- After a transient failure only the unverified blocks are requested again, and their bytes overwritten. Any other
  failure ends the read at once.
- Once a read has ended, even by a failure or cancellation, nothing more is written to its destination.
- Every wait has a time limit: see `patience`.

Everything here runs on the reader's event loop, except `FarReads`' public methods and what readers do in threads.
"""

import asyncio
import itertools
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from surfw.config import BLOCK_BYTES, DEFAULT_SILENCE_SECONDS
from surfw.errors import StorageError
from surfw.retry import RetryPolicy
from surfw.storage.base import ChangedObjectError, refuse_size
from surfw.storage.patience import Activity, ReadPatience, SilenceError
from surfw.storage.ranges import Check, Pin, most_range_bytes, shifted
from surfw.threads import in_thread, on_loop

T = TypeVar("T")

CONNECTIONS = 4
"""The default of `max_concurrency`: how many ranges of a file system are read at a time.

From a gateway on the same machine, 4 at a time came as fast as 8.
"""

RANGE_RETRIES = RetryPolicy(attempts=6, first_delay_seconds=0.2, backoff=2.5, most_delay_seconds=5)
"""Some ten seconds in all, enough for a gateway to restart."""

_FIRST_TRIES = 1
"""How many retries a storage gets that has never responded: its address may be wrong."""


class PinLostError(Exception):
    """The object no longer has the pinned revision."""


class TransientError(Exception):
    """A failure that a retry may fix; the failure itself is the cause of this exception."""


@dataclass(frozen=True, slots=True)
class RangeResponse:
    """The metadata of a response, known before its body is read.

    Attributes:
        revision: changes whenever the object does; None if the response has no revision.
        start: the first byte of the body, as an offset in the object.
        length: the length of the body.
        size: the length of the whole object; None if the response does not say.
    """

    revision: str | None
    start: int
    length: int
    size: int | None


class Destination:
    """The destination of one range. It checks the response, and verifies blocks as they arrive.

    Attributes:
        start: the first byte of the range. After a failure it moves past the verified blocks.
        memory: the memory to fill.
        pin: the revision that the response must have.
        patience: the reader tells it when the request is sent, and how many bytes arrive.
    """

    def __init__(
        self, name: str, start: int, memory: memoryview, pin: Pin, patience: ReadPatience, *, check: Check | None = None
    ) -> None:
        """Set the destination. `name` names the object in errors."""
        self.name = name
        self.start = start
        self.memory = memory
        self.pin = pin
        self.patience = patience
        self._check = check
        self._verified = 0

    @property
    def stop(self) -> int:
        """The end of the range (exclusive)."""
        return self.start + len(self.memory)

    def accept(self, response: RangeResponse) -> memoryview:
        """Return the memory for the bytes of a response. May be called in a thread.

        Raises:
            ChangedObjectError: the response has another revision.
            StorageError: the response is not the requested range.
        """
        self._expect_revision(response)
        if response.start != self.start or response.length > len(self.memory):
            raise StorageError(
                f"{self.name}: the server does not answer ranges as it should: asked for {len(self.memory)} bytes from "
                f"byte {self.start} on, it sends {response.length} from byte {response.start} on; use one that does, "
                "such as nginx or S3 ('python -m http.server' does not)"
            )
        if response.length != len(self.memory):
            raise StorageError(f"{self.name} ends early: asked for {len(self.memory)} bytes, got {response.length}")
        return self.memory

    def _expect_revision(self, response: RangeResponse) -> None:
        expected = self.pin.settle(response.revision)
        if response.length and response.revision != expected:
            raise ChangedObjectError(self.name, str(expected), str(response.revision))

    def filled(self, count: int) -> None:
        """Note that the first `count` bytes have arrived. May be called in a thread."""

    def check_first(self, count: int) -> None:
        """Verify the complete blocks among the first `count` bytes. Call it in a thread: hashing takes time.

        Raises:
            Exception: any error of the check.
        """
        whole = count if count == len(self.memory) else count - count % BLOCK_BYTES
        if self._check is not None and whole > self._verified:
            self._check(self._verified, self.memory[self._verified : whole])
            self._verified = whole

    def resume(self) -> None:
        """Before a retry, skip the verified blocks."""
        if self._check is not None and self._verified:
            done, self._verified = self._verified, 0
            self.start, self.memory, self._check = self.start + done, self.memory[done:], shifted(self._check, done)

    async def verify(self) -> None:
        """Verify the rest, once all bytes have arrived."""
        if self._check is not None and self._verified < len(self.memory):
            await in_thread(self.check_first, len(self.memory))


class Pieces:
    """Several pieces of memory as one sequence. A slice ends at the end of the piece in which it begins."""

    def __init__(self, pieces: Iterable[memoryview]) -> None:
        self._pieces = deque(pieces)
        self._begins = 0
        self._size = sum(map(len, self._pieces))

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, place: slice) -> memoryview:
        at = place.start - self._begins
        for piece in self._pieces:
            if at < len(piece):
                return piece[at : at + place.stop - place.start]
            at -= len(piece)
        return memoryview(b"")

    def drop(self, done: int) -> None:
        """Release the pieces that end at or before offset `done`."""
        while self._pieces and self._begins + len(self._pieces[0]) <= done:
            self._begins += len(self._pieces.popleft())

    def rest(self) -> tuple[int, "Pieces"]:
        """Return the offset of the first remaining piece, and the remaining pieces."""
        return self._begins, Pieces(self._pieces)


class _InPieces(Destination):
    """A range that fills several pieces of memory. A full piece is released, and never written again."""

    memory: Pieces  # type: ignore[assignment]  # readers take slices of it, as of a memoryview

    def __init__(
        self,
        name: str,
        start: int,
        pieces: Iterable[memoryview],
        pin: Pin,
        patience: ReadPatience,
        *,
        on_filled: Callable[[int], object],
    ) -> None:
        super().__init__(name, start, Pieces(pieces), pin, patience)  # type: ignore[arg-type]
        self._on_filled = on_filled
        self._before = 0

    def filled(self, count: int) -> None:
        self.memory.drop(count)
        self._on_filled(self._before + count)

    def resume(self) -> None:
        done, self.memory = self.memory.rest()
        self.start, self._before = self.start + done, self._before + done


class _Beginning(Destination):
    """The first range of an object of unknown size; the response tells how much memory to allocate."""

    def __init__(self, name: str, pin: Pin, patience: ReadPatience, range_bytes: int, most_bytes: int) -> None:
        super().__init__(name, 0, memoryview(b""), pin, patience)
        self.whole = bytearray()
        self._range_bytes = range_bytes
        self._most_bytes = most_bytes

    @property
    def stop(self) -> int:
        return self._range_bytes

    def accept(self, response: RangeResponse) -> memoryview:
        self._expect_revision(response)
        if response.start != 0:
            raise StorageError(f"{self.name} was answered from byte {response.start} on, expected byte 0")
        if response.size is None and response.length == self._range_bytes:
            raise StorageError(f"{self.name} comes in ranges that do not say how long all of it is")
        size = response.length if response.size is None else response.size
        refuse_size(size, self._most_bytes, self.name)
        if response.length > size:
            raise StorageError(f"{self.name} has {size} bytes, and is answered with {response.length}")
        try:
            self.whole = bytearray(size)
        except (MemoryError, OverflowError) as exc:
            raise StorageError(
                f"{self.name} has {size} bytes, more than there is memory for; read it in ranges"
            ) from exc
        self.memory = memoryview(self.whole)[: response.length]
        return self.memory


class RangeReader(ABC):
    """The interface between `FarReads` and a kind of file system. The reader limits the ranges in flight.

    Attributes:
        loop: the event loop that its methods must run on; None for any.
        streams: whether bytes are written to the destination as they arrive, and not buffered in memory first.
        tells_revision: whether responses have a revision.
        read_only: whether the file system cannot be written to.
        silence_timeout: seconds without progress after which a read fails; a single request may be silent for half of
            that.
    """

    loop: asyncio.AbstractEventLoop | None = None
    streams = True
    tells_revision = True
    read_only = False

    def __init__(self, connections: int, silence_timeout: float = DEFAULT_SILENCE_SECONDS) -> None:
        """Set how many ranges may be in flight. Nothing is contacted."""
        self.range_bytes = most_range_bytes(connections, streamed=self.streams)
        self.silence_timeout = silence_timeout

    @abstractmethod
    async def get(self, path: str, into: Destination) -> None:
        """Read bytes `into.start` to `into.stop`, or fewer if the object ends before, into the memory of `into.accept`.

        It calls `patience.begin` when the request is sent, and `patience.arrived` and `filled` as bytes arrive. A slice
        of the memory may be shorter than requested; the next slice continues there. It may call `check_first` for
        leading bytes that will not change any more; `FarReads` verifies the rest at the end. All of these may be called
        in a thread. Once this method has ended, even by cancellation, nothing more is written.

        Raises:
            TransientError: from a failure that a retry may fix.
            PinLostError: the object no longer has the pinned revision.
            Exception: any other failure.
        """

    async def facts(self, path: str) -> RangeResponse | None:
        """Return size and revision without reading bytes; None if the reader cannot query them.

        Raises:
            Exception: as `get` does.
        """
        return None

    def close(self) -> None:  # noqa: B027 - most hold nothing
        """Close connections that the file system does not close itself; a later use opens new ones."""


class FarReads:
    """Reads through a `RangeReader`, from any event loop. `name` names the object in errors."""

    def __init__(self, reader: RangeReader, retries: RetryPolicy) -> None:
        """Set the reader and the retry policy; nothing is contacted."""
        self.reader = reader
        self._retries = retries
        self._reached = False
        self._activity = Activity()

    async def read(
        self, path: str, start: int, memory: memoryview, *, name: str, pin: Pin, check: Check | None = None
    ) -> None:
        """Fill the memory with one range of the object, from `start` on; with `check`, verify it."""
        into = Destination(name, start, memory, pin, self._patience(), check=check)
        await self._on_loop(lambda: self._fill(path, into))

    async def read_pieces(
        self,
        path: str,
        start: int,
        pieces: Iterable[memoryview],
        *,
        name: str,
        pin: Pin,
        on_filled: Callable[[int], object],
    ) -> None:
        """Fill several pieces of memory with one range of the object, from `start` on.

        `on_filled` is called in any thread with the number of bytes filled. A full piece is never written again.
        """
        into = _InPieces(name, start, pieces, pin, self._patience(), on_filled=on_filled)
        await self._on_loop(lambda: self._fill(path, into))
        into.filled(len(into.memory))

    async def begin(self, path: str, *, name: str, pin: Pin, most_bytes: int) -> tuple[bytearray, int]:
        """Read the first range. Returns memory for the whole object (at most `most_bytes`), and the bytes filled."""
        into = _Beginning(name, pin, self._patience(), self.reader.range_bytes, most_bytes)
        await self._on_loop(lambda: self._fill(path, into))
        return into.whole, len(into.memory)

    async def facts(self, path: str, *, name: str) -> RangeResponse | None:
        """Return size and revision; None if the reader cannot query them."""
        patience = self._patience()

        async def ask() -> RangeResponse | None:
            patience.begin()
            return await self.reader.facts(path)

        found = await self._on_loop(lambda: self._retry(name, patience, ask))
        self._reached = self._reached or found is not None
        return found

    def _patience(self) -> ReadPatience:
        return ReadPatience(self.reader.silence_timeout, self._activity)

    async def _on_loop(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        return await (work() if self.reader.loop is None else on_loop(self.reader.loop, work))

    async def _fill(self, path: str, into: Destination) -> None:
        async def ask() -> None:
            into.resume()
            if into.start < into.stop:
                await self.reader.get(path, into)
            self._reached = True

        try:
            await self._retry(into.name, into.patience, ask)
        except PinLostError as exc:
            raise ChangedObjectError(into.name, str(into.pin.revision), "another") from exc
        await into.verify()

    async def _retry(self, name: str, patience: ReadPatience, work: Callable[[], Awaitable[T]]) -> T:
        """Do the work, retrying transient failures within the time limit; raises the last failure."""
        failure: BaseException | None = None

        async def tries() -> T:
            nonlocal failure
            delays = self._retries.delays()
            for failed in itertools.count(1):
                patience.queue()
                try:
                    return await work()
                except TransientError as exc:
                    failure, delay = exc.__cause__ or exc, next(delays, None)
                    if delay is None or (failed > _FIRST_TRIES and not self._reached):
                        break
                    await asyncio.sleep(delay)
            assert failure is not None, "the loop ends with one"
            raise failure from failure.__cause__

        try:
            return await patience.hold(tries(), name)
        except SilenceError:
            if failure is None:
                raise
            raise failure from failure.__cause__
