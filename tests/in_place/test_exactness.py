"""A model in place gives the bits of the resident one, for every family whose weights are stored as used."""

import asyncio
import copy
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from surfw.chunking import prepare_model, write_model
from surfw.chunking.in_place import write_in_place
from surfw.errors import UnsupportedModelError
from surfw.manifest import Manifest
from surfw.models import StreamingModel
from surfw.storage import open_backend
from tests.checkpoints import save_llama
from tests.exactness.families import FAMILIES
from tests.exactness.test_families import inputs
from tests.in_place.disk import written
from tests.servers import serve

COPIED = {"llama-tied", "t5", "albert-shared-layers", "mixtral-experts"}
"""Compared with a copy."""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of the test's own."""
    monkeypatch.setenv("SURFW_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name: str, home: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    FAMILIES[name].build().save_pretrained(tmp_path / name, max_shard_size="200KB")
    resident = copy.deepcopy(getattr(transformers, FAMILIES[name].class_name).from_pretrained(tmp_path / name))
    given = inputs(resident, 2)
    with torch.no_grad():
        want = resident(**given).logits
    for known in (False, True):
        with StreamingModel.open(str(tmp_path / name), cache_size=1) as streaming, torch.no_grad():
            assert streaming.manifest.is_known is known
            assert torch.equal(streaming(**given).logits, want)
            manifest = streaming.manifest
    if name in COPIED:
        assert_same_chunks(manifest, copied(tmp_path / name, tmp_path / "copy"))


def test_experts_that_are_not_stored_as_they_are_used(home: Path, tmp_path: Path) -> None:
    FAMILIES["mixtral-experts"].build().save_pretrained(tmp_path / "mixed")
    state = load_file(tmp_path / "mixed" / "model.safetensors")
    name = next(name for name in state if ".w1.weight" in name)
    save_file(state | {name: state[name].bfloat16()}, tmp_path / "mixed" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=r"of 8 tensors .*run surfw chunk without --in-place"):
        StreamingModel.open(str(tmp_path / "mixed"))


def copied(checkpoint: Path, store: Path) -> Manifest:
    """The manifest of a chunked copy."""
    with prepare_model(str(checkpoint)) as prepared:
        return asyncio.run(write_model(prepared, open_backend(store)))


def assert_same_chunks(manifest: Manifest, copy: Manifest) -> None:
    """Check that identities, digests and the rest of the manifest equal those of the copy, except for locations."""
    assert manifest.public().encode() == copy.public().encode()
    assert manifest.digest == copy.digest


def run(source: str, **options: Any) -> torch.Tensor:
    """Return the logits of a few tokens, streamed with little memory."""
    with StreamingModel.open(source, **options) as streaming, torch.no_grad():
        return torch.as_tensor(streaming(input_ids=torch.arange(3, 12)[None]).logits)


@pytest.fixture
def llama(tmp_path: Path) -> Iterator[tuple[Path, torch.Tensor]]:
    """A checkpoint of some MB with a table of embeddings over 1 MiB, and the resident model's logits."""
    path = save_llama(tmp_path / "llama", hidden=1024, layers=3)
    model = copy.deepcopy(transformers.AutoModelForCausalLM.from_pretrained(path))
    with torch.no_grad():
        yield path, model(input_ids=torch.arange(3, 12)[None]).logits


def test_served_from_a_folder_by_two_servers_one_of_which_is_killed(
    llama: tuple[Path, torch.Tensor], home: Path, tmp_path: Path
) -> None:
    path, want = llama
    before = {file: file.stat() for file in path.iterdir()}
    with serve(None, str(path)) as first, serve(None, str(path)) as second:
        assert torch.equal(run(first.url, memory_budget="95MB"), want)
        assert "libtorch" not in Path(f"/proc/{first.process.pid}/maps").read_text()  # a child process read the model
        os.kill(first.process.pid, signal.SIGKILL)
        with StreamingModel.open(second.url) as known:
            assert known.manifest.is_known  # another process computed them, and was killed
            assert known.manifest.digest == copied(path, tmp_path / "copy").digest
        assert torch.equal(run(second.url, cache_size=1), want)
    assert written(home) < 100_000
    assert {file: file.stat().st_mtime_ns for file in path.iterdir()} == {k: v.st_mtime_ns for k, v in before.items()}


def test_rows_of_a_table_are_read_alone_once_its_digests_are_known(
    llama: tuple[Path, torch.Tensor], home: Path
) -> None:
    path, want = llama
    for known in (False, True):
        with StreamingModel.open(str(path), memory_budget="120MB") as streaming, torch.no_grad():
            assert streaming.manifest.is_known is known
            assert streaming.statistics()["cache"]["fetched_bytes"] < streaming.manifest.payload_bytes
            assert torch.equal(streaming(input_ids=torch.arange(3, 12)[None]).logits, want)
            assert streaming.metrics.count("row_reads") > 0


def test_a_store_that_points_at_the_checkpoint_holds_its_digests_and_no_weights(
    llama: tuple[Path, torch.Tensor], home: Path, tmp_path: Path
) -> None:
    path, want = llama
    with prepare_model(str(path)) as prepared:
        manifest = asyncio.run(write_in_place(prepared, open_backend(tmp_path / "store")))
    assert manifest.is_known
    assert written(tmp_path / "store") < 100_000
    assert torch.equal(run(str(tmp_path / "store"), cache_size=1), want)
    assert_same_chunks(manifest, copied(path, tmp_path / "copy"))


def save_mixed(path: Path, name: str) -> None:
    """A model in bfloat16 with some tensors saved in float32, as is common for norms."""
    torch.manual_seed(0)
    FAMILIES[name].build().to(torch.bfloat16).save_pretrained(path)
    tensors = load_file(path / "model.safetensors")
    mixed = {key: one.float() + 1e-4 if one.dim() == 1 or "0" in key else one for key, one in tensors.items()}
    save_file(mixed, path / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("dtype", [None, "float32", "float16"])
@pytest.mark.parametrize("name", ["llama", "roberta"])
def test_another_precision_is_converted_on_arrival(name: str, dtype: str | None, home: Path, tmp_path: Path) -> None:
    save_mixed(tmp_path / "model", name)
    cls = getattr(transformers, FAMILIES[name].class_name)
    resident = copy.deepcopy(cls.from_pretrained(tmp_path / "model", dtype=dtype or "auto"))
    given = inputs(resident, 2)
    with prepare_model(str(tmp_path / "model"), dtype=dtype) as prepared:
        manifest = asyncio.run(write_in_place(prepared, open_backend(tmp_path / "store")))
    assert {tensor.dtype for tensor in manifest.tensors.values()} == {"F32", "BF16"}
    with StreamingModel.open(str(tmp_path / "store"), cache_size=1) as streaming, torch.no_grad():
        assert str(streaming.model.dtype) == f"torch.{dtype or 'bfloat16'}"
        assert torch.equal(streaming(**given).logits, resident(**given).logits)


def test_shards_may_lie_in_folders(home: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    FAMILIES["llama"].build().save_pretrained(tmp_path / "model", max_shard_size="200KB")
    index = tmp_path / "model/model.safetensors.index.json"
    document = json.loads(index.read_text())
    (tmp_path / "model/weights/more").mkdir(parents=True)
    for file in set(document["weight_map"].values()):
        (tmp_path / "model" / file).rename(tmp_path / "model/weights/more" / file)
    document["weight_map"] = {name: f"weights/more/{file}" for name, file in document["weight_map"].items()}
    index.write_text(json.dumps(document))
    resident = copy.deepcopy(transformers.LlamaForCausalLM.from_pretrained(tmp_path / "model"))
    given = inputs(resident, 2)
    manifest = copied(tmp_path / "model", tmp_path / "copy")
    for source in (tmp_path / "model", tmp_path / "copy"):
        with StreamingModel.open(str(source), cache_size=1) as streaming, torch.no_grad():
            assert torch.equal(streaming(**given).logits, resident(**given).logits)
            assert [one.name for one in streaming.manifest.chunks] == [one.name for one in manifest.chunks]


def test_what_is_no_range_of_the_checkpoint_is_refused(llama: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    path, _ = llama
    store = open_backend(tmp_path / "store")
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    (path / "model.safetensors").unlink()
    torch.save(model.state_dict(), path / "pytorch_model.bin")
    with (
        prepare_model(str(path)) as prepared,
        pytest.raises(UnsupportedModelError, match=r"pytorch_model.bin is no safetensors file; run surfw chunk"),
    ):
        asyncio.run(write_in_place(prepared, store))
    assert not (tmp_path / "store").exists()
