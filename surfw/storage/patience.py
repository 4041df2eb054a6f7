"""How long a read of a remote storage waits for progress: `silence_timeout` seconds, tries and pauses included.

Progress is `PROGRESS_BYTES` of the answer, or an answer that is complete; a byte now and then is none. A read that
waits for its turn has patience as long as any other read of the same storage gets on.
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
    """When a storage last got on with anything."""

    def __init__(self) -> None:
        """It has not yet."""
        self.last = float("-inf")


class Patience:
    """That of one read. Any thread may tell of progress."""

    def __init__(self, seconds: float, activity: Activity) -> None:
        """Start to wait, for one's turn at first."""
        self.seconds = seconds
        self.extent = 1
        self._activity = activity
        self._last = self._since = time.monotonic()
        self._queued = True
        self._few = 0
        self._bytes = 0

    def queue(self) -> None:
        """Wait for one's turn: until `begin`, what others get counts."""
        self._queued, self.extent, self._since = True, 1, time.monotonic()

    def begin(self, blocks: int = 1) -> None:
        """It is this read's turn. An answer that comes as a whole may take the patience of so many blocks."""
        self._last += time.monotonic() - self._since  # what it waited for its turn is not the storage's fault
        self._queued, self.extent = False, blocks

    def arrived(self, count: int) -> None:
        """So many more bytes came."""
        self._few += count
        self._bytes += count
        if self._few >= PROGRESS_BYTES:
            self.progress()

    def progress(self) -> None:
        """The read got on."""
        self._few = 0
        self._last = self._activity.last = time.monotonic()

    def left(self) -> float:
        """Seconds until it is over."""
        last = max(self._last, self._activity.last) if self._queued else self._last
        return last + self.seconds * self.extent - time.monotonic()

    def _expect_time(self, name: str) -> None:
        if self.left() <= 0:
            raise SilenceError(
                f"{name}: the storage made no progress for {self.seconds * self.extent:g} seconds ({self._bytes} bytes "
                "arrived); check it and the network, or give it more time with a longer silence_timeout"
            )

    async def hold(self, work: Coroutine[Any, Any, T], name: str) -> T:
        """Await the work, while it gets on. When this ends, it has ended too.

        Raises:
            SilenceError: patience is over.
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
                task.exception()  # nobody looks at it any more
            raise
        self.progress()
        return task.result()


class SilenceError(StorageError):
    """The storage made no progress for too long."""
