"""A store as a source with faults."""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

from surfw.errors import ConnectionFailedError, IntegrityError
from surfw.manifest import Manifest
from surfw.source import ChunkSource, Read
from tests.sources.counted import CountedSource


class FaultySource(CountedSource):
    """Delivers block by block, with a fault of the test's choice.

    Attributes:
        before: called before each block with the number of earlier blocks; it may raise, or return an event to await.
        delivered: the number of blocks that were delivered.
    """

    def __init__(self, store: Path, url: str = "") -> None:
        super().__init__(store)
        self.url = url or self.url
        self.before: Callable[[int], asyncio.Event | None] = lambda _: None
        self.started = self.delivered = 0
        self.closed = 0

    async def fetch(self, manifest: Manifest, reads: Sequence[Read], *, priority: int = 0) -> None:
        for read in reads:
            for start in range(read.start, read.stop, 1 << 20):
                stop = min(start + (1 << 20), read.stop)
                if (event := self.before(self.started)) is not None:
                    await event.wait()
                self.started += 1
                part = read.destination[start - read.start : stop - read.start]
                await super().fetch(manifest, [Read(read.chunk, read.form, start, stop, part)], priority=priority)
                self.delivered += 1

    async def close(self) -> None:
        self.closed += 1
        await super().close()


def opener(source: ChunkSource) -> Callable[[], "asyncio.Future[ChunkSource]"]:
    """A function that opens a source which exists already."""

    async def opened() -> ChunkSource:
        return source

    return opened  # type: ignore[return-value]


def lost(_: object = None) -> None:
    """Raise as if the connection were lost."""
    raise ConnectionFailedError("the link was lost", transient=True)


def damaged(_: object = None) -> None:
    """Raise as if the bytes were damaged, however often they are read."""
    raise IntegrityError("block 3 is damaged")
