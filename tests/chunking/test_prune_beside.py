"""Pruning beside real processes: a chunk command that is killed and resumed, and a server; in a folder and in S3."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from surfw.client import WireSource, open_wire_source
from surfw.errors import StorageError, SurfwError, UnknownModelError
from surfw.manifest import Manifest
from surfw.storage import FilesystemBackend, StorageBackend, Store
from surfw.storage.housekeeping import Housekeeping
from tests.checkpoints import save_llama
from tests.peers import serving, whole
from tests.services import warm
from tests.services.s3 import S3Service
from tests.storage.test_s3 import connect
from tests.stores import make_store

CHUNK = """
import asyncio, sys
from surfw.chunking import prepare_model, write_model
from surfw.storage import open_backend

def progress(count, name):
    print(name, flush=True)
    if name == sys.argv[3]:
        sys.stdin.read()

with prepare_model(sys.argv[1]) as prepared:
    asyncio.run(write_model(prepared, open_backend(sys.argv[2]), progress=progress))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("saved") / "tiny")


Place = tuple[str, Callable[[], StorageBackend], dict[str, str]]


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """A place's URL, how this process opens it, and the environment for other processes."""
    if request.param == "folder":
        return str(tmp_path / "store"), lambda: FilesystemBackend(tmp_path / "store"), {}
    s3: S3Service = request.getfixturevalue("s3")
    bucket = s3.bucket()
    secrets = {"AWS_ENDPOINT_URL": s3.endpoint, "AWS_ACCESS_KEY_ID": s3.key, "AWS_SECRET_ACCESS_KEY": s3.secret}
    return f"s3://{bucket}/models", lambda: connect(s3, bucket, "models"), secrets


def start(saved: Path, place: Place, stop_at: str, home: Path) -> warm.Process:
    command = [sys.executable, "-c", CHUNK, str(saved), place[0], stop_at]
    environment = os.environ | place[2] | {"SURFW_HOME": str(home)}
    return warm.start(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def test_a_chunking_process_is_killed_and_resumed_while_others_prune(saved: Path, place: Place, tmp_path: Path) -> None:
    backend = place[1]()
    house = Housekeeping(backend)

    def blobs() -> set[str]:
        return set(asyncio.run(backend.list("blobs/")))

    async def orphan() -> None:
        await backend.save(f"blobs/ab/ab{'0' * 62}.safetensors", b"nobody's")

    with start(saved, place, "model.layers.3", tmp_path / "home") as process:
        assert process.stdout is not None
        while process.stdout.readline().strip() != "model.layers.3":
            assert process.poll() is None
        asyncio.run(orphan())
        while len(before := blobs()) < 5:  # the embeddings, three layers, and the orphan
            assert process.poll() is None
        assert asyncio.run(house.prune()).blobs == 1
        assert len(blobs()) == len(before) - 1
        (one,) = asyncio.run(house.contents()).unfinished
        assert (one.name, one.pid, one.at_work) == ("tiny", process.pid, True)
        with pytest.raises(StorageError, match=f"tiny is being written into .* by process {process.pid} on "):
            asyncio.run(house.remove("tiny"))
        process.send_signal(signal.SIGKILL)
        process.wait(60)

    asyncio.run(orphan())
    assert asyncio.run(house.prune()).blobs == 1
    assert len(blobs()) == len(before) - 1
    assert [one.at_work for one in asyncio.run(house.contents()).unfinished] == [False]
    revisions = {key: asyncio.run(backend.revision(key)) for key in blobs()}

    with start(saved, place, "none", tmp_path / "home") as process:
        assert process.wait(120) == 0
    assert {key: asyncio.run(backend.revision(key)) for key in revisions} == revisions, "nothing was written twice"
    assert asyncio.run(house.verify()).damage == ()
    contents = asyncio.run(house.contents())
    assert [model.name for model in contents.models] == ["tiny"]
    assert (contents.unfinished, contents.unneeded_blobs, contents.complaints) == ((), 0, ())
    assert asyncio.run(backend.list("leases/")) == asyncio.run(backend.list("prunes/")) == []
    asyncio.run(backend.close())


@pytest.mark.parametrize("place", ["folder"], indirect=True)
def test_work_that_was_given_up_is_pruned(saved: Path, place: Place, tmp_path: Path) -> None:
    backend = place[1]()
    house = Housekeeping(backend)
    with start(saved, place, "model.layers.1", tmp_path / "home") as process:
        assert process.stdout is not None
        while process.stdout.readline().strip() != "model.layers.1":
            assert process.poll() is None
        while not asyncio.run(backend.list("blobs/")):
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    removed = asyncio.run(house.remove("tiny"))
    assert (removed.published, removed.given_up) == (False, 1)
    assert asyncio.run(house.prune()).blobs >= 1
    keys = asyncio.run(backend.list())
    assert [key for key in keys if not key.startswith("partial/")] == ["surfw.json"]
    with start(saved, place, "none", tmp_path / "home") as process:
        assert process.wait(120) == 0, "what its journal says is done is looked for, and done again"
    assert asyncio.run(house.verify()).damage == ()
    asyncio.run(backend.close())


def test_a_server_goes_on_beside(tmp_path: Path) -> None:
    """The client of a removed model gets an error; the model that shares a chunk with it stays complete."""
    gone = make_store(tmp_path, "gone", (3_000_000, 40_000), files={})
    stays = replace(gone, name="stays", chunks=gone.chunks[:1], order=gone.order[:1])
    asyncio.run(Store(FilesystemBackend(tmp_path)).publish(stays))

    async def fetch(source: WireSource, manifest: Manifest, index: int) -> None:
        read, _ = whole(manifest.chunks[index])
        await source.fetch(manifest, [read])  # every block is verified

    async def main() -> None:
        async with serving(tmp_path) as server, await open_wire_source(server.url) as source:
            manifest = await source.manifest("gone")
            await fetch(source, manifest, 0)
            async with Housekeeping(tmp_path) as house:
                assert (await house.remove("gone")).published
                pruned = await house.prune()
            assert (pruned.blobs, pruned.blob_bytes) == (1, 40_000 + 4096)
            with pytest.raises(SurfwError) as caught:
                await fetch(source, manifest, 1)
            assert str(tmp_path) not in str(caught.value), "what the storage says stays at home"
            with pytest.raises(UnknownModelError, match="has no model 'gone'; it has: stays"):
                await source.manifest("gone")
            await fetch(source, await source.manifest("stays"), 0)
            assert await source.models() == ["stays"]
            assert (await server.health())["ready"]

    asyncio.run(main())
