"""Building a model from an untrusted manifest: everything is checked."""

import asyncio
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from surfw.chunking import prepare_model, write_model
from surfw.errors import ConfigurationError, ManifestError, UnsupportedModelError
from surfw.manifest import Chunk, Manifest, TensorInfo, Use
from surfw.models.from_manifest import cast_dtypes, open_skeleton
from surfw.storage import FilesystemBackend, Store


@pytest.fixture
def manifest(store: Path) -> Manifest:
    return asyncio.run(Store(FilesystemBackend(store)).manifest("llama"))


def with_config(manifest: Manifest, **settings: Any) -> Manifest:
    return replace(manifest, config={**manifest.config, **settings})


def test_a_manifest_becomes_its_model(manifest: Manifest) -> None:
    skeleton = open_skeleton(manifest)
    assert type(skeleton.model).__name__ == "LlamaForCausalLM"
    assert skeleton.dtype == torch.float32
    assert {parameter.device.type for parameter in skeleton.model.parameters()} == {"meta"}
    assert {buffer.device.type for buffer in skeleton.model.buffers()} == {"cpu"}
    assert cast_dtypes(manifest, skeleton) == {}
    assert skeleton.model.generation_config.pad_token_id == 2


def test_another_dtype_is_a_cast_of_every_weight(manifest: Manifest) -> None:
    skeleton = open_skeleton(manifest, torch.bfloat16)
    names = {tensor.name for chunk in manifest.chunks for tensor in chunk.tensors}
    assert cast_dtypes(manifest, skeleton) == dict.fromkeys(names, torch.bfloat16)
    assert {parameter.dtype for parameter in skeleton.model.parameters()} == {torch.bfloat16}


def test_parameters_know_the_dtype_that_transformers_keeps_them_in(store: Path) -> None:
    t5 = asyncio.run(Store(FilesystemBackend(store)).manifest("t5"))
    skeleton = open_skeleton(t5, torch.float16)
    kept = {name for name, parameter in skeleton.model.named_parameters() if parameter.dtype == torch.float32}
    assert len(kept) == 6
    assert all(name.endswith(".wo.weight") for name in kept)


def test_generation_settings_come_from_their_file_and_else_from_the_configuration(manifest: Manifest) -> None:
    settings = {"eos_token_id": 7, "repetition_penalty": 1.5}
    assert open_skeleton(replace(manifest, generation_config=settings)).model.generation_config.eos_token_id == 7
    alone = replace(with_config(manifest, eos_token_id=9), generation_config=None)
    assert open_skeleton(alone).model.generation_config.eos_token_id == 9


def test_requests_for_code_are_ignored_with_a_word(manifest: Manifest, caplog: pytest.LogCaptureFixture) -> None:
    asks = with_config(manifest, auto_map={"AutoModel": "evil.Evil"}, attn_implementation="org/kernel")
    asks = replace(asks, generation_config={"custom_generate": "org/evil", "eos_token_id": 3})
    with caplog.at_level(logging.WARNING, "surfw"):
        skeleton = open_skeleton(asks)
    assert [record.getMessage().rpartition("elsewhere: ")[2] for record in caplog.records] == [
        "auto_map: {'AutoModel': 'evil.Evil'}",
        "attn_implementation: org/kernel",
        "custom_generate: org/evil",
    ]
    assert not hasattr(skeleton.model.config, "auto_map")
    assert skeleton.model.config._attn_implementation in {"sdpa", "eager"}
    assert not hasattr(skeleton.model.generation_config, "custom_generate")
    assert skeleton.model.generation_config.eos_token_id == 3


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"num_hidden_layers": 10**9}, "has num_hidden_layers = 1000000000, expected at most 10000"),
        ({"num_hidden_layers": 9999}, "asks for more than"),
        ({"hidden_size": 10**9}, "which none of its tensors has"),
        ({"vocab_size": 10**12}, "which none of its tensors has"),
        ({"num_labels": 10**9}, "has num_labels = 1000000000, expected at most 100000"),
        ({"intermediate_size": 129}, "asks for a Linear with a weight of shape (129, 64), which none of its tensors"),
        ({"num_attention_heads": 16}, "cannot be used|which none of its tensors has"),
        ({"model_type": "lama"}, "has model type 'lama'"),
        ({"attribute_map": {}, "hidden_act": "org/kernel"}, "cannot be used: KeyError"),
    ],
)  # fmt: skip
def test_a_configuration_that_lies_is_refused_quickly(manifest: Manifest, settings: dict[str, Any], text: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        open_skeleton(with_config(manifest, **settings))
    assert any(part in str(caught.value) for part in text.split("|"))


@pytest.mark.parametrize(
    "name", ["AutoConfig", "os", "__class__", "PreTrainedModel", "BertModel", "LlamaPreTrainedModel"]
)
def test_a_class_that_does_not_fit_is_refused(manifest: Manifest, name: str) -> None:
    with pytest.raises(UnsupportedModelError):
        open_skeleton(replace(manifest, class_name=name))


def test_a_dtype_that_nothing_computes_with(manifest: Manifest) -> None:
    with pytest.raises(ConfigurationError, match="dtype 'int8' is not one of"):
        open_skeleton(replace(manifest, dtype="int8"))


def edited(manifest: Manifest, name: str, edit: Callable[[Chunk], Chunk]) -> Manifest:
    return replace(manifest, chunks=tuple(edit(chunk) if chunk.name == name else chunk for chunk in manifest.chunks))


def reshaped(chunk: Chunk) -> Chunk:
    """The same bytes under another shape that occurs in the model."""
    (info,) = chunk.tensors
    return replace(chunk, tensors=(TensorInfo(info.name, "F32", (300, 64), 0),))


def renamed(chunk: Chunk) -> Chunk:
    (info,) = chunk.tensors
    return replace(chunk, tensors=(replace(info, name="elsewhere.weight"),))


def test_weights_that_are_missing(manifest: Manifest) -> None:
    fewer = with_config(manifest, num_hidden_layers=5)
    with pytest.raises(
        ManifestError, match=r"llama: the manifest has no weights for model\.layers\.4\..* of LlamaForCausalLM"
    ):
        open_skeleton(fewer)


def test_weights_that_are_too_many(manifest: Manifest) -> None:
    with pytest.raises(
        ManifestError, match=r"llama: LlamaForCausalLM has no place for model\.layers\.3\.input_layernorm"
    ):
        open_skeleton(with_config(manifest, num_hidden_layers=3))


def test_weights_with_the_shape_of_others(manifest: Manifest) -> None:
    with pytest.raises(
        ManifestError, match=r"llama: model\.norm\.weight has shape \(300, 64\) in the manifest, \(64,\) in"
    ):
        open_skeleton(edited(manifest, "model.norm", reshaped))


def test_weights_under_other_names(manifest: Manifest) -> None:
    with pytest.raises(ManifestError, match=r"the manifest has no weights for model\.norm\.weight"):
        open_skeleton(edited(manifest, "model.norm", renamed))


def test_a_tie_to_something_of_another_shape(manifest: Manifest) -> None:
    with pytest.raises(
        ManifestError, match=r"llama: lm_head\.weight has shape \(64,\) in the manifest, \(300, 64\) in"
    ):
        open_skeleton(replace(manifest, ties={"lm_head.weight": "model.norm.weight"}))


@pytest.mark.parametrize(
    "edit",
    [
        lambda order: order[:-1],
        lambda order: [*order, order[0]],
        lambda order: [*order[:-1], Use("lm_head", ("model.norm",))],
        lambda order: [*order[:-1], Use("lm_head", ())],
        lambda order: [],
    ],
    ids=["forgotten", "twice", "wrong", "nothing", "empty"],
)
def test_an_order_that_does_not_fit(manifest: Manifest, edit: Callable[[list[Use]], list[Use]]) -> None:
    with pytest.raises(ManifestError, match="llama: the execution order does not fit"):
        open_skeleton(replace(manifest, order=tuple(edit(list(manifest.order)))))


@pytest.mark.parametrize("settings", [{"max_new_tokens": 0}, {"watermarking_config": {"a": 1}}])
def test_generation_settings_that_transformers_refuses(manifest: Manifest, settings: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModelError, match="the generation settings of llama cannot be used"):
        open_skeleton(replace(manifest, generation_config=settings))


def test_a_configuration_survives_the_store(manifest: Manifest, checkpoints: Path) -> None:
    assert manifest.config == json.loads((checkpoints / "llama" / "config.json").read_text())


class StepsConfig(PreTrainedConfig):
    model_type = "steps"


class Steps(PreTrainedModel):
    """A layer, and two buffers that are no floating-point numbers."""

    config_class = StepsConfig

    def __init__(self, config: StepsConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList([nn.Linear(4, 4)])
        self.register_buffer("steps", torch.arange(3))
        self.register_buffer("mask", torch.ones(3, dtype=torch.bool))
        self.post_init()


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("steps")
    Steps(StepsConfig()).save_pretrained(folder / "model")
    with prepare_model(str(folder / "model"), model_class=Steps) as prepared:
        return asyncio.run(write_model(prepared, FilesystemBackend(folder / "store")))


def with_dtype(manifest: Manifest, tensor: str, dtype: str) -> Manifest:
    """The manifest with another dtype for a tensor, which violates no rule of the format."""

    def change(chunk: Chunk) -> Chunk:
        tensors, offset = [], 0
        for info in chunk.tensors:
            tensors.append(replace(info, dtype=dtype if info.name == tensor else info.dtype, offset=offset))
            offset += tensors[-1].nbytes
        return replace(chunk, tensors=tuple(tensors), payload_bytes=offset)

    return replace(manifest, chunks=tuple(change(chunk) for chunk in manifest.chunks))


@pytest.mark.parametrize(
    ("tensor", "dtype", "place"),
    [
        ("layers.0.weight", "I32", "F32"), ("layers.0.weight", "U32", "F32"), ("layers.0.bias", "BOOL", "F32"),
        ("layers.0.bias", "C64", "F32"), ("steps", "F64", "I64"), ("steps", "I32", "I64"), ("steps", "U64", "I64"),
        ("mask", "U8", "BOOL"), ("mask", "F8_E4M3", "BOOL"), ("mask", "I8", "BOOL"),
    ],
)  # fmt: skip
def test_whole_numbers_are_not_taken_for_others(steps: Manifest, tensor: str, dtype: str, place: str) -> None:
    text = f"^model: {tensor} has dtype {dtype} in the manifest, {place} in Steps; chunk the model again"
    with pytest.raises(ManifestError, match=text):
        open_skeleton(with_dtype(steps, tensor, dtype), model_class=Steps)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64", "F8_E4M3"])
def test_floating_point_numbers_are_converted(steps: Manifest, dtype: str) -> None:
    manifest = with_dtype(steps, "layers.0.weight", dtype)
    skeleton = open_skeleton(manifest, model_class=Steps)
    expected = {} if dtype == "F32" else {"layers.0.weight": torch.float32}
    assert cast_dtypes(manifest, skeleton) == expected


def test_an_infinite_epsilon_is_refused(manifest: Manifest) -> None:
    with pytest.raises(UnsupportedModelError, match=r"llama has rms_norm_eps = inf, expected a finite number"):
        open_skeleton(with_config(manifest, rms_norm_eps={"__float__": "Infinity"}))
    penalty = replace(manifest, generation_config={"repetition_penalty": {"__float__": "NaN"}})
    with pytest.raises(UnsupportedModelError, match="llama has repetition_penalty = nan, expected a finite number"):
        open_skeleton(penalty)
