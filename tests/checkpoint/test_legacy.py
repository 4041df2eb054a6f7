"""Files of `torch.save`: the bytes are those of the contiguous tensors, and no code runs."""

import logging
import os
import pickle

import pytest
import torch

from checkpoint.samples import read, write_config, write_index
from surfw.checkpoint import legacy, open_directory
from surfw.errors import CheckpointError, UnsupportedModelError

FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before-1.6"])


def save(folder, state, *, zipped=True, name="pytorch_model.bin"):
    write_config(folder)
    torch.save(state, folder / name, _use_new_zipfile_serialization=zipped)


def plain_bytes(tensor):
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist())


def some_tensors():
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    return {
        "z": base,
        "tied": base,
        "transposed": base.T,
        "column": base[:, 1],
        "row": base[2],
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 3, dtype=torch.float16),
        "half": torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).bfloat16(),
        "mask": torch.tensor([True, False, True]),
        "parameter": torch.nn.Parameter(torch.ones(2, 2)),
        "expanded": torch.tensor([1.5]).expand(3, 2),
    }


@FORMATS
def test_every_kind_of_tensor(tmp_path, zipped):
    state = some_tensors()
    save(tmp_path, state, zipped=zipped)
    with open_directory(tmp_path) as checkpoint:
        assert list(checkpoint.tensors) == list(state)
        facts = {name: (t.dtype, t.shape, t.start) for name, t in checkpoint.tensors.items()}
        assert facts["transposed"] == ("F32", (6, 4), None)
        assert facts["scalar"] == ("I64", (), None)
        assert facts["half"] == ("BF16", (5, 3), None)
        assert facts["empty"] == ("F16", (0, 3), None)
        assert {name: read(checkpoint, name) for name in state} == {name: plain_bytes(t) for name, t in state.items()}


@FORMATS
def test_ranges(tmp_path, zipped):
    state = some_tensors()
    save(tmp_path, state, zipped=zipped)
    with open_directory(tmp_path) as checkpoint:
        for name in ("z", "transposed"):
            for start, stop in [(0, 0), (1, 2), (3, 50), (95, 96), (96, 96)]:
                assert read(checkpoint, name, start, stop) == plain_bytes(state[name])[start:stop]


def test_shards(tmp_path):
    one, two = {"a": torch.ones(3)}, {"b": torch.zeros(2), "c": torch.full((2,), 2.0)}
    save(tmp_path, one, name="pytorch_model-00001-of-00002.bin")
    save(tmp_path, two, name="pytorch_model-00002-of-00002.bin")
    files = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    write_index(tmp_path, files, "pytorch_model.bin.index.json")
    with open_directory(tmp_path) as checkpoint:
        assert list(checkpoint.tensors) == ["a", "b", "c"]
        assert [identity.name for identity in checkpoint.fingerprint()] == sorted(files.values())
        assert {name: read(checkpoint, name) for name in "abc"} == {n: plain_bytes(t) for n, t in (one | two).items()}


def test_the_mapping_is_made_anew_and_the_bytes_stay_the_same(tmp_path, monkeypatch):
    state = {f"t{i}": torch.full((100,), float(i)) for i in range(9)}
    save(tmp_path, state)
    loads = []
    load = legacy._load
    monkeypatch.setattr(legacy, "_load", lambda *args, **kwargs: loads.append(1) or load(*args, **kwargs))
    monkeypatch.setattr(legacy, "_RESIDENT_BYTES", 1000)
    with open_directory(tmp_path) as checkpoint:
        seen = {name: read(checkpoint, name, 0, 200) + read(checkpoint, name, 200, 400) for name in state}
    assert seen == {name: plain_bytes(tensor) for name, tensor in state.items()}
    assert len(loads) == 1 + 2  # 400 bytes each: stopped after 1200 and after 2400 of 3600


def test_only_the_old_format_is_held_in_memory_and_says_so(tmp_path, caplog):
    save(tmp_path, {"a": torch.ones(3)})
    with caplog.at_level(logging.WARNING, "surfw"), open_directory(tmp_path):
        assert caplog.messages == []
    save(tmp_path, {"a": torch.ones(3)}, zipped=False)
    with caplog.at_level(logging.WARNING, "surfw"), open_directory(tmp_path):
        assert "has the format of torch before 1.6, which has to be held in memory whole" in caplog.text


def test_entries_that_are_no_tensors_are_passed_over(tmp_path, caplog):
    save(tmp_path, {"a": torch.ones(3), "epoch": 3, "more": {"b": torch.ones(1)}, 5: torch.ones(1)})
    with caplog.at_level(logging.WARNING, "surfw"), open_directory(tmp_path) as checkpoint:
        assert list(checkpoint.tensors) == ["a"]
    assert [message.split("no tensor ")[1] for message in caplog.messages] == [
        "('epoch': int); it is passed over",
        "('more': dict); it is passed over",
        "('5': Tensor); it is passed over",
    ]


class RunsCode:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


@FORMATS
def test_a_pickle_that_runs_code_is_refused(tmp_path, zipped):
    save(tmp_path, {"a": RunsCode(tmp_path / "canary")}, zipped=zipped)
    with pytest.raises(UnsupportedModelError) as refused:
        open_directory(tmp_path)
    assert str(refused.value) == (
        f"{tmp_path}/pytorch_model.bin can only be read by running code that it names ('posix.system'), which surfw "
        "does not do; where you trust it, load it with torch and save it as safetensors"
    )
    assert not (tmp_path / "canary").exists()


def test_a_plain_pickle_that_runs_code_is_refused(tmp_path):
    write_config(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(RunsCode(tmp_path / "canary")))
    with pytest.raises((CheckpointError, UnsupportedModelError)):
        open_directory(tmp_path)
    assert not (tmp_path / "canary").exists()


def test_a_whole_module_is_refused(tmp_path):
    save(tmp_path, torch.nn.Linear(2, 2))
    with pytest.raises(
        UnsupportedModelError, match=r"running code that it names \('torch\.nn\.modules\.linear\.Linear'\)"
    ):
        open_directory(tmp_path)


def test_a_list_is_refused(tmp_path):
    save(tmp_path, [torch.ones(2)])
    with pytest.raises(
        UnsupportedModelError, match=r"pytorch_model\.bin holds a list, expected tensors by their names"
    ):
        open_directory(tmp_path)


def test_a_file_without_tensors_is_refused(tmp_path):
    save(tmp_path, {"epoch": 3})
    with pytest.raises(UnsupportedModelError, match=r"has no tensors in pytorch_model\.bin"):
        open_directory(tmp_path)


@pytest.mark.parametrize(
    "tensor", [torch.eye(3).to_sparse(), torch.ones(2, dtype=torch.complex128)], ids=["sparse", "c128"]
)
def test_tensors_of_other_kinds_are_refused(tmp_path, tensor):
    save(tmp_path, {"odd": tensor})
    with pytest.raises(UnsupportedModelError, match="tensor 'odd' is of a kind that surfw does not read"):
        open_directory(tmp_path)


def test_a_tensor_that_claims_more_than_its_file_is_refused(tmp_path):
    save(tmp_path, {"bomb": torch.zeros(1).expand(1 << 40)})
    with pytest.raises(CheckpointError, match=f"tensor 'bomb' claims {4 << 40} bytes, the file has"):
        open_directory(tmp_path)


@FORMATS
@pytest.mark.parametrize("share", [0, 0.001, 0.01, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_refused(tmp_path, zipped, share):
    save(tmp_path, {f"t{i}": torch.ones(40) for i in range(9)}, zipped=zipped)
    path = tmp_path / "pytorch_model.bin"
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(CheckpointError) as refused:
        open_directory(tmp_path)
    assert str(refused.value).startswith(f"{path} is damaged, or not from torch.save (")
    assert str(refused.value).isprintable()
    assert "weights_only" not in str(refused.value)


def test_a_file_that_changes_is_noticed(tmp_path):
    save(tmp_path, {"a": torch.ones(3)})
    with open_directory(tmp_path) as checkpoint:
        os.utime(tmp_path / "pytorch_model.bin", ns=(1, 1))
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin changed since it was opened"):
            read(checkpoint, "a")
