"""Chunks that are read while torch is imported are used once, limited in size, and dropped if not needed."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from surfw import ModelChunker
from surfw.codec import choose_form, for_run
from surfw.config import MIB
from surfw.errors import IntegrityError, ModelClosedError, StorageError, UnknownModelError
from surfw.manifest import Chunk, Form, Manifest
from surfw.models.read_ahead import ReadAhead, ReadAheadClient
from surfw.source import ChunkSource, Read, View
from surfw.storage import FilesystemBackend
from surfw.storage.store_source import open_storage_source
from tests.checkpoints import save_llama
from tests.stores import TOKENIZER, make_store

PLENTY = 1 << 40


class Counting(ChunkSource):
    """A source that records the requests; a remote one maps nothing, and may not answer."""

    def __init__(self, source: ChunkSource, *, is_far: bool = False, answers: bool = True) -> None:
        self.url = source.url
        self.source = source
        self.is_far = is_far
        self.answers = answers
        self.asked: list[str] = []
        self.running = 0
        self.begun = asyncio.Semaphore(0)

    async def models(self) -> list[str]:
        return await self.source.models()

    async def manifest(self, model: str) -> Manifest:
        self.asked.append("manifest")
        return await self.source.manifest(model)

    async def file(self, manifest: Manifest, path: str) -> bytes:
        self.asked.append(path)
        return await self.source.file(manifest, path)

    async def view(self, manifest: Manifest, chunk: Chunk, form: Form) -> View | None:
        self.asked.append(f"view {chunk.name}")
        return None if self.is_far else await self.source.view(manifest, chunk, form)

    async def fetch(self, manifest: Manifest, reads: Sequence[Read], *, priority: int = 0) -> None:
        self.asked += [f"fetch {read.chunk.name} {priority}" for read in reads]
        self.running += 1
        self.begun.release()
        try:
            if not self.answers:
                await asyncio.Event().wait()
            await self.source.fetch(manifest, reads, priority=priority)
        finally:
            self.running -= 1

    async def close(self) -> None:
        assert self.running == 0, "nothing is read from a closed source"
        self.asked.append("close")
        await self.source.close()


async def open_ahead(store: Path, manifest: Manifest, **options: bool) -> tuple[Counting, ReadAhead]:
    counting = Counting(await open_storage_source(FilesystemBackend(store)), **options)
    return counting, ReadAhead(counting, manifest, None)


async def view(source: ChunkSource, manifest: Manifest, index: int) -> View | None:
    chunk = manifest.chunks[index]
    return await source.view(manifest, chunk, choose_form(chunk))


async def settle(source: ReadAhead) -> None:
    await asyncio.wait([*source._files.values(), *(task for _, task in source._chunks.values())])


@pytest.mark.parametrize("is_far", [False, True])
def test_what_was_read_is_handed_out_once(is_far: bool, tmp_path: Path) -> None:
    manifest = make_store(tmp_path)

    async def run() -> None:
        counting, ahead = await open_ahead(tmp_path, manifest, is_far=is_far)
        async with ahead:
            await ahead.begin(memory_bytes=PLENTY)
            await settle(ahead)
            fetches = [f"fetch layers.{index} {index + 1}" for index in range(2)] if is_far else []
            assert sorted(counting.asked) == sorted([*TOKENIZER, "view layers.0", "view layers.1", *fetches])
            counting.asked.clear()
            assert await ahead.resolve(None) == manifest.name
            assert await ahead.manifest(manifest.name) is manifest
            for path, data in TOKENIZER.items():
                assert await ahead.file(manifest, path) == data
            for index, chunk in enumerate(manifest.chunks):
                found, form = await view(ahead, manifest, index), choose_form(chunk)
                assert found is not None
                found.expect_unchanged()
                stored = memoryview(bytearray(form.stored_bytes))
                await counting.source.fetch(manifest, [Read(chunk, form, 0, form.stored_bytes, stored)])
                assert found.memory == stored
            assert counting.asked == [], "all of it was there"
            assert (await view(ahead, manifest, 0) is None) is is_far
            assert counting.asked == ["view layers.0"], "a second view is another one"

    asyncio.run(run())


def test_what_is_kept_is_bounded(tmp_path: Path) -> None:
    manifest = make_store(tmp_path, sizes=[MIB] * 4)

    async def chunks_read(memory_bytes: int, *, is_far: bool) -> list[bool]:
        _, ahead = await open_ahead(tmp_path, manifest, is_far=is_far)
        async with ahead:
            await ahead.begin(memory_bytes=memory_bytes)
            await settle(ahead)
            read = [ahead._chunks.get(f"layers.{index}") for index in range(4)]
            return [one and one[1].result() is not None for one in read]

    assert asyncio.run(chunks_read(8 * MIB, is_far=False)) == [True] * 4, "page cache"
    assert asyncio.run(chunks_read(8 * MIB, is_far=True)) == [True, False, False, False], "an eighth of the memory"
    assert asyncio.run(chunks_read(24 * MIB, is_far=True)) == [True, True, True, False]
    assert asyncio.run(chunks_read(8 * MIB - 1, is_far=False)) == [None] * 4, "it may not fit"
    assert asyncio.run(chunks_read(0, is_far=False)) == [None] * 4


def test_chunks_are_read_in_their_order_two_at_a_time(tmp_path: Path) -> None:
    manifest = make_store(tmp_path, sizes=[MIB] * 4)

    async def run() -> None:
        counting, ahead = await open_ahead(tmp_path, manifest, is_far=True, answers=False)
        async with ahead:
            await ahead.begin(memory_bytes=PLENTY)
            for _ in range(2):
                await counting.begun.acquire()
            for _ in range(10):
                await asyncio.sleep(0)
            asked = [one for one in counting.asked if one.startswith("fetch")]
            assert asked == ["fetch layers.0 1", "fetch layers.1 2"]

    asyncio.run(run())


def test_the_first_chunks_are_there_while_later_ones_are_on_their_way_to_a_place_near_by(tmp_path: Path) -> None:
    manifest = make_store(tmp_path, sizes=[MIB] * 6)

    class Near(Counting):
        async def keep(self, manifest: Manifest, chunk: Chunk, form: Form, *, priority: int = 0) -> bool:
            if priority > 1:
                await asyncio.Event().wait()
            return True

    async def run() -> None:
        ahead = ReadAhead(Near(await open_storage_source(FilesystemBackend(tmp_path))), manifest, None)
        async with ahead:
            await ahead.begin(memory_bytes=PLENTY)
            async with asyncio.timeout(60):
                assert await view(ahead, manifest, 0) is not None

    asyncio.run(run())


def test_a_fetch_lets_go_of_what_is_kept(tmp_path: Path) -> None:
    manifest = make_store(tmp_path)

    async def run() -> None:
        counting, ahead = await open_ahead(tmp_path, manifest, is_far=True, answers=False)
        async with ahead:
            await ahead.begin(memory_bytes=PLENTY)
            for _ in manifest.chunks:
                await counting.begun.acquire()
            counting.answers = True
            chunk, data = manifest.chunks[0], memoryview(bytearray(MIB))
            await ahead.fetch(manifest, [Read(chunk, choose_form(chunk), 0, MIB, data)])
            assert counting.running == 0
            assert not ahead._chunks
            assert any(data)

    asyncio.run(run())


class Slow(Counting):
    """A remote source of coded chunks with a local one; the test decides when a chunk arrives or is fetched."""

    def __init__(self, source: ChunkSource, manifest: Manifest) -> None:
        super().__init__(source)
        self.url = "ws://far.example:8765"
        self.arrives = {chunk.name: asyncio.Event() for chunk in manifest.chunks}
        self.delivers = asyncio.Event()
        self.here: set[str] = set()
        self.takes = True
        self.broken: set[str] = set()
        self.unkept: set[str] = set()

    async def keep(self, manifest: Manifest, chunk: Chunk, form: Form, *, priority: int = 0) -> bool:
        self.asked.append(f"keep {chunk.name}")
        await self.arrives[chunk.name].wait()
        if chunk.name in self.unkept:
            raise StorageError("it cannot be kept")
        self.here |= {chunk.name} if self.takes else set()
        return self.takes

    def near(self, manifest: Manifest, chunk: Chunk) -> tuple[Form, ...]:
        return chunk.forms if chunk.name in self.here else ()

    async def view(self, manifest: Manifest, chunk: Chunk, form: Form) -> View | None:
        return View(memoryview(b"here"), lambda: None) if chunk.name in self.here else None

    async def fetch(self, manifest: Manifest, reads: Sequence[Read], *, priority: int = 0) -> None:
        self.asked += [f"fetch {read.chunk.name}" for read in reads]
        await self.delivers.wait()
        if any(read.chunk.name in self.broken for read in reads):
            raise StorageError("it is broken")


async def open_slow(
    path: Path, *, chunks: int = 6, plain: Sequence[int] = (), url: str = "ws://far.example:8765"
) -> tuple[Slow, ReadAhead, Manifest]:
    """Open a source whose chunks are coded, except for the plain ones."""
    found = await asyncio.to_thread(make_store, path, sizes=(1000,) * chunks)
    codecs = ["none" if index in plain else "lossless" for index in range(chunks)]
    forms = [replace(one.forms[0], codec=codec) for one, codec in zip(found.chunks, codecs, strict=True)]
    coded = [replace(one, forms=(form,)) for one, form in zip(found.chunks, forms, strict=True)]
    manifest = replace(found, chunks=tuple(coded))
    slow = Slow(await open_storage_source(FilesystemBackend(path)), manifest)
    slow.url = url
    return slow, ReadAhead(slow, manifest, None), manifest


def whole(manifest: Manifest, index: int) -> Read:
    chunk = manifest.chunks[index]
    return Read(chunk, chunk.forms[0], 0, 1000, memoryview(bytearray(1000)))


async def turns() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def test_what_was_not_begun_is_left_to_a_model_that_waits(tmp_path: Path) -> None:
    async def run() -> None:
        slow, ahead, manifest = await open_slow(tmp_path)
        slow.here.add("layers.3")
        names = [chunk.name for chunk in manifest.chunks]
        async with ahead:
            await ahead.begin(memory_bytes=PLENTY)
            waits = [asyncio.create_task(view(ahead, manifest, index)) for index in range(2)]
            await turns()
            slow.arrives[names[0]].set()
            assert await waits[0] is not None, "it had been begun"
            await turns()
            assert slow.asked[2:4] == [f"keep {name}" for name in names[:2]]
            assert slow.asked[4:] == ["keep layers.3"], "the model waits for the second; what is near is not held up"
            assert await view(ahead, manifest, 2) is None
            fetched = asyncio.create_task(ahead.fetch(manifest, [whole(manifest, 2)]))
            slow.arrives[names[1]].set()
            slow.arrives[names[3]].set()
            assert await waits[1] is not None
            assert await view(ahead, manifest, 3) is not None
            await turns()
            assert slow.asked[5:] == ["fetch layers.2"], "the model waits for it"
            slow.delivers.set()
            await fetched
            await turns()
            assert slow.asked[6:] == ["keep layers.4", "keep layers.5"], "it waits for nothing, and the rest is read"
            assert ahead.near(manifest, manifest.chunks[4]) == manifest.chunks[4].forms, "it is on its way"
            last = asyncio.create_task(view(ahead, manifest, 4))
            await turns()
            assert ahead.near(manifest, manifest.chunks[4]) == (), "it is for the one who asked"
            last.cancel()
            await asyncio.wait([last])
            await ahead.fetch(manifest, [whole(manifest, 4)])
            assert slow.asked[8:] == ["fetch layers.4"], "what is asked for again lets go of nothing"
            slow.arrives[names[5]].set()
            assert await view(ahead, manifest, 5) is not None
            assert ahead._waiting == 0

    asyncio.run(asyncio.wait_for(run(), 60))


def test_what_is_not_kept_near_after_all_is_read_for_a_model_that_waits(tmp_path: Path) -> None:
    async def run() -> None:
        slow, ahead, manifest = await open_slow(tmp_path)
        slow.takes = False
        async with ahead:
            await ahead.begin(memory_bytes=PLENTY)
            for index in range(1, 6):
                slow.arrives[f"layers.{index}"].set()
            await turns()
            first = asyncio.create_task(view(ahead, manifest, 0))
            await turns()
            slow.arrives["layers.0"].set()
            await turns()
            assert await view(ahead, manifest, 3) is None, "it had not been begun"
            slow.delivers.set()
            found = await first  # not delayed by others
            assert found is not None
            assert not found.is_mapped
            assert slow.asked.count("fetch layers.0") == 1

    asyncio.run(asyncio.wait_for(run(), 60))


def test_what_had_to_wait_is_read_in_order(tmp_path: Path) -> None:
    async def run() -> None:
        slow, ahead, manifest = await open_slow(tmp_path, chunks=40)
        async with ahead:
            await ahead.begin(memory_bytes=PLENTY)
            await turns()
            first = asyncio.create_task(view(ahead, manifest, 0))
            await turns()
            slow.arrives["layers.1"].set()
            for _ in range(5):  # the tasks that wait for the free turn check at once, one after the other
                await asyncio.sleep(0)
            for arrives in slow.arrives.values():
                arrives.set()
            assert await first is not None
            await settle(ahead)
            kept = [one.removeprefix("keep layers.") for one in slow.asked if one.startswith("keep")]
            assert kept == [str(index) for index in range(40)]

    asyncio.run(asyncio.wait_for(run(), 60))


def test_only_coded_chunks_of_another_machine_wait(tmp_path: Path) -> None:
    async def begun(url: str) -> set[str]:
        slow, ahead, manifest = await open_slow(tmp_path / url[:2], plain=[4], url=url)
        async with ahead:
            await ahead.begin(memory_bytes=PLENTY)
            await turns()
            first = asyncio.create_task(view(ahead, manifest, 0))
            await turns()
            for arrives in [*slow.arrives.values()][1:]:
                arrives.set()
            await turns()
            kept = [one for one in slow.asked if one.startswith("keep")]
            first.cancel()
            await asyncio.wait([first])
            return {one.removeprefix("keep layers.") for one in kept}

    async def run() -> None:
        assert await begun("ws://far.example:8765") == {"0", "1", "4"}
        assert await begun(str(tmp_path)) == {str(index) for index in range(6)}

    asyncio.run(asyncio.wait_for(run(), 60))


def test_only_a_fetch_of_what_was_asked_for_lets_go_of_nothing(tmp_path: Path) -> None:
    async def run() -> None:
        slow, ahead, manifest = await open_slow(tmp_path)
        slow.delivers.set()
        async with ahead:
            await ahead.begin(memory_bytes=PLENTY)
            await turns()
            assert await view(ahead, manifest, 2) is None
            other = replace(manifest, name="other")
            assert ahead.near(manifest, manifest.chunks[0]) == manifest.chunks[0].forms
            assert ahead.near(other, manifest.chunks[0]) == (), "of another model, nothing is on its way"
            await ahead.fetch(manifest, [whole(manifest, 2)])
            assert len(ahead._chunks) == 5
            await ahead.fetch(manifest, [whole(manifest, 2), whole(manifest, 3)])
            assert not ahead._chunks

            await ahead.begin(memory_bytes=PLENTY)
            await ahead.fetch(other, [whole(manifest, 2)])
            assert not ahead._chunks, "nor was that asked for"

    asyncio.run(asyncio.wait_for(run(), 60))


def test_a_chunk_that_is_wanted_in_another_form_is_not_read_ahead(tmp_path: Path) -> None:
    async def run() -> None:
        slow, _, made = await open_slow(tmp_path)
        plain = [replace(chunk.forms[0], codec="none") for chunk in made.chunks]
        both = [replace(chunk, forms=(form, chunk.forms[0])) for chunk, form in zip(made.chunks, plain, strict=True)]
        ahead = ReadAhead(slow, replace(made, chunks=tuple(both)), None)
        manifest = await ahead.manifest(made.name)
        slow.takes = False
        slow.delivers.set()
        async with ahead:
            await ahead.begin(memory_bytes=PLENTY)
            await turns()
            assert ahead.near(manifest, manifest.chunks[0]) == manifest.chunks[0].forms[1:], "it is on its way"
            assert ahead.near(manifest, manifest.chunks[3]) == ()
            for index in 0, 3:
                assert await view(ahead, manifest, index) is None
                await ahead.fetch(manifest, [whole(manifest, index)])
            for arrives in slow.arrives.values():
                arrives.set()
            await settle(ahead)
            fetched = sorted(one for one in slow.asked if one.startswith("fetch"))
            assert fetched == [f"fetch layers.{index}" for index in range(6)], "each of them once"

    asyncio.run(asyncio.wait_for(run(), 60))


def test_what_arrived_in_another_form_than_is_wanted_takes_no_memory_any_more(tmp_path: Path) -> None:
    made = make_store(tmp_path, sizes=[MIB, MIB])
    other = [replace(chunk.forms[0], codec="lossless") for chunk in made.chunks]
    both = [replace(chunk, forms=(*chunk.forms, form)) for chunk, form in zip(made.chunks, other, strict=True)]
    manifest = replace(made, chunks=tuple(both))

    async def run() -> None:
        _, ahead = await open_ahead(tmp_path, manifest, is_far=True)
        async with ahead:
            await ahead.begin(memory_bytes=PLENTY)
            free = ahead._free_bytes
            await settle(ahead)
            taken = free - ahead._free_bytes
            assert taken == sum(chunk.forms[0].stored_bytes for chunk in made.chunks)
            assert await ahead.view(manifest, manifest.chunks[0], other[0]) is None
            assert free - ahead._free_bytes == made.chunks[1].forms[0].stored_bytes

    asyncio.run(run())


def test_what_could_not_be_kept_is_not_on_its_way(tmp_path: Path) -> None:
    async def run() -> None:
        slow, ahead, manifest = await open_slow(tmp_path)
        slow.takes = False
        slow.delivers.set()
        slow.broken.add("layers.0")
        slow.unkept.add("layers.3")
        for arrives in slow.arrives.values():
            arrives.set()
        async with ahead:
            await ahead.begin(memory_bytes=8 * 2000)
            await settle(ahead)
            coming = [chunk.name for chunk in manifest.chunks if ahead.near(manifest, chunk)]
            assert coming == ["layers.1", "layers.2"], "what failed takes no memory, and two fit"
            with pytest.raises(StorageError):
                await view(ahead, manifest, 0)
            assert await view(ahead, manifest, 1) is not None
            assert await view(ahead, manifest, 5) is None

    asyncio.run(asyncio.wait_for(run(), 60))


def test_what_came_near_while_it_had_to_wait_is_handed_out(tmp_path: Path) -> None:
    """Two chunks may hold the same bytes, of which one is already there."""

    async def run() -> None:
        slow, ahead, manifest = await open_slow(tmp_path)
        async with ahead:
            await ahead.begin(memory_bytes=PLENTY)
            await turns()
            first = asyncio.create_task(view(ahead, manifest, 0))
            slow.here.add("layers.4")
            assert await view(ahead, manifest, 4) is not None
            first.cancel()
            await asyncio.wait([first])

    asyncio.run(asyncio.wait_for(run(), 60))


def test_damage_is_reported_to_the_one_who_asks(tmp_path: Path) -> None:
    manifest = make_store(tmp_path)
    blob = next(path for path in (tmp_path / "blobs").rglob("*") if path.is_file() and path.stat().st_size > 5_000_000)
    damaged = bytearray(blob.read_bytes())
    damaged[-1] ^= 1
    blob.chmod(0o644)
    blob.write_bytes(damaged)

    async def run() -> None:
        _, ahead = await open_ahead(tmp_path, manifest)
        async with ahead:
            await ahead.begin(memory_bytes=PLENTY)
            await settle(ahead)
            assert await view(ahead, manifest, 0) is not None
            with pytest.raises(IntegrityError, match=r"chunk layers\.1 from .* is damaged"):
                await view(ahead, manifest, 1)

    asyncio.run(run())


def test_an_interrupted_import_closes_the_source(tmp_path: Path) -> None:
    make_store(tmp_path)
    opened: list[Counting] = []
    client = ReadAheadClient(FilesystemBackend(tmp_path), "model", memory_bytes=PLENTY)
    open_ahead = client._open_source

    async def open_hanging() -> ChunkSource:
        ahead = await open_ahead()
        assert isinstance(ahead, ReadAhead)
        ahead._source = Counting(ahead._source, is_far=True, answers=False)
        opened.append(ahead._source)
        return ahead

    def infer() -> None:
        with client:
            client.begin()
            raise KeyboardInterrupt  # while torch is imported

    client._open_source = open_hanging
    with pytest.raises(KeyboardInterrupt):
        infer()
    assert opened[0].asked[-1] == "close"
    with pytest.raises(ModelClosedError):
        client.models()


def test_whether_weights_will_be_streamed(tmp_path: Path) -> None:
    make_store(tmp_path, sizes=[MIB] * 4)
    for budget, streams in ((3 * MIB, True), (4 * MIB - 1, False), (None, False)):
        with ReadAheadClient(tmp_path, None, memory_bytes=0, budget_bytes=budget) as client:
            client.begin()
            assert client.streams is streams
    packed = tmp_path / "packed"
    ModelChunker(save_llama(tmp_path / "words"), packed, codecs=("none", "int4")).chunk_model_sync()
    with ReadAheadClient(packed, None, memory_bytes=0, codec="int4", budget_bytes=500_000) as client:
        client.begin()
        assert sum(chunk.payload_bytes for chunk in client.manifest.chunks) > 700_000
        assert not client.streams, "they take less"


def test_only_the_first_that_opens_the_model_gets_what_is_read_ahead(tmp_path: Path) -> None:
    ModelChunker(save_llama(tmp_path / "words"), tmp_path / "store", codecs=("none", "int4")).chunk_model_sync()
    with ReadAheadClient(tmp_path / "store", None, memory_bytes=0, codec="int4") as client:
        client.begin()
        stored = client.manifest

        def opened() -> Manifest:
            return client.run(lambda source: source.manifest_to_open(stored))

        assert client.run(lambda source: source.manifest(stored.name)) is stored, "to look at it takes nothing"
        assert opened() == for_run(stored, "int4", where=client.url) != stored
        assert opened() is stored, "which has the forms that another opener wants"


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    make_store(tmp_path)
    with ReadAheadClient(tmp_path, "nosuch", memory_bytes=None) as client, pytest.raises(UnknownModelError):
        client.begin()
