"""Coded forms in a store: written with the plain ones, resumed, verified, and copied to other stores."""

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

from surfw import Housekeeping
from surfw.chunking import copy_model, prepare_model, write_model
from surfw.chunking.write import ChunkWriter
from surfw.codec import check_codecs
from surfw.config import MIB
from surfw.errors import ConfigurationError, ManifestError
from surfw.manifest import Chunk, Manifest, encode_stored_manifest, parse_stored_manifest, payload_digest
from surfw.storage import FilesystemBackend, Store, open_backend
from surfw.storage.store import manifest_key
from surfw.storage.store_source import open_storage_source
from tests.checkpoints import save_llama
from tests.chunking.test_write import Payloads, make, planned, run
from tests.cli.run import surfw
from tests.runtime.test_coded import weights
from tests.servers import serve
from tests.toys import code, toy_chunk

BOTH = ("none", "lossless")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA in bfloat16 whose layers have several frames."""
    return save_llama(tmp_path_factory.mktemp("codecs") / "tiny", layers=2, hidden=640, dtype=torch.bfloat16)


def chunk_into(store: Path, checkpoint: Path, codecs: tuple[str, ...]) -> Manifest:
    with prepare_model(str(checkpoint)) as prepared:
        return asyncio.run(write_model(prepared, open_backend(store), codecs=codecs))


def stored(backend: FilesystemBackend, chunk: Chunk, index: int) -> bytes:
    (place,) = chunk.forms[index].locations
    return asyncio.run(backend.load_range(place.object, place.start, place.stop))


@pytest.fixture
def backend(tmp_path: Path) -> FilesystemBackend:
    return FilesystemBackend(tmp_path / "store")


def writer(backend: FilesystemBackend, source: Payloads, codecs: tuple[str, ...] = BOTH) -> ChunkWriter:
    made = make(backend, source)
    made.codecs = codecs
    return made


def test_both_forms_are_written_of_one_reading(backend: FilesystemBackend) -> None:
    toys = [weights("a", 9 * MIB + 5), toy_chunk("noise", [("U8", (3 * MIB,))]), toy_chunk("empty", [("U8", (0,))])]
    source = Payloads(toys)
    made = run(writer(backend, source), planned(toys))
    assert [[form.codec for form in chunk.forms] for chunk in made] == [
        ["none", "lossless"],
        ["none"],
        ["none"],
    ]
    for (toy, payload), chunk in zip(toys, made, strict=True):
        assert (chunk.id, stored(backend, chunk, 0)) == (toy.id, payload)
    form, coded = code(*toys[0])
    assert stored(backend, made[0], 1) == coded
    assert (made[0].forms[1].frames, made[0].forms[1].digest) == (form.frames, form.digest)
    assert sum(size for name, _, size in source.reads if name == "a") == len(toys[0][1])


def test_one_form_alone_is_written_also_where_it_saves_nothing(backend: FilesystemBackend, tmp_path: Path) -> None:
    toys = [weights("a", 2 * MIB), toy_chunk("noise", [("U8", (2 * MIB,))])]
    made = run(writer(backend, Payloads(toys), ("lossless",)), planned(toys))
    assert [[form.codec for form in chunk.forms] for chunk in made] == [["lossless"]] * 2
    assert made[1].forms[0].stored_bytes == 2 * MIB
    assert [chunk.id for chunk in made] == [toy.id for toy, _ in toys]
    assert not list((tmp_path / "store").glob("blobs/*/*.safetensors"))


def test_an_interrupted_run_goes_on_with_both_forms(backend: FilesystemBackend, tmp_path: Path) -> None:
    toys = [weights("a", 2 * MIB), weights("b", 2 * MIB, seed=1)]
    source = Payloads(toys)
    source.failing = "b"
    with pytest.raises(Exception, match="b cannot be read"):
        run(writer(backend, source), planned(toys))
    again = Payloads(toys)
    made = run(writer(backend, again), planned(toys))
    assert again.names == ["b"]
    fresh = run(writer(FilesystemBackend(tmp_path / "other"), Payloads(toys)), planned(toys))
    assert made == fresh


def test_a_form_that_has_vanished_is_written_again(backend: FilesystemBackend, tmp_path: Path) -> None:
    toys = [weights("a", 2 * MIB)]
    (chunk,) = run(writer(backend, Payloads(toys)), planned(toys))
    path = tmp_path / "store" / chunk.forms[1].locations[0].object
    before = path.read_bytes()
    path.unlink()
    assert run(writer(backend, Payloads(toys)), planned(toys)) == [chunk]
    assert path.read_bytes() == before


def test_a_disk_without_room_for_both_gets_the_form_in_parts(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with prepare_model(str(checkpoint)) as prepared:
        free = int(1.5 * prepared.plan.payload_bytes)
        monkeypatch.setattr("surfw.chunking.write.shutil.disk_usage", lambda _: SimpleNamespace(free=free))
        manifest = asyncio.run(write_model(prepared, open_backend(tmp_path / "store"), codecs=BOTH))
    assert {form.codec for chunk in manifest.chunks for form in chunk.forms} == {"none"}
    assert "has no space for compressed forms of tiny beside the others" in caplog.text


@pytest.mark.parametrize("codecs", [("none",), ("lossless",), BOTH])
def test_a_copy_is_the_same_model_in_other_forms(codecs: tuple[str, ...], checkpoint: Path, tmp_path: Path) -> None:
    for given in [("none",), ("lossless",)]:
        original = chunk_into(tmp_path / given[0], checkpoint, given)

        async def copy(place: Path = tmp_path / given[0], name: str = f"{given[0]}-copy") -> Manifest:
            async with await open_storage_source(open_backend(place)) as source:
                return await copy_model(source, "tiny", open_backend(tmp_path / "to"), name=name, codecs=codecs)

        copied = asyncio.run(copy())
        expected = chunk_into(tmp_path / "-".join(codecs), checkpoint, codecs)
        assert copied.chunks == expected.chunks
        assert copied.files == expected.files
        assert (copied.config, copied.order, copied.ties) == (original.config, original.order, original.ties)
        assert asyncio.run(Store(open_backend(tmp_path / "to")).manifest(copied.name)) == copied


def test_a_copy_comes_from_a_server_too(checkpoint: Path, tmp_path: Path) -> None:
    from surfw.client import open_wire_source

    original = chunk_into(tmp_path / "from", checkpoint, BOTH)

    async def copy(url: str) -> Manifest:
        async with await open_wire_source(url) as source:
            return await copy_model(source, None, open_backend(tmp_path / "to"), codecs=BOTH)

    with serve(tmp_path / "from") as served:
        assert asyncio.run(copy(served.url)) == original


def test_a_copy_with_a_bad_name_writes_nothing(checkpoint: Path, tmp_path: Path) -> None:
    chunk_into(tmp_path / "from", checkpoint, ("none",))

    async def copy() -> Manifest:
        async with await open_storage_source(open_backend(tmp_path / "from")) as source:
            return await copy_model(source, "tiny", open_backend(tmp_path / "to"), name="../evil")

    with pytest.raises(ManifestError, match="evil"):
        asyncio.run(copy())
    assert not (tmp_path / "to").exists()


def test_the_command_copies(checkpoint: Path, tmp_path: Path) -> None:
    chunk_into(tmp_path / "from", checkpoint, ("none",))
    command = ["chunk", "tiny", "--from", str(tmp_path / "from"), "--name", "org/mine"]
    plan = json.loads(surfw(tmp_path, *command, "--dry-run", "--json").stdout)
    assert not (tmp_path / "store").exists()
    facts = json.loads(surfw(tmp_path, *command, "--codec", "lossless", "--json").stdout)
    assert plan == {key: facts[key] for key in plan}
    assert facts["form_bytes"].keys() == {"lossless"}
    said = surfw(tmp_path, *command)
    assert (said.returncode, said.stderr) == (0, "")
    assert said.stdout.startswith("org/mine: 5 chunks (2 layers), ")
    verified = surfw(tmp_path, "verify", "org/mine")
    assert verified.returncode == 0, verified.stderr


def test_a_run_that_goes_on_with_more_room_does_not_mix_forms(backend: FilesystemBackend) -> None:
    toys = [weights("a", 2 * MIB), weights("b", 2 * MIB, seed=1)]
    source = Payloads(toys)
    source.failing = "b"
    with pytest.raises(Exception, match="b cannot be read"):
        run(writer(backend, source, ("none",)), planned(toys))
    made = run(writer(backend, Payloads(toys)), planned(toys))
    assert [len(chunk.forms) for chunk in made] == [2, 2]


def test_a_copy_adds_a_form_to_the_very_store(checkpoint: Path, tmp_path: Path) -> None:
    original = chunk_into(tmp_path / "store", checkpoint, ("none",))
    blobs = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").glob("blobs/*/*.safetensors")}

    async def copy() -> Manifest:
        backend = open_backend(tmp_path / "store")
        async with await open_storage_source(backend, owned=False) as source:
            return await copy_model(source, "tiny", backend, codecs=BOTH)

    copied = asyncio.run(copy())
    assert [chunk.id for chunk in copied.chunks] == [chunk.id for chunk in original.chunks]
    assert {path: path.stat().st_mtime_ns for path in blobs} == blobs
    assert {form.codec for chunk in copied.chunks for form in chunk.forms} == set(BOTH)


def test_a_copy_that_is_cancelled_gives_its_fetch_up(checkpoint: Path, tmp_path: Path) -> None:
    chunk_into(tmp_path / "store", checkpoint, ("none",))

    async def copy() -> None:
        async with await open_storage_source(open_backend(tmp_path / "store")) as source:
            began = asyncio.Event()

            async def fetch(*_: object) -> None:
                began.set()
                await asyncio.Event().wait()

            with patch.object(source, "fetch", fetch):
                manifest = await source.manifest("tiny")
                copying = asyncio.create_task(copy_model(source, manifest, open_backend(tmp_path / "to")))
                await began.wait()
                copying.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await copying

    asyncio.run(copy())
    assert not list((tmp_path / "to").rglob("models/*"))


def republish(store: Path, manifest: Manifest, **changes: object) -> None:
    """Publish the manifest again with changes to the form `lossless` of its first layer."""
    document = json.loads(manifest.encode())
    layers = [one for one in document["chunks"] if one["kind"] == "layer"]
    chunk, other = layers if changes.pop("first", True) else reversed(layers)
    form = next(one for one in chunk["forms"] if one["codec"] == "lossless")
    form.update(next(one for one in other["forms"] if one["codec"] == "lossless") if changes.pop("swap", False) else {})
    form.update(changes)
    data = json.dumps(document).encode()
    path = store / manifest_key(manifest.name)
    path.write_bytes(f"surfw.manifest blake3 {payload_digest(data)}\n".encode() + data)


def test_verify_decodes_coded_forms(checkpoint: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    manifest = chunk_into(store, checkpoint, BOTH)

    async def verify() -> list[str]:
        async with Housekeeping(str(store)) as housekeeping:
            return [one.complaint for one in (await housekeeping.verify()).damage]

    assert asyncio.run(verify()) == []
    for first in (True, False):
        republish(store, manifest, swap=True, first=first)
        (complaint,) = asyncio.run(verify())
        assert complaint.startswith("it decodes to BLAKE3 ")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"frames": []}, "are not one for each MiB of its payload"),
        ({"frames": None}, "is not a list"),
        ({"frames": [1 << 40]}, "are not one for each MiB of its payload"),
        ({"stored_bytes": 12}, "do not add up to 12 bytes"),
        ({"frames": "all"}, "is not a list"),
    ],
)
def test_wrong_frames_are_refused_before_anything_is_read(
    changes: dict[str, object], says: str, checkpoint: Path, tmp_path: Path
) -> None:
    manifest = chunk_into(tmp_path, checkpoint, BOTH)
    republish(tmp_path, manifest, **changes)
    with pytest.raises(Exception, match=says):
        asyncio.run(Store(open_backend(tmp_path)).manifest(manifest.name))


def test_a_manifest_with_coded_forms_has_a_version_of_its_own(checkpoint: Path, tmp_path: Path) -> None:
    plain, coded = (chunk_into(tmp_path / codecs[0], checkpoint, codecs) for codecs in [("none",), ("lossless",)])
    assert [json.loads(one.encode())["version"] for one in (plain, coded)] == [1, 3]
    assert parse_stored_manifest(encode_stored_manifest(coded), where="here") == coded


def test_codecs_are_checked() -> None:
    assert check_codecs(["lossless", "none"]) == BOTH
    for wrong in ([], ["zip"], ["none", "int1"]):
        with pytest.raises(ConfigurationError, match="expected none or lossless or int8 or int4"):
            check_codecs(wrong)
