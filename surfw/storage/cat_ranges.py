"""Ranges of any other asynchronous file system of fsspec, by its `_cat_file`: held once before they are in place."""

import asyncio
from typing import Any

from surfw.config import BLOCK_BYTES
from surfw.storage.transfer import Answer, Place, RangeReader, TransientError


class CatRanges(RangeReader):
    """Ranges as fsspec reads them; they do not tell a revision."""

    streams = False
    tells_revision = False

    def __init__(self, fs: Any, connections: int) -> None:
        """Name the file system; nothing is contacted."""
        super().__init__(connections)
        self._fs = fs
        self.loop = fs.loop
        self._slots = asyncio.Semaphore(connections)

    async def get(self, path: str, start: int, stop: int, place: Place, pinned: str | None) -> None:
        """Read, then put in place."""
        try:
            async with self._slots:
                place.begin(blocks=-(-(stop - start) // BLOCK_BYTES))  # it comes as a whole, and shows no progress
                data = await self._fs._cat_file(path, start=start, end=stop)  # noqa: SLF001 - fsspec's own systems call it
        except (ConnectionError, TimeoutError) as exc:
            raise TransientError from exc
        place(Answer(None, start, len(data), None)).memory[:] = data
