"""The layout of a store: what counts as one, which objects are visible, and where the bytes of a form are."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surfw.config import MANIFEST_BYTES, WireLimits
from surfw.errors import ManifestError, NotAStoreError, StorageError, UnknownModelError
from surfw.manifest import Location
from surfw.storage import FilesystemBackend, Store
from surfw.storage.store import blob_key, manifest_key, segments
from tests.stores import make_store
from tests.toys import toy_model

MANIFEST, _ = toy_model([10, 20])


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(FilesystemBackend(tmp_path / "store"))


def test_an_empty_place_becomes_a_store(store: Store, tmp_path: Path) -> None:
    with pytest.raises(
        NotAStoreError, match="is not a surfw store yet: nothing was chunked into it; 'surfw chunk MODEL"
    ):
        asyncio.run(store.check())
    asyncio.run(store.create())
    asyncio.run(store.check())
    asyncio.run(store.create())
    document = json.loads((tmp_path / "store" / "surfw.json").read_text())
    assert document == {"format": "surfw.store", "version": 1}


def test_what_an_interrupted_first_run_left_is_no_obstacle(store: Store, tmp_path: Path) -> None:
    (tmp_path / "store" / "partial" / "abc").mkdir(parents=True)
    (tmp_path / "store" / "partial" / "abc" / "journal.jsonl").write_text("half")
    asyncio.run(store.create())
    asyncio.run(store.check())


def test_a_place_with_other_things_is_left_alone(store: Store, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir(exist_ok=True)
    (tmp_path / "store" / "thesis.doc").write_text("precious")
    with pytest.raises(
        NotAStoreError, match=r"holds other things \(such as thesis\.doc\) and no surfw\.json; choose an"
    ):
        asyncio.run(store.create())
    with pytest.raises(
        NotAStoreError, match=r"is not a surfw store \(surfw\.json is missing\); name the folder or URL"
    ):
        asyncio.run(store.check())
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["thesis.doc"]


@pytest.mark.parametrize(
    ("marker", "complaint"),
    [
        (b"", "its surfw.json cannot be read"),
        (b"[1]", "its surfw.json cannot be read"),
        (b'{"version": 1}', "its surfw.json cannot be read"),
        (b'{"format": "surfer", "version": 1}', "its surfw.json says 'surfer', not 'surfw.store'"),
        (b'{"format": "surfw.store", "version": 2}', "is a store of version 2; this surfw reads 1"),
        (b"\xff\xfe", "its surfw.json cannot be read"),
    ],
)
def test_a_marker_that_says_something_else(store: Store, tmp_path: Path, marker: bytes, complaint: str) -> None:
    (tmp_path / "store").mkdir(exist_ok=True)
    (tmp_path / "store" / "surfw.json").write_bytes(marker)
    for work in (store.check(), store.create()):
        with pytest.raises(NotAStoreError) as caught:
            asyncio.run(work)
        assert complaint in str(caught.value)
    assert (tmp_path / "store" / "surfw.json").read_bytes() == marker


def test_models_are_visible_once_published(store: Store, tmp_path: Path) -> None:
    asyncio.run(store.create())
    (tmp_path / "store" / "partial").mkdir(exist_ok=True)
    (tmp_path / "store" / "partial" / "x.json").write_text("{}")
    (tmp_path / "store" / "models").mkdir(exist_ok=True)
    (tmp_path / "store" / "models" / "notes.txt").write_text("no model")
    assert asyncio.run(store.models()) == []
    with pytest.raises(UnknownModelError, match="holds no model yet"):
        asyncio.run(store.manifest("toy"))
    for name in ("toy", "org/toy", "org/other"):
        asyncio.run(store.publish(replace(MANIFEST, name=name)))
    assert asyncio.run(store.models()) == ["org/other", "org/toy", "toy"]
    assert asyncio.run(store.manifest("org/toy")) == replace(MANIFEST, name="org/toy")
    with pytest.raises(UnknownModelError, match="has no model 'tory'; it has: org/other, org/toy, toy"):
        asyncio.run(store.manifest("tory"))


def test_files_that_cannot_be_models_are_left_out_with_a_word(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asyncio.run(store.publish(MANIFEST))
    (tmp_path / "store" / "models" / "-x.json").write_text("{}")
    for _ in range(2):
        assert asyncio.run(store.models()) == ["toy"]
    (record,) = caplog.records
    assert record.getMessage() == f"{store.url} holds '-x', which cannot be a model's name; it is left out"


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../b", "", "a\0"])
def test_a_name_never_leads_out_of_the_store(store: Store, tmp_path: Path, name: str) -> None:
    (tmp_path / "x.json").write_bytes(MANIFEST.encode())
    with pytest.raises(ManifestError, match="cannot be used"):
        asyncio.run(store.manifest(name))
    with pytest.raises(ManifestError, match=r"cannot be used|is not valid"):
        asyncio.run(store.publish(replace(MANIFEST, name=name)))


def test_a_manifest_under_another_name_is_an_error(store: Store, tmp_path: Path) -> None:
    asyncio.run(store.publish(MANIFEST))
    (tmp_path / "store" / "models" / "toy.json").rename(tmp_path / "store" / "models" / "boy.json")
    with pytest.raises(StorageError, match=r"models/boy\.json in .* is the manifest of 'toy'"):
        asyncio.run(store.manifest("boy"))


def test_a_damaged_manifest_names_its_place(store: Store, tmp_path: Path) -> None:
    asyncio.run(store.publish(MANIFEST))
    path = tmp_path / "store" / "models" / "toy.json"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(
        ManifestError, match=r"the manifest from .*/store, model toy is damaged: the digest of its bytes is "
    ):
        asyncio.run(store.manifest("toy"))


@pytest.mark.parametrize("config", [{"x": "\ud800"}, {"x": float("nan")}])
def test_what_could_not_be_read_again_is_not_published(store: Store, config: dict[str, object]) -> None:
    with pytest.raises(ManifestError, match=r"cannot be written as JSON|is not valid"):
        asyncio.run(store.publish(replace(MANIFEST, config=config)))
    assert asyncio.run(store.models()) == []


def test_files_that_cannot_be_models_are_left_out(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asyncio.run(store.create())
    asyncio.run(store.publish(MANIFEST))
    for stray in ("a b.json", "x\n.json", ".json"):
        (tmp_path / "store" / "models" / stray).write_text("{}")
    for _ in range(2):
        assert asyncio.run(store.models()) == [MANIFEST.name]
    assert "holds 'x\\n', which cannot be a model's name" in caplog.text
    assert caplog.text.count("'a b'") == 1


def test_keys() -> None:
    assert manifest_key("org/x") == "models/org/x.json"
    assert blob_key("abcdef", ".safetensors") == "blobs/ab/abcdef.safetensors"


@st.composite
def placed(draw: st.DrawFn) -> tuple[list[Location], bytes, dict[str, bytes]]:
    """Stored bytes in ranges of several objects: the locations, the bytes, and the objects."""
    objects = {name: draw(st.binary(min_size=20, max_size=40)) for name in "abc"}
    locations = []
    for _ in range(draw(st.integers(1, 5))):
        start = draw(st.integers(0, 20))
        locations.append(Location(draw(st.sampled_from("abc")), start, draw(st.integers(start, 20))))
    joined = b"".join(objects[at.object][at.start : at.stop] for at in locations)
    return locations, joined, objects


@given(placed(), st.data())
def test_segments_are_the_bytes_of_the_range(
    place: tuple[list[Location], bytes, dict[str, bytes]], data: st.DataObject
) -> None:
    locations, joined, objects = place
    start = data.draw(st.integers(0, len(joined)))
    stop = data.draw(st.integers(start, len(joined)))
    found = segments(locations, start, stop)
    assert b"".join(objects[key][at : at + length] for key, at, length in found) == joined[start:stop]
    assert all(length > 0 for _, _, length in found)


def test_what_is_published_can_be_read_from_a_store_and_from_a_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = make_store(tmp_path, sizes=(10,))
    assert WireLimits().manifest_bytes == MANIFEST_BYTES
    stored = (tmp_path / manifest_key(manifest.name)).stat().st_size
    store = Store(FilesystemBackend(tmp_path))
    for most in (stored, stored - 1):
        for module in ("surfw.manifest.parser", "surfw.storage.store"):
            monkeypatch.setattr(f"{module}.MANIFEST_BYTES", most)
        if most == stored:
            asyncio.run(store.publish(manifest))
            assert asyncio.run(store.manifest(manifest.name)) == manifest
        else:
            with pytest.raises(ManifestError, match=rf"has {stored} bytes, expected at most {most}$"):
                asyncio.run(store.publish(manifest))
