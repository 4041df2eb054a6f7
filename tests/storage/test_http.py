"""A store that a web server offers: read-only, in ranges, from a real server."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from surfw.errors import NotFoundError, StorageError
from surfw.models import StreamingModel
from surfw.retry import RetryPolicy
from surfw.storage import FsspecBackend, StorageBackend, fsspec_backend, open_backend
from surfw.testing import OBJECTS, ReadOnlyStorageBackendSuite
from tests.services.http import http_server
from tests.services.processes import free_port
from tests.services.proxy import PASS, proxy_to
from tests.storage.dict_backend import DictBackend


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the server offers."""
    return tmp_path_factory.mktemp("offered")


@pytest.fixture(scope="module")
def url(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with http_server(folder, tmp_path_factory.mktemp("log") / "http.log") as running:
        yield running


class TestHttp(ReadOnlyStorageBackendSuite):
    @pytest.fixture
    def backend(self, folder: Path, url: str) -> StorageBackend:
        for key, data in OBJECTS.items():
            file = folder / "objects" / key
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(data)
        return FsspecBackend(f"{url}/objects")


class TestDict(ReadOnlyStorageBackendSuite):
    """The suite for those who only read, over a backend with the four methods, of which one refuses."""

    @pytest.fixture
    def backend(self) -> StorageBackend:
        class Frozen(DictBackend):
            async def save(self, key: str, data: object) -> None:
                raise StorageError("this dictionary is frozen")

        return Frozen(dict(OBJECTS))


def test_a_changed_file_is_an_error(folder: Path, url: str) -> None:
    (folder / "x").write_bytes(b"first")
    backend = FsspecBackend(url)
    pinned = asyncio.run(backend.revision("x"))
    (folder / "x").write_bytes(b"seconds")
    with pytest.raises(StorageError, match=rf"^x in {url} was changed: its revision is .* now, expected "):
        asyncio.run(backend.read_into("x", 0, memoryview(bytearray(3)), revision=pinned))


def test_writing_says_that_it_can_only_be_read(url: str, tmp_path: Path) -> None:
    backend = open_backend(f"{url}/objects")
    (tmp_path / "file").write_bytes(b"1")
    for work in (backend.save("new", b"1"), backend.adopt("new", tmp_path / "file")):
        with pytest.raises(StorageError, match=rf"^new cannot be written to {url}/objects: it can only be read; write"):
            asyncio.run(work)
    assert (tmp_path / "file").exists()


def test_a_server_that_cannot_be_reached_is_no_missing_object(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fsspec_backend, "RANGE_RETRIES", RetryPolicy(attempts=2, first_delay_seconds=0.01))
    backend = FsspecBackend(f"http://127.0.0.1:{free_port()}")
    for work in (backend.load("x"), backend.exists("x"), backend.size("x"), backend.revision("x")):
        with pytest.raises(
            StorageError, match=r"^x in http.*: the server cannot be reached .*; check the address"
        ) as got:
            asyncio.run(work)
        assert not isinstance(got.value, NotFoundError)


def test_an_answer_that_is_cut_off_is_asked_for_again(folder: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fsspec_backend, "RANGE_RETRIES", RetryPolicy(attempts=3, first_delay_seconds=0.01))
    (folder / "y").write_bytes(bytes(range(256)) * 4096)
    with proxy_to(url) as proxy:
        cut = iter([0, 99_999])
        proxy.judge = lambda head: next(cut, PASS)
        assert asyncio.run(FsspecBackend(proxy.endpoint).load("y")) == bytes(range(256)) * 4096
        assert len(proxy.heads) == 3


def test_a_model_is_run_from_a_web_server(folder: Path, url: str) -> None:
    import torch

    from surfw.chunking.chunker import prepare_model, write_model
    from tests.checkpoints import save_llama

    save_llama(folder / "llama")
    with prepare_model(str(folder / "llama")) as prepared:
        asyncio.run(write_model(prepared, open_backend(folder / "store")))
    ids = torch.tensor([[5, 9, 77, 3, 120]])
    answers = []
    for place in (str(folder / "store"), f"{url}/store"):
        with StreamingModel.open(place, "llama", cache_size=1) as model:
            answers.append(model(input_ids=ids).logits)
    assert torch.equal(*answers)
