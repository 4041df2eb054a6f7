"""A run of pages filled by one request to a remote storage: each page can be used as soon as it has arrived."""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator

from surfw.config import BLOCK_BYTES


class RunStream:
    """Memory that is filled from beginning to end, page by page.

    Full pages are not referenced here, so that they can be evicted while the others arrive.

    Attributes:
        size: the number of bytes.
        arrived: how many of them have arrived.
    """

    def __init__(
        self,
        memory: deque[memoryview],
        on_bytes: Callable[[int, int], object],
        on_page: Callable[[memoryview], object],
        *,
        patience_seconds: float,
    ) -> None:
        """Take over the memory of the pages; belongs to the running event loop.

        Args:
            memory: the memory of each page.
            on_bytes: called with the number of bytes that arrived, and of those present of the current page.
            on_page: called with the memory of each full page, in order.
            patience_seconds: after this time, every arrival is reported, not only whole blocks.
        """
        self.size = sum(map(len, memory))
        self.arrived = 0
        self._memory = memory
        self._unread = deque(memory)
        self._landed = 0
        self._seen = self._told = 0
        self._on_bytes, self._on_page = on_bytes, on_page
        self._loop = asyncio.get_running_loop()
        self._hurries = time.monotonic() + patience_seconds

    def take(self) -> Iterator[memoryview]:
        """Yield the memory of each page, once, to be filled."""
        while self._unread:
            yield self._unread.popleft()

    def note(self, count: int) -> None:
        """Report, from any thread, that the first `count` bytes have arrived."""
        self._seen = count
        if count - self._told >= BLOCK_BYTES or count == self.size or time.monotonic() > self._hurries:
            self._told = count
            self._loop.call_soon_threadsafe(self.advance, count)

    def advance(self, count: int) -> None:
        """Report, in the event loop, that the first `count` bytes have arrived."""
        if count <= self.arrived:
            return
        new, self.arrived = count - self.arrived, count
        while self._memory and self._landed + len(self._memory[0]) <= count:
            self._landed += len(self._memory[0])
            self._on_page(self._memory.popleft())
        self._on_bytes(new, count - self._landed)

    def end(self) -> None:
        """End the stream; later reports are ignored."""
        self.advance(self._seen)
        self.arrived = self.size
        self._memory.clear()
        self._unread.clear()
