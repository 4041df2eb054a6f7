"""Places are told apart, and origins are mounted while others read."""

import asyncio
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from surfw.chunking import in_place
from surfw.config import MIB
from surfw.errors import NotFoundError
from surfw.manifest import Manifest, Origin, Pin
from surfw.storage import FilesystemBackend, S3Backend, open_backend, origins
from surfw.storage.base import RangedBackend
from surfw.storage.origins import Objects
from surfw.storage.ranges import ObjectRange, ObjectRead
from surfw.storage.store import MARKER
from surfw.storage_options import identify_place
from tests.stores import make_store

URL = "s3://bucket/models"


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "AWS_DEFAULT_PROFILE", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)


ONE, OTHER = {"endpoint_url": "http://one:9000"}, {"endpoint_url": "http://other:9000"}


def test_what_identifies_a_place() -> None:
    assert identify_place(URL, {}) == URL
    assert identify_place("./folder", ONE) == "./folder"
    assert identify_place(URL, ONE) == 's3://bucket/models {"endpoint_url": "http://one:9000"}'
    for same in ({"max_concurrency": 8}, {"key": "a", "secret": "b"}, {"aws_session_token": "c"}, {"sse": "AES256"}):
        assert identify_place(URL, ONE | same) == identify_place(URL, ONE)
    assert identify_place(URL, {"region": "a"}) == identify_place(URL, {"region_name": "a"}) != identify_place(URL, {})
    nested = {"client_kwargs": {"base_url": "x", "password": "y"}}
    assert identify_place("http://host", nested) == 'http://host {"client_kwargs": {"base_url": "x"}}'


def test_the_environment_may_say_where_a_place_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://one:9000")
    assert identify_place(URL, {}) == identify_place(URL, ONE)
    assert identify_place(URL, OTHER) != identify_place(URL, ONE)


def test_one_bucket_name_at_two_endpoints_is_two_private_stores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The origins are made the usual way, up to the read of the checkpoint."""
    monkeypatch.setenv("SURFW_HOME", str(tmp_path))
    found = []
    make = in_place.private_store

    def noted(*given: Any) -> Path:
        found.append(make(*given))
        raise InterruptedError

    monkeypatch.setattr(in_place, "private_store", noted)
    for options in (ONE, OTHER, ONE):
        with pytest.raises(InterruptedError):
            in_place.publish_place(URL, options).send(None)
    assert found[0] == found[2]
    assert found[0] != found[1]


def test_one_bucket_name_at_two_endpoints_has_two_folders_for_uploads() -> None:
    def spool(options: Mapping[str, str]) -> Path:
        return open_backend(URL, options).spool()

    assert spool(ONE) == spool(ONE | {"max_concurrency": "2"})
    assert len({spool(ONE), spool(OTHER), spool({})}) == 3
    assert S3Backend("bucket", "models", endpoint_url="http://one:9000").spool() == spool(ONE)


def elsewhere(manifest: Manifest, index: int) -> Manifest:
    pins = {at.object: Pin(at.stop, '"x"') for chunk in manifest.chunks for at in chunk.forms[0].locations}
    return replace(manifest, files=(), origin=Origin(f"http://host/{index}", pins))


def test_an_origin_is_mounted_while_another_thread_goes_through_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = make_store(tmp_path, sizes=(10, 20))
    objects = Objects(FilesystemBackend(tmp_path), MARKER)
    for index in range(3):
        objects.mount(elsewhere(manifest, index), where="here")
    ask, more = origins.is_local_url, iter(range(3, 100))

    def mounting(url: str) -> bool:
        if threading.current_thread() is asking:
            thread = threading.Thread(
                target=objects.mount, args=(elsewhere(manifest, next(more)),), kwargs={"where": "here"}
            )
            thread.start()
            thread.join()
        return ask(url)

    asking = threading.current_thread()
    monkeypatch.setattr(origins, "is_local_url", mounting)
    assert not objects.has_local_origin
    monkeypatch.undo()
    assert objects.mount(elsewhere(manifest, 3), where="here").origin == Origin(
        "http://host/3", elsewhere(manifest, 3).origin.pins
    )


class Noting(RangedBackend):
    """Zeros, with this many concurrent reads; it records the sizes of its ranges."""

    def __init__(self, parallel_reads: int, *, in_place: bool) -> None:
        self.url = "noting"
        self.parallel_reads, self.reads_in_place = parallel_reads, in_place
        self.sizes: list[int] = []

    async def load(self, key: str) -> bytes:
        raise NotFoundError(key)

    async def save(self, key: str, data: object) -> None:
        raise NotImplementedError

    async def exists(self, key: str) -> bool:
        return False

    async def list(self, prefix: str = "") -> list[str]:
        return []

    async def read_into(self, key: str, start: int, destination: memoryview, *, revision: str | None = None) -> None:
        self.sizes.append(destination.nbytes)


def test_ranges_are_as_large_as_the_storage_wants_that_they_are_read_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This bounds memory: some storages stream a range, others hold it as a whole."""
    manifest, size = make_store(tmp_path, sizes=(10,)), 60 * MIB
    near, far = Noting(1, in_place=False), Noting(4, in_place=True)
    monkeypatch.setattr(origins, "open_backend", lambda *given, **options: far)
    objects = Objects(near, MARKER)
    mounted = objects.mount(elsewhere(manifest, 0), where="here")
    assert (objects.parallel_reads, objects.buffered_bytes) == (4, 8 * MIB)

    def read(key: str) -> None:
        parts = [ObjectRange(key, 0, size)]
        asyncio.run(objects.read_all([ObjectRead(parts, memoryview(bytearray(size)))]))

    read("blobs/x")
    assert sorted(near.sizes) == [7 * MIB] * 4 + [8 * MIB] * 4
    read(mounted.chunks[0].forms[0].locations[0].object)
    assert far.sizes == [30 * MIB] * 2
