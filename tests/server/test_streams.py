"""Pages of a remote storage: one request for consecutive pages, each of which is used as soon as it arrives."""

import asyncio
import gc
import mmap
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path

import pytest

from surfw.config import MIB, PAGE_BYTES
from surfw.errors import StorageError
from surfw.metrics import Metrics
from surfw.server.fairness import Reader
from surfw.server.memory import PageMemory
from surfw.server.pages import Page, PageCache
from surfw.storage import FilesystemBackend


def page(index: int) -> Page:
    return Page("blobs/x", index * PAGE_BYTES, (index + 1) * PAGE_BYTES)


class FarBackend(FilesystemBackend):
    """Pages filled with their number, from a storage that delivers as many as it is told to."""

    parallel_reads = 2

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.requests: list[tuple[int, int]] = []
        self.fails_at = -1
        self.delivered = asyncio.Semaphore(0)

    def run_bytes(self, key: str) -> int:
        return 32 * MIB

    async def read_into(self, key: str, start: int, destination: memoryview, *, revision: str | None = None) -> None:
        await self.read_pieces(key, start, iter([destination]), lambda _: None)

    async def read_pieces(
        self,
        key: str,
        start: int,
        pieces: Iterable[memoryview],
        on_filled: Callable[[int], object],
        *,
        revision: str | None = None,
    ) -> None:
        number = len(self.requests)
        self.requests.append((start // PAGE_BYTES, 0))
        done = 0
        for piece in pieces:
            await self.delivered.acquire()
            index = (start + done) // PAGE_BYTES
            if index == self.fails_at:
                raise StorageError("gone")
            piece[:] = bytes([index]) * len(piece)
            done += len(piece)
            del piece
            self.requests[number] = start // PAGE_BYTES, done // PAGE_BYTES
            on_filled(done)


def run(
    folder: Path, test: Callable[[PageCache, FarBackend], Awaitable[None]], capacity: int = 40 * PAGE_BYTES
) -> None:
    async def main() -> None:
        backend = FarBackend(folder)
        pages = PageCache(backend, capacity, Metrics())
        await test(pages, backend)
        await pages.close()

    asyncio.run(main())


def use(pages: PageCache, *indexes: int, reader: Reader | None = None) -> list[asyncio.Task[None]]:
    reader = reader or Reader()
    return [asyncio.create_task(pages.use(page(index), reader)) for index in indexes]


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def test_pages_that_follow_each_other_are_one_request(tmp_path: Path) -> None:
    async def test(pages: PageCache, backend: FarBackend) -> None:
        first = use(pages, 0, 11)  # these begin at once
        await settle()
        queued = use(pages, 5, 1, 2, 3, 4, 6, 7)
        await settle()
        for _ in range(20):
            backend.delivered.release()
        await asyncio.gather(*first, *queued)
        assert sorted(backend.requests) == [(0, 1), (1, 4), (5, 3), (11, 1)], "5 was asked for before 1"
        for index in (*range(8), 11):
            assert bytes(await pages.view(page(index))) == bytes([index]) * PAGE_BYTES
        assert len(backend.requests) == 4

    run(tmp_path, test)


def test_each_page_is_there_before_the_rest_and_a_failure_is_that_of_the_others(tmp_path: Path) -> None:
    async def test(pages: PageCache, backend: FarBackend) -> None:
        first = use(pages, 10, 11)
        await settle()
        others = Reader()
        queued = use(pages, 1, 2, 3, reader=others)
        await settle()
        backend.fails_at = 3
        for _ in range(3):
            backend.delivered.release()
        await queued[0]
        assert bytes(await pages.view(page(1))) == bytes([1]) * PAGE_BYTES
        assert not queued[1].done()
        assert PAGE_BYTES <= others.progress_bytes < 2 * PAGE_BYTES
        late = use(pages, 2)
        for _ in range(2):
            backend.delivered.release()
        await asyncio.gather(queued[1], *late, *first)
        with pytest.raises(StorageError, match="gone"):
            await queued[2]
        assert page(1) in pages.cache
        assert page(2) in pages.cache
        assert page(3) not in pages.cache
        assert not pages.healthy
        assert len(pages.reads) == 0

    run(tmp_path, test)


def test_a_page_that_was_evicted_takes_no_memory_while_the_others_arrive(tmp_path: Path) -> None:
    async def test(pages: PageCache, backend: FarBackend) -> None:
        first = use(pages, 10, 11)
        await settle()
        queued = use(pages, 1, 2, 3)
        await settle()
        for _ in range(3):
            backend.delivered.release()
        await queued[0]
        await settle()
        used = pages._memory.used_bytes
        del pages.cache[page(1)]
        queued.pop(0)
        gc.collect()
        assert pages._memory.used_bytes == used - PAGE_BYTES
        for _ in range(2):
            backend.delivered.release()
        await asyncio.gather(*queued, *first)

    run(tmp_path, test)


def test_a_small_cache_reads_shorter_runs(tmp_path: Path) -> None:
    async def test(pages: PageCache, backend: FarBackend) -> None:
        first = use(pages, 10, 11)
        await settle()
        queued = use(pages, *range(8))
        for _ in range(20):
            backend.delivered.release()
        await asyncio.gather(*first, *queued)
        assert {pages for _, pages in backend.requests[2:]} == {2}
        assert pages.cache.bytes + sum(one.size for one, _ in pages.reads.running()) <= pages.cache.capacity_bytes
        assert pages._memory.used_bytes + pages._memory.kept_bytes <= pages.cache.capacity_bytes

    run(tmp_path, test, capacity=16 * PAGE_BYTES)


class Keeper:
    """Keeps a view of a page until it is told to release it."""

    def __init__(self, view: memoryview | None) -> None:
        self.view = view

    def let_go(self) -> None:
        self.view = None


def test_who_holds_a_page_lets_go_when_it_is_evicted_or_was_before(tmp_path: Path) -> None:
    async def test(pages: PageCache, backend: FarBackend) -> None:
        backend.delivered.release()
        await pages.use(page(0))
        keeper = Keeper(await pages.view(page(0)))
        with pages.held(page(0), keeper):
            assert keeper.view is not None
            del pages.cache[page(0)]
            assert keeper.view is None
        assert not pages._holders
        late = Keeper(memoryview(b"x"))
        with pages.held(page(0), late):
            assert late.view is None

    run(tmp_path, test)


def test_memory_is_used_again_once_nothing_refers_to_it_and_never_exceeds_its_budget() -> None:
    memory = PageMemory(3 * PAGE_BYTES)
    first, second = memory.take(PAGE_BYTES), memory.take(PAGE_BYTES)
    first[:4] = b"mine"
    part = first[1:3].toreadonly()
    del first
    assert memory.used_bytes == 2 * PAGE_BYTES, "a part of it is still referred to"
    assert bytes(part) == b"in"
    del part
    assert (memory.used_bytes, memory.kept_bytes) == (PAGE_BYTES, PAGE_BYTES)
    again = memory.take(PAGE_BYTES)
    assert bytes(again[:4]) == b"mine", "it was not mapped anew"
    assert memory.kept_bytes == 0
    del again
    small = [memory.take(MIB) for _ in range(4)]
    assert memory.used_bytes + memory.kept_bytes <= 3 * PAGE_BYTES
    small.append(memory.take(MIB))
    assert memory.kept_bytes == 0, "what is kept makes room"
    del second, small
    assert memory.used_bytes == 0
    memory.close()
    assert memory.kept_bytes == 0


def test_without_mappings_the_allocator_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError

    monkeypatch.setattr(mmap, "mmap", refuse)
    memory = PageMemory(2 * PAGE_BYTES)
    one = memory.take(PAGE_BYTES)
    assert len(one) == memory.used_bytes == PAGE_BYTES
    del one
    assert (memory.used_bytes, memory.kept_bytes) == (0, PAGE_BYTES)


@pytest.fixture(autouse=True)
def _no_garbage() -> None:
    gc.collect()
