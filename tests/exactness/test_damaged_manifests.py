"""Every reader refuses a damaged manifest, verification names it, and it never changes a logit."""

import asyncio
import copy
import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

from surfw.chunking import prepare_model, write_model
from surfw.chunking.in_place import write_in_place
from surfw.client.wire_source import open_wire_source
from surfw.errors import IntegrityError, ManifestError, StorageError, SurfwError
from surfw.models import StreamingModel
from surfw.server import WeightServer
from surfw.storage import FilesystemBackend, Store, open_backend
from surfw.storage.housekeeping import Housekeeping
from tests.exactness.families import FAMILIES
from tests.exactness.test_families import inputs

FLIPS = 40
COPIED = ("llama-tied", "t5", "mixtral-experts")
IN_PLACE = ("llama", "bert-mlm")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    for name in (*COPIED, *IN_PLACE):
        torch.manual_seed(1)
        FAMILIES[name].build().save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def store(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store")
    path.rmdir()
    for name in (*COPIED, *IN_PLACE):
        with prepare_model(str(checkpoints / name)) as prepared:
            write = write_in_place if name in IN_PLACE else write_model
            asyncio.run(write(prepared, open_backend(path)))
    return path


def flips(data: bytes, seed: str) -> Iterator[bytes]:
    """The bytes with one bit flipped somewhere."""
    source = random.Random(seed)
    for _ in range(FLIPS):
        at = source.randrange(8 * len(data))
        yield data[: at // 8] + bytes([data[at // 8] ^ 1 << at % 8]) + data[at // 8 + 1 :]


def replace(path: Path, data: bytes) -> None:
    """Replace a file as a storage does that replaces whole objects."""
    other = path.with_name("other")
    other.write_bytes(data)
    other.replace(path)


@pytest.mark.parametrize("name", [*COPIED, *IN_PLACE])
def test_a_flipped_bit_in_a_manifest_is_refused_by_every_reader(name: str, store: Path) -> None:
    path = store / "models" / f"{name}.json"
    data = path.read_bytes()

    async def read_all() -> None:
        async with WeightServer(model_path=store, port=0) as server:
            source = await open_wire_source(server.url)
            whole = await source.manifest(name)
            for damaged in flips(data, name):
                replace(path, damaged)
                with pytest.raises(ManifestError, match=r"is damaged|is not JSON"):
                    await Store(FilesystemBackend(store)).manifest(name)
                with pytest.raises(SurfwError):
                    await source.manifest(name)
                verified = await Housekeeping(FilesystemBackend(store)).verify(name)
                assert [(one.model, one.part) for one in verified.damage] == [(name, "")]
            replace(path, data)
            assert await source.manifest(name) == whole
            assert (await Housekeeping(FilesystemBackend(store)).verify(name)).damage == ()
            await source.close()

    try:
        asyncio.run(read_all())
    finally:
        replace(path, data)


@pytest.mark.parametrize("name", ["llama-tied", "bert-mlm"])
def test_what_would_give_other_logits_is_not_opened(name: str, store: Path) -> None:
    path = store / "models" / f"{name}.json"
    data = path.read_bytes()
    key = "rms_norm_eps" if name == "llama-tied" else "layer_norm_eps"
    epsilon = json.loads(data.partition(b"\n")[2])["config"][key]
    damaged = data.replace(f'"{key}":{epsilon}'.encode(), f'"{key}":1e-02'.encode())
    assert damaged != data
    try:
        replace(path, damaged)
        with pytest.raises(ManifestError, match="is damaged"):
            StreamingModel.open(str(store), name)
    finally:
        replace(path, data)


def test_a_manifest_without_a_digest_is_opened_and_verifying_says_so(
    store: Path, checkpoints: Path, tmp_path: Path
) -> None:
    path = store / "models" / "llama-tied.json"
    data = path.read_bytes()
    replace(path, data.partition(b"\n")[2])
    resident = copy.deepcopy(transformers.LlamaForCausalLM.from_pretrained(checkpoints / "llama-tied"))
    given = inputs(resident, 2)
    try:
        with StreamingModel.open(str(store), "llama-tied") as streaming, torch.no_grad():
            assert torch.equal(streaming(**given).logits, resident(**given).logits)
        verified = asyncio.run(Housekeeping(FilesystemBackend(store)).verify())
        assert (verified.damage, verified.undigested) == ((), ("llama-tied",))
        with prepare_model(str(checkpoints / "llama-tied")) as prepared:
            asyncio.run(write_model(prepared, open_backend(store)))
        assert path.read_bytes() == data
        assert asyncio.run(Housekeeping(FilesystemBackend(store)).verify()).undigested == ()
    finally:
        replace(path, data)


def test_while_a_manifest_is_damaged_nothing_is_pruned_and_chunking_again_mends_it(
    store: Path, checkpoints: Path
) -> None:
    path = store / "models" / "t5.json"
    data = path.read_bytes()
    blobs = sorted(store.glob("blobs/*/*"))
    replace(path, data.replace(b'"layer"', b'"layes"', 1))
    house = Housekeeping(FilesystemBackend(store))
    try:
        with pytest.raises(StorageError, match=r"models/t5\.json: the manifest from .* is damaged.*nothing is removed"):
            asyncio.run(house.prune())
        assert "is damaged" in asyncio.run(house.contents()).complaints[0]
        with prepare_model(str(checkpoints / "t5")) as prepared:
            asyncio.run(write_model(prepared, open_backend(store)))
        assert path.read_bytes() == data
    finally:
        replace(path, data)
    assert sorted(store.glob("blobs/*/*")) == blobs


def test_a_damaged_log_of_digests_is_neither_believed_nor_an_error(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SURFW_HOME", str(tmp_path / "home"))
    place = str(shutil.copytree(checkpoints / "llama", tmp_path / "llama"))
    resident = copy.deepcopy(transformers.LlamaForCausalLM.from_pretrained(place))
    given = inputs(resident, 2)
    with torch.no_grad():
        want = resident(**given).logits

    def run() -> bool:
        with StreamingModel.open(place) as streaming, torch.no_grad():
            assert torch.equal(streaming(**given).logits, want)
            return streaming.manifest.is_known

    run()
    (log,) = (tmp_path / "home" / "digests").iterdir()
    whole = log.read_bytes()
    lines = whole.splitlines()
    damaged = [
        line[:at] + bytes([line[at] ^ 1]) + line[at + 1 :] for line in lines for at in [len(line) * 3 // 4] if line
    ]
    log.write_bytes(b"\n".join(damaged) + b"\n")
    assert run() is False, "no damaged line is believed"
    assert run() is True, "what was damaged was found out again"
    shard = Path(place) / "model.safetensors"
    before = shard.stat()
    data = shard.read_bytes()
    with shard.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(bytes([data[-1] ^ 1]))
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(IntegrityError):
        run()
