"""Pages: one read for all who want one, each use counted once, never more than the budget."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

from surfw.errors import StorageError
from surfw.metrics import Metrics
from surfw.server.pages import MIN_CACHE_BYTES, PAGE_BYTES, Page, PageCache
from tests.peers import until
from tests.server.backends import GatedBackend

CONTENT = bytes(range(256)) * (6 * PAGE_BYTES // 256)


def page(index: int) -> Page:
    return Page("blobs/x", index * PAGE_BYTES, (index + 1) * PAGE_BYTES)


def run(
    folder: Path, test: Callable[[PageCache, GatedBackend, Metrics], Awaitable[None]], capacity: int = MIN_CACHE_BYTES
) -> None:
    """Run a test over six pages behind a gate."""
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
        await until(lambda: not pages._reads)
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
        await until(lambda: page(0) not in pages._reads)
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
