"""Objects that can only be loaded whole: one load for all ranges, bounded memory, and several event loops."""

import asyncio
import contextlib
import gc
from pathlib import Path
from typing import Any

import pytest

from surfw.client import open_wire_source
from surfw.errors import NotFoundError, StorageError
from surfw.manifest import Chunk
from surfw.storage import StorageBackend
from surfw.storage.custom import SharedLoads
from surfw.storage.store_source import open_storage_source
from tests.peers import serving, until, whole
from tests.storage.conftest import DATA, KEY
from tests.storage.dict_backend import DictBackend
from tests.stores import make_store


def ranges(count: int = 22) -> list[tuple[int, int]]:
    """Ranges that cut the data into pieces."""
    step = len(DATA) // count + 1
    return [(at, min(at + step, len(DATA))) for at in range(0, len(DATA), step)]


def test_22_ranges_at_once_are_one_load(plain: DictBackend, adapted: StorageBackend) -> None:
    async def read() -> list[bytes]:
        return await asyncio.gather(*(adapted.load_range(KEY, start, stop) for start, stop in ranges()))

    pieces = asyncio.run(read())
    assert len(pieces) == 22
    assert b"".join(pieces) == DATA
    assert plain.loads == [KEY]


@pytest.mark.parametrize("into", [True, False])
def test_ranges_one_after_another_are_one_load(plain: DictBackend, adapted: StorageBackend, into: bool) -> None:
    async def read() -> bytes:
        found = bytearray(len(DATA))
        assert await adapted.size(KEY) == len(DATA)
        for start, stop in ranges():
            if into:
                await adapted.read_into(KEY, start, memoryview(found)[start:stop])
            else:
                found[start:stop] = await adapted.load_range(KEY, start, stop)
        return bytes(found)

    assert asyncio.run(read()) == DATA
    assert plain.loads == [KEY]


def test_an_object_is_let_go_when_its_last_byte_was_read(plain: DictBackend) -> None:
    shared = SharedLoads(plain.load, 1 << 30)

    async def read() -> list[int]:
        kept = []
        for _, stop in ranges(4):
            await shared.get(KEY, stop)
            kept.append(shared.kept_bytes)
        return kept

    assert asyncio.run(read()) == [len(DATA)] * 3 + [0]


def test_what_is_kept_stays_within_the_budget_or_is_the_latest_object() -> None:
    objects = {"a": b"1" * 40, "b": b"2" * 40, "c": b"3" * 40, "huge": b"4" * 500}
    plain = DictBackend(objects)
    shared = SharedLoads(plain.load, 100)

    async def read(*keys: str) -> list[int]:
        kept = []
        for key in keys:
            assert (await shared.get(key, 1)) == objects[key]
            kept.append(shared.kept_bytes)
        return kept

    assert asyncio.run(read("a", "b", "a", "c", "a")) == [40, 80, 80, 80, 80]
    assert plain.loads == ["a", "b", "c"]  # `b` was evicted: it was used less recently than `a`
    assert asyncio.run(read("huge", "huge", "b")) == [500, 500, 40]
    assert plain.loads == ["a", "b", "c", "huge", "b"]


def test_a_failed_load_fails_those_who_wait_and_is_tried_anew(plain: DictBackend, adapted: StorageBackend) -> None:
    async def read() -> list[Any]:
        plain.objects = {}
        first = await asyncio.gather(*(adapted.load_range(KEY, 0, 1) for _ in range(3)), return_exceptions=True)
        plain.objects = {KEY: DATA}
        return [*first, await adapted.load_range(KEY, 0, 2)]

    *failed, found = asyncio.run(read())
    assert [type(error) for error in failed] == [NotFoundError] * 3
    assert found == DATA[:2]
    assert plain.loads == [KEY] * 2


def test_giving_up_a_range_stops_no_load(plain: DictBackend, adapted: StorageBackend) -> None:
    async def read() -> bytes:
        plain.gate = asyncio.Event()
        one, other = (asyncio.create_task(adapted.load_range(KEY, 0, stop)) for stop in (1, 2))
        await until(lambda: bool(plain.loads))
        one.cancel()
        with pytest.raises(asyncio.CancelledError):
            await one
        plain.gate.set()
        return await other

    assert asyncio.run(read()) == DATA[:2]
    assert plain.loads == [KEY]


def test_a_load_that_fails_when_nobody_waits_any_more_is_not_reported(
    plain: DictBackend, adapted: StorageBackend
) -> None:
    reported: list[Any] = []

    async def read() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
        plain.gate = asyncio.Event()
        only = asyncio.create_task(adapted.load_range(KEY, 0, 1))
        await until(lambda: bool(plain.loads))
        only.cancel()
        plain.objects = {}
        plain.gate.set()
        await asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()}, return_exceptions=True)
        gc.collect()

    asyncio.run(read())
    assert reported == []


def test_loops_may_follow_one_another(plain: DictBackend, adapted: StorageBackend) -> None:
    first = asyncio.new_event_loop()

    async def start() -> asyncio.Task[bytes]:
        plain.gate = asyncio.Event()
        reading = asyncio.create_task(adapted.load_range(KEY, 0, 1))
        await until(lambda: bool(plain.loads))
        return reading

    left = first.run_until_complete(start())  # a loop that stopped during a load
    plain.gate = None
    assert asyncio.run(adapted.load_range(KEY, 0, 2)) == DATA[:2]
    assert asyncio.run(adapted.load_range(KEY, 2, 4)) == DATA[2:4]
    assert plain.loads == [KEY] * 2
    for task in asyncio.all_tasks(first):
        task.cancel()
    with pytest.raises(asyncio.CancelledError):
        first.run_until_complete(left)
    first.close()
    assert asyncio.run(adapted.load_range(KEY, 4, 6)) == DATA[4:6]
    assert plain.loads == [KEY] * 2


def test_a_new_object_replaces_what_was_loaded(plain: DictBackend, adapted: StorageBackend, tmp_path: Path) -> None:
    async def read() -> list[bytes]:
        found = [await adapted.load_range(KEY, 0, 3)]
        await adapted.save(KEY, b"saved")
        found.append(await adapted.load_range(KEY, 0, 3))
        (tmp_path / "file").write_bytes(b"adopted")
        await adapted.adopt(KEY, tmp_path / "file")
        return [*found, await adapted.load_range(KEY, 0, 3)]

    assert asyncio.run(read()) == [DATA[:3], b"sav", b"ado"]


def test_what_was_loaded_before_a_save_is_not_kept_after_it(plain: DictBackend, adapted: StorageBackend) -> None:
    async def read() -> bytes:
        plain.gate = asyncio.Event()
        early = asyncio.create_task(adapted.load_range(KEY, 0, 3))
        await until(lambda: bool(plain.loads))
        await adapted.save(KEY, b"saved")
        plain.gate.set()
        await early
        return await adapted.load_range(KEY, 0, 3)

    assert asyncio.run(read()) == b"sav"
    assert plain.loads == [KEY] * 2


def test_closing_stops_loads_and_forgets(plain: DictBackend, adapted: StorageBackend) -> None:
    async def read() -> None:
        await adapted.load_range(KEY, 0, 1)
        plain.objects["y"] = b"1"
        plain.gate = asyncio.Event()
        waiting = asyncio.create_task(adapted.load_range("y", 0, 1))
        await until(lambda: plain.loads == [KEY, "y"])
        await adapted.close()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert asyncio.all_tasks() == {asyncio.current_task()}
        plain.gate.set()
        await adapted.load_range(KEY, 0, 1)

    asyncio.run(read())
    assert plain.loads == [KEY, "y", KEY]


def test_a_range_beyond_the_end(adapted: StorageBackend) -> None:
    for start, stop in ((len(DATA) - 1, len(DATA) + 1), (len(DATA) + 5, len(DATA) + 6)):
        with pytest.raises(StorageError, match=f"{KEY} in a dictionary ends early: asked for {stop - start} bytes"):
            asyncio.run(adapted.load_range(KEY, start, stop))


@pytest.fixture
def big(tmp_path: Path) -> tuple[DictBackend, Chunk]:
    """A store in a dictionary, with a chunk that is read in several pieces."""
    manifest = make_store(tmp_path, sizes=(22_000_000,))
    files = (path for path in tmp_path.rglob("*") if path.is_file())
    return DictBackend({str(path.relative_to(tmp_path)): path.read_bytes() for path in files}), manifest.chunks[0]


@pytest.mark.parametrize("served", [True, False])
def test_a_chunk_is_loaded_once(big: tuple[DictBackend, Chunk], served: bool) -> None:
    plain, chunk = big

    async def fetch() -> bytearray:
        read, memory = whole(chunk)
        async with contextlib.AsyncExitStack() as opened:
            if served:
                server = await opened.enter_async_context(serving(plain))
                source = await opened.enter_async_context(await open_wire_source(server.url))
            else:
                source = await opened.enter_async_context(await open_storage_source(plain))
            await source.fetch(await source.manifest("toy/model"), [read])
        return memory

    blob = chunk.forms[0].locations[0].object
    assert asyncio.run(fetch()) == plain.objects[blob][-22_000_000:]
    assert plain.loads.count(blob) == 1
