"""What all range readers share: one revision for all of a read, whatever single answers say."""

import asyncio

import pytest

from surfw.errors import StorageError
from surfw.retry import RetryPolicy
from surfw.storage.base import ChangedObjectError
from surfw.storage.far_reads import Destination, FarReads, RangeReader, RangeResponse
from surfw.storage.ranges import Pin

SIZE = 100


class Told(RangeReader):
    """Zeros, of a revision that is told or not, and as an object whose length is told or not."""

    def __init__(self, revision: str | None, size: int | None = SIZE) -> None:
        super().__init__(connections=4)
        self.revision = revision
        self.size = size

    async def get(self, path: str, into: Destination) -> None:
        del path
        length = into.stop - into.start if self.size is None else min(into.stop, self.size) - into.start
        into.accept(RangeResponse(self.revision, into.start, length, self.size))[:] = bytes(length)


def read(reader: RangeReader, pinned: str | None) -> None:
    async def main() -> None:
        far = FarReads(reader, RetryPolicy(attempts=1))
        await far.read("x", 0, memoryview(bytearray(SIZE)), name="x", pin=Pin(pinned))

    asyncio.run(main())


def test_bytes_of_a_pinned_object_say_which_revision_they_are_of() -> None:
    read(Told("a"), "a")
    read(Told(None), None)
    for seen in ("b", None):
        with pytest.raises(ChangedObjectError, match="expected a"):
            read(Told(seen), "a")


def test_an_object_that_comes_in_part_is_not_taken_for_all_of_it() -> None:
    async def main() -> None:
        far = FarReads(Told("a", None), RetryPolicy(attempts=1))
        await far.begin("x", name="x", pin=Pin(), most_bytes=1 << 40)

    with pytest.raises(StorageError, match="do not say how long"):
        asyncio.run(main())
