"""Encrypted models through every kind of source: the same plaintext, or one error before anything is used."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from surfw.client import open_wire_source
from surfw.config import BLOCK_BYTES
from surfw.encryption import DecryptingSource, EncryptionKey
from surfw.errors import CheckpointError, ConfigurationError, IntegrityError, ManifestError
from surfw.manifest import Chunk, Manifest, parse_manifest, payload_digest
from surfw.runtime.buffers import Buffer
from surfw.server import WeightServer
from surfw.source import ChunkSource, Read
from surfw.storage import FilesystemBackend, Store
from surfw.storage.store_source import open_storage_source
from tests.chunking.test_write import Payloads, make, planned, run
from tests.encryption.search import Windows, pieces_of_files
from tests.toys import ToySource, toy_chunk, toy_manifest

KEY = EncryptionKey(bytes(range(32)))
OTHER = EncryptionKey(bytes(32))
SIZES = {"a": 9 * BLOCK_BYTES + 5, "b": 1000}


class Encrypted:
    """A store with an encrypted model of two chunks, and their payloads."""

    def __init__(self, path: Path, key: EncryptionKey = KEY) -> None:
        self.path, self.backend = path, FilesystemBackend(path)
        asyncio.run(Store(self.backend).create())
        toys = [toy_chunk(name, [("U8", (size,))]) for name, size in SIZES.items()]
        self.payloads = {chunk.name: payload for chunk, payload in toys}
        writer = make(self.backend, Payloads(toys))
        writer.encryption = key
        self.manifest = replace(toy_manifest(run(writer, planned(toys))), key_id=key.id)
        asyncio.run(self.publish(self.manifest))

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        return self.manifest.chunks

    def stored(self, chunk: Chunk) -> bytes:
        """A chunk's ciphertext, the only content of its blob."""
        (place,) = chunk.forms[0].locations
        return (self.path / place.object).read_bytes()

    async def publish(self, manifest: Manifest) -> None:
        await Store(self.backend).publish(manifest)


class FlippingBackend(FilesystemBackend):
    """Flips one bit at the first read of the large chunk."""

    flipped = False

    def local_path(self, key: str) -> Path | None:
        return None

    async def read_into(self, key: str, start: int, destination: memoryview, *, revision: str | None = None) -> None:
        await super().read_into(key, start, destination, revision=revision)
        if len(destination) > 1000 and "blobs" in key and not self.flipped:
            destination[BLOCK_BYTES + 3], self.flipped = destination[BLOCK_BYTES + 3] ^ 1, True


@pytest.fixture(scope="module")
def encrypted(tmp_path_factory: pytest.TempPathFactory) -> Encrypted:
    return Encrypted(tmp_path_factory.mktemp("encrypted") / "store")


Kind = Literal["store", "server", "toy"]
KINDS: list[Kind] = ["store", "server", "toy"]


@asynccontextmanager
async def opened(kind: Kind, encrypted: Encrypted) -> AsyncIterator[ChunkSource]:
    """A source of ciphertext that reports verified bytes, as surfw's own do, or does not."""
    if kind == "store":
        async with await open_storage_source(FilesystemBackend(encrypted.path)) as source:
            yield source
    elif kind == "server":
        async with (
            WeightServer(FilesystemBackend(encrypted.path), port=0) as server,
            await open_wire_source(server.url) as source,
        ):
            yield source
    else:
        yield ToySource({"toy": encrypted.manifest}, {one.id: encrypted.stored(one) for one in encrypted.chunks})


async def read(source: ChunkSource, manifest: Manifest, name: str, start: int = 0, stop: int | None = None) -> bytes:
    """A range of a chunk's stored bytes, as the source delivers them."""
    chunk = manifest.by_name[name]
    form = chunk.forms[0]
    stop = form.stored_bytes if stop is None else stop
    memory = Buffer(stop - start).view[: stop - start]
    await source.fetch(manifest, [Read(chunk, form, start, stop, memory)])
    return bytes(memory)


@pytest.mark.parametrize("kind", KINDS)
def test_whole_chunks_and_ranges_are_decrypted(encrypted: Encrypted, kind: Kind) -> None:
    async def work() -> None:
        async with opened(kind, encrypted) as stored:
            source = DecryptingSource(stored, KEY)
            manifest = await source.manifest("toy")
            source.expect_readable(manifest)
            for name, payload in encrypted.payloads.items():
                assert await read(source, manifest, name) == payload
                assert await read(stored, manifest, name) == encrypted.stored(
                    encrypted.manifest.by_name[name]
                )  # as it is stored
                assert await source.view(manifest, manifest.by_name[name], manifest.by_name[name].forms[0]) is None
            part = await read(source, manifest, "a", 8 * BLOCK_BYTES)
            assert part == encrypted.payloads["a"][8 * BLOCK_BYTES :]

    asyncio.run(work())


@pytest.mark.parametrize("kind", ["store", "server"])
def test_blocks_are_decrypted_by_the_threads_that_verify_them(encrypted: Encrypted, kind: Kind) -> None:
    threads = set[str]()

    class Watched(EncryptionKey):
        def open(self, block: memoryview, seal: bytes) -> None:
            threads.add(threading.current_thread().name)
            super().open(block, seal)

    async def work() -> None:
        async with opened(kind, encrypted) as stored:
            source = DecryptingSource(stored, Watched(bytes(range(32))))
            await read(source, await source.manifest("toy"), "a")

    asyncio.run(work())
    assert threads
    assert all("verify" in name for name in threads), threads


def test_a_damaged_block_is_read_again_and_decrypted(tmp_path: Path) -> None:
    encrypted = Encrypted(tmp_path / "store")
    damaged = FlippingBackend(encrypted.path)

    async def work() -> None:
        async with await open_storage_source(damaged) as stored:
            source = DecryptingSource(stored, KEY)
            assert await read(source, await source.manifest("toy"), "a") == encrypted.payloads["a"]
            assert source.refetched_blocks == 1

    asyncio.run(work())


def test_without_the_key_or_with_another_one_nothing_is_read(encrypted: Encrypted) -> None:
    async def work() -> None:
        async with opened("toy", encrypted) as stored:
            with pytest.raises(ConfigurationError, match=rf"toy is encrypted with key {KEY.id}, and no key is given"):
                stored.expect_readable(encrypted.manifest)
            source = DecryptingSource(stored, OTHER)
            with pytest.raises(ConfigurationError, match=rf"key {KEY.id}, and the key holds key {OTHER.id}"):
                source.expect_readable(encrypted.manifest)
            with pytest.raises(ConfigurationError):
                await read(source, encrypted.manifest, "b")
            assert isinstance(stored, ToySource)
            assert not stored.reads

    asyncio.run(work())


@pytest.mark.parametrize("kind", KINDS)
def test_what_another_key_has_written_is_an_error_and_no_weight(tmp_path: Path, kind: Kind) -> None:
    """The digests and the key's id are right, so only the tags show it."""
    encrypted = Encrypted(tmp_path / "store", OTHER)
    encrypted.manifest = replace(encrypted.manifest, key_id=KEY.id)
    asyncio.run(encrypted.publish(encrypted.manifest))

    async def work() -> None:
        async with opened(kind, encrypted) as stored:
            with pytest.raises(IntegrityError, match=r"of chunk b from .* does not decrypt with the key of the model"):
                await read(DecryptingSource(stored, KEY), encrypted.manifest, "b")

    asyncio.run(work())


def test_a_model_that_is_not_encrypted_is_read_as_it_is_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    chunk, payload = toy_chunk("a", [("U8", (1000,))])
    manifest = toy_manifest([chunk])

    async def work() -> None:
        source = DecryptingSource(ToySource({"toy": manifest}, {chunk.id: payload}), KEY)
        for _ in range(2):
            source.expect_readable(manifest)
        assert await read(source, manifest, "a") == payload
        assert source.identify(manifest, payload_digest(payload)) == chunk.id

    asyncio.run(work())
    assert [one.getMessage() for one in caplog.records] == ["toy is not encrypted: the key is not used for it"]


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    backend, toys = FilesystemBackend(tmp_path), [toy_chunk(name, [("U8", (size,))]) for name, size in SIZES.items()]
    source = Payloads(toys)
    source.failing = "b"
    writers = [make(backend, source), make(backend, source)]
    for writer in writers:
        writer.encryption = KEY
    with pytest.raises(CheckpointError):
        run(writers[0], planned(toys))
    assert list(tmp_path.glob("partial/*/journal.jsonl"))
    assert not Windows(payload for _, payload in toys).find_in(pieces_of_files(tmp_path))
    source.failing = None
    source.reads.clear()
    made = run(writers[1], planned(toys))
    assert source.names == ["b"]
    assert [len(chunk.forms[0].seals) for chunk in made] == [48 * 10, 48]


def test_ids_do_not_tell_the_payload(encrypted: Encrypted) -> None:
    source = DecryptingSource(ToySource({}, {}), KEY)
    for chunk in encrypted.chunks:
        payload = encrypted.payloads[chunk.name]
        digest = payload_digest(payload)
        assert chunk.id == source.identify(encrypted.manifest, digest) == KEY.hide(digest)
        assert chunk.id != payload_digest(payload)


def test_the_manifest_survives_and_each_of_its_rules_is_checked(encrypted: Encrypted) -> None:
    manifest = encrypted.manifest
    assert parse_manifest(manifest.encode(), where="there") == manifest
    assert parse_manifest(manifest.public().encode(), where="there").key_id == KEY.id
    for edit, complaint in (
        ({"encryption": {"cipher": "ROT13", "key": KEY.id}}, "it is encrypted with 'ROT13', expected AES-256-GCM"),
        ({"encryption": {"cipher": "AES-256-GCM", "key": "x"}}, "the name of its key is not 32 hex digits"),
        ({"encryption": None}, "malformed"),
        ({"version": 4}, "the form 'none' of chunk a is not its payload"),
    ):
        document = json.loads(manifest.encode()) | edit
        with pytest.raises(ManifestError, match=complaint):
            parse_manifest(json.dumps(document).encode(), where="there")
    for seals in ("", "00" * 48, "zz"):
        document = json.loads(manifest.encode())
        document["chunks"][0]["forms"][0]["seals"] = seals
        with pytest.raises(ManifestError, match=r"bytes of seals, expected 480|malformed"):
            parse_manifest(json.dumps(document).encode(), where="there")
