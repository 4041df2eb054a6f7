"""Every byte of a range lies in exactly one piece, in order, and pages are the same for whoever asks."""

import asyncio
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from surfw.manifest import Location
from surfw.metrics import Metrics
from surfw.server.pages import PAGE_BYTES, PageCache
from surfw.server.pieces import HeldPiece, StoredPiece, plan_pieces
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
    for piece in plan_pieces(NOWHERE, locations, start, stop):
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


def test_a_held_piece_is_its_bytes() -> None:
    piece = HeldPiece(b"manifest")
    asyncio.run(piece.use())
    assert (piece.size, bytes(asyncio.run(piece.view()))) == (8, b"manifest")
