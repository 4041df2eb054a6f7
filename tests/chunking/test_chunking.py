"""Chunking a real checkpoint: preparing, writing, publishing, and resuming after failures."""

import asyncio
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from surfw.checkpoint import open_directory
from surfw.chunking import PreparedModel, prepare_model, write_model
from surfw.errors import (
    CheckpointError,
    ConfigurationError,
    ManifestError,
    NotAStoreError,
    StorageError,
    UnsupportedModelError,
)
from surfw.manifest import Manifest, split_name
from surfw.storage import FilesystemBackend, Store
from tests.exactness.families import FAMILIES
from tests.services import warm

TOKENIZER = '{"version": "1.0"}'


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaMA with a tied head, saved by transformers, with two tokenizer files."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    torch.manual_seed(0)
    FAMILIES["llama-tied"].build().save_pretrained(folder)
    (folder / "tokenizer.json").write_text(TOKENIZER)
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


@pytest.fixture
def checkpoint(saved: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint, to be changed."""
    return Path(shutil.copytree(saved, tmp_path / "tiny"))


@pytest.fixture
def backend(tmp_path: Path) -> FilesystemBackend:
    return FilesystemBackend(tmp_path / "store")


def change(folder: Path, **settings: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def chunk(backend: FilesystemBackend, folder: Path, **options: Any) -> Manifest:
    with prepare_model(str(folder), **options) as prepared:
        return asyncio.run(write_model(prepared, backend))


def tensors(backend: FilesystemBackend, manifest: Manifest) -> dict[str, torch.Tensor]:
    """Every stored tensor, read back by the safetensors library."""
    found: dict[str, torch.Tensor] = {}
    for one in manifest.chunks:
        found |= load_file(backend.local_path(one.forms[0].locations[0].object))
    return found


def open_files() -> list[str]:
    """The targets of this process's file descriptors."""
    return sorted(str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink())


def test_what_is_stored_is_the_checkpoint(backend: FilesystemBackend, saved: Path) -> None:
    manifest = chunk(backend, saved)
    source = load_file(saved / "model.safetensors")
    stored = tensors(backend, manifest)
    assert set(stored) == set(source)
    assert all(torch.equal(stored[name], source[name]) for name in source)
    assert manifest.name == "tiny"
    assert manifest.class_name == "LlamaForCausalLM"
    assert manifest.dtype == "float32"
    assert manifest.ties == {"lm_head.weight": "model.embed_tokens.weight"}
    assert [one.name for one in manifest.chunks] == [
        "model.embed_tokens", "model.layers.0", "model.layers.1", "model.layers.2", "model.layers.3", "model.norm",
    ]  # fmt: skip
    assert manifest.layer_count == 4
    assert manifest.order[-1].module == "lm_head"
    assert manifest.order[-1].chunks == ("model.embed_tokens",)
    assert manifest.config["hidden_size"] == 64
    assert manifest.generation_config is not None
    assert [file.path for file in manifest.files] == ["tokenizer.json", "tokenizer_config.json"]
    assert asyncio.run(backend.load(manifest.file("tokenizer.json").object)) == TOKENIZER.encode()
    assert asyncio.run(Store(backend).manifest("tiny")) == manifest
    assert not backend.spool().exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "fp16", "float64"])
def test_another_dtype_is_cast_as_torch_casts(backend: FilesystemBackend, saved: Path, dtype: str) -> None:
    manifest = chunk(backend, saved, dtype=dtype, name="cast")
    wanted = {"bfloat16": torch.bfloat16, "fp16": torch.float16, "float64": torch.float64}[dtype]
    stored = tensors(backend, manifest)
    for name, tensor in load_file(saved / "model.safetensors").items():
        assert stored[name].dtype == wanted
        assert torch.equal(stored[name], tensor.to(wanted))
    assert manifest.dtype == str(wanted).removeprefix("torch.")
    assert manifest.name == "cast"


def test_the_dtype_is_the_configurations_and_else_that_of_the_weights(
    backend: FilesystemBackend, checkpoint: Path
) -> None:
    change(checkpoint, dtype="bfloat16")
    assert chunk(backend, checkpoint).dtype == "bfloat16"
    change(checkpoint, dtype=None)
    assert chunk(backend, checkpoint).dtype == "float32"


def test_chunking_again_changes_no_blob_in_substance(backend: FilesystemBackend, saved: Path) -> None:
    first = chunk(backend, saved)
    before = {path.name: path.read_bytes() for path in backend.base.glob("blobs/*/*")}
    assert chunk(backend, saved) == first
    assert {path.name: path.read_bytes() for path in backend.base.glob("blobs/*/*")} == before


def test_a_copy_under_another_name_shares_all_blobs(backend: FilesystemBackend, saved: Path) -> None:
    first = chunk(backend, saved)
    blobs = sorted(backend.base.glob("blobs/*/*"))
    second = chunk(backend, saved, name="org/copy")
    assert sorted(backend.base.glob("blobs/*/*")) == blobs
    assert second.chunks == first.chunks
    assert asyncio.run(Store(backend).models()) == ["org/copy", "tiny"]


def test_tensors_without_a_place_are_left_out_with_a_word(
    backend: FilesystemBackend, checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = load_file(checkpoint / "model.safetensors")
    save_file(source | {"zzz.extra": torch.ones(3)}, checkpoint / "model.safetensors", {"format": "pt"})
    manifest = chunk(backend, checkpoint)
    assert set(tensors(backend, manifest)) == set(source)
    (record,) = [one for one in caplog.records if one.name == "surfw.chunking"]
    assert "has no place for 1 tensor of the checkpoint, such as zzz.extra" in record.getMessage()


def test_code_that_a_configuration_asks_for_is_left_out_with_a_word(
    backend: FilesystemBackend, checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change(checkpoint, auto_map={"AutoModel": "evil.Model"}, attn_implementation="flash_attention_2")
    with caplog.at_level(logging.WARNING, "surfw"):
        manifest = chunk(backend, checkpoint)
    assert "auto_map" not in manifest.config
    assert "attn_implementation" not in manifest.config
    left_out = "tiny: left out of the configuration, because surfw runs no code that comes with a model: "
    assert [record.getMessage() for record in caplog.records if record.name == "surfw.chunking"] == [
        left_out + "auto_map: {'AutoModel': 'evil.Model'}",
        left_out + "attn_implementation: flash_attention_2",
    ]


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"attn_implementation": "org/kernel"}, UnsupportedModelError, "asks for the implementation 'org/kernel'"),
        ({"num_hidden_layers": 10**9}, UnsupportedModelError, "has num_hidden_layers = 1000000000, expected at most"),
        ({"num_hidden_layers": 9000}, UnsupportedModelError, "asks for more than 408 parameters"),
        ({"hidden_size": 128}, CheckpointError, "configuration and weights do not belong together"),
        ({"num_hidden_layers": 5}, CheckpointError, "lacks 9 weights of LlamaForCausalLM, such as model.layers.4"),
        ({"architectures": ["BertModel"]}, UnsupportedModelError, "cannot be used"),
        ({"architectures": ["LlamaPreTrainedModel"]}, UnsupportedModelError, "LlamaPreTrainedModel is not a whole"),
        ({"architectures": ["AutoConfig"]}, UnsupportedModelError, "asks for the class 'AutoConfig'"),
        ({"model_type": "lama"}, UnsupportedModelError, "has model type 'lama'"),
        ({"dtype": "int8"}, UnsupportedModelError, "not a floating-point dtype"),
    ],
)  # fmt: skip
def test_what_cannot_be_chunked_is_refused_before_anything_is_written(
    backend: FilesystemBackend, checkpoint: Path, settings: dict[str, Any], error: type[Exception], text: str
) -> None:
    change(checkpoint, **settings)
    before = open_files()
    with pytest.raises(error) as caught:
        chunk(backend, checkpoint)
    assert text in str(caught.value)
    assert list(backend.base.iterdir()) == []
    assert open_files() == before  # the checkpoint was closed


@pytest.mark.parametrize(
    ("options", "error"), [({"name": "../x"}, ManifestError), ({"dtype": "int4"}, ConfigurationError)]
)
def test_options_that_cannot_be_used(saved: Path, options: dict[str, str], error: type[Exception]) -> None:
    before = open_files()
    with pytest.raises(error):
        prepare_model(str(saved), **options)
    assert open_files() == before


def test_a_prepared_model_closes_its_checkpoint(saved: Path) -> None:
    before = open_files()
    with prepare_model(str(saved)) as prepared:
        assert len(open_files()) == len(before) + 1
        assert prepared.plan.payload_bytes == open_directory_bytes(saved)
    assert open_files() == before


def open_directory_bytes(folder: Path) -> int:
    with open_directory(folder) as opened:
        return sum(tensor.nbytes for tensor in opened.tensors.values())


def keys(folder: Path, **options: Any) -> str:
    with prepare_model(str(folder), **options) as prepared:
        return prepared.key


def test_only_the_very_same_work_is_gone_on_with(checkpoint: Path) -> None:
    first = keys(checkpoint)
    assert keys(checkpoint) == first
    assert keys(checkpoint, name="other") != first
    assert keys(checkpoint, dtype="bfloat16") != first
    os.utime(checkpoint / "model.safetensors", ns=(1, 1))
    second = keys(checkpoint)
    assert second != first
    change(checkpoint, rms_norm_eps=0.5)
    assert keys(checkpoint) != second


def test_a_place_with_other_things_is_left_alone(backend: FilesystemBackend, saved: Path) -> None:
    backend.base.mkdir(exist_ok=True)
    (backend.base / "thesis.doc").write_text("precious")
    with pytest.raises(NotAStoreError, match=r"holds other things \(such as thesis\.doc\)"):
        chunk(backend, saved)
    assert [path.name for path in backend.base.rglob("*")] == ["thesis.doc"]


def test_a_shard_that_changes_while_it_is_read(backend: FilesystemBackend, checkpoint: Path) -> None:
    with prepare_model(str(checkpoint)) as prepared:
        os.utime(checkpoint / "model.safetensors", ns=(1, 1))
        with pytest.raises(CheckpointError, match="changed since it was opened"):
            asyncio.run(write_model(prepared, backend))
    assert asyncio.run(Store(backend).models()) == []


def test_a_tokenizer_file_that_cannot_be_read(backend: FilesystemBackend, checkpoint: Path) -> None:
    with prepare_model(str(checkpoint)) as prepared:
        (checkpoint / "tokenizer.json").unlink()
        with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read: No such file"):
            asyncio.run(write_model(prepared, backend))
    assert asyncio.run(Store(backend).models()) == []


class StoppedError(Exception):
    """Raised by a progress callback, as if the machine had stopped."""


def test_nothing_is_visible_before_everything_is_there(backend: FilesystemBackend, saved: Path) -> None:
    seen: list[list[str]] = []

    def look(count: int, name: str) -> None:
        seen.append([path.name for path in backend.base.glob("models/*")])
        if name == "model.norm":
            raise StoppedError

    with prepare_model(str(saved)) as prepared, pytest.raises(StoppedError):
        asyncio.run(write_model(prepared, backend, progress=look))
    assert seen == [[]] * 6
    assert asyncio.run(Store(backend).models()) == []
    with prepare_model(str(saved)) as prepared:
        manifest = asyncio.run(write_model(prepared, backend))
    assert asyncio.run(Store(backend).models()) == ["tiny"]
    assert set(tensors(backend, manifest)) == set(load_file(saved / "model.safetensors"))


CHUNK_AND_STOP_AT = """
import asyncio, sys
from surfw.chunking import prepare_model, write_model
from surfw.storage import open_backend

def progress(count, name):
    if name == sys.argv[3]:
        print("at", name, flush=True)
        sys.stdin.read()

with prepare_model(sys.argv[1]) as prepared:
    asyncio.run(write_model(prepared, open_backend(sys.argv[2]), progress=progress))
"""


def test_a_killed_run_leaves_nothing_visible_and_a_second_one_completes(
    backend: FilesystemBackend, saved: Path
) -> None:
    command = [sys.executable, "-c", CHUNK_AND_STOP_AT, str(saved), str(backend.base), "model.layers.3"]
    with warm.start(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "at model.layers.3\n"
        with prepare_model(str(saved)) as prepared, pytest.raises(StorageError, match="another surfw is chunking this"):
            asyncio.run(write_model(prepared, backend))
        (journal,) = backend.base.rglob("journal.jsonl")
        while journal.read_bytes().count(b"\n") < 4:  # the embeddings, and the layers before the one in progress
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
    assert asyncio.run(Store(backend).models()) == []
    asyncio.run(Store(backend).check())
    before = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in backend.base.glob("blobs/*/*")}
    assert len(before) >= 3  # the embeddings and the first layers

    written: dict[str, int] = {}
    with prepare_model(str(saved)) as prepared:
        manifest = asyncio.run(
            write_model(prepared, backend, progress=lambda count, name: written.update({name: count}))
        )
    after = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in backend.base.glob("blobs/*/*")}
    assert {name: after[name] for name in before} == before
    assert asyncio.run(Store(backend).models()) == ["tiny"]
    assert not backend.spool().exists()
    source = load_file(saved / "model.safetensors")
    assert all(torch.equal(tensor, source[name]) for name, tensor in tensors(backend, manifest).items())
    assert list(written) == [one.name for one in manifest.chunks]


def test_each_expert_is_a_chunk(backend: FilesystemBackend, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = FAMILIES["mixtral-experts"].build()
    model.save_pretrained(tmp_path / "experts")
    manifest = chunk(backend, tmp_path / "experts")
    stored = tensors(backend, manifest)
    state = model.state_dict()
    slices = {name: split_name(name) for name in stored if split_name(name)}
    assert len(slices) == 2 * 4 * 4  # tensors, layers, experts
    assert {name: info.shape for name, info in manifest.weights.items()} == {
        name: tuple(tensor.shape) for name, tensor in state.items()
    }
    assert all(torch.equal(tensor, state[name]) for name, tensor in stored.items() if name not in slices)
    assert all(torch.equal(stored[name], state[stack][index]) for name, (stack, index) in slices.items())
    assert [one.kind for one in manifest.chunks] == ["part", *(["layer", *["expert"] * 4] * 4), "part", "part"]
    assert manifest.version == 7


def test_a_legacy_checkpoint_gives_the_same_chunks(backend: FilesystemBackend, checkpoint: Path) -> None:
    first = chunk(backend, checkpoint)
    state = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    torch.save(state, checkpoint / "pytorch_model.bin")
    assert chunk(backend, checkpoint, name="legacy").chunks == first.chunks


def test_a_model_is_prepared_without_holding_it(saved: Path) -> None:
    with prepare_model(str(saved)) as prepared:
        assert isinstance(prepared, PreparedModel)
        assert [one.copy_of for chunked in prepared.plan.chunks for one in chunked.tensors].count(None) == 0
    with prepare_model(str(saved), dtype="bfloat16") as prepared:
        assert {one.copy_of for chunked in prepared.plan.chunks for one in chunked.tensors} == {None}
