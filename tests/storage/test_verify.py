"""Verification reads every byte that a manifest lists, and names whatever is missing or damaged."""

import asyncio
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surfw.config import BLOCK_BYTES
from surfw.errors import NotAStoreError, StorageError, UnknownModelError
from surfw.storage import FilesystemBackend, StorageBackend, Store
from surfw.storage.housekeeping import Housekeeping
from surfw.storage.housekeeping.verify import Verified, verify
from tests.server.backends import RecordingBackend
from tests.storage.dict_backend import DictBackend
from tests.stores import make_store

HEADER = "the header of its file is damaged"
SIZES = (9 * BLOCK_BYTES + 77, 3 * BLOCK_BYTES, 0, 50)


def check(backend: StorageBackend | Path, model: str | None = None) -> Verified:
    backend = FilesystemBackend(backend) if isinstance(backend, Path) else backend
    return asyncio.run(Housekeeping(backend).verify(model))


def test_a_whole_store_is_as_it_should_be_and_what_is_shared_is_read_once(tmp_path: Path) -> None:
    manifest = make_store(tmp_path, "a", SIZES)
    asyncio.run(Store(FilesystemBackend(tmp_path)).publish(replace(manifest, name="b")))
    steps: list[tuple[int, int]] = []
    backend = RecordingBackend(tmp_path)
    house = Housekeeping(backend)
    verified = asyncio.run(house.verify(progress=lambda done, total, _: steps.append((done, total))))
    size = sum(SIZES) + sum(file.size for file in manifest.files)
    assert verified == Verified(
        store=str(tmp_path), models=("a", "b"), parts=6, read_bytes=size, damage=(), undigested=()
    )
    assert steps[-1] == (size, size)
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    blob = manifest.chunks[0].forms[0].locations[0].object
    assert backend.asked.count(blob) == 3  # two pieces, and the header


def test_a_backend_with_four_methods_is_verified_too(tmp_path: Path) -> None:
    make_store(tmp_path, "a", SIZES)
    files = {path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert check(DictBackend(files)).damage == ()
    damaged = next(key for key, data in files.items() if len(data) > 9 * BLOCK_BYTES)
    files[damaged] = files[damaged][:-1] + bytes([files[damaged][-1] ^ 1])
    (found,) = check(DictBackend(files)).damage
    assert (found.objects, found.complaint) == ((damaged,), "block 9 is damaged (1 of 10 blocks are)")


@settings(max_examples=25, deadline=None)
@given(part=st.integers(0, 5), at=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_is_found(part: int, at: float, bit: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "flipped"
    if not path.exists():
        make_store(path, "a", (2 * BLOCK_BYTES + 9, BLOCK_BYTES, 4000, 1))
    manifest = asyncio.run(Store(FilesystemBackend(path)).manifest("a"))
    places = [(chunk.name, chunk.forms[0].locations[0]) for chunk in manifest.chunks]
    name, blob, start, stop = (
        (places[part][0], places[part][1].object, places[part][1].start, places[part][1].stop)
        if part < 4
        else (manifest.files[part - 4].path, manifest.files[part - 4].object, 0, manifest.files[part - 4].size)
    )
    offset = start + int(at * (stop - start))
    with (path / blob).open("r+b") as file:

        def flip() -> None:
            file.seek(offset)
            (value,) = file.read(1)
            file.seek(offset)
            file.write(bytes([value ^ 1 << bit]))
            file.flush()

        flip()
        (found,) = check(path).damage
        assert (found.model, found.part, found.objects) == ("a", name, (blob,))
        flip()
    assert check(path).damage == ()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ((0, b"\xf9"), "the header of its file says that it has 4089 bytes, expected 4088"),
        ((8, b"\x00"), f"{HEADER}: its header starts with b'\\x00"),
        (
            (b"U8", b"V8"),
            f"{HEADER}: tensor 'layers.0.weight' has dtype 'V8', expected one of BOOL",
        ),
        (
            (b"[5000]", b"[5001]"),
            f"{HEADER}: tensor 'layers.0.weight' (U8 '[5001]') has 5000 bytes, expected 5001",
        ),
        (
            (b"[0, 5000]", b"[8, 5008]"),
            f"{HEADER}: tensor 'layers.0.weight' begins at byte 4104, expected 4096",
        ),
        (
            (b"data_offsets", b"datA_offsets"),
            f"{HEADER}: tensor 'layers.0.weight' has data_offsets 'None'",
        ),
    ],
)
def test_a_damaged_header_is_found(change: tuple[int | bytes, bytes], complaint: str, tmp_path: Path) -> None:
    manifest = make_store(tmp_path, "a", (5000,), files={})
    blob = tmp_path / manifest.chunks[0].forms[0].locations[0].object
    data, (what, new) = blob.read_bytes(), change
    at = what if isinstance(what, int) else data.index(what)
    blob.write_bytes(data[:at] + new + data[at + len(new) :])
    (found,) = check(tmp_path).damage
    assert (found.part, found.complaint[: len(complaint)]) == ("layers.0", complaint)


def test_everything_that_is_wrong_is_named(tmp_path: Path) -> None:
    manifest = make_store(tmp_path, "a", (5000, 6000, 7000))
    make_store(tmp_path, "b", (5000,), seed=1)
    make_store(tmp_path, "c", (10,), seed=2)
    first, second, _ = (tmp_path / chunk.forms[0].locations[0].object for chunk in manifest.chunks)
    first.unlink()
    os.truncate(second, 4096 + 5999)
    with (tmp_path / manifest.files[1].object).open("ab") as file:
        file.write(b"!")
    (tmp_path / "models" / "c.json").write_bytes(b"{}")
    verified = check(tmp_path)
    found = {(one.model, one.part): one.complaint for one in verified.damage}
    assert verified.models == ("a", "b", "c")
    assert found.pop(("c", "")).startswith(f"the manifest from {tmp_path}, model c is not valid")
    assert found == {
        ("a", "layers.0"): "it is missing",
        ("a", "layers.1"): f"{second.relative_to(tmp_path)} has 10095 bytes, expected 10096",
        ("a", "vocab.txt"): f"{manifest.files[1].object} has 9 bytes, expected 8",
    }


def test_one_model_alone(tmp_path: Path) -> None:
    manifest = make_store(tmp_path, "a", (5000,), files={})
    make_store(tmp_path, "b", (6000,), files={}, seed=1)
    (tmp_path / manifest.chunks[0].forms[0].locations[0].object).unlink()
    assert (check(tmp_path, "b").damage, check(tmp_path, "b").read_bytes) == ((), 6000)
    assert [one.model for one in check(tmp_path, "a").damage] == ["a"]
    with pytest.raises(UnknownModelError, match="has no model 'x'; it has: a, b"):
        check(tmp_path, "x")


def test_a_storage_that_does_not_answer_is_an_error_and_one_bad_object_is_not(tmp_path: Path) -> None:
    make_store(tmp_path, "a", (5000, 6000), files={})

    class Failing(FilesystemBackend):
        everything = False

        async def load(self, key: str) -> bytes:
            if self.everything:
                raise StorageError("the network is gone")
            return await super().load(key)

        async def read_into(self, key: str, start: int, destination: memoryview) -> None:
            if len(destination) == 6000:
                self.everything = away
                raise StorageError(f"{key}: Input/output error")
            await super().read_into(key, start, destination)

    away = False
    (found,) = check(Failing(tmp_path)).damage
    assert (found.part, found.complaint) == ("layers.1", f"it cannot be read: {found.objects[0]}: Input/output error")
    away = True
    with pytest.raises(StorageError, match="the network is gone"):
        check(Failing(tmp_path))
    with pytest.raises(NotAStoreError):
        asyncio.run(verify(Store(FilesystemBackend(tmp_path / "models")), None, progress=lambda *_: None))
