"""Every byte of a range lies in exactly one piece, in order, and pages are the same for whoever asks."""

import asyncio
import contextlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surfw.config import PAGE_BYTES
from surfw.errors import StorageError
from surfw.manifest import Location
from surfw.metrics import Metrics
from surfw.server.fairness import Reader
from surfw.server.pages import PageCache, ReadAhead, StoredPiece, plan_pieces, use_ahead
from surfw.storage import FilesystemBackend

NOWHERE = PageCache(FilesystemBackend(Path("/nonexistent")), 0, Metrics())
EDGES = st.sampled_from([0, 1, 4096, PAGE_BYTES - 1, PAGE_BYTES, PAGE_BYTES + 1, 3 * PAGE_BYTES, 3 * PAGE_BYTES + 17])


@settings(deadline=None)
@given(st.lists(st.tuples(EDGES, EDGES), min_size=1, max_size=3), st.data())
def test_pieces_cover_a_range(parts: list[tuple[int, int]], data: st.DataObject) -> None:
    locations = [Location(f"o{index}", at, at + length) for index, (at, length) in enumerate(parts)]
    where = [(location.object, at) for location in locations for at in (location.start, location.stop)]
    total = sum(length for _, length in parts)
    stop = data.draw(st.integers(0, total))
    start = data.draw(st.integers(0, stop))
    expected, base = [], 0
    for location in locations:
        length = location.stop - location.start
        low, high = max(start, base) - base, min(stop, base + length) - base
        if low < high:
            expected.append((location.object, location.start + low, location.start + high))
        base += length
    found: list[tuple[str, int, int]] = []
    for piece in plan_pieces(NOWHERE, locations, start, stop, Reader()):
        assert isinstance(piece, StoredPiece)
        page = piece.page
        assert 0 < page.stop - page.start <= PAGE_BYTES
        assert 0 <= piece.start < piece.stop <= page.stop - page.start
        home = next(location for location in locations if location.object == page.object)
        assert (page.start - home.start) % PAGE_BYTES == 0
        assert page.stop == min(page.start + PAGE_BYTES, home.stop)
        low, high = page.start + piece.start, page.start + piece.stop
        if found and found[-1][0] == page.object and found[-1][2] == low:
            found[-1] = (page.object, found[-1][1], high)
        else:
            found.append((page.object, low, high))
    assert found == expected, where


class Announced:
    """A piece that writes down when its use begins, and when it is given up."""

    size = 1

    def __init__(self, name: str, seen: list[str], *, hangs: bool = False) -> None:
        self.name, self.seen, self.hangs = name, seen, hangs

    async def use(self) -> None:
        self.seen.append(f"use {self.name}")
        try:
            if self.hangs:
                await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.seen.append(f"give up {self.name}")
            raise

    async def view(self, start: int, stop: int) -> memoryview:
        return memoryview(self.name.encode())[start:stop]


def test_the_next_piece_is_used_ahead_and_given_up_when_nobody_goes_on() -> None:
    seen: list[str] = []
    pieces = [Announced("a", seen), Announced("b", seen), Announced("c", seen, hangs=True), Announced("d", seen)]

    async def main() -> None:
        async with contextlib.aclosing(use_ahead(iter(pieces))) as ready:
            async for piece in ready:
                seen.append(f"send {bytes(await piece.view(0, 1)).decode()}")
                await asyncio.sleep(0)
                if piece is pieces[1]:
                    break
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())
    assert seen == ["use a", "send a", "use b", "send b", "use c", "give up c"]


def test_no_pieces_are_no_pieces() -> None:
    async def main() -> list[Announced]:
        return [piece async for piece in use_ahead(iter(()))]

    assert asyncio.run(main()) == []


def test_several_pieces_are_used_ahead_as_far_as_there_are_permits() -> None:
    seen: list[str] = []
    ahead = ReadAhead(3)

    async def main() -> None:
        first = use_ahead(iter([Announced(name, seen, hangs=name > "a") for name in "abcdefg"]), ahead, most=3)
        assert (await anext(first)).size == 1
        await asyncio.sleep(0)
        assert seen == ["use a", "use b", "use c", "use d"], "the first without a permit, the others with one"
        other = use_ahead(iter([Announced(name, seen) for name in "xyz"]), ahead, most=8)
        await anext(other)
        await asyncio.sleep(0)
        assert seen[4:] == ["use x", "use y", "use z"], "the last permit, and the piece that needs none"
        await other.aclose()
        await first.aclose()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())
    assert [ahead.take() for _ in range(4)] == [True, True, True, False], "all permits came back"


def test_a_piece_that_fails_gives_its_permits_back() -> None:
    class Failing(Announced):
        async def use(self) -> None:
            raise StorageError("gone")

    async def main() -> None:
        ahead = ReadAhead(2)
        pieces: list[Announced] = [Announced("a", []), Failing("b", []), Announced("c", [], hangs=True)]
        ready = use_ahead(iter(pieces), ahead, most=3)
        assert await anext(ready) is pieces[0]
        with pytest.raises(StorageError, match="gone"):
            await anext(ready)
        assert [ahead.take() for _ in range(3)] == [True, True, False]

    asyncio.run(main())
