"""Writing a plan: the bytes are right, interruptions lose only unfinished chunks, and writers do not conflict."""

import asyncio
import os
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surfw.chunking import write as write_module
from surfw.chunking.plan import ChunkPlan, PlannedChunk, PlannedTensor
from surfw.chunking.write import ChunkWriter
from surfw.config import BLOCK_BYTES
from surfw.errors import CheckpointError, StorageError, StorageFullError
from surfw.manifest import Chunk, Digester, decode_line, encode_line
from surfw.safetensors_header import encode_header
from surfw.storage import FilesystemBackend, StorageBackend, adapt_backend
from surfw.storage.store import Store, blob_key
from tests.storage.dict_backend import DictBackend
from tests.stores import make_store
from tests.toys import toy_chunk

PAYLOAD = bytes(range(250)) * 24
SIZES = (5000, 9 * BLOCK_BYTES + 3, 0, 700)


class Payloads:
    """The bytes of planned chunks; reads of some chunks can be made to fail or to wait."""

    def __init__(self, chunks: Sequence[tuple[Chunk, bytes]]) -> None:
        self.payloads = {chunk.name: payload for chunk, payload in chunks}
        self.reads: list[tuple[str, int, int]] = []
        self.failing: str | None = None
        self.waiting: str | None = None
        self.arrived, self.go_on = threading.Event(), threading.Event()

    def read_into(self, chunk: PlannedChunk, start: int, destination: memoryview) -> None:
        self.reads.append((chunk.name, start, len(destination)))
        if chunk.name == self.failing:
            raise CheckpointError(f"{chunk.name} cannot be read")
        if chunk.name == self.waiting:
            self.arrived.set()
            assert self.go_on.wait(60)
        destination[:] = self.payloads[chunk.name][start : start + len(destination)]

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(name for name, _, _ in self.reads))


def planned(chunks: Sequence[tuple[Chunk, bytes]]) -> ChunkPlan:
    made = tuple(
        PlannedChunk(chunk.name, chunk.kind, tuple(PlannedTensor(info, info.name) for info in chunk.tensors))
        for chunk, _ in chunks
    )
    return ChunkPlan(made, ())


def toys(sizes: Sequence[int] = SIZES) -> list[tuple[Chunk, bytes]]:
    return [toy_chunk(f"layers.{index}", [("U8", (size,))], seed=index) for index, size in enumerate(sizes)]


def run(writer: ChunkWriter, plan: ChunkPlan) -> list[Chunk]:
    with writer.locked():
        return asyncio.run(writer.write(plan))


def make(
    backend: StorageBackend, source: Payloads, progress: list[int] | None = None, *, key: str = "k"
) -> ChunkWriter:
    done = [] if progress is None else progress
    return ChunkWriter(backend, source, model="toy", key=key, progress=lambda count, _: done.append(count))


@pytest.fixture
def backend(tmp_path: Path) -> FilesystemBackend:
    return FilesystemBackend(tmp_path / "store")


def stored(backend: StorageBackend, chunk: Chunk) -> bytes:
    """A chunk's payload, read from the location that the writer returned."""
    (form,) = chunk.forms
    (at,) = form.locations
    return asyncio.run(backend.load_range(at.object, at.start, at.stop))


def marks(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of modification of every blob."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("blobs/*/*")}


@pytest.mark.parametrize("kind", ["files", "four methods"])
def test_chunks_are_written_as_they_are_described(kind: str, tmp_path: Path) -> None:
    storage: StorageBackend = FilesystemBackend(tmp_path / "store") if kind == "files" else adapt_backend(DictBackend())
    chunks, progress = toys(), []
    made = run(make(storage, Payloads(chunks), progress), planned(chunks))
    assert sum(progress) == sum(SIZES)
    for (toy, payload), chunk in zip(chunks, made, strict=True):
        assert (chunk.name, chunk.kind, chunk.id, chunk.tensors) == (toy.name, toy.kind, toy.id, toy.tensors)
        assert chunk.forms[0].blocks == toy.forms[0].blocks
        assert chunk.forms[0].digest == toy.id
        (at,) = chunk.forms[0].locations
        assert at.object == blob_key(toy.id, ".safetensors")
        assert at.start % 4096 == 0
        assert asyncio.run(storage.load(at.object)) == encode_header(toy.tensors) + payload


def test_a_buffer_is_filled_again_only_when_its_bytes_have_been_digested(
    backend: FilesystemBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reads run ahead of digests, limited by the number of buffers."""
    chunks = toys((5 * BLOCK_BYTES,))
    source, reads = Payloads(chunks), threading.Semaphore(0)
    read_into, update = source.read_into, Digester.update

    def counted(chunk: PlannedChunk, start: int, destination: memoryview) -> None:
        read_into(chunk, start, destination)
        reads.release()

    def after_four_reads(digester: Digester, piece: memoryview) -> None:
        if len(source.reads) < 4:
            for _ in range(4):  # three buffers can be read; the fourth read waits for this digest
                reads.acquire(timeout=0.3)
        update(digester, piece)

    monkeypatch.setattr(source, "read_into", counted)
    monkeypatch.setattr(write_module, "PIECE_BYTES", BLOCK_BYTES)
    monkeypatch.setattr(Digester, "update", after_four_reads)
    (chunk,) = run(make(backend, source), planned(chunks))
    assert chunk.forms[0].blocks == chunks[0][0].forms[0].blocks


@settings(max_examples=20, deadline=None)
@given(st.lists(st.lists(st.integers(0, 90), min_size=1, max_size=4), min_size=1, max_size=4), st.integers(1, 40))
def test_every_byte_is_read_once_in_order_and_stored_once(layers: list[list[int]], piece: int) -> None:
    chunks = [
        toy_chunk(f"l{index}", [("U8", (size,)) for size in sizes], seed=index) for index, sizes in enumerate(layers)
    ]
    source, backend = Payloads(chunks), adapt_backend(DictBackend())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write_module, "PIECE_BYTES", piece)
        made = run(make(backend, source), planned(chunks))
    for (toy, payload), chunk in zip(chunks, made, strict=True):
        pieces = [(start, size) for name, start, size in source.reads if name == toy.name]
        assert [start for start, _ in pieces] == list(range(0, len(payload), piece))
        assert sum(size for _, size in pieces) == len(payload)
        assert stored(backend, chunk) == payload
    shutil.rmtree(backend.spool())


def test_an_interrupted_run_goes_on_where_it_stopped(backend: FilesystemBackend) -> None:
    chunks = toys()
    source = Payloads(chunks)
    source.failing = "layers.3"
    with pytest.raises(CheckpointError, match=r"layers\.3 cannot be read"):
        run(make(backend, source), planned(chunks))
    before = marks(backend.base)
    assert len(before) == 3
    assert [path.name for path in (backend.spool() / "k").iterdir() if path.suffix == ".tmp"] == []

    again, progress = Payloads(chunks), []
    made = run(make(backend, again, progress), planned(chunks))
    assert again.names == ["layers.3"]
    assert sum(progress) == sum(SIZES)
    assert {name: mark for name, mark in marks(backend.base).items() if name in before} == before
    assert [stored(backend, chunk) for chunk in made] == [payload for _, payload in chunks]


def test_a_finished_chunk_that_is_gone_or_cut_is_written_again(backend: FilesystemBackend) -> None:
    chunks = toys()
    made = run(make(backend, Payloads(chunks)), planned(chunks))
    backend.local_path(made[0].forms[0].locations[0].object).unlink()
    os.truncate(backend.local_path(made[1].forms[0].locations[0].object), 4096 + 100)
    source = Payloads(chunks)
    assert run(make(backend, source), planned(chunks)) == made
    assert source.names == ["layers.0", "layers.1"]
    assert [stored(backend, chunk) for chunk in made] == [payload for _, payload in chunks]


@pytest.mark.parametrize(
    "left",
    [b'{"chunk": "layers.0", "dig', b"[]", b"null", encode_line([])[:-9], encode_line([]), encode_line({"chunk": 1}),
     b"\0\0\0", b"\xff"],
)  # fmt: skip
def test_half_a_line_in_the_journal_costs_one_chunk_once(backend: FilesystemBackend, left: bytes) -> None:
    chunks = toys((100, 200))
    run(make(backend, Payloads(chunks)), planned(chunks))
    journal = backend.spool() / "k" / "journal.jsonl"
    first, second = [line for line in journal.read_bytes().splitlines() if line]
    assert decode_line(first)["chunk"] == "layers.0"
    journal.write_bytes(second + b"\n" + left)
    source = Payloads(chunks)
    run(make(backend, source), planned(chunks))
    assert source.names == ["layers.0"]
    source = Payloads(chunks)
    run(make(backend, source), planned(chunks))
    assert source.names == []


def test_the_journal_is_forgotten_with_everything_beside_it(backend: FilesystemBackend) -> None:
    chunks = toys((100,))
    writer = make(backend, Payloads(chunks))
    with writer.locked():
        asyncio.run(writer.write(planned(chunks)))
        writer.forget()
    assert not backend.spool().exists()
    assert len(marks(backend.base)) == 1


def test_what_others_left_in_progress_stays(backend: FilesystemBackend) -> None:
    chunks = toys((100,))
    other = backend.spool() / "other"
    other.mkdir(parents=True)
    (other / "journal.jsonl").write_text("{}")
    writer = make(backend, Payloads(chunks))
    with writer.locked():
        asyncio.run(writer.write(planned(chunks)))
        writer.forget()
    assert [path.name for path in backend.spool().iterdir()] == ["other"]


def test_two_writers_of_the_same_plan_do_not_meet(backend: FilesystemBackend) -> None:
    chunks = toys()
    source = Payloads(chunks)
    source.waiting = "layers.1"
    first = threading.Thread(target=run, args=(make(backend, source), planned(chunks)))
    first.start()
    assert source.arrived.wait(60)
    second = Payloads(chunks)
    with pytest.raises(StorageError, match=f"another surfw is chunking this model into {backend.url}; wait for it"):
        run(make(backend, second), planned(chunks))
    assert second.reads == []
    source.go_on.set()
    first.join()
    run(make(backend, second), planned(chunks))
    assert second.reads == []  # all chunks exist


def test_a_lock_that_a_finished_writer_removed_locks_nobody_out(
    backend: FilesystemBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer opens the file, its holder removes it, and only then it is locked: such a lock protects nothing."""
    first = make(backend, Payloads([]))
    holding = first.locked()
    holding.__enter__()
    flock, attempts = write_module.fcntl.flock, []

    def finish_before(fd: int, how: int) -> None:
        attempts.append(fd)
        if len(attempts) == 1:
            first.forget()
            holding.__exit__(None, None, None)
        flock(fd, how)

    monkeypatch.setattr(write_module.fcntl, "flock", finish_before)
    with make(backend, Payloads([])).locked():
        assert len(attempts) == 2
        assert (backend.spool() / "k" / "lock").stat().st_ino == os.fstat(attempts[1]).st_ino
        monkeypatch.undo()
        with pytest.raises(StorageError, match="another surfw"), make(backend, Payloads([])).locked():
            raise AssertionError("two writers at once")


def test_equal_payloads_behind_headers_of_other_lengths_are_stored_once(backend: FilesystemBackend) -> None:
    chunk, payload = toy_chunk("layers.0", [("U8", (6000,))])
    renamed, _ = toy_chunk("x" * 5000, [("U8", (6000,))], seed=0)
    (short,) = run(make(backend, Payloads([(chunk, payload)])), planned([(chunk, payload)]))
    before = marks(backend.base)
    source = Payloads([(renamed, payload)])
    (long,) = run(make(backend, source, key="other"), planned([(renamed, payload)]))
    assert len(encode_header(renamed.tensors)) == 8192
    assert long.id == short.id
    assert long.forms[0].locations == short.forms[0].locations
    assert marks(backend.base) == before
    assert stored(backend, long) == stored(backend, short) == payload
    again = Payloads([(renamed, payload)])
    assert run(make(backend, again, key="other"), planned([(renamed, payload)])) == [long]
    assert again.reads == []  # it was recorded as done


def test_two_models_with_equal_payloads_written_at_once_both_stay_readable(backend: FilesystemBackend) -> None:
    """If two headers differ in length, one is kept, and both models refer to it: a published blob never changes."""
    start, found = threading.Barrier(2), {}

    class Together(Payloads):
        def read_into(self, chunk: PlannedChunk, start_byte: int, destination: memoryview) -> None:
            super().read_into(chunk, start_byte, destination)
            start.wait(60)

    def write(name: str) -> None:
        chunk, _ = toy_chunk(name, [("U8", (6000,))])
        writer = make(backend, Together([(chunk, PAYLOAD)]), key=f"key-{len(name)}")
        found[name] = run(writer, planned([(chunk, PAYLOAD)]))[0]

    threads = [threading.Thread(target=write, args=(name,)) for name in ("short", "long" * 1500)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [stored(backend, chunk) for chunk in found.values()] == [PAYLOAD, PAYLOAD]
    assert len({chunk.forms[0].locations for chunk in found.values()}) == 1
    assert len(marks(backend.base)) == 1


class Far(DictBackend):
    """Another storage with its own address. Its uploads begin, and end when the test says so."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.url = url
        self.begun, self.may_end = threading.Event(), threading.Event()
        self.two_rely_on_it = threading.Event()

    async def save(self, key: str, data: bytes | BinaryIO) -> None:
        await super().save(key, data)
        if len([key for key in self.objects if key.startswith("leases/")]) == 2:
            self.two_rely_on_it.set()

    async def adopt(self, key: str, path: Path) -> None:
        self.begun.set()
        await asyncio.to_thread(self.may_end.wait, 60)
        await super().adopt(key, path)


def writing(backend: StorageBackend, name: str, key: str) -> threading.Thread:
    """Write a chunk of this name, always with the same payload, in a thread."""
    chunk, _ = toy_chunk(name, [("U8", (6000,))])
    writer = make(adapt_backend(backend), Payloads([(chunk, PAYLOAD)]), key=key)
    thread = threading.Thread(target=run, args=(writer, planned([(chunk, PAYLOAD)])), daemon=True)
    thread.start()
    return thread


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SURFW_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_uploads_to_other_stores_are_in_nobodys_way(home: Path) -> None:
    slow, other = Far("elsewhere://one"), Far("elsewhere://two")
    other.may_end.set()
    held = writing(slow, "short", "a")
    try:
        assert slow.begun.wait(60)
        free = writing(other, "short", "a")
        free.join(20)
        assert not free.is_alive()
        assert slow.objects.keys().isdisjoint(other.objects)
    finally:
        slow.may_end.set()
        held.join(60)
    assert [key for key in slow.objects if key.startswith("blobs/")] == [
        key for key in other.objects if key.startswith("blobs/")
    ]
    assert list(home.rglob("*.lock")) == []


def test_equal_payloads_wait_for_each_other_and_ctrl_c_does_not(home: Path) -> None:
    backend = Far("elsewhere://one")
    held = writing(backend, "short", "a")
    assert backend.begun.wait(60)
    chunk, _ = toy_chunk("longer" * 1500, [("U8", (6000,))])
    writer = make(adapt_backend(backend), Payloads([(chunk, PAYLOAD)]), key="b")

    async def give_up() -> None:
        work = asyncio.create_task(writer.write(planned([(chunk, PAYLOAD)])))
        await asyncio.to_thread(backend.two_rely_on_it.wait, 60)  # just before it waits for its turn
        done, _ = await asyncio.wait([work], timeout=0.2)
        assert not done
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work

    def interrupt() -> None:
        with writer.locked():
            asyncio.run(give_up())

    interrupted = threading.Thread(target=interrupt, daemon=True)
    interrupted.start()
    interrupted.join(20)
    ended = not interrupted.is_alive()
    backend.may_end.set()
    held.join(60)
    assert ended
    assert len([key for key in backend.objects if key.startswith("blobs/")]) == 1


def test_equal_chunks_of_one_model_share_a_blob(backend: FilesystemBackend) -> None:
    one, payload = toy_chunk("layers.0", [("U8", (600,))])
    two, _ = toy_chunk("layers.1", [("U8", (600,))])
    chunks = [(one, payload), (two, payload)]
    made = run(make(backend, Payloads(chunks)), planned(chunks))
    assert made[0].id == made[1].id
    assert [stored(backend, chunk) for chunk in made] == [payload, payload]
    assert len(marks(backend.base)) == 1


def test_a_damaged_blob_is_replaced(backend: FilesystemBackend) -> None:
    chunks = toys((6000,))
    (chunk,) = run(make(backend, Payloads(chunks)), planned(chunks))
    blob = backend.local_path(chunk.forms[0].locations[0].object)
    for damaged in (bytes(8192 + 6000), bytes(4096 + 6000), b"", bytes(50)):
        blob.write_bytes(damaged)
        shutil.rmtree(backend.spool())
        assert run(make(backend, Payloads(chunks)), planned(chunks)) == [chunk]
        assert stored(backend, chunk) == chunks[0][1]


def test_a_cancelled_run_stops_soon_and_keeps_what_is_done(backend: FilesystemBackend) -> None:
    chunks = toys((100, 200, 20 * BLOCK_BYTES, 300))
    source = Payloads(chunks)
    source.waiting = "layers.2"
    writer = make(backend, source)

    async def cancel() -> None:
        work = asyncio.create_task(writer.write(planned(chunks)))
        await asyncio.to_thread(source.arrived.wait, 60)
        work.cancel()
        await asyncio.sleep(0)
        source.go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await work

    with writer.locked():
        asyncio.run(cancel())
    assert [name for name, _, _ in source.reads] == ["layers.0", "layers.1", "layers.2"]  # one piece of three
    assert [path.name for path in (backend.spool() / "k").glob("*.tmp")] == []
    again = Payloads(chunks)
    made = run(make(backend, again), planned(chunks))
    assert again.names[-2:] == ["layers.2", "layers.3"]
    assert "layers.0" not in again.names
    assert [stored(backend, chunk) for chunk in made] == [payload for _, payload in chunks]


def test_a_full_disk_leaves_nothing_half_written(small_disk: Path) -> None:
    backend = FilesystemBackend(small_disk / "store")
    chunks = toys((300_000, 3 * BLOCK_BYTES, 400))
    with pytest.raises(StorageFullError, match=r"writing chunk layers\.1 to .*: no space is left"):
        run(make(backend, Payloads(chunks)), planned(chunks))
    first = Path(blob_key(chunks[0][0].id, ".safetensors")).name  # finished before the disk was full, or not
    assert set(marks(backend.base)) <= {first}
    assert [path for path in backend.base.rglob("*") if path.suffix == ".tmp"] == []


def test_space_is_compared_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def expect(free: int) -> None:
        monkeypatch.setattr(write_module.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
        writer = make(FilesystemBackend(tmp_path), Payloads(chunks))
        with writer.locked():
            asyncio.run(writer.expect_space(Store(writer.backend), planned(chunks)))

    chunks = toys((5000, 6000, 7000))
    make_store(tmp_path, "other", (6000, 9000))
    expect(18_000)
    expect(12_000)  # 6,000 of the 18,000 bytes may be shared with the other model
    text = (
        r"/.* has no space for toy: 12\.0 kB \(12000 bytes\) are to be written, and 12\.0 kB \(11999 bytes\) are free;"
    )
    with pytest.raises(StorageFullError, match=text):
        expect(11_999)


def test_it_is_told_what_became_of_each_chunk(backend: FilesystemBackend) -> None:
    def write(key: str, count: int) -> list[str]:
        def told(name: str, outcome: str) -> None:
            outcomes[name] = outcome
            assert len(list(writer.folder.glob("*.tmp"))) <= 1, "but for the next one, no chunk lies there twice"

        outcomes: dict[str, str] = {}
        writer = make(backend, Payloads(chunks), key=key)
        writer.on_outcome = told
        run(writer, planned(chunks[:count]))
        return list(outcomes.values())

    chunks = toys()
    assert write("k", 2) == ["new"] * 2
    assert write("k", 2) == ["unchanged"] * 2, "the journal has them"
    assert write("other", 4) == ["unchanged", "unchanged", "new", "new"], "their blobs are there"
    before = marks(backend.base)
    assert write("again", 4) == ["unchanged"] * 4
    assert marks(backend.base) == before, "what is whole stays as it is"
    for at in (8, -1):  # in the header, and in the payload
        blob = backend.local_path(blob_key(chunks[1][0].id, ".safetensors"))
        data = bytearray(blob.read_bytes())
        data[at] ^= 1
        blob.write_bytes(data)
        assert write(f"mend {at}", 3) == ["unchanged", "replaced", "unchanged"]
        assert blob.read_bytes() == encode_header(chunks[1][0].tensors) + chunks[1][1]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "partial").write_text("no folder")
    with (
        pytest.raises(StorageError, match=r"preparing .*/partial/k"),
        make(FilesystemBackend(tmp_path, create=False), Payloads([])).locked(),
    ):
        raise AssertionError("locked nothing")
