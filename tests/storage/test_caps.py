"""Sizes are checked: objects that are too large are refused before they are read, and only regular files are opened."""

import asyncio
import json
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from surfw.checkpoint.layout import read_config, read_json
from surfw.config import MANIFEST_BYTES
from surfw.errors import CheckpointError, IntegrityError, NotAStoreError, StorageError, SurfwError
from surfw.files import open_regular, read_regular
from surfw.storage import FilesystemBackend, FsspecBackend, StorageBackend, Store, adapt_backend, open_backend
from surfw.storage.housekeeping.leases import read_leases
from surfw.storage.store_source import StorageSource, open_storage_source
from tests.storage.dict_backend import DictBackend
from tests.stores import make_store

HUGE = 2 << 30


@contextmanager
def announcing(size: int) -> Iterator[tuple[str, list[int]]]:
    """A server that reports this size for every object; yields how many bytes of each it could send."""
    sent: list[int] = []

    class Announcing(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(size))
            self.end_headers()
            count = 0
            try:
                while count < size:
                    count += self.wfile.write(b" " * 65536)
            except OSError:
                pass
            sent.append(count)
            self.close_connection = True

        def log_message(self, *args: object) -> None:
            """Log nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Announcing) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", sent
        server.shutdown()


_LOOK = """
import asyncio, resource, sys
from surfw.errors import StorageError
from surfw.storage import Store, open_backend
store = Store(open_backend(sys.argv[1]))
for look in (store.check(), store.manifest("a")):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        asyncio.run(look)
    except StorageError as exc:
        print(exc)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_web_server_that_announces_two_gigabytes_costs_next_to_nothing() -> None:
    with announcing(HUGE) as (url, _):
        done = subprocess.run(
            [sys.executable, "-c", _LOOK, url], stdout=subprocess.PIPE, text=True, timeout=120, check=True
        )
    lines = done.stdout.splitlines()
    assert lines[0] == f"surfw.json in {url} has {HUGE} bytes, expected at most 65536; it is not loaded"
    assert lines[2] == (
        f"the manifest of model a cannot be read: models/a.json in {url} has {HUGE} bytes, "
        f"expected at most {MANIFEST_BYTES}; it is not loaded"
    )
    assert int(lines[3]) < 48 * 1024  # KiB; the first call also loads modules


def test_a_listing_without_end_is_given_up() -> None:
    with announcing(HUGE) as (url, sent):

        async def look() -> None:
            await open_backend(url).list("models/")

        with (
            little_memory(),
            pytest.raises(StorageError, match=r"^the listing of /models has 1[67]\d* bytes, expected at m"),
        ):
            asyncio.run(look())
    assert max(sent) < HUGE // 8


def put_sparse(file: Path) -> None:
    with file.open("wb") as out:
        out.truncate(HUGE)


def put_zeros(file: Path) -> None:
    file.symlink_to("/dev/zero")


def put_fifo(file: Path) -> None:
    os.mkfifo(file)


def put_folder(file: Path) -> None:
    file.mkdir()


STRANGE = [put_sparse, put_zeros, put_fifo, put_folder]


@contextmanager
def little_memory() -> Iterator[None]:
    """Limit the memory to half a gigabyte more than is in use, so that a failing test does no harm."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (512 << 20), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("put", STRANGE)
@pytest.mark.parametrize("key", ["surfw.json", "models/toy/model.json", "leases/x.json"])
def test_only_regular_files_of_a_sensible_size_are_loaded(
    put: Callable[[Path], None], key: str, tmp_path: Path
) -> None:
    make_store(tmp_path, sizes=(10,))
    (tmp_path / key).unlink(missing_ok=True)
    (tmp_path / key).parent.mkdir(exist_ok=True)
    put(tmp_path / key)
    store = Store(FilesystemBackend(tmp_path))

    async def look() -> None:
        await store.check()
        await store.manifest("toy/model")
        await read_leases(store.backend)
        await store.backend.load_capped(key, 1000)  # no listing contains the folder

    with little_memory(), pytest.raises(StorageError, match=f"{key}.*(regular file|expected at most|directory)"):
        asyncio.run(look())


@pytest.mark.timeout(60)
@pytest.mark.parametrize("put", STRANGE)
def test_a_tokenizer_file_has_the_size_that_is_listed(put: Callable[[Path], None], tmp_path: Path) -> None:
    manifest = make_store(tmp_path, sizes=(10,))
    key = manifest.file("vocab.txt").object
    (tmp_path / key).unlink()
    put(tmp_path / key)
    source = StorageSource(FilesystemBackend(tmp_path))
    with little_memory(), pytest.raises(SurfwError, match=f"{key}.*(regular file|expected at most 8;|directory)"):
        asyncio.run(source.file(manifest, "vocab.txt"))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("put", [put_zeros, put_fifo])
def test_weights_are_read_and_mapped_from_regular_files_only(put: Callable[[Path], None], tmp_path: Path) -> None:
    manifest = make_store(tmp_path, sizes=(10,))
    chunk, form = manifest.chunks[0], manifest.chunks[0].forms[0]
    (tmp_path / form.locations[0].object).unlink()
    put(tmp_path / form.locations[0].object)
    source = StorageSource(FilesystemBackend(tmp_path))
    with pytest.raises(StorageError, match="it is no regular file"):
        asyncio.run(source.view(manifest, chunk, form))
    with pytest.raises(StorageError, match="it is no regular file"):
        asyncio.run(source.store.backend.load_range(form.locations[0].object, 0, 1))
    asyncio.run(source.close())


def test_a_link_to_a_regular_file_is_one(tmp_path: Path) -> None:
    (tmp_path / "there").write_bytes(b"text")
    (tmp_path / "here").symlink_to("there")
    assert read_regular(tmp_path / "here", 4) == b"text"
    os.close(open_regular(tmp_path / "here"))
    with pytest.raises(OSError, match="it has 4 bytes, expected at most 3"):
        read_regular(tmp_path / "here", 3)


class Sized(DictBackend):
    """Reports its own sizes, and records which objects are loaded."""

    def __init__(self) -> None:
        super().__init__({"small": b"12345", "large": b"123456"})
        self.loaded: list[str] = []

    async def load(self, key: str) -> bytes:
        self.loaded.append(key)
        return await super().load(key)

    async def size(self, key: str) -> int:
        return len(self.objects[key])


@pytest.mark.parametrize(("kind", "loaded"), [(Sized, ["small"]), (DictBackend, None)])
def test_a_custom_backend_is_asked_for_the_size_if_it_tells_one(
    kind: type[DictBackend], loaded: list[str] | None
) -> None:
    inner = Sized() if kind is Sized else DictBackend({"small": b"12345", "large": b"123456"})
    backend = adapt_backend(inner)
    assert asyncio.run(backend.load_capped("small", 5)) == b"12345"
    with pytest.raises(StorageError, match=r"^large in .* has 6 bytes, expected at most 5; it is not loaded$"):
        asyncio.run(backend.load_capped("large", 5))
    assert getattr(inner, "loaded", None) == loaded


def test_file_systems_of_fsspec_are_asked_for_the_size(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"123456")
    memory = FsspecBackend("memory://caps")
    asyncio.run(memory.save("x", b"123456"))
    for backend in (memory, open_backend(tmp_path)):
        assert asyncio.run(backend.load_capped("x", 6)) == b"123456"
        with pytest.raises(StorageError, match="expected at most 5"):
            asyncio.run(backend.load_capped("x", 5))


def test_a_subclass_that_changes_bytes_on_their_way_is_asked_for_them(tmp_path: Path) -> None:
    class Upper(FilesystemBackend):
        async def load(self, key: str) -> bytes:
            return (await super().load(key)).upper()

    (tmp_path / "x").write_bytes(b"text")
    backend: StorageBackend = Upper(tmp_path)
    assert asyncio.run(backend.load_capped("x", 4)) == b"TEXT"
    with pytest.raises(StorageError, match="expected at most 3"):
        asyncio.run(backend.load_capped("x", 3))


DEEP = b"[" * 100_000


def test_deep_nesting_is_a_clear_error(tmp_path: Path) -> None:
    make_store(tmp_path, sizes=(10,))
    (tmp_path / "surfw.json").write_bytes(DEEP[:60_000])
    with pytest.raises(NotAStoreError, match=r"its surfw\.json cannot be read"):
        asyncio.run(open_storage_source(FilesystemBackend(tmp_path)))


@pytest.mark.parametrize("levels", [70, 900, 100_000])
def test_a_configuration_that_is_nested_deeply_is_refused(levels: int, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"a":' * levels + "1" + "}" * levels)
    with pytest.raises(CheckpointError, match="is nested too deeply"):
        read_config(tmp_path)


def test_a_configuration_may_be_nested_a_little(tmp_path: Path) -> None:
    document = json.loads('{"a":' * 60 + "[1]" + "}" * 60)
    (tmp_path / "config.json").write_text(json.dumps(document))
    assert read_config(tmp_path) == document


@pytest.mark.timeout(60)
@pytest.mark.parametrize("put", STRANGE)
def test_files_of_a_checkpoint_are_regular_and_capped(put: Callable[[Path], None], tmp_path: Path) -> None:
    put(tmp_path / "config.json")
    with little_memory(), pytest.raises(CheckpointError, match=r"no regular file|has more than|s a directory"):
        read_json(tmp_path / "config.json", 1000)


def test_a_file_that_stays_damaged_says_where_it_lies(tmp_path: Path) -> None:
    manifest = make_store(tmp_path, sizes=(10,))
    (tmp_path / manifest.file("vocab.txt").object).write_bytes(b"one\nTWO\n")
    source = StorageSource(FilesystemBackend(tmp_path))
    said = f"is damaged; chunk the model again: it was the same 3 times, so the damage lies in {tmp_path}$"
    with pytest.raises(IntegrityError, match=said):
        asyncio.run(source.file(manifest, "vocab.txt"))
