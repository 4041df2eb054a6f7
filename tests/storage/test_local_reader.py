"""Local files are read into memory: the right bytes by every method, and no writes after a read has ended."""

import asyncio
import gc
import mmap
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from surfw.config import KIB, MIB
from surfw.errors import IntegrityError, NotFoundError, StorageError
from surfw.manifest import Manifest
from surfw.source import View
from surfw.storage import FilesystemBackend, local_reader
from surfw.storage.base import ChangedObjectError
from surfw.storage.filesystem import file_revision
from surfw.storage.local_reader import PIECE_BYTES, FileRange, LocalReader, MappedFile, _Bounces, _File
from surfw.storage.store_source import StorageSource
from tests.storage.dict_backend import DictBackend
from tests.stores import make_store, payload

PAGE = mmap.PAGESIZE
SMALL = 256 * KIB
SIZE = 3 * PIECE_BYTES + 5 * PAGE + 77
DIRECT = getattr(os, "O_DIRECT", 0)
FILL = 0xA5


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    """Every thread of surfw has ended after a test."""
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("surfw-")] == []


@pytest.fixture(scope="module")
def data() -> bytes:
    return os.urandom(SIZE)


@pytest.fixture(scope="module")
def file(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with these bytes: more than three pieces, with an end in the middle of a page."""
    path = tmp_path_factory.mktemp("reader") / "file"
    path.write_bytes(data)
    return path


@pytest.fixture
def reader() -> Iterator[LocalReader]:
    """A reader that is closed afterwards."""
    made = LocalReader()
    yield made
    made.close()


def memory(size: int, *, skip: int = 0) -> memoryview:
    """This much memory, starting `skip` bytes after a page boundary, filled with a byte that no test expects."""
    view = memoryview(mmap.mmap(-1, skip + size))[skip:]
    view[:] = bytes([FILL]) * size
    return view


def accept(at: int, piece: memoryview) -> None:
    """Accept any bytes."""


async def read_all(
    reader: LocalReader, path: Path, start: int, stop: int, *, skip: int = 0, urgent: bool = True
) -> memoryview:
    into = memory(stop - start, skip=skip)
    await reader.read([FileRange(path, start, stop)], into, accept, urgent=urgent)
    return into


def expect_verified(reader: LocalReader, ranges: list[FileRange], want: bytes, *, skip: int = 0, urgent: bool) -> None:
    """Read the ranges; check that they equal these bytes, and that every piece is verified once."""
    into, seen = memory(len(want), skip=skip) if want else memoryview(bytearray()), dict[int, bytes]()

    def check(at: int, piece: memoryview) -> None:
        assert at not in seen
        seen[at] = bytes(piece)

    asyncio.run(reader.read(ranges, into, check, urgent=urgent))
    assert bytes(into) == want
    assert sorted(seen) == list(range(0, len(want), PIECE_BYTES))
    assert b"".join(seen[at] for at in sorted(seen)) == want


def near(*places: int) -> st.SearchStrategy[int]:
    """An offset, or one close to it."""
    return st.builds(lambda place, by: max(0, place + by), st.sampled_from(places), st.integers(-2, 2))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    start=near(0, 1, PAGE, 7 * PAGE, PIECE_BYTES),
    size=near(0, 1, PAGE, SMALL, SMALL + PAGE, PIECE_BYTES, PIECE_BYTES + SMALL, 2 * PIECE_BYTES),
    skip=st.sampled_from([0, 0, 1, 64]),
    urgent=st.booleans(),
)
@example(start=0, size=SIZE, skip=0, urgent=False)
@example(start=PAGE, size=SIZE - PAGE, skip=0, urgent=True)
@example(start=3 * PIECE_BYTES, size=5 * PAGE + 77, skip=0, urgent=True)
def test_any_range_has_its_bytes_and_every_piece_is_verified_once(
    start: int, size: int, skip: int, urgent: bool, file: Path, data: bytes, reader: LocalReader
) -> None:
    size = min(size, SIZE - start)
    expect_verified(
        reader, [FileRange(file, start, start + size)], data[start : start + size], skip=skip, urgent=urgent
    )


@pytest.mark.skipif(not DIRECT, reason="this system has no O_DIRECT")
@pytest.mark.parametrize(
    ("start", "size", "skip", "flags"),
    [
        (0, SMALL, 0, {DIRECT}),
        (PAGE, SMALL + 1, 0, {DIRECT, 0}),
        (0, SMALL - 1, 0, {0}),
        (1, SMALL, 0, {DIRECT}),
        (SIZE - SMALL - 76, SMALL + 76, 0, {DIRECT}),
        (3 * PIECE_BYTES, 5 * PAGE + 77, 0, {0}),
        (2 * PIECE_BYTES + PAGE, SIZE - 2 * PIECE_BYTES - PAGE, 0, {DIRECT, 0}),
        (0, SMALL, 1, {DIRECT, 0}),
    ],
)
def test_large_reads_are_direct_and_what_remains_is_not(
    start: int, size: int, skip: int, flags: set[int], file: Path, data: bytes
) -> None:
    """The last case reads into memory that is not aligned to a page, which the file system refuses."""
    opened, into = _File(file, None, _Bounces()), memory(size, skip=skip)
    opened.read_into(start, into, in_place=True)
    used = set(opened._descriptors)
    opened.close()
    assert bytes(into) == data[start : start + size]
    assert used == flags


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    places=st.lists(
        st.tuples(near(0, 8, PAGE, PIECE_BYTES), near(0, 8, SMALL, PAGE, PIECE_BYTES, PIECE_BYTES + SMALL)),
        min_size=1,
        max_size=5,
    ),
    urgent=st.booleans(),
)
def test_ranges_from_anywhere_lie_one_behind_the_other(
    places: list[tuple[int, int]], urgent: bool, file: Path, data: bytes, reader: LocalReader
) -> None:
    """Like the tensors of a chunk in the shards of a checkpoint."""
    ranges = [FileRange(file, start, min(start + size, SIZE)) for start, size in places]
    want = b"".join(data[one.start : one.stop] for one in ranges)
    expect_verified(reader, ranges, want, urgent=urgent)


def test_a_pinned_file_that_changes_while_it_is_read_is_an_error(file: Path, reader: LocalReader) -> None:
    revision = file_revision(file.stat())
    pinned = FileRange(file, 8, SIZE, revision)

    def change(at: int, piece: memoryview) -> None:
        os.utime(file, ns=(at, at))

    asyncio.run(reader.read([pinned], memory(SIZE - 8), accept, urgent=True))
    with pytest.raises(ChangedObjectError, match="was changed: its revision is"):
        asyncio.run(reader.read([pinned], memory(SIZE - 8), change, urgent=True))


def test_where_direct_reads_are_refused_they_are_not_tried_again(file: Path, data: bytes) -> None:
    opened = _File(file, None, _Bounces())
    opened.read_into(0, memory(SMALL, skip=1), in_place=True)
    refused = not opened._direct
    into = memory(SMALL)
    opened.read_into(SMALL, into, in_place=True)
    opened.close()
    assert refused or not DIRECT
    assert bytes(into) == data[SMALL : 2 * SMALL]


def test_a_file_system_in_memory_is_read_too(data: bytes, reader: LocalReader) -> None:
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("there is no /dev/shm to write to")
    path = Path("/dev/shm") / f"surfw-test-{os.getpid()}"
    try:
        path.write_bytes(data)
        for skip in (0, 1):
            assert bytes(asyncio.run(read_all(reader, path, PAGE, SIZE, skip=skip))) == data[PAGE:]
    finally:
        path.unlink(missing_ok=True)


@pytest.mark.parametrize("size", [100, SMALL + 77, PIECE_BYTES, PIECE_BYTES + PAGE])
def test_a_file_that_ends_early_is_one_error(size: int, file: Path, reader: LocalReader, tmp_path: Path) -> None:
    short = tmp_path / "short"
    short.write_bytes(file.read_bytes()[:size])
    stop = 2 * PIECE_BYTES
    with pytest.raises(StorageError) as caught:
        asyncio.run(read_all(reader, short, 0, stop))
    expected = PIECE_BYTES if size < PIECE_BYTES else stop  # of the first missing piece
    assert str(caught.value) == f"{short} ends at byte {size}, expected {expected} bytes"


def test_a_file_that_is_missing(reader: LocalReader, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=rf"reading {tmp_path}/nothing: not found"):
        asyncio.run(read_all(reader, tmp_path / "nothing", 0, SIZE))
    with pytest.raises(StorageError, match=rf"reading {tmp_path}: "):
        asyncio.run(read_all(reader, tmp_path, 0, 100))


@pytest.mark.parametrize("urgent", [False, True])
@pytest.mark.parametrize("bad", [0, 1, 3])
def test_a_piece_that_is_not_right_fails_the_read_and_nothing_is_written_afterwards(
    bad: int, urgent: bool, file: Path, data: bytes, reader: LocalReader
) -> None:
    def check(at: int, piece: memoryview) -> None:
        assert bytes(piece) == data[at : at + PIECE_BYTES]
        if at == bad * PIECE_BYTES:
            raise IntegrityError(f"piece {bad} is damaged")

    into = memory(SIZE)

    async def main() -> None:
        with pytest.raises(IntegrityError, match=f"piece {bad} is damaged"):
            await reader.read([FileRange(file, 0, SIZE)], into, check, urgent=urgent)
        into[:] = bytes(SIZE)
        await read_all(reader, file, 0, SIZE, urgent=urgent)  # after anything that may still be queued

    asyncio.run(main())
    assert bytes(into) == bytes(SIZE)


class Held:
    """Reads of one file wait until the test releases them."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.began: list[int] = []
        self.ended: list[int] = []
        self._path, self._arrived, self._go_on = path, threading.Semaphore(0), threading.Event()
        self._real = _File.read_into

        def read_into(opened: _File, start: int, destination: memoryview, *, in_place: bool) -> None:
            self._read(opened, start, destination)

        monkeypatch.setattr(local_reader._File, "read_into", read_into)

    def _read(self, opened: _File, start: int, destination: memoryview) -> None:
        if opened._path == self._path:
            self.began.append(start)
            self._arrived.release()
            assert self._go_on.wait(60)
        self._real(opened, start, destination, in_place=True)
        if opened._path == self._path:
            self.ended.append(start)

    async def arrived(self, count: int = 1) -> None:
        """Wait until this many more reads have begun."""
        for _ in range(count):
            assert await asyncio.to_thread(self._arrived.acquire, timeout=60)

    def go_on(self) -> None:
        """Release all reads."""
        self._go_on.set()


@pytest.fixture
def held(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Held:
    """Reads of a second name of the file wait."""
    os.link(file, tmp_path / "held")
    return Held(tmp_path / "held", monkeypatch)


def test_a_read_that_somebody_waits_for_overtakes_those_made_ahead(
    held: Held, file: Path, data: bytes, reader: LocalReader
) -> None:
    async def main() -> None:
        ahead = asyncio.create_task(read_all(reader, held._path, 0, SIZE, urgent=False))
        await held.arrived(2)  # both readers are busy
        assert bytes(await read_all(reader, file, PAGE, SIZE)) == data[PAGE:]
        assert not ahead.done()
        assert held.ended == []
        held.go_on()
        assert bytes(await ahead) == data

    asyncio.run(main())
    assert sorted(held.ended) == list(range(0, SIZE, PIECE_BYTES))


def test_verification_that_is_cancelled_ends_with_the_piece_that_is_at_work(reader: LocalReader) -> None:
    begun, go_on, pieces = threading.Event(), threading.Event(), []

    def check(at: int, _: memoryview) -> None:
        pieces.append(at)
        begun.set()
        assert go_on.wait(60)

    async def main() -> None:
        checking = asyncio.create_task(reader.check(memory(4 * PIECE_BYTES), check))
        await asyncio.to_thread(begun.wait, 60)
        checking.cancel()
        await asyncio.sleep(0)
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await checking

    asyncio.run(main())
    assert pieces == [0]


@pytest.mark.parametrize(("urgent", "readers"), [(False, 2), (True, 1)])
def test_a_cancelled_read_ends_when_nothing_is_written_any_more_and_begins_no_other_piece(
    urgent: bool, readers: int, held: Held, data: bytes, reader: LocalReader
) -> None:
    into = memory(SIZE)

    async def main() -> None:
        read = reader.read([FileRange(held._path, 0, SIZE)], into, accept, urgent=urgent)
        work = asyncio.create_task(read)
        await held.arrived(readers)
        for _ in range(2):  # as often as it is called
            work.cancel()
            done, _ = await asyncio.wait([work], timeout=0)
            assert not done
        held.go_on()
        with pytest.raises(asyncio.CancelledError):
            await work
        assert sorted(held.ended) == sorted(held.began) == [index * PIECE_BYTES for index in range(readers)]

    asyncio.run(main())
    written = readers * PIECE_BYTES
    assert bytes(into[:written]) == data[:written]
    assert bytes(into[written:]) == bytes([FILL]) * (SIZE - written)


def begin_to_close(reader: LocalReader) -> threading.Thread:
    """Close it in a thread; this waits for the reads in progress, and no other read starts any more."""
    closing = threading.Thread(target=reader.close)
    closing.start()
    while not reader._urgent._shutdown:
        pass
    return closing


def test_a_reader_that_is_closed_while_it_reads_says_so(held: Held, reader: LocalReader) -> None:
    into = memory(SIZE)

    async def main() -> None:
        work = asyncio.create_task(reader.read([FileRange(held._path, 0, SIZE)], into, accept, urgent=True))
        await held.arrived()
        closing = begin_to_close(reader)
        held.go_on()
        with pytest.raises(StorageError, match="the storage was closed while it was read"):
            await work
        assert held.ended == [0]
        closing.join()

    asyncio.run(main())
    assert bytes(into[PIECE_BYTES:]) == bytes([FILL]) * (SIZE - PIECE_BYTES)


@pytest.mark.parametrize("urgent", [False, True])
def test_a_reader_that_is_closed_reads_no_more(urgent: bool, file: Path, reader: LocalReader) -> None:
    asyncio.run(read_all(reader, file, 0, SIZE, urgent=urgent))
    reader.close()
    reader.close()
    for use in (
        lambda: read_all(reader, file, 0, SIZE, urgent=urgent),
        lambda: reader.check(memory(100), accept),
    ):
        with pytest.raises(StorageError, match="the storage was closed while it was read"):
            asyncio.run(use())


def test_a_reader_that_is_closed_between_two_pieces_leaves_nothing_that_writes(
    held: Held, reader: LocalReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second piece is refused during the read of the first one, and the call fails only after that read."""
    submit, closing = reader._urgent.submit, list[threading.Thread]()

    def close_before_the_second(*args: Any) -> Any:
        if held.began:
            closing.append(begin_to_close(reader))
        made = submit(*args)  # raises the second time
        assert held._arrived.acquire(timeout=60)
        return made

    monkeypatch.setattr(reader._urgent, "submit", close_before_the_second)

    async def main() -> None:
        work = asyncio.create_task(read_all(reader, held._path, 0, SIZE))
        await asyncio.wait([work], timeout=0)
        assert not work.done()
        held.go_on()
        with pytest.raises(StorageError, match="the storage was closed while it was read"):
            await work
        assert held.ended == [0]

    asyncio.run(main())
    closing[0].join()


@pytest.mark.parametrize("start", [0, PAGE, 2 * MIB, 2 * MIB + 3 * PAGE, 8 * MIB - PAGE])
def test_a_mapping_has_the_bytes_and_its_changes_stay_its_own(start: int, file: Path, data: bytes) -> None:
    one, other = (MappedFile(FileRange(file, start, SIZE)).memory for _ in range(2))
    assert bytes(one) == bytes(other) == data[start:]
    one[0] ^= 0xFF
    one[-1] ^= 0xFF
    assert bytes(one) != data[start:]
    assert bytes(other) == data[start:]
    assert file.read_bytes() == data


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux says what a mapping shares")
def test_a_mapping_is_no_copy(file: Path, data: bytes) -> None:
    file.read_bytes()  # so that its pages can be shared
    view = MappedFile(FileRange(file, PAGE, SIZE)).memory
    assert bytes(view) == data[PAGE:]
    lines = Path("/proc/self/smaps").read_text().splitlines()
    (at,) = (index for index, line in enumerate(lines) if line.endswith(str(file)))
    mapping = dict(line.split()[:2] for line in lines[at + 1 : at + 24] if line.split()[1:2])
    assert int(mapping["Anonymous:"]) == 0
    assert int(mapping["Rss:"]) * KIB >= SIZE - PAGE
    view[0] ^= 1


def test_a_file_too_short_to_be_mapped(file: Path, tmp_path: Path) -> None:
    with pytest.raises(StorageError) as caught:
        MappedFile(FileRange(file, PAGE, SIZE + 1))
    assert str(caught.value) == f"{file} ends at byte {SIZE}, expected {SIZE + 1} bytes"
    with pytest.raises(NotFoundError, match=rf"mapping {tmp_path}/nothing: not found"):
        MappedFile(FileRange(tmp_path / "nothing", 0, 1))


STORED = 9 * MIB + 77


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return make_store(tmp_path / "store", sizes=(STORED, 100))


def flip(file: Path, at: int) -> None:
    """Flip a bit of a file, or flip it back."""
    with file.open("r+b") as opened:
        opened.seek(at)
        old = opened.read(1)[0]
        opened.seek(at)
        opened.write(bytes([old ^ 1]))


def view_of(source: StorageSource, manifest: Manifest, index: int = 0) -> View | None:
    chunk = manifest.chunks[index]

    async def main() -> View | None:
        try:
            return await source.view(manifest, chunk, chunk.forms[0])
        finally:
            await source.close()

    return asyncio.run(main())


def test_a_view_of_a_store_is_verified(manifest: Manifest, tmp_path: Path) -> None:
    source = StorageSource(FilesystemBackend(tmp_path / "store"))
    view = view_of(source, manifest)
    assert view is not None
    assert bytes(view.memory) == payload(tmp_path / "store", manifest.chunks[0])
    assert source.fetched_bytes == STORED


@pytest.mark.parametrize("block", [0, 7, 8, 9])
def test_a_view_of_what_is_damaged_is_refused(block: int, manifest: Manifest, tmp_path: Path) -> None:
    at = manifest.chunks[0].forms[0].locations[0]
    flip(tmp_path / "store" / at.object, at.start + block * MIB)
    source = StorageSource(FilesystemBackend(tmp_path / "store"))
    with pytest.raises(IntegrityError, match=rf"is damaged: block {block} has BLAKE3"):
        view_of(source, manifest)
    assert source.fetched_bytes == 0


def test_there_is_no_view_where_there_is_no_file_or_where_it_begins_between_pages(
    manifest: Manifest, tmp_path: Path
) -> None:
    assert view_of(StorageSource(DictBackend()), manifest) is None
    chunk = manifest.chunks[0]
    at = chunk.forms[0].locations[0]
    moved = replace(chunk.forms[0], locations=(replace(at, start=at.start + 64),))
    halves = (replace(at, stop=at.start + 5 * MIB), replace(at, start=at.start + 5 * MIB))
    split = replace(chunk.forms[0], locations=halves)
    source = StorageSource(FilesystemBackend(tmp_path / "store"))
    try:
        assert asyncio.run(source.view(manifest, chunk, split)) is None
        assert asyncio.run(source.view(manifest, chunk, replace(moved, stored_bytes=STORED - 64))) is None
    finally:
        asyncio.run(source.close())


def changing(manifest: Manifest, tmp_path: Path) -> tuple[StorageSource, View, Path]:
    """A view that is in use, and its file."""
    source = StorageSource(FilesystemBackend(tmp_path / "store"))
    view = view_of(source, manifest)
    assert view is not None
    view.expect_unchanged()
    return source, view, tmp_path / "store" / manifest.chunks[0].forms[0].locations[0].object


@pytest.mark.parametrize("hides", [False, True])
def test_a_file_that_is_changed_while_it_is_in_use_is_an_error(hides: bool, manifest: Manifest, tmp_path: Path) -> None:
    source, view, file = changing(manifest, tmp_path)
    before = file.stat()
    flip(file, 5 * MIB)
    if hides:
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    for _ in range(2):
        with pytest.raises(IntegrityError, match=rf"^chunk layers\.0 was changed in {source.url} while it was in use"):
            view.expect_unchanged()
    flip(file, 5 * MIB)
    view.expect_unchanged()


def test_a_file_that_is_cut_off_while_it_is_in_use_is_an_error(manifest: Manifest, tmp_path: Path) -> None:
    _, view, file = changing(manifest, tmp_path)
    size = file.stat().st_size
    os.truncate(file, size - 1)
    with pytest.raises(StorageError, match=rf"^{file} was cut off while it was in use: it has {size - 1} bytes, expe"):
        view.expect_unchanged()


def test_what_does_not_change_the_bytes_in_use_is_none(manifest: Manifest, tmp_path: Path) -> None:
    """If the file is touched, replaced or removed, the mapped bytes stay the same."""
    _, view, file = changing(manifest, tmp_path)
    seen = bytes(view.memory)
    file.touch()
    view.expect_unchanged()
    (tmp_path / "other").write_bytes(b"something else")
    (tmp_path / "other").replace(file)
    view.expect_unchanged()
    file.unlink()
    view.expect_unchanged()
    assert bytes(view.memory) == seen


def test_a_mapping_closes_its_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(PAGE))
    mapped = MappedFile(FileRange(tmp_path / "file", 0, PAGE))
    descriptor = mapped._fd
    assert os.fstat(descriptor).st_size == PAGE
    del mapped
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_a_mapping_keeps_one_descriptor_and_its_pages_outlive_it(tmp_path: Path) -> None:
    data = bytes(range(256)) * (PAGE // 256)
    (tmp_path / "file").write_bytes(data)
    before = len(list(Path("/proc/self/fd").iterdir()))
    mapped = [MappedFile(FileRange(tmp_path / "file", 0, PAGE)) for _ in range(50)]
    assert len(list(Path("/proc/self/fd").iterdir())) == before + 50
    pages = mapped[7].memory[5:]
    mapped.clear()
    gc.collect()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert pages == data[5:]
    here = str(tmp_path / "file")
    assert Path("/proc/self/maps").read_text().count(here) == 1
    del pages
    gc.collect()
    assert here not in Path("/proc/self/maps").read_text()
