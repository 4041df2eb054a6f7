"""Common layouts are read as in transformers, or refused with advice."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from surfw.checkpoint import open_directory
from surfw.chunking import prepare_model
from surfw.errors import CheckpointError, ConfigurationError, UnsupportedModelError
from tests.checkpoint.samples import write_index, write_sharded, write_single
from tests.exactness.families import FAMILIES

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


@pytest.mark.parametrize("there", [True, False], ids=["elsewhere", "nowhere"])
def test_a_tensor_that_is_not_where_the_index_says_draws_a_warning(
    there: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As in transformers: the model's class determines whether it is missing."""
    tensors = write_sharded(tmp_path)
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    astray = {"z.weight": second} if there else {"lost.weight": first}
    write_index(tmp_path, {"m.weight": first, "z.weight": first, "a.weight": second} | astray)
    with caplog.at_level(logging.WARNING, "surfw"), open_directory(tmp_path) as checkpoint:
        assert set(checkpoint.tensors) == set(tensors)
    (said,) = caplog.messages
    name, file = next(iter(astray.items()))
    how = "another has it" if there else "and no other does"
    assert f"model.safetensors.index.json places tensor '{name}' in {file}, which does not hold it ({how})" in said


@pytest.mark.parametrize("keys", [["state_dict"], ["model"], ["module", "params"]])
def test_tensors_further_down_are_shown(keys: list[str], tmp_path: Path) -> None:
    write_single(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    tensors: dict[str, Any] = {"a.weight": torch.ones(2)}
    for key in reversed(keys):
        tensors = {key: tensors, "epoch": 3}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    path, file = "".join(f"['{key}']" for key in keys), "'pytorch_model.bin'"
    with pytest.raises(UnsupportedModelError) as refused:
        open_directory(tmp_path)
    assert f"pytorch_model.bin has its tensors under {path}, expected" in str(refused.value)
    assert str(refused.value).endswith(f"save them so: torch.save(torch.load({file}){path}, {file})")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_a_pointer_of_lfs_is_told_by_its_content(file: str, tmp_path: Path) -> None:
    write_single(tmp_path)
    if file.endswith("index.json"):
        (tmp_path / "model.safetensors").unlink()
    (tmp_path / file).write_text(POINTER)
    with pytest.raises(CheckpointError, match=rf"{file} is a Git LFS pointer, not the file itself; run 'git lfs pull'"):
        open_directory(tmp_path)


def saved(folder: Path, rename: Any = lambda name: name, extra: Any = None) -> Path:
    torch.manual_seed(0)
    FAMILIES["llama"].build().save_pretrained(folder)
    tensors = {rename(name): one for name, one in load_file(folder / "model.safetensors").items()}
    save_file(tensors | (extra or {}), folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "language_model."])
def test_missing_weights_are_told_with_the_unplaced_ones(prefix: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", lambda name: prefix + name)
    complaint = rf"lacks \d+ weights of Llama.*, and has \d+ tensors that .* no place for, such as '{prefix}"
    with pytest.raises(CheckpointError, match=complaint):
        prepare_model(str(folder))


def test_scales_of_powers_of_two_that_nobody_needs_are_left_out(tmp_path: Path) -> None:
    scales = torch.ones(4).to(torch.float8_e8m0fnu)
    folder = saved(tmp_path / "model", extra={"model.layers.0.self_attn.q_proj.weight_scale": scales})
    resident = transformers.LlamaForCausalLM.from_pretrained(folder)
    with prepare_model(str(folder)) as prepared:
        assert prepared.loading.unused == ("model.layers.0.self_attn.q_proj.weight_scale",)
        assert set(prepared.loading.recipes) == set(resident.state_dict())


def test_a_pointer_for_a_tokenizer_is_refused_when_it_is_chunked(tmp_path: Path) -> None:
    from surfw.chunking.prepare import check_files

    folder = saved(tmp_path / "model")
    (folder / "tokenizer.json").write_text(POINTER)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    with prepare_model(str(folder)) as prepared, pytest.raises(CheckpointError, match=r"tokenizer.json is a Git LFS"):
        check_files(prepared)


@pytest.mark.parametrize(("shards", "kind"), [(False, "safetensors"), (True, "safetensors"), (False, "bin")], ids=str)
@pytest.mark.parametrize("variant", ["fp16", "non_ema"])
def test_a_variant_is_taken_where_it_is_named(variant: str, shards: bool, kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = FAMILIES["llama"].build().half()
    if kind == "bin":
        model.save_pretrained(tmp_path)
        (tmp_path / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / f"pytorch_model.{variant}.bin")
    else:
        model.save_pretrained(tmp_path, variant=variant, max_shard_size="200KB" if shards else "1GB")
    with open_directory(tmp_path, variant=variant) as checkpoint:
        assert set(checkpoint.tensors) == set(model.state_dict())
        assert len(checkpoint.shards) == 1 or shards
    with pytest.raises(
        UnsupportedModelError, match=rf"has its weights as {variant} only; .*: --variant \(variant=\) {variant}$"
    ):
        open_directory(tmp_path)
    complaint = rf"no weights called other: expected model.other.safetensors or .*index.other.json .* has {variant}$"
    with pytest.raises(UnsupportedModelError, match=complaint):
        open_directory(tmp_path, variant="other")
    with pytest.raises(ConfigurationError, match=r"variant '../x' is not a word, such as fp16"):
        open_directory(tmp_path, variant="../x")
