"""Reads of remote objects as ranges in parallel, straight into their destination.

Invariants:

- All ranges of a read come from one revision of the object: the pinned one, else the one that answered first. A change
  in between is an error, never a mixture.
- What is under way is bounded: by the plan for each read, and by a number of connections for all of a file system.
- A range that fails for a reason that may pass is asked for anew after a pause, but for its blocks that were verified;
  what else arrived is written over. A reason that will not pass ends the read at once.
- When a read ends, however it does, nothing is written to its destination any more.

- Nothing is waited for without end: see `patience`.

Everything here but `Transfer`'s calls, and what readers do in threads, runs on the reader's event loop.
"""

import asyncio
import itertools
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from surfw.config import BLOCK_BYTES, DEFAULT_SILENCE_SECONDS
from surfw.errors import StorageError
from surfw.retry import RetryPolicy
from surfw.storage.base import ChangedObjectError, Check, changed, refuse_size, shifted
from surfw.storage.patience import Activity, Patience, SilenceError
from surfw.storage.ranges import most_range_bytes, plan_ranges
from surfw.threads import in_thread, on_loop, together

T = TypeVar("T")

CONNECTIONS = 4
"""The most ranges that are read at a time, of all objects of a file system, unless it is told otherwise.

From a gateway on the same machine, 4 at a time came as fast as 8.
"""

RANGE_RETRIES = RetryPolicy(attempts=6, first_delay_seconds=0.2, backoff=2.5, most_delay_seconds=5)
"""Some ten seconds in all, in which a gateway may restart."""

_FIRST_TRIES = 1
"""How often a storage that was never reached is tried again: its address may be wrong."""

_RESTARTS = 3
"""How often a load begins anew because the object was replaced meanwhile."""


class PinLostError(Exception):
    """A reader's word for an object that is of another revision than the pinned one."""


class TransientError(Exception):
    """Wraps, as its cause, what may pass when it is tried again."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a storage says before it sends bytes.

    Attributes:
        revision: changes whenever the object does; None if the storage does not tell.
        start: the first byte it sends.
        length: how many it sends.
        size: of the whole object; None if it does not tell.
    """

    revision: str | None
    start: int
    length: int
    size: int | None


class Landing:
    """Where the bytes of an answer go. They may be verified as they arrive, while they lie in the processor's cache.

    Attributes:
        memory: what is to be filled, from its beginning to its end.
    """

    def __init__(self, memory: memoryview, check: Check | None = None) -> None:
        """Nothing has arrived."""
        self.memory = memory
        self.patience: Patience | None = None
        self._check = check
        self._checked = 0

    def came(self, count: int) -> None:
        """So many more bytes came, to whoever waits for them."""
        if self.patience is not None:
            self.patience.arrived(count)

    def arrived(self, count: int) -> None:
        """Verify the whole blocks among the first `count` bytes. For threads: it takes the time of hashing them.

        Raises:
            Exception: what the check raises.
        """
        whole = count if count == len(self.memory) else count - count % BLOCK_BYTES
        if self._check is not None and whole > self._checked:
            self._check(self._checked, self.memory[self._checked : whole])
            self._checked = whole

    def left(self) -> "Landing":
        """What another try has to bring: all but the blocks that are verified."""
        check, done = self._check, self._checked
        return self if check is None or not done else Landing(self.memory[done:], shifted(check, done))

    async def verify(self) -> None:
        """Verify what is left, once all has arrived."""
        if self._check is not None and self._checked < len(self.memory):
            await in_thread(self.arrived, len(self.memory))


class Place:
    """Where to put the bytes of an answer, which it also judges: one that is not wanted is an error."""

    def __init__(self, put: Callable[[Answer], Landing], patience: Patience) -> None:
        """Name what judges, and the patience of whoever waits."""
        self._put = put
        self._patience = patience

    def begin(self, blocks: int = 1) -> None:
        """Tell that the request is made now; before, it waited for its turn. See `Patience.begin`."""
        self._patience.begin(blocks)

    def __call__(self, answer: Answer) -> Landing:
        """Where its bytes go.

        Raises:
            StorageError: it is not the answer that was wanted.
        """
        landing = self._put(answer)
        landing.patience = self._patience
        return landing


class RangeReader(ABC):
    """One kind of file system, as `Transfer` needs it. It bounds by itself how many ranges are under way.

    Attributes:
        loop: the event loop it is called on; None for any.
        streams: whether what arrives is put in place at once, and not held in memory first.
        tells_revision: whether answers carry one.
        read_only: whether nothing can be written there.
        silence_timeout: seconds without progress after which a read is given up.
    """

    loop: asyncio.AbstractEventLoop | None = None
    streams = True
    tells_revision = True
    read_only = False
    silence_timeout: float = DEFAULT_SILENCE_SECONDS

    def __init__(self, connections: int) -> None:
        """Say how many ranges may be under way; nothing is contacted."""
        self.connections = connections
        self.range_bytes = most_range_bytes(connections, streamed=self.streams)

    def limit_waits(self, silence_timeout: float) -> None:
        """Say how long a read may take without progress, in seconds; half of that is what one request may be silent."""
        self.silence_timeout = silence_timeout

    @abstractmethod
    async def get(self, path: str, start: int, stop: int, place: Place, pinned: str | None) -> None:
        """Read bytes `start` to `stop`, or fewer if the object ends before, to where `place` says.

        It tells `place` when its turn has come, may call it in a thread, and tells the landing what came and what has
        arrived in place; what it did not tell is verified later.

        Raises:
            TransientError: from what may pass.
            PinLostError: the object is of another revision than the pinned one.
            Exception: whatever will not pass.
        """

    async def facts(self, path: str) -> Answer | None:
        """Size and revision without the bytes; None if fsspec's own way has to do.

        Raises:
            Exception: as `get` does.
        """
        return None

    def close(self) -> None:  # noqa: B027 - most hold nothing
        """Let go of connections that the file system does not close; a later use makes new ones."""


class Transfer:
    """Reads through a `RangeReader`. Its calls may come from any event loop; `name` is what errors call the object."""

    def __init__(self, reader: RangeReader, retries: RetryPolicy) -> None:
        """Name the parts; nothing is contacted."""
        self.reader = reader
        self._retries = retries
        self._reached = False
        self._activity = Activity()

    async def _on_loop(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        return await (work() if self.reader.loop is None else on_loop(self.reader.loop, work))

    async def read_into(
        self,
        path: str,
        start: int,
        destination: memoryview,
        *,
        name: str,
        pinned: str | None = None,
        check: Check | None = None,
    ) -> None:
        """Fill `destination` with the object's bytes from `start` on, of the pinned revision if there is one.

        With `check` they are verified: a single range as it arrives, several of them when all have.
        """
        if destination.nbytes:
            read = _Read(path, name, pinned)
            await self._on_loop(lambda: self._fill(read, start, destination.cast("B"), check))

    async def load(self, path: str, *, name: str, most_bytes: int = sys.maxsize) -> bytearray:
        """The whole object; a small one takes a single request. One with more bytes is refused before any is read."""
        return await self._on_loop(lambda: self._load(path, name, most_bytes))

    async def facts(self, path: str, *, name: str) -> Answer | None:
        """Size and revision, if the reader has a way of its own to tell."""

        async def ask(patience: Patience) -> Answer | None:
            patience.begin()
            return await self.reader.facts(path)

        found = await self._on_loop(lambda: self._retry(name, ask))
        self._reached = self._reached or found is not None
        return found

    async def _load(self, path: str, name: str, most_bytes: int) -> bytearray:
        for _ in range(_RESTARTS):
            try:
                return await self._load_once(_Read(path, name), most_bytes)
            except ChangedObjectError:  # the beginning and the rest were of two objects: begin anew
                continue
        return await self._load_once(_Read(path, name), most_bytes)

    async def _load_once(self, read: "_Read", most_bytes: int) -> bytearray:
        memory, arrived = bytearray(), 0

        def place(answer: Answer) -> Landing:
            nonlocal memory, arrived
            read.check(answer)
            if answer.start != 0:
                raise StorageError(f"{read.name} was answered from byte {answer.start} on, expected byte 0")
            if answer.size is None and answer.length == self.reader.range_bytes:
                raise StorageError(f"{read.name} comes in ranges that do not say how long all of it is")
            size = answer.length if answer.size is None else answer.size
            refuse_size(size, most_bytes, read.name)
            if answer.length > size:
                raise StorageError(f"{read.name} has {size} bytes, and is answered with {answer.length}")
            memory = _allocate(read.name, size)
            arrived = answer.length
            return Landing(memoryview(memory)[:arrived])

        async def get(patience: Patience) -> None:
            await self.reader.get(read.path, 0, self.reader.range_bytes, Place(place, patience), read.pinned)

        await self._get(read, get)
        if arrived < len(memory):
            await self._fill(read, arrived, memoryview(memory)[arrived:])
        return memory

    async def _fill(self, read: "_Read", start: int, destination: memoryview, check: Check | None = None) -> None:
        reader, stop = self.reader, start + len(destination)
        plan = plan_ranges(start, stop, most_bytes=reader.range_bytes, connections=reader.connections)
        if len(plan.ranges) == 1:
            await self._read(read, start, destination, check)
            return
        ranges = iter(plan.ranges)
        await together(self._work(read, start, destination, ranges) for _ in range(plan.at_once))
        await Landing(destination, check).verify()

    async def _work(self, read: "_Read", base: int, destination: memoryview, ranges: Iterator[tuple[int, int]]) -> None:
        """Take one range after the other, until none is left."""
        for start, stop in ranges:
            await self._read(read, start, destination[start - base : stop - base])

    async def _read(self, read: "_Read", start: int, destination: memoryview, check: Check | None = None) -> None:
        """Fill the destination with one range."""
        stop, landing = start + len(destination), Landing(destination, check)

        async def get(patience: Patience) -> None:
            nonlocal landing
            landing = landing.left()
            begin = stop - len(landing.memory)

            def place(answer: Answer) -> Landing:
                read.check(answer)
                _expect_range(answer, begin, stop - begin, read.name)
                return landing

            if begin < stop:
                await self.reader.get(read.path, begin, stop, Place(place, patience), read.pinned)

        await self._get(read, get)
        await landing.verify()

    async def _get(self, read: "_Read", ask: Callable[[Patience], Awaitable[None]]) -> None:
        async def get(patience: Patience) -> None:
            await ask(patience)
            self._reached = True

        try:
            await self._retry(read.name, get)
        except PinLostError as exc:
            raise read.changed("another") from exc

    async def _retry(self, name: str, work: Callable[[Patience], Awaitable[T]]) -> T:
        """Do it, and again while it fails for a reason that may pass and there is patience; at last that is raised."""
        patience = Patience(self.reader.silence_timeout, self._activity)
        failure: BaseException | None = None

        async def tries() -> T:
            nonlocal failure
            delays = self._retries.delays()
            for failed in itertools.count(1):
                patience.queue()
                try:
                    return await work(patience)
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


class _Read:
    """A read of one object, and the one revision that all of it is of."""

    def __init__(self, path: str, name: str, pinned: str | None = None) -> None:
        """Name the object, and its revision if it is known."""
        self.path = path
        self.name = name
        self.pinned = pinned
        self._lock = threading.Lock()

    def check(self, answer: Answer) -> None:
        """Hold an answer to the revision; the first one sets it.

        Raises:
            ChangedObjectError: it is of another.
        """
        with self._lock:
            if self.pinned is None:
                self.pinned = answer.revision
            elif answer.length and answer.revision != self.pinned:
                raise self.changed(str(answer.revision))

    def changed(self, seen: str) -> ChangedObjectError:
        """The error for an object that is not the one it was."""
        return changed(self.name, str(self.pinned), seen)


def _expect_range(answer: Answer, start: int, length: int, name: str) -> None:
    """Make sure that what was asked for is what comes.

    Raises:
        StorageError: it is not.
    """
    if answer.start != start or answer.length > length:
        raise StorageError(
            f"{name}: the server does not answer ranges as it should: asked for {length} bytes from byte {start} on, "
            f"it sends {answer.length} from byte {answer.start} on; use one that does, such as nginx or S3 "
            "('python -m http.server' does not)"
        )
    if answer.length != length:
        raise StorageError(f"{name} ends early: asked for {length} bytes, got {answer.length}")


def _allocate(name: str, size: int) -> bytearray:
    try:
        return bytearray(size)
    except (MemoryError, OverflowError) as exc:
        raise StorageError(f"{name} has {size} bytes, more than there is memory for; read it in ranges") from exc
