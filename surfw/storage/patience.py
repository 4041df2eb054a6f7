"""The timeout of reads of a remote storage: `silence_timeout` seconds without progress, retries and delays included.

Progress means `PROGRESS_BYTES` more of the response, or a complete response; a trickle of bytes does not count. While
a read waits for a connection, progress of any other read of the same storage counts as its own.
"""

import asyncio
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

from surfw.config import PROGRESS_BYTES
from surfw.errors import StorageError
from surfw.threads import to_its_end

T = TypeVar("T")


class Activity:
    """The time of the last progress of any read of a storage."""

    def __init__(self) -> None:
        self.last = float("-inf")


class ReadPatience:
    """The timeout of one read. Progress may be reported from any thread."""

    def __init__(self, seconds: float, activity: Activity) -> None:
        """Start the timeout; the read waits for a connection first."""
        self.seconds = seconds
        self.extent = 1
        self._activity = activity
        self._last = self._since = time.monotonic()
        self._queued = True
        self._few = 0
        self._bytes = 0

    def queue(self) -> None:
        """Start to wait for a connection: until `begin`, the progress of other reads counts."""
        self._queued, self.extent, self._since = True, 1, time.monotonic()

    def begin(self, blocks: int = 1) -> None:
        """Note that the request is sent. A response without visible progress gets the time of `blocks` blocks."""
        self._last += time.monotonic() - self._since  # time in the queue does not count against the storage
        self._queued, self.extent = False, blocks

    def arrived(self, count: int) -> None:
        """Count bytes that arrived."""
        self._few += count
        self._bytes += count
        if self._few >= PROGRESS_BYTES:
            self.progress()

    def progress(self) -> None:
        """Note that the read made progress."""
        self._few = 0
        self._last = self._activity.last = time.monotonic()

    def left(self) -> float:
        """Return the seconds until the timeout."""
        last = max(self._last, self._activity.last) if self._queued else self._last
        return last + self.seconds * self.extent - time.monotonic()

    def _expect_time(self, name: str) -> None:
        if self.left() <= 0:
            raise SilenceError(
                f"{name}: the storage made no progress for {self.seconds * self.extent:g} seconds ({self._bytes} bytes "
                "arrived); check it and the network, or give it more time with a longer silence_timeout"
            )

    async def hold(self, work: Coroutine[Any, Any, T], name: str) -> T:
        """Await the work as long as it makes progress. When this returns or raises, the work has ended too.

        Raises:
            SilenceError: the timeout has passed.
        """
        task = asyncio.ensure_future(work)
        try:
            while not task.done():
                self._expect_time(name)
                await asyncio.wait([task], timeout=max(0, self.left()))
        except BaseException:
            task.cancel()
            await to_its_end(asyncio.ensure_future(asyncio.wait([task])))
            if not task.cancelled():
                task.exception()  # mark it retrieved: nothing else does
            raise
        self.progress()
        return task.result()


class SilenceError(StorageError):
    """The storage made no progress for too long."""
