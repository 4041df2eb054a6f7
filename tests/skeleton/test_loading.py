"""Loaded weights equal those of `from_pretrained`, whatever the checkpoint's layout."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, PreTrainedModel

from surfw.checkpoint import Checkpoint, open_directory
from surfw.errors import CheckpointError
from surfw.manifest import split_name
from surfw.skeleton.build import Skeleton, build_skeleton
from surfw.skeleton.loading import Loading, SourceFacts, convert_bytes, plan_loading
from tests.exactness.families import FAMILIES, MIXTURES
from tests.skeleton.models import skeleton_for

State = dict[str, torch.Tensor]


def save(folder: Path, family: str) -> Path:
    torch.manual_seed(1)
    model = FAMILIES[family].build()
    with torch.no_grad():
        for parameter in model.parameters():  # also norms, which are initialised with ones
            parameter.add_(torch.randn_like(parameter) / 10)
    model.save_pretrained(folder)
    return folder


def rewrite(folder: Path, change: Callable[[State], State]) -> Path:
    """Change the tensors of a saved checkpoint."""
    path = folder / "model.safetensors"
    save_file(
        {name: tensor.contiguous().clone() for name, tensor in change(load_file(path)).items()}, path, {"format": "pt"}
    )
    return folder


def facts_of(checkpoint: Checkpoint) -> SourceFacts:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in checkpoint.tensors.items()}


def read_all(checkpoint: Checkpoint, name: str) -> bytes:
    data = bytearray(checkpoint.tensors[name].nbytes)
    checkpoint.read_into(name, memoryview(data), 0, len(data))
    return bytes(data)


def plan(skeleton: Skeleton, checkpoint: Checkpoint) -> Loading:
    def equal(one: str, other: str) -> bool:
        return read_all(checkpoint, one) == read_all(checkpoint, other)

    return plan_loading(skeleton, facts_of(checkpoint), equal, where="here")


def load(folder: Path, *, class_name: str | None = None, dtype: torch.dtype = torch.float32) -> tuple[State, Loading]:
    """Return every tensor that surfw would store as a state dict, with the tied ones."""
    skeleton, checkpoint = skeleton_for(folder, class_name=class_name, dtype=dtype)
    with checkpoint:
        loading = plan(skeleton, checkpoint)

        def read(name: str, destination: memoryview, start: int) -> None:
            checkpoint.read_into(name, destination, start, start + len(destination))

        state: State = {}
        for name, recipe in loading.recipes.items():
            made = convert_bytes(recipe, read, facts_of(checkpoint))
            assert set(made) == set(recipe.targets)
            target_dtype, shape = recipe.targets[name]
            flat = torch.frombuffer(bytearray(made[name]) or bytearray(1), dtype=torch.uint8)[: made[name].nbytes]
            state[name] = flat.view(target_dtype).view(shape)
    return stacked(state | {name: state[stored] for name, stored in loading.ties.items()}), loading


def stacked(state: State) -> State:
    """Join slices to the stacks they come from."""
    stacks: dict[str, list[torch.Tensor]] = {}
    for name, tensor in state.items():
        if parts := split_name(name):
            stack = stacks.setdefault(parts[0], [])
            assert len(stack) == parts[1]
            stack.append(tensor)
    whole = {name: tensor for name, tensor in state.items() if not split_name(name)}
    return whole | {name: torch.stack(slices) for name, slices in stacks.items()}


def same_as_from_pretrained(
    folder: Path, *, class_name: str | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Loading, transformers.PreTrainedModel]:
    """Compare with transformers, bit for bit."""
    name = class_name or json.loads((folder / "config.json").read_text())["architectures"][0]
    resident = getattr(transformers, name).from_pretrained(folder, dtype=dtype)
    expected = resident.state_dict()
    state, loading = load(folder, class_name=class_name, dtype=dtype)
    buffers = {key for key, _ in resident.named_buffers()}
    assert set(expected) - buffers <= set(state) <= set(expected)
    for key, tensor in state.items():
        assert tensor.dtype == expected[key].dtype, key
        assert torch.equal(tensor.view(torch.uint8) if tensor.dim() else tensor, _bytes_like(expected[key], tensor)), (
            key
        )
    return loading, resident


def _bytes_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8) if like.dim() else tensor


@pytest.mark.parametrize("family", FAMILIES)
def test_families_as_they_are_saved(family: str, tmp_path: Path) -> None:
    same_as_from_pretrained(save(tmp_path, family))


@pytest.mark.parametrize("family", ["llama", "t5", "mixtral-experts", "bert-mlm"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    same_as_from_pretrained(save(tmp_path, family), dtype=dtype)


def test_what_transformers_keeps_in_fp32_is_kept(tmp_path: Path) -> None:
    """T5's `wo` overflows in fp16."""
    loading, _ = same_as_from_pretrained(save(tmp_path, "t5"), dtype=torch.float16)
    kept = {name for name, recipe in loading.recipes.items() if recipe.targets[name][0] == torch.float32}
    assert len(kept) == 6
    assert all(name.endswith(".wo.weight") for name in kept)


def test_legacy_names_of_norms(tmp_path: Path) -> None:
    def age(state: State) -> State:
        renamed = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        return {
            next((key[: -len(new)] + old for new, old in renamed.items() if key.endswith(new)), key): tensor
            for key, tensor in state.items()
        }

    rewrite(save(tmp_path, "bert-mlm"), age)
    assert any(key.endswith("gamma") for key in load_file(tmp_path / "model.safetensors"))
    loading, _ = same_as_from_pretrained(tmp_path)
    assert loading.recipes["bert.embeddings.LayerNorm.weight"].sources == ("bert.embeddings.LayerNorm.gamma",)


class Scale(nn.Module):
    """A parameter of its own with the name of a legacy norm's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(4))


class Scaled(PreTrainedModel):
    config_class = LlamaConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.LayerNorm = Scale()
        self.post_init()


def test_a_name_that_looks_like_a_legacy_one_and_is_not(tmp_path: Path) -> None:
    model = Scaled(LlamaConfig())
    with torch.no_grad():
        model.LayerNorm.gamma.copy_(torch.arange(4))
    model.save_pretrained(tmp_path)
    assert Scaled.from_pretrained(tmp_path).LayerNorm.gamma.tolist() == [0, 1, 2, 3]
    skeleton = build_skeleton(LlamaConfig(), Scaled, torch.float32, tensor_count=1, where="scaled")
    with open_directory(tmp_path) as checkpoint:
        assert plan(skeleton, checkpoint).recipes["LayerNorm.gamma"].sources == ("LayerNorm.gamma",)


def test_a_base_model_out_of_a_checkpoint_with_a_head(tmp_path: Path) -> None:
    loading, _ = same_as_from_pretrained(save(tmp_path, "llama"), class_name="LlamaModel")
    assert loading.recipes["norm.weight"].sources == ("model.norm.weight",)
    assert loading.unused == ("lm_head.weight",)


def test_a_model_with_a_tied_head_out_of_a_checkpoint_of_its_base(tmp_path: Path) -> None:
    save(tmp_path, "llama-tied")
    rewrite(tmp_path, lambda state: {name.removeprefix("model."): tensor for name, tensor in state.items()})
    loading, _ = same_as_from_pretrained(tmp_path)
    assert loading.recipes["model.norm.weight"].sources == ("norm.weight",)
    assert loading.ties == {"lm_head.weight": "model.embed_tokens.weight"}


def test_experts_of_their_own_become_slices_of_one_stack(tmp_path: Path) -> None:
    save(tmp_path, "mixtral-experts")  # transformers saves them separately, as they were published
    assert sum(".w1.weight" in name for name in load_file(tmp_path / "model.safetensors")) == 16
    loading, _ = same_as_from_pretrained(tmp_path)
    name = "model.layers.0.mlp.experts.gate_up_proj[3]"
    recipe = loading.recipes[name]
    assert recipe.targets == {name: (torch.float32, (192, 64))}
    assert [source.rpartition("experts.")[2] for source in recipe.joined] == ["3.w1.weight", "3.w3.weight"]


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixtures_as_they_are_saved(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    MIXTURES[family].build().save_pretrained(tmp_path)
    loading, _ = same_as_from_pretrained(tmp_path, dtype=dtype)
    slices = {name: recipe for name, recipe in loading.recipes.items() if split_name(name)}
    assert {name.rpartition("[")[2] for name in slices} == {f"{index}]" for index in range(8)}
    assert all(bool(recipe.joined) is (dtype == torch.float32) for recipe in slices.values())


def test_experts_of_several_dtypes_are_made_as_one_stack_and_cut(tmp_path: Path) -> None:
    def lower(state: State) -> State:
        (name, tensor) = next((name, tensor) for name, tensor in state.items() if ".w1.weight" in name)
        return state | {name: tensor.bfloat16()}

    rewrite(save(tmp_path, "mixtral-experts"), lower)
    loading, _ = same_as_from_pretrained(tmp_path)
    cut = loading.recipes["model.layers.0.mlp.experts.gate_up_proj[0]"]
    assert (len(cut.sources), len(cut.targets)) == (8, 4)
    assert len(loading.recipes["model.layers.1.mlp.experts.gate_up_proj[0]"].targets) == 1


def with_head(state: State, head: torch.Tensor) -> State:
    return state | {"lm_head.weight": head}


def test_both_sides_of_a_tie_with_the_same_bytes_are_one(tmp_path: Path) -> None:
    save(tmp_path, "llama-tied")
    rewrite(tmp_path, lambda state: with_head(state, state["model.embed_tokens.weight"]))
    loading, resident = same_as_from_pretrained(tmp_path)
    assert loading.ties == {"lm_head.weight": "model.embed_tokens.weight"}
    assert resident.lm_head.weight is resident.model.embed_tokens.weight


def test_both_sides_of_a_tie_with_other_bytes_are_two(tmp_path: Path) -> None:
    save(tmp_path, "llama-tied")
    rewrite(tmp_path, lambda state: with_head(state, state["model.embed_tokens.weight"] + 1))
    loading, resident = same_as_from_pretrained(tmp_path)
    assert loading.ties == {}
    assert resident.lm_head.weight is not resident.model.embed_tokens.weight


def test_a_tie_of_which_only_the_other_side_is_there(tmp_path: Path) -> None:
    save(tmp_path, "llama-tied")
    rewrite(
        tmp_path,
        lambda state: {
            name.replace("model.embed_tokens.weight", "lm_head.weight"): value for name, value in state.items()
        },
    )
    loading, _ = same_as_from_pretrained(tmp_path)
    assert loading.ties == {"model.embed_tokens.weight": "lm_head.weight"}


def test_a_family_of_ties_is_stored_once(tmp_path: Path) -> None:
    loading, _ = same_as_from_pretrained(save(tmp_path, "t5"))
    assert loading.ties == {
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
        "lm_head.weight": "shared.weight",
    }


def test_a_legacy_file_loads_the_same(tmp_path: Path) -> None:
    save(tmp_path / "new", "bert-mlm")
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    state = load_file(tmp_path / "new" / "model.safetensors")
    (tmp_path / "old" / "model.safetensors").unlink()
    torch.save(state, tmp_path / "old" / "pytorch_model.bin")
    new, _ = load(tmp_path / "new")
    old, _ = load(tmp_path / "old")
    assert set(new) == set(old)
    assert all(torch.equal(new[name], old[name]) for name in new)


@pytest.mark.parametrize(
    ("family", "missing", "found"),
    [
        ("llama", "model.layers.2.mlp.up_proj.weight", ("model.layers.2.mlp.up_proj.weight",)),
        ("llama", "lm_head.weight", ("lm_head.weight",)),
        ("llama-tied", "model.embed_tokens.weight", ("model.embed_tokens.weight", "lm_head.weight")),
    ],
)
def test_missing_weights_are_named(family: str, missing: str, found: tuple[str, ...], tmp_path: Path) -> None:
    save(tmp_path, family)
    rewrite(tmp_path, lambda state: {name: tensor for name, tensor in state.items() if name != missing})
    _, loading = load(tmp_path)
    assert loading.missing == found


def test_weights_of_another_shape_are_an_error(tmp_path: Path) -> None:
    save(tmp_path, "llama")
    rewrite(tmp_path, lambda state: state | {"model.norm.weight": torch.ones(65)})
    with pytest.raises(
        CheckpointError, match=r"here: tensor model\.norm\.weight has shape \(65,\), but LlamaForCausalLM with"
    ):
        load(tmp_path)


def test_experts_that_do_not_fit_together_are_an_error(tmp_path: Path) -> None:
    def cut(state: State) -> State:
        (name, tensor) = next((name, tensor) for name, tensor in state.items() if ".w1.weight" in name)
        return state | {name: tensor[:5]}

    rewrite(save(tmp_path, "mixtral-experts"), cut)
    with pytest.raises(
        CheckpointError, match=r"here: transformers cannot make model\.layers\.0\.mlp\.experts\.gate_up_proj out of"
    ):
        load(tmp_path)


def test_tensors_without_a_place_are_named(tmp_path: Path) -> None:
    save(tmp_path, "llama")
    extra: Mapping[str, torch.Tensor] = {"model.layers.9.mlp.up_proj.weight": torch.ones(1), "zzz": torch.ones(1)}
    rewrite(tmp_path, lambda state: state | dict(extra))
    _, loading = load(tmp_path)
    assert loading.unused == ("model.layers.9.mlp.up_proj.weight", "zzz")
