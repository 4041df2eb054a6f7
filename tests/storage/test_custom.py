"""Custom backends: every key, exception and type is checked."""

import asyncio
import errno
import functools
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch

from surfw.chunking import prepare_model, write_model
from surfw.errors import ConfigurationError, NotFoundError, StorageError, StorageFullError
from surfw.models import StreamingModel
from surfw.storage import FilesystemBackend, FsspecBackend, StorageBackend, Store, adapt_backend, custom
from surfw.storage.store_source import StorageSource, open_storage_source
from tests.checkpoints import save_llama
from tests.storage.conftest import DATA, KEY
from tests.storage.dict_backend import DictBackend


def test_own_backends_and_adapted_ones_pass_as_they_are(tmp_path: Path, adapted: StorageBackend) -> None:
    class Watched(FilesystemBackend):
        """A subclass of one of surfw's backends."""

    for backend in (FilesystemBackend(tmp_path), Watched(tmp_path), FsspecBackend("memory://x"), adapted):
        assert adapt_backend(backend) is backend


def test_a_store_and_what_reads_it_adapt_the_backend(plain: DictBackend) -> None:
    for backend in (Store(plain).backend, StorageSource(plain).store.backend):
        assert isinstance(backend, custom.AdaptedBackend)
        assert backend.inner is plain
        assert backend.url == "a dictionary"


@pytest.mark.parametrize(
    ("given", "seen"), [(DictBackend, "the class DictBackend"), ({}, "dict object"), ("s3://x", "str object")]
)
def test_what_is_no_backend_is_refused(given: Any, seen: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{seen} is no storage backend; give an instance of a subclass"):
        adapt_backend(given)


class RangedBackend(DictBackend):
    """A backend with its own range reads, which it records."""

    def __init__(self, method: str) -> None:
        super().__init__({KEY: DATA})
        self.asked: list[Any] = []

    async def size(self, key: str) -> int:
        return len(self.objects[key])


class WithLoadRange(RangedBackend):
    async def load_range(self, key: str, start: int, stop: int) -> bytes:
        self.asked.append((start, stop))
        return self.objects[key][start:stop]


class WithReadInto(RangedBackend):
    async def read_into(self, key: str, start: int, destination: memoryview) -> None:
        self.asked.append((start, start + len(destination)))
        destination[:] = self.objects[key][start : start + len(destination)]


@pytest.mark.parametrize("kind", [WithLoadRange, WithReadInto])
def test_a_backends_own_way_for_ranges_is_taken(kind: type[RangedBackend]) -> None:
    plain = kind("")
    backend = adapt_backend(plain)
    memory = bytearray(3)
    asyncio.run(backend.read_into(KEY, 7, memoryview(memory)))
    assert (memory, asyncio.run(backend.load_range(KEY, 1, 3))) == (DATA[7:10], DATA[1:3])
    assert asyncio.run(backend.size(KEY)) == len(DATA)
    assert (plain.asked, plain.loads) == ([(7, 10), (1, 3)], [])
    with pytest.raises(NotFoundError, match=r"nothing in a dictionary: not found"):
        asyncio.run(backend.load_range("nothing", 0, 1))
    with pytest.raises(StorageError):
        asyncio.run(backend.load_range(KEY, len(DATA) - 1, len(DATA) + 1))


class Closed(DictBackend):
    def check_rights(self) -> None:
        raise PermissionError(13, "no")


def test_a_backend_may_say_early_that_it_cannot_be_written() -> None:
    adapt_backend(DictBackend()).check_rights()
    with pytest.raises(StorageError, match="permission denied"):
        adapt_backend(Closed()).check_rights()


class Answering(StorageBackend):
    """Gives the same answer to everything, or raises it."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.keys: list[str] = []

    async def _answer(self, key: str) -> Any:
        self.keys.append(key)
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer

    async def load(self, key: str) -> bytes:
        return await self._answer(key)

    async def save(self, key: str, data: bytes | BinaryIO) -> None:
        await self._answer(key)

    async def exists(self, key: str) -> bool:
        return await self._answer(key)

    async def list(self, prefix: str = "") -> list[str]:
        return await self._answer(prefix)


@pytest.mark.parametrize(
    ("raised", "ours", "text"),
    [
        (KeyError("x"), NotFoundError, "x in custom storage: not found"),
        (FileNotFoundError(2, "No such file"), NotFoundError, "Answering.load(x) in custom storage: not found"),
        (NotFoundError("gone for good"), NotFoundError, "gone for good"),
        (StorageError("my own words"), StorageError, "my own words"),
        (StorageFullError("no room"), StorageFullError, "no room"),
        (OSError(errno.ENOSPC, "full"), StorageFullError, "Answering.load(x) in custom storage: no space is left"),
        (PermissionError(13, "no"), StorageError, "Answering.load(x) in custom storage: permission denied (no)"),
        (TimeoutError(), StorageError, "Answering.load(x) in custom storage: TimeoutError"),
        (ValueError("two\nlines"), StorageError, "Answering.load(x) in custom storage: ValueError: two lines"),
    ],
)
def test_foreign_exceptions_become_surfws(raised: Exception, ours: type[Exception], text: str) -> None:
    backend = adapt_backend(Answering(raised))
    for work in (backend.load("x"), backend.load_range("x", 0, 1), backend.size("x")):
        with pytest.raises(ours) as caught:
            asyncio.run(work)
        assert type(caught.value) is ours
        assert str(caught.value).startswith(text)
        assert caught.value is raised or caught.value.__cause__ is raised


def test_a_broken_save_or_listing_is_no_missing_object() -> None:
    backend = adapt_backend(Answering(KeyError("x")))
    for work, call in ((backend.save("k", b""), "save(k)"), (backend.list("k"), "list(k)")):
        with pytest.raises(StorageError) as caught:
            asyncio.run(work)
        assert type(caught.value) is StorageError
        assert str(caught.value) == f"Answering.{call} in custom storage: KeyError: 'x'"
    assert asyncio.run(backend.exists("k")) is False


def test_a_cancellation_passes() -> None:
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(adapt_backend(Answering(asyncio.CancelledError())).load("x"))


@pytest.mark.parametrize("answer", ["text", None, 3, ["x"]])
def test_an_object_that_is_not_bytes(answer: Any) -> None:
    with pytest.raises(StorageError, match=rf"Answering.load\(x\) gave {type(answer).__name__}, expected bytes"):
        asyncio.run(adapt_backend(Answering(answer)).load("x"))


@pytest.mark.parametrize("answer", [b"x", bytearray(b"x"), memoryview(b"x")])
def test_every_kind_of_bytes_is_an_object(answer: Any) -> None:
    found = asyncio.run(adapt_backend(Answering(answer)).load("x"))
    assert (type(found), found) == (bytes, b"x")


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (None, "gave NoneType, expected a list of keys"),
        ("models/x", "gave str, expected a list of keys"),
        ([b"models/x"], r"gave .*models/x.* \(bytes\), expected whole keys as strings that start with the prefix"),
        (["x.json"], r"gave 'x.json' \(str\), expected whole keys"),
    ],
)
def test_a_listing_that_is_none(answer: Any, text: str) -> None:
    with pytest.raises(StorageError, match=rf"Answering.list\(models/\) {text}"):
        asyncio.run(adapt_backend(Answering(answer)).list("models/"))


@pytest.mark.parametrize("key", ["../x", "/etc/passwd", "", "a//b", "a\0b", ".hidden", "a/"])
def test_a_bad_key_never_reaches_a_custom_backend(key: str, tmp_path: Path) -> None:
    plain = Answering(b"1")
    backend = adapt_backend(plain)
    for work in (
        backend.load(key), backend.save(key, b"1"), backend.exists(key), backend.size(key),
        backend.load_range(key, 0, 1), backend.read_into(key, 0, memoryview(bytearray(1))),
        backend.adopt(key, tmp_path / "x"),
    ):  # fmt: skip
        with pytest.raises(StorageError, match="is refused"):
            asyncio.run(work)
    with pytest.raises(StorageError, match="is refused"):
        backend.local_path(key)
    assert plain.keys == []


@pytest.mark.parametrize("prefix", ["../", "/etc/", "a/../", "..", "a//", "/", "a\0"])
def test_a_bad_prefix_never_reaches_a_custom_backend(prefix: str) -> None:
    plain = Answering([])
    with pytest.raises(StorageError, match="is refused"):
        asyncio.run(adapt_backend(plain).list(prefix))
    assert plain.keys == []


def test_a_model_in_a_dictionary_says_what_it_says_from_a_folder(tmp_path: Path) -> None:
    save_llama(tmp_path / "llama")
    ids = torch.tensor([[5, 9, 77, 3, 120]])
    answers = []
    for backend in (DictBackend(), FilesystemBackend(tmp_path / "store")):
        with prepare_model(str(tmp_path / "llama")) as prepared:
            asyncio.run(write_model(prepared, backend))
        with StreamingModel.open(functools.partial(open_storage_source, backend), "llama", cache_size=1) as model:
            answers.append(model(input_ids=ids).logits)
    assert torch.equal(*answers)
