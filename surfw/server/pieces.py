"""What an answer's bytes are made of: pieces in order, from memory or from pages of the storage."""

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from surfw.manifest import Location
from surfw.server.pages import PAGE_BYTES, Page, PageCache


class Piece(Protocol):
    """Bytes that come one after the other in an answer. First `use` it once, then `view` it as often as needed."""

    @property
    def size(self) -> int:
        """How many bytes."""

    async def use(self) -> None:
        """Have the bytes at hand.

        Raises:
            StorageError: they cannot be read.
        """

    async def view(self) -> memoryview:
        """The bytes, for use until the next `await`."""


@dataclass(frozen=True, slots=True)
class HeldPiece:
    """Bytes that are in memory anyway, such as a manifest's."""

    data: bytes

    @property
    def size(self) -> int:
        """How many bytes."""
        return len(self.data)

    async def use(self) -> None:
        """Nothing to do."""

    async def view(self) -> memoryview:
        """The bytes."""
        return memoryview(self.data)


@dataclass(frozen=True, slots=True)
class StoredPiece:
    """Bytes `start` to `stop` (end-exclusive) of a page."""

    pages: PageCache
    page: Page
    start: int
    stop: int

    @property
    def size(self) -> int:
        """How many bytes."""
        return self.stop - self.start

    async def use(self) -> None:
        """Have the page read, and count the use."""
        await self.pages.use(self.page)

    async def view(self) -> memoryview:
        """The bytes."""
        return (await self.pages.view(self.page))[self.start : self.stop]


def plan_pieces(pages: PageCache, locations: Sequence[Location], start: int, stop: int) -> Iterator[Piece]:
    """The pieces that make up bytes `start` to `stop` of what lies at the locations.

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
            yield StoredPiece(pages, page, max(low - first, 0), min(high, last) - first)


async def use_ahead(pieces: Iterator[Piece]) -> AsyncGenerator[Piece, None]:
    """The pieces in order, each once its bytes are at hand; the use of the next one has then begun.

    Close the generator: that gives up the use that has begun.

    Raises:
        StorageError: a piece cannot be read.
    """
    using: asyncio.Task[None] | None = None
    try:
        piece = next(pieces, None)
        while piece is not None:
            await (using or piece.use())
            following = next(pieces, None)
            using = asyncio.create_task(following.use()) if following is not None else None
            yield piece
            piece = following
    finally:
        if using is not None:
            using.cancel()
            await asyncio.gather(using, return_exceptions=True)
