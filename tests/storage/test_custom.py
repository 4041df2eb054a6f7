"""Custom backends: at the boundary every key, exception and type is checked, and ranges share one load."""

import asyncio
import contextlib
import errno
import functools
import gc
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch

from surfw.chunking.chunker import prepare_model, write_model
from surfw.client import open_wire_source
from surfw.errors import ConfigurationError, NotFoundError, StorageError, StorageFullError
from surfw.manifest import Chunk
from surfw.models import StreamingModel
from surfw.server import WeightServer
from surfw.storage import FilesystemBackend, FsspecBackend, StorageBackend, Store, adapt_backend, custom
from surfw.storage.shared_loads import SharedLoads
from surfw.storage.source import StorageSource, open_storage_source
from tests.checkpoints import save_llama
from tests.peers import serving, until, whole
from tests.storage.dict_backend import DictBackend
from tests.stores import make_store

KEY = "blobs/ab/x"
DATA = bytes(range(256)) * 86


def ranges(count: int = 22) -> list[tuple[int, int]]:
    """Ranges that cut the data into pieces."""
    step = len(DATA) // count + 1
    return [(at, min(at + step, len(DATA))) for at in range(0, len(DATA), step)]


@pytest.fixture
def plain() -> DictBackend:
    return DictBackend({KEY: DATA})


@pytest.fixture
def adapted(plain: DictBackend) -> StorageBackend:
    return adapt_backend(plain)


def test_own_backends_and_adapted_ones_pass_as_they_are(tmp_path: Path, adapted: StorageBackend) -> None:
    class Watched(FilesystemBackend):
        """A subclass of an own backend is one."""

    for backend in (FilesystemBackend(tmp_path), Watched(tmp_path), FsspecBackend("memory://x"), adapted):
        assert adapt_backend(backend) is backend


def test_everything_that_takes_a_backend_adapts_it(plain: DictBackend) -> None:
    for backend in (
        Store(plain).backend,
        StorageSource(plain).store.backend,
        WeightServer(plain, port=0)._pages._backend,
    ):
        assert isinstance(backend, custom.AdaptedBackend)
        assert backend.inner is plain
        assert backend.url == "a dictionary"


@pytest.mark.parametrize(
    ("given", "seen"), [(DictBackend, "the class DictBackend"), ({}, "dict object"), ("s3://x", "str object")]
)
def test_what_is_no_backend_is_refused(given: Any, seen: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{seen} is no storage backend; give an instance of a subclass"):
        adapt_backend(given)


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
    assert plain.loads == ["a", "b", "c"]  # `b` went: it was used less recently than `a`
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

    left = first.run_until_complete(start())  # a loop that stopped in the middle of a load
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


class RangedBackend(DictBackend):
    """A backend with a way of its own for ranges, which it writes down."""

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


def test_a_model_in_a_dictionary_says_what_it_says_from_a_folder(tmp_path: Path) -> None:
    save_llama(tmp_path / "llama")
    ids = torch.tensor([[5, 9, 77, 3, 120]])
    answers = []
    for backend in (DictBackend(), FilesystemBackend(tmp_path / "store")):
        with prepare_model(str(tmp_path / "llama")) as prepared:
            asyncio.run(write_model(prepared, backend))
        with StreamingModel.open(functools.partial(open_storage_source, backend), "llama", cache_layers=1) as model:
            answers.append(model(input_ids=ids).logits)
    assert torch.equal(*answers)
