"""Pages: one read for all requests, each use counted once, never over the budget; their pieces cover a range."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surfw.config import PAGE_BYTES
from surfw.errors import StorageError
from surfw.manifest import Location
from surfw.metrics import Metrics
from surfw.server.fairness import Reader
from surfw.server.pages import MIN_CACHE_BYTES, Page, PageCache, Permits, StoredPiece, plan_pieces, use_ahead
from surfw.storage import FilesystemBackend
from tests.peers import until
from tests.server.backends import GatedBackend

CONTENT = bytes(range(256)) * (6 * PAGE_BYTES // 256)


def page(index: int) -> Page:
    return Page("blobs/x", index * PAGE_BYTES, (index + 1) * PAGE_BYTES)


def run(
    folder: Path, test: Callable[[PageCache, GatedBackend, Metrics], Awaitable[None]], capacity: int = MIN_CACHE_BYTES
) -> None:
    """Run a test with six pages behind a gate."""
    (folder / "blobs").mkdir()
    (folder / "blobs/x").write_bytes(CONTENT)

    async def main() -> None:
        backend, metrics = GatedBackend(folder), Metrics()
        pages = PageCache(backend, capacity, metrics)
        await test(pages, backend, metrics)
        await pages.close()
        assert not [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]

    asyncio.run(main())


def counts(metrics: Metrics) -> tuple[int, int, int]:
    return metrics.count("hits"), metrics.count("misses"), metrics.count("coalesced")


def test_concurrent_uses_share_one_read(tmp_path: Path) -> None:
    async def test(pages: PageCache, backend: GatedBackend, metrics: Metrics) -> None:
        uses = [asyncio.create_task(pages.use(page(0))) for _ in range(5)]
        await backend.reading.wait()
        backend.gate.set()
        await asyncio.gather(*uses)
        await pages.use(page(0))
        assert backend.reads == 1
        assert counts(metrics) == (1, 1, 4)
        assert await pages.view(page(0)) == CONTENT[:PAGE_BYTES]

    run(tmp_path, test)


def test_giving_up_a_use_does_not_stop_it_for_the_others(tmp_path: Path) -> None:
    async def test(pages: PageCache, backend: GatedBackend, metrics: Metrics) -> None:
        first, second = (asyncio.create_task(pages.use(page(0))) for _ in range(2))
        await backend.reading.wait()
        first.cancel()
        await asyncio.wait([first])
        backend.gate.set()
        await second
        assert first.cancelled()
        assert backend.reads == 1
        assert page(0) in pages.cache

    run(tmp_path, test)


def test_a_failed_read_fails_all_who_wait_and_is_not_kept(tmp_path: Path) -> None:
    async def test(pages: PageCache, backend: GatedBackend, metrics: Metrics) -> None:
        backend.failing = True
        uses = [asyncio.create_task(pages.use(page(0))) for _ in range(3)]
        await backend.reading.wait()
        backend.gate.set()
        assert [type(one) for one in await asyncio.gather(*uses, return_exceptions=True)] == [StorageError] * 3
        assert not pages.healthy
        backend.failing = False
        await pages.use(page(0))
        assert pages.healthy
        assert counts(metrics) == (0, 2, 2)

    run(tmp_path, test)


def test_a_queued_read_that_nobody_waits_for_is_dropped(tmp_path: Path) -> None:
    async def test(pages: PageCache, backend: GatedBackend, metrics: Metrics) -> None:
        begun = [asyncio.create_task(pages.use(page(index))) for index in (0, 1)]
        await backend.reading.wait()
        left, left_too, stays = (asyncio.create_task(pages.use(page(index))) for index in (2, 3, 3))
        await asyncio.sleep(0)
        for use in (*begun, left, left_too):
            use.cancel()
        await asyncio.wait([*begun, left, left_too])
        backend.gate.set()
        await stays
        await until(lambda: not pages.reads)
        assert set(pages.cache) == {page(0), page(1), page(3)}, "what has begun goes on, and what another waits for"
        assert backend.reads == 3
        await pages.use(page(2))
        assert backend.reads == 4

    run(tmp_path, test)


def test_a_read_that_was_dropped_can_be_asked_for_at_once(tmp_path: Path) -> None:
    async def test(pages: PageCache, backend: GatedBackend, metrics: Metrics) -> None:
        begun = [asyncio.create_task(pages.use(page(index))) for index in (0, 1)]
        await backend.reading.wait()
        left = asyncio.create_task(pages.use(page(2)))
        await asyncio.sleep(0)
        left.cancel()
        await asyncio.wait([left])
        again = asyncio.create_task(pages.use(page(2)))
        await asyncio.sleep(0)
        backend.gate.set()
        await asyncio.gather(*begun, again)
        assert bytes(await pages.view(page(2))) == CONTENT[2 * PAGE_BYTES : 3 * PAGE_BYTES]
        assert counts(metrics) == (0, 4, 0)

    run(tmp_path, test)


def test_a_failure_that_nobody_waits_for_is_nobodys_error(tmp_path: Path) -> None:
    async def test(pages: PageCache, backend: GatedBackend, metrics: Metrics) -> None:
        backend.failing = True
        use = asyncio.create_task(pages.use(page(0)))
        await backend.reading.wait()
        use.cancel()
        await asyncio.wait([use])
        backend.gate.set()
        await until(lambda: page(0) not in pages.reads)
        backend.failing = False
        await pages.use(page(0))
        assert counts(metrics) == (0, 2, 0)

    run(tmp_path, test)


def test_pages_and_reads_stay_within_the_budget(tmp_path: Path) -> None:
    async def test(pages: PageCache, backend: GatedBackend, metrics: Metrics) -> None:
        backend.gate.set()
        for index in (0, 1, 2, 3):
            await pages.use(page(index))
        assert pages.cache.bytes == MIN_CACHE_BYTES
        backend.gate.clear()
        backend.reading.clear()
        fifth = asyncio.create_task(pages.use(page(4)))
        await backend.reading.wait()
        assert list(pages.cache) == [page(1), page(2), page(3)], "room is made before a page is read"
        backend.gate.set()
        await fifth
        assert list(pages.cache) == [page(1), page(2), page(3), page(4)]
        assert pages.cache.evictions == 1

    run(tmp_path, test)


def test_a_cache_that_is_told_to_keep_nothing_has_room_to_work(tmp_path: Path) -> None:
    async def test(pages: PageCache, backend: GatedBackend, metrics: Metrics) -> None:
        backend.gate.set()
        await asyncio.gather(*(pages.use(page(index)) for index in range(6)))
        assert pages.cache.bytes <= pages.cache.capacity_bytes == MIN_CACHE_BYTES

    run(tmp_path, test, capacity=0)


def test_closing_ends_reads_that_hang(tmp_path: Path) -> None:
    async def test(pages: PageCache, backend: GatedBackend, metrics: Metrics) -> None:
        use = asyncio.create_task(pages.use(page(0)))
        await backend.reading.wait()
        await pages.close()
        assert (await asyncio.gather(use, return_exceptions=True))[0].__class__ is asyncio.CancelledError

    run(tmp_path, test)


def test_fresh_pages_are_read_again_and_others_go_on(tmp_path: Path) -> None:
    async def test(pages: PageCache, backend: GatedBackend, metrics: Metrics) -> None:
        old = asyncio.create_task(pages.view(page(0)))
        await backend.reading.wait()
        (tmp_path / "blobs/x").write_bytes(b"\7" * len(CONTENT))
        fresh = asyncio.create_task(pages.use(page(0), Reader(fresh=True)))
        await asyncio.sleep(0)
        backend.gate.set()
        await asyncio.gather(old, fresh)
        assert backend.reads == 2
        (tmp_path / "blobs/x").write_bytes(b"\x08" * len(CONTENT))
        assert bytes(await pages.view(page(0))) == b"\7" * PAGE_BYTES
        await pages.use(page(0), Reader(fresh=True))
        assert bytes(await pages.view(page(0))) == b"\x08" * PAGE_BYTES

    run(tmp_path, test)


def test_a_page_that_is_read_anew_stays_for_the_others_until_then(tmp_path: Path) -> None:
    async def test(pages: PageCache, backend: GatedBackend, metrics: Metrics) -> None:
        backend.gate.set()
        await pages.use(page(0))
        backend.gate.clear()
        (tmp_path / "blobs/x").write_bytes(b"\7" * len(CONTENT))
        others = [asyncio.create_task(pages.use(page(index))) for index in (1, 2)]
        await until(lambda: len(list(pages.reads.running())) == 2)
        fresh = [asyncio.create_task(pages.use(page(0), Reader(fresh=True), 1)) for _ in range(3)]
        await asyncio.sleep(0)
        async with asyncio.timeout(5):
            await pages.use(page(0))
            assert bytes(await pages.view(page(0))) == CONTENT[:PAGE_BYTES], "it waits in line"
        backend.gate.set()
        await asyncio.gather(*others, *fresh)
        assert backend.reads == 4, "it was read anew once for all who wanted that"
        assert bytes(await pages.view(page(0))) == b"\7" * PAGE_BYTES
        assert counts(metrics) == (1, 4, 2)

    run(tmp_path, test)


def test_who_wants_single_bytes_pays_for_the_pages(tmp_path: Path) -> None:
    async def test(pages: PageCache, backend: GatedBackend, metrics: Metrics) -> None:
        order: list[int] = []
        read_into = backend.read_into

        async def noted(key: str, start: int, destination: memoryview) -> None:
            order.append(start // PAGE_BYTES)
            await read_into(key, start, destination)

        backend.read_into = noted  # type: ignore[method-assign,assignment]
        greedy, whole = Reader(), Reader()
        first = [asyncio.create_task(pages.use(page(index), greedy, 1)) for index in (0, 1, 2, 3)]
        await backend.reading.wait()
        second = [asyncio.create_task(pages.use(page(index), whole)) for index in (4, 5)]
        await asyncio.sleep(0)
        backend.gate.set()
        await asyncio.gather(*first, *second)
        assert order == [0, 1, 4, 5, 2, 3], "two had begun, and the others waited behind what they cost"

    run(tmp_path, test)


@pytest.mark.parametrize(("wanted", "rests"), [(1, True), (PAGE_BYTES // 4, False), (PAGE_BYTES, False)])
def test_a_near_storage_rests_after_a_page_of_which_little_is_wanted(
    wanted: int, rests: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rested: list[float] = []
    sleep = asyncio.sleep

    async def noted(seconds: float) -> None:
        rested.append(seconds)
        await sleep(0)

    async def test(pages: PageCache, backend: GatedBackend, metrics: Metrics) -> None:
        backend.gate.set()
        with monkeypatch.context() as patch:
            patch.setattr("surfw.server.pages.asyncio.sleep", noted)
            await pages.use(page(0), Reader(), wanted)

    run(tmp_path, test)
    assert len(rested) == rests
    assert all(seconds > 0 for seconds in rested)


def test_progress_is_what_is_read_for_a_reader_or_before_it_in_line(tmp_path: Path) -> None:
    async def test(pages: PageCache, backend: GatedBackend, metrics: Metrics) -> None:
        others = [asyncio.create_task(pages.use(page(index))) for index in (0, 1)]
        await backend.reading.wait()
        reader = Reader()
        waiting = asyncio.create_task(pages.use(page(2), reader))
        await asyncio.sleep(0)
        assert reader.progress_bytes == 0, "nothing was read for anybody"
        pages.reads.read_bytes += 5
        assert reader.progress_bytes == 5, "the line moves"
        assert reader.progress_bytes == 5
        backend.gate.set()
        await asyncio.gather(*others, waiting)
        assert reader.progress_bytes >= 5 + PAGE_BYTES
        hung = Reader()
        backend.gate.clear()
        own = asyncio.create_task(pages.use(page(3), hung))
        await until(lambda: page(3) in dict(pages.reads.running()))
        pages.reads.read_bytes += 1000
        assert hung.progress_bytes == 0, "its own read hangs, whatever others get"
        own.cancel()

    run(tmp_path, test)


def test_a_slow_storage_is_read_by_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(pages: PageCache, backend: GatedBackend, metrics: Metrics) -> None:
        backend.gate.set()
        monkeypatch.setattr("surfw.server.pages.PROGRESS_SECONDS", -1)
        await pages.use(page(0))
        assert backend.reads == 1
        await pages.use(page(1))
        assert backend.reads == 5
        assert bytes(await pages.view(page(1))) == CONTENT[PAGE_BYTES : 2 * PAGE_BYTES]
        monkeypatch.setattr("surfw.server.pages.PROGRESS_SECONDS", 3600)
        await pages.use(page(2))
        await pages.use(page(3))
        assert backend.reads == 10

    run(tmp_path, test)


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
    """A piece that records when its use begins, and when it is released."""

    size = 1

    def __init__(self, name: str, seen: list[str], *, hangs: bool = False) -> None:
        self.name, self.seen, self.hangs = name, seen, hangs

    def use_cached(self) -> bool:
        return False

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
        async with contextlib.aclosing(use_ahead(iter(pieces), Permits(0), most=1)) as ready:
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
        return [piece async for piece in use_ahead(iter(()), Permits(0), most=1)]

    assert asyncio.run(main()) == []


def test_several_pieces_are_used_ahead_as_far_as_there_are_permits() -> None:
    seen: list[str] = []
    ahead = Permits(3)

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
        ahead = Permits(2)
        pieces: list[Announced] = [Announced("a", []), Failing("b", []), Announced("c", [], hangs=True)]
        ready = use_ahead(iter(pieces), ahead, most=3)
        assert await anext(ready) is pieces[0]
        with pytest.raises(StorageError, match="gone"):
            await anext(ready)
        assert [ahead.take() for _ in range(3)] == [True, True, False]

    asyncio.run(main())
