"""A run of pages that one request to a far storage fills: each page can be used as soon as it is there."""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator

from surfw.config import BLOCK_BYTES


class RunStream:
    """Memory that fills from its beginning to its end, page by page.

    Nothing here refers to the memory of a page that is full, so that it can be evicted while the others arrive.

    Attributes:
        size: how many bytes there are.
        arrived: how many of them are there.
    """

    def __init__(
        self,
        memory: deque[memoryview],
        on_bytes: Callable[[int, int], object],
        on_page: Callable[[memoryview], object],
        *,
        patience_seconds: float,
    ) -> None:
        """Take the memory of the pages over; belongs to the running event loop.

        Args:
            memory: the memory of each page.
            on_bytes: called with how many bytes arrived, and how many of the page that is being filled are there.
            on_page: called with the memory of a page that is full, in order.
            patience_seconds: from then on, every arrival is told, and not only whole blocks.
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
        """Give out the memory of each page, once, to whoever fills it."""
        while self._unread:
            yield self._unread.popleft()

    def note(self, count: int) -> None:
        """Note, in any thread, that the first `count` bytes are there."""
        self._seen = count
        if count - self._told >= BLOCK_BYTES or count == self.size or time.monotonic() > self._hurries:
            self._told = count
            self._loop.call_soon_threadsafe(self.advance, count)

    def advance(self, count: int) -> None:
        """Note, in the loop, that the first `count` bytes are there."""
        if count <= self.arrived:
            return
        new, self.arrived = count - self.arrived, count
        while self._memory and self._landed + len(self._memory[0]) <= count:
            self._landed += len(self._memory[0])
            self._on_page(self._memory.popleft())
        self._on_bytes(new, count - self._landed)

    def end(self) -> None:
        """Nothing more will arrive; what is told later is too late."""
        self.advance(self._seen)
        self.arrived = self.size
        self._memory.clear()
        self._unread.clear()
