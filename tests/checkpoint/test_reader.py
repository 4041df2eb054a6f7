"""Checkpoints in a directory: which are found, which bytes are read, and the errors of damaged ones."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from checkpoint.samples import CONFIG, arrays, entry, pack, read, write_config, write_index, write_sharded, write_single
from surfw.checkpoint import SourceTensor, open_checkpoint, open_directory
from surfw.checkpoint.reader import folder_name
from surfw.errors import CheckpointError, ConfigurationError, UnsupportedModelError
from tests.conftest import locked


def test_a_single_file(tmp_path):
    expected = write_single(tmp_path / "tiny")
    with open_checkpoint(str(tmp_path / "tiny")) as checkpoint:
        assert (checkpoint.name, checkpoint.path) == ("tiny", tmp_path / "tiny")
        assert (checkpoint.config, checkpoint.generation_config, checkpoint.files) == (CONFIG, None, {})
        assert list(checkpoint.tensors) == ["a", "b", "c"]
        assert {name: read(checkpoint, name) for name in expected} == {k: v.tobytes() for k, v in expected.items()}


def test_facts_of_a_tensor(tmp_path):
    write_config(tmp_path)
    file = pack({"w": entry("BF16", [2, 3], 0, 12), "s": entry("I64", [], 12, 20)}, bytes(range(20)))
    (tmp_path / "model.safetensors").write_bytes(file)
    with open_directory(tmp_path) as checkpoint:
        path, start = tmp_path / "model.safetensors", len(file) - 20
        assert checkpoint.tensors == {
            "s": SourceTensor("s", "I64", (), path, start + 12),
            "w": SourceTensor("w", "BF16", (2, 3), path, start),
        }
        assert [tensor.nbytes for tensor in checkpoint.tensors.values()] == [8, 12]


def test_shards_are_joined_in_the_order_of_transformers(tmp_path):
    expected = write_sharded(tmp_path)
    with open_directory(tmp_path) as checkpoint:
        assert list(checkpoint.tensors) == ["m.weight", "z.weight", "a.weight"]
        assert checkpoint.tensors["a.weight"].file.name == "model-00002-of-00002.safetensors"
        assert {name: read(checkpoint, name) for name in expected} == {k: v.tobytes() for k, v in expected.items()}


def test_any_range_of_a_tensor(tmp_path):
    whole = write_sharded(tmp_path)["z.weight"].tobytes()
    with open_directory(tmp_path) as checkpoint:
        for start, stop in [(0, 0), (0, 1), (3, 17), (len(whole) - 1, len(whole)), (len(whole), len(whole))]:
            assert read(checkpoint, "z.weight", start, stop) == whole[start:stop]


@pytest.mark.parametrize(("start", "stop", "room"), [(-1, 3, 4), (0, 41, 41), (5, 4, 0), (0, 4, 3), (0, 4, 5)])
def test_a_range_outside_of_the_tensor_is_a_mistake_of_the_caller(tmp_path, start, stop, room):
    write_single(tmp_path)
    with open_directory(tmp_path) as checkpoint:
        assert checkpoint.tensors["b"].nbytes == 40
        with pytest.raises(ValueError, match="of tensor b, which has 40, into a buffer of"):
            checkpoint.read_into("b", memoryview(bytearray(room)), start, stop)


def test_the_files_beside_the_weights(tmp_path):
    write_single(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 2}')
    for name in ("tokenizer.json", "chat_template.jinja", "README.md", "training_args.bin", "vocab.txt.bak"):
        (tmp_path / name).write_text(name)
    with open_directory(tmp_path, name="org/tiny") as checkpoint:
        assert checkpoint.name == "org/tiny"
        assert checkpoint.generation_config == {"eos_token_id": 2}
        assert checkpoint.files == {name: tmp_path / name for name in ("tokenizer.json", "chat_template.jinja")}


def test_safetensors_come_before_legacy_files(tmp_path):
    write_single(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"not even read")
    with open_directory(tmp_path) as checkpoint:
        assert [shard.path.name for shard in checkpoint.shards] == ["model.safetensors"]


def test_the_name_of_the_current_directory(tmp_path, monkeypatch):
    write_single(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path / "tiny")
    with open_checkpoint(".") as checkpoint:
        assert checkpoint.name == "tiny"


def test_the_fingerprint_changes_with_the_source(tmp_path):
    write_sharded(tmp_path)
    with open_directory(tmp_path) as checkpoint:
        before = checkpoint.fingerprint()
    shard = tmp_path / before[0].name
    assert [identity.name for identity in before] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert (before[0].size_bytes, before[0].mtime_ns) == (shard.stat().st_size, shard.stat().st_mtime_ns)
    with open_directory(tmp_path) as checkpoint:
        assert checkpoint.fingerprint() == before
    os.utime(shard, ns=(1, 1))
    with open_directory(tmp_path) as checkpoint:
        assert checkpoint.fingerprint() != before


def test_a_file_that_changes_is_noticed(tmp_path):
    write_single(tmp_path)
    with open_directory(tmp_path) as checkpoint:
        os.truncate(tmp_path / "model.safetensors", 300)
        with pytest.raises(
            CheckpointError, match=r"model\.safetensors changed since it was opened \(\d+ bytes then, 300 now"
        ):
            read(checkpoint, "c")


def test_a_file_that_shrinks_during_a_read_is_noticed(tmp_path, monkeypatch):
    write_single(tmp_path)
    monkeypatch.setattr(
        "surfw.checkpoint.shard.check_unchanged", lambda *_: os.truncate(tmp_path / "model.safetensors", 300)
    )
    with (
        open_directory(tmp_path) as checkpoint,
        pytest.raises(CheckpointError, match=r"ends at byte 300, expected \d+ bytes: it shrank while it was read"),
    ):
        read(checkpoint, "c")


def test_nothing_can_be_read_after_closing(tmp_path):
    write_single(tmp_path)
    checkpoint = open_directory(tmp_path)
    checkpoint.close()
    checkpoint.close()
    with pytest.raises(CheckpointError, match="cannot be read: Bad file descriptor"):
        read(checkpoint, "a")


def test_an_error_leaves_no_file_open(tmp_path):
    write_sharded(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(b"")
    before = sorted(Path("/proc/self/fd").iterdir())
    with pytest.raises(CheckpointError, match="has 0 bytes, expected at least 8"):
        open_directory(tmp_path)
    assert sorted(Path("/proc/self/fd").iterdir()) == before


def test_a_missing_shard_is_named(tmp_path):
    write_sharded(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"model-00002-of-00002\.safetensors is missing; the checkpoint is incomplete"
    ):
        open_directory(tmp_path)


def test_a_shard_that_is_no_file(tmp_path):
    write_sharded(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    os.mkfifo(tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="is no regular file"):
        open_directory(tmp_path)


def test_a_pointer_of_git_lfs_is_told_apart(tmp_path):
    write_config(tmp_path)
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(CheckpointError, match=r"is a Git LFS pointer, not the file itself; run 'git lfs pull'"):
        open_directory(tmp_path)


def test_an_index_that_leads_out_of_its_folder_reads_nothing(tmp_path):
    save_file(arrays("canary"), tmp_path / "canary.safetensors")
    write_sharded(tmp_path / "model")
    write_index(tmp_path / "model", {"canary": "../canary.safetensors"})
    with pytest.raises(
        CheckpointError, match=r"places tensor 'canary' in '\.\./canary\.safetensors', expected a path within"
    ):
        open_directory(tmp_path / "model")


def test_like_transformers_tensors_outside_of_the_index_count_and_the_later_of_two_wins(tmp_path):
    write_config(tmp_path)
    first, second = arrays("twice", "unlisted"), {"twice": np.full(3, 7, np.float16), "last": np.ones(1, np.int8)}
    save_file(first, tmp_path / "model-1.safetensors")
    save_file(second, tmp_path / "model-2.safetensors")
    save_file(arrays("elsewhere"), tmp_path / "other.safetensors")
    write_index(tmp_path, {"twice": "model-1.safetensors", "last": "model-2.safetensors"})
    with open_directory(tmp_path) as checkpoint:
        assert set(checkpoint.tensors) == {"twice", "unlisted", "last"}
        assert checkpoint.tensors["twice"].dtype == "F16"
        assert read(checkpoint, "twice") == second["twice"].tobytes()
        assert read(checkpoint, "unlisted") == first["unlisted"].tobytes()


def test_a_checkpoint_without_tensors(tmp_path):
    write_config(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(pack({}))
    with pytest.raises(UnsupportedModelError, match=r"has no tensors in model\.safetensors"):
        open_directory(tmp_path)


def test_a_damaged_file_is_named(tmp_path):
    write_single(tmp_path)
    path = tmp_path / "model.safetensors"
    size = path.stat().st_size
    os.truncate(path, size - 1)
    with pytest.raises(CheckpointError) as refused:
        open_directory(tmp_path)
    assert str(refused.value) == (
        f"{path} is truncated: expected {size} bytes, the file has {size - 1}; download the shard again"
    )


@pytest.mark.parametrize("model", ["./nowhere", "/nowhere/at/all", "~/nowhere", "../x", "a/b/c", "nowhere/"])
def test_what_can_only_be_a_path_does_not_reach_the_hub(model, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(
        CheckpointError, match=r" is not a directory here; give the directory of a checkpoint, or a hub id$"
    ):
        open_checkpoint(model)


def test_a_file_is_not_its_directory(tmp_path):
    write_single(tmp_path)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is a file of weights, expected the folder that"):
        open_checkpoint(str(tmp_path / "model.safetensors"))


def test_a_folder_without_rights_is_named_with_who_lacks_them(tmp_path):
    write_single(tmp_path / "mine" / "tiny")
    for folder in (tmp_path / "mine", tmp_path / "mine" / "tiny"):
        with locked(folder) as user, pytest.raises(CheckpointError) as caught:
            open_checkpoint(str(tmp_path / "mine" / "tiny"))
        assert str(caught.value) == (
            f"{tmp_path}/mine/tiny cannot be read: permission denied for user {user}; give that user the rights to it, "
            "or name another checkpoint"
        )


def test_a_directory_has_no_revisions(tmp_path):
    write_single(tmp_path)
    with pytest.raises(ConfigurationError, match=r"revision 'v2' is for hub models, but .* is a directory here"):
        open_checkpoint(str(tmp_path), revision="v2")


def test_safetensors_are_read_without_torch(tmp_path):
    write_single(tmp_path)
    code = (
        "import json, sys; from surfw.checkpoint import open_checkpoint; "
        "names = list(open_checkpoint(sys.argv[1]).tensors); "
        "print(json.dumps([names, sorted({'torch', 'transformers', 'huggingface_hub', 'numpy'} & set(sys.modules))]))"
    )
    seen = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, check=True, timeout=60)
    assert json.loads(seen.stdout) == [["a", "b", "c"], []]


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("/models/tiny", "tiny"),
        ("/models/tiny/", "tiny"),
        ("/models/tiny/old/..", "tiny"),
        ("/hub/models--org--my-name/snapshots/0123abc", "org/my-name"),
        ("/hub/models--gpt2/snapshots/0123abc", "gpt2"),
        ("/hub/models--org--a--b/snapshots/0123abc", "org/a--b"),
        ("/hub/datasets--org--name/snapshots/0123abc", "0123abc"),
        ("/hub/models--org--name/blobs", "blobs"),
    ],
)
def test_a_folder_gives_its_model_a_name(folder, name):
    assert folder_name(Path(folder)) == name


def test_a_link_gives_its_own_name_and_the_current_folder_its_real_one(tmp_path, monkeypatch):
    (tmp_path / "hub" / "models--org--name" / "snapshots" / "0123abc").mkdir(parents=True)
    (tmp_path / "mine").symlink_to(tmp_path / "hub" / "models--org--name" / "snapshots" / "0123abc")
    assert folder_name(tmp_path / "mine") == "mine"
    monkeypatch.chdir(tmp_path / "mine")
    assert folder_name(Path()) == "org/name"
