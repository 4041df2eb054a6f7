"""All range readers use one revision for all of a read, whatever single answers say."""

import asyncio

import pytest

from surfw.errors import StorageError
from surfw.retry import RetryPolicy
from surfw.storage.base import ChangedObjectError
from surfw.storage.far_reads import Destination, FarReads, RangeReader, RangeResponse, TransientError
from surfw.storage.ranges import Pin

SIZE = 100


class Told(RangeReader):
    """Zeros, with or without a revision, as an object with or without a known length."""

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


class Failing(RangeReader):
    """Returns counting bytes, a few at a time, and fails once after this many."""

    def __init__(self, fails_after: int) -> None:
        super().__init__(connections=4)
        self.fails_after = fails_after
        self.asked: list[tuple[int, int]] = []

    async def get(self, path: str, into: Destination) -> None:
        self.asked.append((into.start, into.stop))
        length = into.stop - into.start
        memory, done = into.accept(RangeResponse("a", into.start, length, None)), 0
        while done < length:
            place = memory[done : done + 7]
            place[:] = bytes((into.start + done + index) % 251 for index in range(len(place)))
            done += len(place)
            del place
            into.filled(done)
            if self.fails_after and done >= self.fails_after:
                self.fails_after = 0
                raise TransientError from OSError("lost")


@pytest.mark.parametrize("fails_after", [0, 3, 20, 25, 40])
def test_pieces_are_filled_by_one_range_and_let_go_of_when_they_are_full(fails_after: int) -> None:
    reader, kept, heard = Failing(fails_after), [bytearray(size) for size in (10, 10, 3, 17)], list[int]()
    full: list[bytes] = []

    def note(count: int) -> None:
        heard.append(count)
        while len(full) < 4 and count >= sum(map(len, kept[: len(full) + 1])):
            one = kept[len(full)]
            full.append(bytes(one))
            one.append(0)  # a buffer with references cannot grow
            one.pop()
            one[:] = b"\xff" * len(one)

    async def main() -> None:
        far = FarReads(reader, RetryPolicy(attempts=2, first_delay_seconds=0))
        views = (memoryview(one) for one in kept)
        await far.read_pieces("x", 100, views, name="x", pin=Pin(), on_filled=note)

    asyncio.run(main())
    assert b"".join(full) == bytes((100 + index) % 251 for index in range(40))
    assert all(set(one) == {0xFF} for one in kept), "what was full is not written to again"
    assert heard[-1] == 40
    again = {3: 100, 20: 120, 25: 123}.get(fails_after)
    assert reader.asked == [(100, 140)] + ([] if again is None else [(again, 140)])
