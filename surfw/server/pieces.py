"""What an answer's bytes are made of: pieces in order, most of them of pages of the storage."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from surfw.config import PAGE_BYTES
from surfw.manifest import Location
from surfw.server.pages import Page, PageCache, ReadAhead
from surfw.server.single_flight import Reader


class Piece(Protocol):
    """Bytes that come one after the other in an answer. First `use` it once, then `view` parts of it."""

    @property
    def size(self) -> int:
        """How many bytes."""

    async def use(self) -> None:
        """Have the bytes at hand.

        Raises:
            StorageError: they cannot be read.
        """

    async def view(self, start: int, stop: int) -> memoryview:
        """Bytes `start` to `stop` of them, for use until the next `await`: no view may be kept across it."""


@dataclass(frozen=True, slots=True)
class StoredPiece:
    """Bytes `start` to `stop` (end-exclusive) of a page."""

    pages: PageCache
    page: Page
    start: int
    stop: int
    reader: Reader

    @property
    def size(self) -> int:
        """How many bytes."""
        return self.stop - self.start

    async def use(self) -> None:
        """Have the page read, and count the use."""
        await self.pages.use(self.page, self.reader, self.size)

    async def view(self, start: int, stop: int) -> memoryview:
        """The bytes."""
        page = await self.pages.view(self.page, self.reader, stop - start)
        return page[self.start + start : self.start + stop]


def plan_pieces(
    pages: PageCache, locations: Sequence[Location], start: int, stop: int, reader: Reader
) -> Iterator[Piece]:
    """The pieces that make up bytes `start` to `stop` of what lies at the locations, for a reader.

    Pages are cut from the start of each location, so that whoever asks for bytes of it meets the same pages.
    """
    base = 0
    for location in locations:
        length = location.stop - location.start
        low, high = max(start - base, 0), min(stop - base, length)
        base += length
        if low >= high:
            continue
        for first in range(low - low % PAGE_BYTES, high, PAGE_BYTES):
            last = min(first + PAGE_BYTES, length)
            page = Page(location.object, location.start + first, location.start + last)
            yield StoredPiece(pages, page, max(low - first, 0), min(high, last) - first, reader)


class _Window:
    """Pieces whose use has begun, in order. The first needs no permit, so that every answer goes on; the others do."""

    def __init__(self, pieces: Iterator[Piece], ahead: ReadAhead, most: int) -> None:
        self._pieces = pieces
        self._ahead = ahead
        self._most = most
        self._begun: deque[tuple[Piece, asyncio.Task[None]]] = deque()

    def fill(self) -> None:
        """Begin to use what follows, as far as it may be."""
        while len(self._begun) < self._most and (not self._begun or self._ahead.take()):
            piece = next(self._pieces, None)
            if piece is None:
                if self._begun:
                    self._ahead.give()
                return
            self._begun.append((piece, asyncio.create_task(piece.use())))

    async def take(self) -> Piece | None:
        """The next piece, once it is at hand; None at the end."""
        if not self._begun:
            return None
        await self._begun[0][1]
        return self._drop()[0]

    def _drop(self) -> tuple[Piece, asyncio.Task[None]]:
        dropped = self._begun.popleft()
        if self._begun:
            self._ahead.give()  # of the one that is the first now
        return dropped

    async def close(self) -> None:
        """Give up what has begun."""
        given_up = []
        while self._begun:
            given_up.append(self._drop()[1])
            given_up[-1].cancel()
        await asyncio.gather(*given_up, return_exceptions=True)


async def use_ahead(
    pieces: Iterator[Piece], ahead: ReadAhead | None = None, most: int = 1
) -> AsyncGenerator[Piece, None]:
    """The pieces in order, each once its bytes are at hand; the use of the next ones has then begun.

    Close the generator: that gives up the uses that have begun.

    Args:
        pieces: what to use.
        ahead: permits for more than one piece ahead, shared with others; None for no more.
        most: how many pieces may be ahead at most.

    Raises:
        StorageError: a piece cannot be read.
    """
    window = _Window(pieces, ahead or ReadAhead(0), most)
    try:
        window.fill()
        while (piece := await window.take()) is not None:
            window.fill()
            yield piece
    finally:
        await window.close()
