"""A store that is read directly: in pieces, verified, and with no writes after a failure."""

import asyncio
import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from surfw.config import BLOCK_BYTES
from surfw.errors import IntegrityError, NotAStoreError, NotFoundError, StorageError, UnknownModelError
from surfw.manifest import Chunk, Location, Manifest
from surfw.metrics import Metrics
from surfw.runtime.rows import RowReader
from surfw.runtime.run import IoThread
from surfw.source import Read
from surfw.storage import FilesystemBackend
from surfw.storage.ranges import most_range_bytes
from surfw.storage.store_source import StorageSource, open_storage_source
from tests.stores import TOKENIZER, make_store, payload

SIZE = 9 * BLOCK_BYTES + 77  # more than one piece of 8 MiB
FAR_PIECE = most_range_bytes(2, streamed=True)
FAR = FAR_PIECE + BLOCK_BYTES + 77  # more than one piece of a remote read


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return make_store(tmp_path / "store", sizes=(SIZE, 100))


@pytest.fixture
def source(tmp_path: Path, manifest: Manifest) -> StorageSource:
    return asyncio.run(open_storage_source(FilesystemBackend(tmp_path / "store")))


def fetch(
    source: StorageSource, manifest: Manifest, chunk: Chunk, start: int = 0, stop: int | None = None
) -> bytearray:
    (form,) = chunk.forms
    stop = form.stored_bytes if stop is None else stop
    memory = bytearray(stop - start)
    asyncio.run(source.fetch(manifest, [Read(chunk, form, start, stop, memoryview(memory))]))
    return memory


def test_only_a_store_is_opened(tmp_path: Path) -> None:
    with pytest.raises(NotAStoreError):
        asyncio.run(open_storage_source(FilesystemBackend(tmp_path)))


def test_models_and_manifests(source: StorageSource, manifest: Manifest, tmp_path: Path) -> None:
    assert source.url == str(tmp_path / "store")
    assert asyncio.run(source.models()) == ["toy/model"]
    assert asyncio.run(source.manifest("toy/model")) == manifest
    with pytest.raises(UnknownModelError):
        asyncio.run(source.manifest("model"))


@pytest.mark.parametrize(
    ("start", "stop"), [(0, SIZE), (0, BLOCK_BYTES), (8 * BLOCK_BYTES, SIZE), (3 * BLOCK_BYTES, 9 * BLOCK_BYTES)]
)
def test_any_range_of_blocks(source: StorageSource, manifest: Manifest, tmp_path: Path, start: int, stop: int) -> None:
    chunk = manifest.chunks[0]
    assert fetch(source, manifest, chunk, start, stop) == payload(tmp_path / "store", chunk)[start:stop]
    assert source.fetched_bytes == stop - start


def test_several_reads_at_once(source: StorageSource, manifest: Manifest, tmp_path: Path) -> None:
    memories = [bytearray(chunk.payload_bytes) for chunk in manifest.chunks]
    reads = [
        Read(chunk, chunk.forms[0], 0, chunk.payload_bytes, memoryview(memory))
        for chunk, memory in zip(manifest.chunks, memories, strict=True)
    ]
    asyncio.run(source.fetch(manifest, reads))
    assert memories == [payload(tmp_path / "store", chunk) for chunk in manifest.chunks]
    assert source.fetched_bytes == SIZE + 100


def test_a_form_in_ranges_of_several_objects(source: StorageSource, manifest: Manifest, tmp_path: Path) -> None:
    chunk = manifest.chunks[0]
    data = payload(tmp_path / "store", chunk)
    (tmp_path / "store" / "one").write_bytes(b"....." + data[:3_000_001])
    (tmp_path / "store" / "two").write_bytes(data[3_000_001:] + b"..")
    places = (Location("one", 5, 3_000_006), Location("two", 0, SIZE - 3_000_001))
    moved = replace(chunk, forms=(replace(chunk.forms[0], locations=places),))
    assert fetch(source, manifest, moved) == data


@pytest.mark.parametrize("block", [0, 7, 8, 9])
def test_damage_is_found_wherever_it_is(source: StorageSource, manifest: Manifest, tmp_path: Path, block: int) -> None:
    chunk = manifest.chunks[0]
    at = chunk.forms[0].locations[0]
    with (tmp_path / "store" / at.object).open("r+b") as blob:
        blob.seek(at.start + block * BLOCK_BYTES)
        old = blob.read(1)[0]
        blob.seek(-1, os.SEEK_CUR)
        blob.write(bytes([old ^ 1]))
    with pytest.raises(
        IntegrityError, match=rf"chunk layers\.0 from {source.url} is damaged: block {block} has BLAKE3"
    ):
        fetch(source, manifest, chunk)


def test_a_blob_that_is_cut_off(source: StorageSource, manifest: Manifest, tmp_path: Path) -> None:
    at = manifest.chunks[0].forms[0].locations[0]
    os.truncate(tmp_path / "store" / at.object, at.stop - 1)
    with pytest.raises(StorageError, match=r"safetensors ends at byte .*, expected"):
        fetch(source, manifest, manifest.chunks[0])


def test_a_blob_that_is_missing(source: StorageSource, manifest: Manifest, tmp_path: Path) -> None:
    (tmp_path / "store" / manifest.chunks[1].forms[0].locations[0].object).unlink()
    with pytest.raises(NotFoundError, match="not found"):
        fetch(source, manifest, manifest.chunks[1])


def test_a_manifest_without_places_cannot_be_read_from(source: StorageSource, manifest: Manifest) -> None:
    with pytest.raises(StorageError, match=r"says of no place where chunk layers\.1 lies"):
        fetch(source, manifest, manifest.public().chunks[1])


def test_files_are_verified(source: StorageSource, manifest: Manifest, tmp_path: Path) -> None:
    for name, data in TOKENIZER.items():
        assert asyncio.run(source.file(manifest, name)) == data
    with pytest.raises(NotFoundError, match=r"toy/model has no file '../surfw.json'"):
        asyncio.run(source.file(manifest, "../surfw.json"))
    (tmp_path / "store" / manifest.file("vocab.txt").object).write_bytes(b"one\nTWO\n")
    with pytest.raises(IntegrityError, match=r"vocab\.txt of toy/model in .* is damaged"):
        asyncio.run(source.file(manifest, "vocab.txt"))


class PathlessBackend(FilesystemBackend):
    """A folder whose files look remote."""

    def local_path(self, key: str) -> None:
        return None


class SlowBackend(PathlessBackend):
    """A backend that reads only when the test says so, like a slow disk."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.reading = threading.Event()
        self.go_on = threading.Event()
        self.read_to_the_end = False

    async def read_into(self, key: str, start: int, destination: memoryview) -> None:
        def read() -> None:
            self.reading.set()
            assert self.go_on.wait(60)
            destination[:] = bytes(len(destination))
            self.read_to_the_end = True

        await asyncio.to_thread(read)


def test_a_cancelled_fetch_ends_when_nothing_is_written_any_more(manifest: Manifest, tmp_path: Path) -> None:
    backend = SlowBackend(tmp_path / "store")
    source = StorageSource(backend)
    (chunk, form) = manifest.chunks[1], manifest.chunks[1].forms[0]

    async def cancel() -> bool:
        read = Read(chunk, form, 0, 100, memoryview(bytearray(100)))
        work = asyncio.create_task(source.fetch(manifest, [read]))
        await asyncio.to_thread(backend.reading.wait, 60)
        work.cancel()
        done, _ = await asyncio.wait([work], timeout=0)
        assert not done
        backend.go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await work
        return backend.read_to_the_end

    assert asyncio.run(cancel())


class FarBackend(PathlessBackend):
    """A remote backend with two concurrent reads. Each read waits until both have begun."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.parallel_reads = 2
        self.reads_in_place = True
        self.together = asyncio.Barrier(2)
        self.failing: int | None = None
        self.given_up = 0

    async def read_into(self, key: str, start: int, destination: memoryview, *, revision: str | None = None) -> None:
        try:
            await self.together.wait()
            if self.failing == len(destination):
                raise StorageError("the line is cut")
            if self.failing is not None:
                await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.given_up += 1
            raise
        await super().read_into(key, start, destination, revision=revision)


def test_pieces_from_far_away_are_read_at_the_same_time(tmp_path: Path) -> None:
    manifest = make_store(tmp_path / "store", sizes=(FAR, 100))
    chunk = manifest.chunks[0]
    source = StorageSource(FarBackend(tmp_path / "store"))
    assert fetch(source, manifest, chunk) == payload(tmp_path / "store", chunk)
    assert (source.fetched_bytes, source.buffered_bytes) == (FAR, 4 * BLOCK_BYTES)


class JoinedBackend(PathlessBackend):
    """A remote backend whose best piece size becomes smaller during its first read, as if another had joined."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.parallel_reads, self.reads_in_place = 2, True

    async def read_into(self, key: str, start: int, destination: memoryview, *, revision: str | None = None) -> None:
        self.parallel_reads, self.reads_in_place = 100, False
        await super().read_into(key, start, destination, revision=revision)


def test_the_size_of_pieces_may_change_while_they_are_read(tmp_path: Path) -> None:
    size = 2 * FAR_PIECE + most_range_bytes(100, streamed=False) + BLOCK_BYTES
    manifest = make_store(tmp_path / "store", sizes=(size, 100))
    chunk = manifest.chunks[0]
    read = fetch(StorageSource(JoinedBackend(tmp_path / "store")), manifest, chunk)
    assert read == payload(tmp_path / "store", chunk)


def test_a_piece_that_fails_ends_the_others(tmp_path: Path) -> None:
    manifest = make_store(tmp_path / "store", sizes=(FAR, 100))
    backend = FarBackend(tmp_path / "store")
    backend.failing = -(-FAR // BLOCK_BYTES) // 2 * BLOCK_BYTES  # the size of the first of two pieces
    with pytest.raises(StorageError, match="the line is cut"):
        fetch(StorageSource(backend), manifest, manifest.chunks[0])
    assert backend.given_up == 1


class ManyBackend(FarBackend):
    """A backend with four concurrent reads, which counts the rounds of four."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.parallel_reads = 4
        self.together = asyncio.Barrier(4)
        self.reads = self.rounds = 0

    async def read_into(self, key: str, start: int, destination: memoryview, *, revision: str | None = None) -> None:
        self.reads += 1
        if destination.nbytes >= BLOCK_BYTES:  # a part of a model
            try:
                async with asyncio.timeout(20):  # ends a test that fails
                    last = await self.together.wait() == 0
                self.rounds += last
            except TimeoutError as exc:
                raise StorageError("it is read one by one") from exc
        await FilesystemBackend.read_into(self, key, start, destination, revision=revision)


def test_reads_of_one_call_are_under_way_together(tmp_path: Path) -> None:
    """Sixteen reads take four round trips with four concurrent reads."""
    manifest = make_store(tmp_path / "store", sizes=(32 * BLOCK_BYTES,))
    (chunk,) = manifest.chunks
    backend = ManyBackend(tmp_path / "store")
    source = StorageSource(backend)
    memory = bytearray(chunk.payload_bytes)
    starts = range(0, chunk.payload_bytes, 2 * BLOCK_BYTES)
    reads = [
        Read(chunk, chunk.forms[0], at, at + BLOCK_BYTES, memoryview(memory)[at : at + BLOCK_BYTES]) for at in starts
    ]
    asyncio.run(source.fetch(manifest, reads))
    whole = payload(tmp_path / "store", chunk)
    assert all(memory[at : at + BLOCK_BYTES] == whole[at : at + BLOCK_BYTES] for at in starts)
    assert (backend.reads, backend.rounds, source.fetched_bytes) == (16, 4, 16 * BLOCK_BYTES)


def test_rows_far_apart_cost_few_round_trips(tmp_path: Path) -> None:
    """Rows in 24 places, read in groups of up to 16, take 6 round trips instead of 24."""
    made = make_store(tmp_path / "store", sizes=(48 * BLOCK_BYTES,))
    table = replace(made.chunks[0].tensors[0], shape=(48, BLOCK_BYTES))
    manifest = replace(made, chunks=(replace(made.chunks[0], tensors=(table,)),))
    backend = ManyBackend(tmp_path / "store")
    io = IoThread()
    try:
        rows = RowReader(StorageSource(backend), manifest, io, Metrics())
        found = rows.lookup(table.name, torch.arange(0, 48, 2))
    finally:
        io.close()
    whole = payload(tmp_path / "store", made.chunks[0])
    expected = (whole[at * BLOCK_BYTES : (at + 1) * BLOCK_BYTES] for at in range(0, 48, 2))
    assert found.numpy().tobytes() == b"".join(expected)
    assert (backend.reads, backend.rounds) == (24, 6)


def test_a_read_that_fails_ends_those_beside_it(tmp_path: Path) -> None:
    manifest = make_store(tmp_path / "store", sizes=(3 * BLOCK_BYTES, 100))
    backend = FarBackend(tmp_path / "store")
    backend.failing = 100
    memories = [bytearray(chunk.payload_bytes) for chunk in manifest.chunks]
    reads = [
        Read(chunk, chunk.forms[0], 0, chunk.payload_bytes, memoryview(memory))
        for chunk, memory in zip(manifest.chunks, memories, strict=True)
    ]
    with pytest.raises(StorageError, match="the line is cut"):
        asyncio.run(asyncio.wait_for(StorageSource(backend).fetch(manifest, reads), 20))
    assert (backend.given_up, any(memories[0])) == (1, False)


def test_closing_closes_the_backend(manifest: Manifest, tmp_path: Path) -> None:
    closed = []

    class Backend(FilesystemBackend):
        async def close(self) -> None:
            closed.append(self.url)

    asyncio.run(StorageSource(Backend(tmp_path / "store")).close())
    assert closed == [str(tmp_path / "store")]
