"""All backends, and one with just the four methods, pass the same suite."""

import asyncio
import uuid
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surfw.errors import ConfigurationError, NotFoundError, StorageError
from surfw.storage import FilesystemBackend, FsspecBackend, S3Backend, StorageBackend, adapt_backend, open_backend
from surfw.storage.base import check_key
from surfw.testing import StorageBackendSuite
from tests.storage.dict_backend import DictBackend, RemovingBackend
from tests.storage.own_suite import OwnBackendSuite


class TestDict(StorageBackendSuite):
    @pytest.fixture
    def backend(self) -> StorageBackend:
        return DictBackend()


class TestDictThatRemoves(StorageBackendSuite):
    @pytest.fixture
    def backend(self) -> StorageBackend:
        return RemovingBackend()


class TestAdaptedDict(OwnBackendSuite):
    @pytest.fixture
    def backend(self) -> StorageBackend:
        return adapt_backend(DictBackend())


class TestFilesystem(OwnBackendSuite):
    @pytest.fixture
    def backend(self, tmp_path: Path) -> StorageBackend:
        return FilesystemBackend(tmp_path / "store")


class TestMemory(OwnBackendSuite):
    @pytest.fixture
    def backend(self) -> StorageBackend:
        return FsspecBackend(f"memory://{uuid.uuid4().hex}")


class TestLocalThroughFsspec(OwnBackendSuite):
    @pytest.fixture
    def backend(self, tmp_path: Path) -> StorageBackend:
        return FsspecBackend(f"file://{tmp_path}/store", auto_mkdir=True)

    test_a_reader_sees_whole_objects_only = None  # fsspec writes local files in place


@pytest.mark.parametrize("key", ["a", "surfw.json", "models/org/x-1.json", "blobs/ab/" + "f" * 64, "_x", "a" * 512])
def test_keys_of_plain_parts(key: str) -> None:
    assert check_key(key) == key


@pytest.mark.parametrize("key", ["a" * 513, "a b", "é", "a\n", "-a", "a/.b", "a/./b", "a:b", "~/x", "s3://x"])
def test_other_keys_are_refused(key: str) -> None:
    with pytest.raises(StorageError, match="expected a relative path of plain parts, such as blobs/ab/abcd"):
        check_key(key)


@given(st.text("ab./\\~\0-_ ", max_size=12))
def test_a_key_that_passes_lies_below_the_folder(key: str) -> None:
    try:
        check_key(key)
    except StorageError:
        return
    base = Path("/some/base")
    assert FilesystemBackend(base, create=False).local_path(key).resolve().is_relative_to(base)
    assert FilesystemBackend(base, create=False).local_path(key) != base


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("relative/store", FilesystemBackend),
        ("file:///tmp/store", FilesystemBackend),
        ("memory://x", FsspecBackend),
        ("s3://bucket/prefix", S3Backend),
    ],
)
def test_the_scheme_chooses_the_backend(url: str, kind: type[StorageBackend]) -> None:
    assert type(open_backend(url)) is kind


def test_paths_are_absolute_from_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert open_backend("store").url == str(tmp_path / "store")
    assert open_backend("~/store").url == str(tmp_path / "home" / "store")
    assert open_backend(Path("a/b")).local_path("c") == tmp_path / "a" / "b" / "c"


def test_an_unknown_scheme_is_a_wrong_setting() -> None:
    with pytest.raises(ConfigurationError, match="storage nope://x cannot be opened: Protocol not known: nope"):
        open_backend("nope://x")


def test_each_storage_has_a_spool_of_its_own() -> None:
    folders = {FsspecBackend(f"memory://{name}").spool() for name in "abc"}
    assert len(folders) == 3


def test_a_backend_shows_no_credentials() -> None:
    backend = FsspecBackend("memory://me:secret@place/store")
    assert backend.url == "memory://***@place/store"
    assert "secret" in backend.root, "it still goes where it was told to"
    assert backend.spool() != FsspecBackend("memory://you:secret@place/store").spool()
    with pytest.raises(NotFoundError) as caught:
        asyncio.run(backend.load("a"))
    assert "secret" not in str(caught.value)
    with pytest.raises(ConfigurationError, match=r"^storage nowhere://\*\*\*@place cannot be opened") as refused:
        open_backend("nowhere://me:secret@place")
    assert "secret" not in str(refused.value)
