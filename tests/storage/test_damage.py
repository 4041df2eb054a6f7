"""Damaged data is read again: transient damage is harmless, permanent damage is reported."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from surfw.config import BLOCK_BYTES, DAMAGE_RETRIES
from surfw.errors import IntegrityError, ManifestError, SurfwError
from surfw.manifest import Chunk, Manifest
from surfw.source import Read
from surfw.storage import FilesystemBackend, FsspecBackend, S3Backend, StorageBackend, Store, local_reader
from surfw.storage.housekeeping.verify import Damage, verify
from surfw.storage.store_source import StorageSource
from tests.storage.dict_backend import DictBackend
from tests.stores import TOKENIZER, make_store, payload

SIZE = 3 * BLOCK_BYTES + 77
BLOCK = 2

Flip = Callable[[int], bytes]
"""Maps how often the damaged place of an object was read before to the bits that are flipped there."""


def once(time: int) -> bytes:
    return b"\x10" if time == 0 else b"\x00"


def always(time: int) -> bytes:
    del time
    return b"\x10"


def differently(time: int) -> bytes:
    return bytes([1 << time])


def every_retry_but_one(time: int) -> bytes:
    return bytes([1 << time]) if time < DAMAGE_RETRIES else b"\x00"


@dataclass
class Line:
    """The connection between a store and its reader."""

    folder: Path
    flip: Flip = always
    at: dict[str, int] = field(default_factory=dict)
    times: dict[str, int] = field(default_factory=dict)

    def spoil(self, key: str, start: int, data: bytes) -> bytes:
        at = self.at.get(key, -1) - start
        if not 0 <= at < len(data):
            return data
        time = self.times[key] = self.times.get(key, -1) + 1
        return data[:at] + bytes([data[at] ^ self.flip(time)[0]]) + data[at + 1 :]


@contextmanager
def served(line: Line) -> Iterator[str]:
    """A web server for the folder, which is also a read-only S3 server."""

    class Serving(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            key = self.path.strip("/").partition("/")[2]
            try:
                data = (line.folder / key).read_bytes()
            except OSError:
                self.send_error(404)
                return
            first, dash, last = self.headers.get("Range", "").removeprefix("bytes=").partition("-")
            start = int(first) if dash else 0
            part = data[start : int(last) + 1] if dash else data
            self.send_response(206 if dash else 200)
            self.send_header("ETag", '"x"')
            self.send_header("Content-Length", str(len(part)))
            if dash:
                self.send_header("Content-Range", f"bytes {start}-{start + len(part) - 1}/{len(data)}")
            self.end_headers()
            self.wfile.write(line.spoil(key, start, part))

        def do_HEAD(self) -> None:
            self.send_response(200)
            self.send_header(
                "Content-Length", str((line.folder / self.path.strip("/").partition("/")[2]).stat().st_size)
            )
            self.send_header("ETag", '"x"')
            self.end_headers()

        def log_message(self, *args: object) -> None:
            """Log nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Serving) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def over_http(url: str, line: Line) -> StorageBackend:
    del line
    return FsspecBackend(f"{url}/bucket")


def over_s3(url: str, line: Line) -> StorageBackend:
    del line
    return S3Backend(
        "bucket", endpoint_url=url, aws_access_key_id="a", aws_secret_access_key="b", addressing_style="path"
    )


def custom(url: str, line: Line) -> StorageBackend:
    """A backend that can only load whole objects."""
    del url

    class Spoiling(DictBackend):
        async def load(self, key: str) -> bytes:
            return line.spoil(key, 0, await super().load(key))

    files = (path for path in line.folder.rglob("*") if path.is_file())
    return Spoiling({path.relative_to(line.folder).as_posix(): path.read_bytes() for path in files})


def in_a_folder(url: str, line: Line) -> StorageBackend:
    del url
    return FilesystemBackend(line.folder)


Make = Callable[[str, Line], StorageBackend]
EVERY: list[Make] = [over_http, over_s3, custom, in_a_folder]


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return make_store(tmp_path, sizes=(SIZE, 100))


@pytest.fixture
def line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Line:
    """local files are read through it too"""
    line, fill = Line(tmp_path), local_reader._File._fill

    def spoiled(self: local_reader._File, flag: int, start: int, destination: memoryview) -> int:
        count = fill(self, flag, start, destination)
        key = self._path.relative_to(tmp_path).as_posix()
        destination[:count] = line.spoil(key, start, bytes(destination[:count]))
        return count

    monkeypatch.setattr(local_reader._File, "_fill", spoiled)
    return line


def damage(line: Line, chunk: Chunk) -> None:
    """Damage a byte in the middle of a block."""
    at = chunk.forms[0].locations[0]
    line.at[at.object] = at.start + BLOCK * BLOCK_BYTES + 700_000


def fetch(backend: StorageBackend, manifest: Manifest) -> tuple[list[bytearray], int]:
    """Return all payloads, and how many blocks were read again."""

    async def main() -> tuple[list[bytearray], int]:
        async with StorageSource(backend) as source:
            memories = [bytearray(chunk.payload_bytes) for chunk in manifest.chunks]
            reads = [
                Read(chunk, chunk.forms[0], 0, chunk.payload_bytes, memoryview(memory))
                for chunk, memory in zip(manifest.chunks, memories, strict=True)
            ]
            try:
                await source.fetch(manifest, reads)
            finally:
                refetched.append(source.refetched_blocks)
            return memories, source.refetched_blocks

    return asyncio.run(main())


refetched: list[int] = []


@pytest.mark.parametrize("make", EVERY)
@pytest.mark.parametrize(("flip", "again"), [(once, 1), (every_retry_but_one, DAMAGE_RETRIES)])
def test_a_block_that_is_damaged_on_its_way_is_read_again(
    flip: Flip, again: int, make: Make, manifest: Manifest, line: Line
) -> None:
    line.flip = flip
    damage(line, manifest.chunks[0])
    with served(line) as url:
        memories, count = fetch(make(url, line), manifest)
    assert memories == [payload(line.folder, chunk) for chunk in manifest.chunks]
    assert count == again


@pytest.mark.parametrize("make", EVERY)
@pytest.mark.parametrize(
    ("flip", "said"),
    [
        (always, "chunk the model again: it was the same 3 times, so the damage lies in "),
        (
            differently,
            "it differed between 3 reads, so it is damaged on the way; check the network",
        ),
    ],
)
def test_damage_that_stays_is_an_error_that_says_where_it_lies(
    flip: Flip, said: str, make: Make, manifest: Manifest, line: Line
) -> None:
    line.flip = flip
    damage(line, manifest.chunks[0])
    refetched.clear()
    with (
        served(line) as url,
        pytest.raises(
            IntegrityError, match=rf"^chunk layers\.0 from .* is damaged: block {BLOCK} has BLAKE3 .*; {said}"
        ),
    ):
        fetch(make(url, line), manifest)
    assert refetched == [DAMAGE_RETRIES]


@pytest.mark.parametrize("make", [over_http, over_s3, custom])
@pytest.mark.parametrize("what", ["file", "manifest"])
def test_files_and_manifests_are_read_again_too(what: str, make: Make, manifest: Manifest, line: Line) -> None:
    line.flip = once
    line.at = {manifest.file("vocab.txt").object: 3, "models/toy/model.json": 0}

    async def main(backend: StorageBackend) -> object:
        async with StorageSource(backend) as source:
            if what == "file":
                return await source.file(manifest, "vocab.txt")
            return await source.manifest("toy/model")

    with served(line) as url:
        assert asyncio.run(main(make(url, line))) == (TOKENIZER["vocab.txt"] if what == "file" else manifest)
        line.flip = always
        with pytest.raises(SurfwError):
            asyncio.run(main(make(url, line)))


@pytest.mark.parametrize("make", [over_http, over_s3, custom])
@pytest.mark.parametrize("what", ["file", "manifest"])
@pytest.mark.parametrize(
    ("flip", "again", "said"),
    [
        (once, 1, None),
        (every_retry_but_one, DAMAGE_RETRIES, None),
        (always, DAMAGE_RETRIES, "; chunk the model again"),
        (differently, DAMAGE_RETRIES, "; check the network and the memory of this machine"),
    ],
)
def test_files_and_manifests_that_are_read_again_are_counted_and_their_damage_is_located(
    flip: Flip, again: int, said: str | None, what: str, make: Make, manifest: Manifest, line: Line
) -> None:
    line.flip = flip
    key = manifest.file("vocab.txt").object if what == "file" else "models/toy/model.json"
    line.at = {key: 3 if what == "file" else 300}

    async def main(backend: StorageBackend) -> int:
        async with StorageSource(backend) as source:
            asked = source.file(manifest, "vocab.txt") if what == "file" else source.manifest("toy/model")
            if said is None:
                await asked
            else:
                with pytest.raises(IntegrityError if what == "file" else ManifestError) as caught:
                    await asked
                assert "is damaged" in str(caught.value)
                assert said in str(caught.value)
                assert ("chunk the model again" in str(caught.value)) == (flip is always)
            return source.refetched_blocks

    with served(line) as url:
        assert asyncio.run(main(make(url, line))) == again


def verified(backend: StorageBackend) -> tuple[Damage, ...]:
    async def main() -> tuple[Damage, ...]:
        try:
            return (await verify(Store(backend), "toy/model", progress=lambda *_: None)).damage
        finally:
            await backend.close()

    return asyncio.run(main())


@pytest.mark.parametrize("make", [over_http, over_s3, custom])
def test_verifying_reports_only_what_stays_damaged(make: Make, manifest: Manifest, line: Line) -> None:
    vocabulary = manifest.file("vocab.txt").object
    damage(line, manifest.chunks[0])
    line.at |= {vocabulary: 3, "models/toy/model.json": 0}
    line.flip = once
    with served(line) as url:
        assert verified(make(url, line)) == ()
        del line.at["models/toy/model.json"]
        line.flip = always
        found = verified(make(url, line))
    assert [(one.part, one.complaint.partition(",")[0]) for one in found] == [
        ("layers.0", f"block {BLOCK} is damaged (1 of 4 blocks are)"),
        ("vocab.txt", found[1].complaint.partition(",")[0]),
    ]
    assert found[1].complaint.endswith(f"expected {manifest.file('vocab.txt').digest}")


def test_verifying_says_what_differs_from_time_to_time(manifest: Manifest, line: Line) -> None:
    line.at, line.flip = {manifest.file("vocab.txt").object: 3, "models/toy/model.json": 300}, differently
    with served(line) as url:
        (found,) = verified(over_http(url, line))
        assert "; check the network" in found.complaint
        del line.at["models/toy/model.json"]
        line.times.clear()
        (found,) = verified(over_http(url, line))
    assert found.part == "vocab.txt"
    assert "; check the network" in found.complaint


def test_a_page_that_is_damaged_in_memory_alone_is_read_from_the_file(
    manifest: Manifest, line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunk = manifest.chunks[0]
    make = local_reader.MappedFile.__init__

    def spoiled(self: local_reader.MappedFile, file: local_reader.FileRange) -> None:
        make(self, file)
        self.memory[BLOCK * BLOCK_BYTES + 5] ^= 1

    monkeypatch.setattr(local_reader.MappedFile, "__init__", spoiled)

    async def main() -> tuple[object, int]:
        async with StorageSource(FilesystemBackend(line.folder)) as source:
            return await source.view(manifest, chunk, chunk.forms[0]), source.refetched_blocks

    assert asyncio.run(main()) == (None, 1)
