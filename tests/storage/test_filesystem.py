"""Files are written completely or not at all, even on a full disk, whatever the folder is called."""

import asyncio
import errno
import os
import tempfile
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from surfw.errors import ConfigurationError, NotFoundError, StorageError, StorageFullError
from surfw.files import read_regular, user_name
from surfw.storage import FilesystemBackend, FsspecBackend, filesystem, local_reader, open_backend
from surfw.storage.filesystem import create_file, read_file_into
from surfw.storage.fsspec_backend import translate_errors
from surfw.storage.housekeeping import Housekeeping
from surfw.storage.store import Store, is_checkpoint
from surfw.storage.store_source import open_storage_source
from tests.conftest import locked
from tests.peers import whole
from tests.stores import make_store


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def backend(tmp_path: Path) -> FilesystemBackend:
    return FilesystemBackend(tmp_path / "store")


def test_the_folder_is_there_at_once(tmp_path: Path) -> None:
    assert FilesystemBackend(tmp_path / "a" / "b").base.is_dir()
    assert FilesystemBackend(str(tmp_path / "a" / "b")).base.is_dir()


def test_a_folder_that_is_only_named_is_not_made(tmp_path: Path) -> None:
    backend = open_backend(tmp_path / "a" / "b")
    assert asyncio.run(backend.list()) == []
    assert not asyncio.run(backend.exists("x"))
    assert not (tmp_path / "a").exists()
    asyncio.run(backend.save("x", b"1"))
    assert (tmp_path / "a" / "b" / "x").read_bytes() == b"1"


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    for create in (True, False):
        with pytest.raises(ConfigurationError, match=r"^/.*/file is a file, expected a folder; name another$"):
            FilesystemBackend(tmp_path / "file", create=create)
    with pytest.raises(StorageError, match=r"making the folder /.*/file/below: a part of this path is a file"):
        FilesystemBackend(tmp_path / "file" / "below")


def test_a_folder_without_rights_is_named_with_who_lacks_them(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with locked(tmp_path / "mine") as user:
        for url in (tmp_path / "mine", tmp_path / "mine" / "store"):
            store = Store(FilesystemBackend(url, create=False))
            for work in (store.create, store.check, partial(is_checkpoint, store.backend)):
                with pytest.raises(StorageError) as caught:
                    asyncio.run(work())
                assert str(caught.value) == (
                    f"surfw.json in {url}: permission denied: user {user} may not use {url}/surfw.json; give that user "
                    "the rights, or use another folder"
                )
        with pytest.raises(StorageError, match=rf"^making the folder .*: permission denied: user {user} may not use /"):
            FilesystemBackend(tmp_path / "mine" / "store")


def test_a_file_without_rights_is_not_to_be_moved_away_or_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = make_store(tmp_path, "a", [10])
    blob, file = (tmp_path / name for name in (manifest.chunks[0].forms[0].locations[0].object, "models/a.json"))
    denied = f"permission denied: user {user_name()} may not use {{}}; give that user the rights"

    async def read_chunk() -> None:
        async with await open_storage_source(FilesystemBackend(tmp_path)) as source:
            await source.fetch(manifest, [whole(manifest.chunks[0])[0]])

    with monkeypatch.context() as patch:
        patch.setattr(local_reader, "open_regular", Mock(side_effect=PermissionError(13, "no", str(blob))))
        with pytest.raises(StorageError, match=r"^chunk .* cannot be read: ") as caught:
            asyncio.run(read_chunk())
        assert str(caught.value).endswith(denied.format(blob))

    async def read_file() -> None:
        async with await open_storage_source(FilesystemBackend(tmp_path)) as source:
            await source.file(manifest, "vocab.txt")

    (tmp_path / manifest.file("vocab.txt").object).unlink()
    with pytest.raises(NotFoundError, match=r"^vocab.txt of a in .* cannot be read: .* not found; put its file back, "):
        asyncio.run(read_file())

    def read(path: Path, most_bytes: int) -> bytes:
        if path == file:
            raise PermissionError(13, "no", str(path))
        return read_regular(path, most_bytes)

    monkeypatch.setattr(filesystem, "read_regular", read)
    with pytest.raises(StorageError) as caught:
        asyncio.run(Store(FilesystemBackend(tmp_path)).manifest("a"))
    told = f"the manifest of model a cannot be read: models/a.json in {tmp_path}: {denied.format(file)}"
    assert str(caught.value) == told
    with pytest.raises(StorageError) as caught:
        asyncio.run(Housekeeping(tmp_path).prune())
    assert str(caught.value).endswith(f"{told}; nothing is removed")


def test_objects_are_files_below_the_folder(backend: FilesystemBackend) -> None:
    asyncio.run(backend.save("models/org/x.json", b"{}"))
    assert backend.local_path("models/org/x.json").read_bytes() == b"{}"
    assert files(backend.base) == {"models/org/x.json": b"{}"}


@pytest.mark.parametrize("name", ["a b", "a::b", "a#b", "a?b=c", "a%20b", "[x]*", "ü", "a\\b", "~x", "a,b{c}", "x:"])
def test_a_folder_may_have_any_name(tmp_path: Path, name: str) -> None:
    backend = FilesystemBackend(tmp_path / name)
    asyncio.run(backend.save("models/x.json", b"1"))
    assert (tmp_path / name / "models" / "x.json").read_bytes() == b"1"
    assert asyncio.run(backend.load("models/x.json")) == b"1"
    assert asyncio.run(backend.list("models/")) == ["models/x.json"]
    assert asyncio.run(backend.size("models/x.json")) == 1


def test_a_reader_sees_the_old_object_until_the_new_one_is_whole(
    backend: FilesystemBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    asyncio.run(backend.save("x", b"old"))
    seen: list[bytes] = []
    sync = os.fsync

    def look_and_sync(fd: int) -> None:
        seen.append(backend.local_path("x").read_bytes())
        sync(fd)

    monkeypatch.setattr(os, "fsync", look_and_sync)
    asyncio.run(backend.save("x", b"new"))
    assert seen == [b"old", b"new"]  # when the bytes become durable, and when the name does
    assert asyncio.run(backend.load("x")) == b"new"


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failing_write_leaves_no_half_file(
    backend: FilesystemBackend, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    asyncio.run(backend.save("x", b"old"))
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(StorageError, match=f"writing x to {backend.url}: Input/output error"):
        asyncio.run(backend.save("x", b"new"))
    assert files(backend.base) == {"x": b"old"}


def test_a_full_disk(small_disk: Path) -> None:
    backend = FilesystemBackend(small_disk / "store")
    asyncio.run(backend.save("small", b"fits"))
    with pytest.raises(StorageFullError, match=f"writing large to {backend.url}: no space is left; free some and run"):
        asyncio.run(backend.save("large", bytes(4 << 20)))
    assert files(backend.base) == {"small": b"fits"}
    asyncio.run(backend.save("large", bytes(1 << 18)))
    assert asyncio.run(backend.size("large")) == 1 << 18


def test_adopting_is_a_rename(backend: FilesystemBackend) -> None:
    spooled = backend.spool() / "1.tmp"
    spooled.parent.mkdir(parents=True)
    spooled.write_bytes(b"finished")
    inode = spooled.stat().st_ino
    asyncio.run(backend.adopt("blobs/ab/x", spooled))
    assert backend.local_path("blobs/ab/x").stat().st_ino == inode


def test_a_spooled_file_that_vanished_is_an_error(backend: FilesystemBackend) -> None:
    with pytest.raises(StorageError, match=r"1\.tmp vanished before it could be moved to .*/store/x"):
        asyncio.run(backend.adopt("x", backend.spool() / "1.tmp"))
    assert files(backend.base) == {}


def test_a_folder_may_be_removed_by_others_while_a_file_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []
    mkdir = Path.mkdir

    def race(path: Path, *args: Any, **kwargs: Any) -> None:
        mkdir(path, *args, **kwargs)
        made.append(path)
        if len(made) < 3:
            path.rmdir()

    monkeypatch.setattr(Path, "mkdir", race)
    os.close(create_file(tmp_path / "partial" / "x"))
    assert made == [tmp_path / "partial"] * 3
    assert (tmp_path / "partial" / "x").read_bytes() == b""


def test_a_folder_that_never_stays_ends_in_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: None)
    with pytest.raises(StorageError, match="no folder can be made there, or something removes it again and again"):
        create_file(tmp_path / "partial" / "x")


def test_a_folder_that_cannot_be_written_is_told_before_anything_is() -> None:
    with tempfile.TemporaryDirectory() as made:  # others may read it once it is open, unlike pytest's folders
        top = Path(made)
        top.chmod(0o755)
        backend = FilesystemBackend(top / "closed" / "store", create=False)
        backend.check_rights()
        (top / "closed").mkdir(mode=0o555)
        user = os.geteuid()
        if user == 0:  # anyone may write there
            os.seteuid(65534)
        try:
            with pytest.raises(StorageError, match=r"/closed cannot be written: user .* lacks the rights; give"):
                backend.check_rights()
        finally:
            os.seteuid(user)


def test_a_file_that_ends_early_is_named(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"12345")
    memory = bytearray(4)
    read_file_into(tmp_path / "x", 1, memoryview(memory))
    assert memory == b"2345"
    with pytest.raises(StorageError, match=f"{tmp_path}/x ends at byte 5, expected 7 bytes"):
        read_file_into(tmp_path / "x", 3, memoryview(memory))


def test_many_readers_and_writers_of_one_key_see_whole_objects(backend: FilesystemBackend) -> None:
    objects = [bytes([number]) * 100_000 for number in range(4)]
    asyncio.run(backend.save("x", objects[0]))
    seen: list[bytes] = []
    start = threading.Barrier(5)

    def write(data: bytes) -> None:
        start.wait()
        for _ in range(5):
            asyncio.run(backend.save("x", data))

    def read() -> None:
        start.wait()
        seen.extend(asyncio.run(backend.load("x")) for _ in range(20))

    threads = [*(threading.Thread(target=write, args=(data,)) for data in objects), threading.Thread(target=read)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 20
    assert set(seen) <= set(objects)
    assert list(files(backend.base)) == ["x"]


def test_listing_a_place_that_is_a_file_by_now(tmp_path: Path) -> None:
    backend = FilesystemBackend(tmp_path / "file", create=False)
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(StorageError, match=r"listing .*/file: a part of this path is a file"):
        asyncio.run(backend.list())


def test_a_foreign_key_is_found_without_walking_everything(
    backend: FilesystemBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    walked: list[str] = []

    def walk(top: Path, **_: Any) -> Iterator[tuple[str, list[str], list[str]]]:
        for number in range(1000):
            walked.append(f"{top}/{number}")
            yield walked[-1], [], ["thesis.doc"]

    monkeypatch.setattr(filesystem.os, "walk", walk)
    assert asyncio.run(backend.find_foreign_key("partial/")) == "0/thesis.doc"
    assert len(walked) == 1


@pytest.mark.parametrize(
    ("foreign", "ours", "text"),
    [
        (FileNotFoundError(2, "No such file"), NotFoundError, "loading x: not found"),
        (PermissionError(13, "Permission denied"), StorageError, "loading x: permission denied"),
        (OSError(errno.ENOSPC, "full"), StorageFullError, "loading x: no space is left"),
        (OSError(errno.EDQUOT, "quota"), StorageFullError, "loading x: no space is left"),
        (TimeoutError("too slow"), StorageError, "loading x: too slow"),
        (OSError(), StorageError, "loading x: OSError"),
        (ImportError("install gcsfs"), ConfigurationError, "loading x: install gcsfs"),
    ],
)
def test_foreign_errors_are_translated_once(foreign: Exception, ours: type[Exception], text: str) -> None:
    with pytest.raises(ours) as caught, translate_errors("loading x"):
        raise foreign
    assert type(caught.value) is ours
    assert str(caught.value).startswith(text)
    assert caught.value.__cause__ is foreign


def test_what_a_library_behind_a_file_system_raises_becomes_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoCredentialsError(Exception):
        """Like botocore's, which is no OSError."""

    def fail(*_: Any, **__: Any) -> None:
        raise NoCredentialsError("Unable to locate credentials")

    backend = FsspecBackend("memory://x")
    for name in ("cat_file", "find"):
        monkeypatch.setattr(backend.fs, name, fail, raising=False)
    for work in (backend.load("x"), backend.load_range("x", 0, 1), backend.list()):
        with pytest.raises(StorageError, match="memory://x: NoCredentialsError: Unable to locate credentials"):
            asyncio.run(work)


def test_a_file_tells_its_revision(tmp_path: Path) -> None:
    backend = FilesystemBackend(tmp_path)
    asyncio.run(backend.save("a", b"1"))
    assert asyncio.run(backend.revision("a")) is not None
