"""Which files form a checkpoint: precedence, the index, the configuration, and layouts that are refused by name."""

import json

import pytest

from checkpoint.samples import write_config, write_index
from surfw.checkpoint.layout import WEIGHTS_FILES, Weights, find_weights, read_config, read_json, read_weights
from surfw.config import DEQUANTISED
from surfw.errors import CheckpointError, UnsupportedModelError


@pytest.mark.parametrize("position", range(len(WEIGHTS_FILES)))
def test_weights_are_found_in_the_order_of_transformers(position):
    assert find_weights({"config.json", *WEIGHTS_FILES[position:]}, "x") == WEIGHTS_FILES[position]


@pytest.mark.parametrize(
    ("names", "seen"),
    [
        ({"config.json", "model-Q4.gguf"}, "model-Q4.gguf (GGUF weights, of which surfw chunk takes one file)"),
        ({"a.gguf"}, "a.gguf (GGUF weights, of which surfw chunk takes one file)"),
        ({"config.json", "flax_model.msgpack"}, "flax_model.msgpack (Flax weights)"),
        ({"config.json", "tf_model.h5"}, "tf_model.h5 (TensorFlow weights)"),
        ({"consolidated.00.pth", "params.json"}, "consolidated.00.pth (weights in their publisher's own layout)"),
        (
            {"config.json", "consolidated.safetensors"},
            "consolidated.safetensors (weights in their publisher's own layout)",
        ),
        ({"model_index.json"}, "model_index.json (a diffusion pipeline)"),
        ({"config.json", "README.md"}, "README.md, config.json"),
    ],
)
def test_other_kinds_of_weights_are_unsupported_by_name(names, seen):
    with pytest.raises(UnsupportedModelError) as refused:
        find_weights(names, "place")
    assert str(refused.value) == (
        "place has no weights that surfw reads: expected model.safetensors or model.safetensors.index.json or "
        f"pytorch_model.bin or pytorch_model.bin.index.json, it has {seen}; save the model with save_pretrained"
    )


def test_an_adapter_is_told_how_it_is_chunked_alone_and_beside_weights():
    adapter = {"adapter_config.json", "adapter_model.safetensors"}
    with pytest.raises(UnsupportedModelError) as refused:
        find_weights(adapter, "place")
    assert str(refused.value) == (
        "place is an adapter (adapter_config.json), no whole model: chunk its base first, and then the adapter over "
        "it, with surfw chunk place --base NAME"
    )
    with pytest.raises(UnsupportedModelError) as refused:
        find_weights(adapter | {"config.json", "model.safetensors"}, "place")
    assert str(refused.value) == (
        "place has an adapter (adapter_config.json) beside the weights in model.safetensors, and transformers would "
        "apply it where peft is installed; move the adapter's files into a folder of their own, chunk the model, and "
        "then the adapter over it, with surfw chunk FOLDER --base NAME"
    )


@pytest.mark.parametrize(
    ("shard", "index"),
    [
        ("model-00001-of-00002.safetensors", "model.safetensors.index.json"),
        ("pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"),
    ],
)
def test_shards_without_their_index_are_told_which_one(shard, index):
    with pytest.raises(
        UnsupportedModelError, match=f"it has config.json, {shard}; .* lack their index: download {index}"
    ):
        find_weights({"config.json", shard}, "place")


@pytest.mark.parametrize("names", [set(), {"README.md"}])
def test_a_place_without_a_model_is_no_checkpoint(names):
    with pytest.raises(CheckpointError, match=r"^place is not a checkpoint: no config\.json; "):
        find_weights(names, "place")


def test_weights_without_a_config_are_no_checkpoint(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"is not a checkpoint: no config\.json; "):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("settings", "method"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
        ({"quantization_config": {"load_in_8bit": True}}, "of an unnamed kind"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"quantization_config": "awq"}, "of an unnamed kind"),
    ],
)
def test_quantised_checkpoints_are_unsupported(tmp_path, settings, method):
    with pytest.raises(UnsupportedModelError) as refused:
        read_config(write_config(tmp_path, **settings))
    assert f"asks for quantised weights ({method!r})" in str(refused.value)
    advice = "make dense ones of them with --dequantize" if method in DEQUANTISED else "and surfw makes dense ones of"
    assert advice in str(refused.value)


def test_an_empty_quantization_config_is_none(tmp_path):
    assert read_config(write_config(tmp_path, quantization_config=None))["quantization_config"] is None


def test_weights_under_another_name_are_unsupported(tmp_path):
    with pytest.raises(
        UnsupportedModelError, match=r"keeps its weights in 'other\.safetensors' \(transformers_weights\)"
    ):
        read_config(write_config(tmp_path, transformers_weights="other.safetensors"))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b'{"a": "\xff"}', "is not JSON"),
        (b"\xef\xbb\xbf{}", "is not JSON"),
        (b"[" * 9_000, "is not JSON"),
        (b"[]", "is not a JSON object but '[]'"),
        (b"null", "is not a JSON object but 'None'"),
        (b" " * 10_001, "has more than 10000 bytes"),
    ],
)
def test_json_that_cannot_be_used(tmp_path, text, complaint):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(CheckpointError) as refused:
        read_json(tmp_path / "config.json", 10_000)
    assert str(refused.value).startswith(f"{tmp_path}/config.json ")
    assert complaint in str(refused.value)


def test_json_of_more_values_than_memory_has_room_for_is_not_parsed(tmp_path):
    (tmp_path / "index.json").write_bytes(b"[" + b"0," * 4_000_001 + b"0]")
    with pytest.raises(CheckpointError, match="more than 1000000 objects and lists, or 4000000 values, which no file"):
        read_json(tmp_path / "index.json", 10_000_000)


def test_one_file_is_its_own_shard(tmp_path):
    assert read_weights(tmp_path, "model.safetensors") == Weights(("model.safetensors",), {})


def test_shards_come_in_the_order_of_their_names(tmp_path):
    weight_map = {"a": "model-2.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"}
    write_index(tmp_path, weight_map)
    expected = Weights(("model-1.safetensors", "model-2.safetensors"), weight_map)
    assert read_weights(tmp_path, "model.safetensors.index.json") == expected


@pytest.mark.parametrize(
    "file",
    [
        "../x.safetensors", "/etc/x.safetensors", "sub//x.safetensors",
        "a/../x.safetensors", "./x.safetensors", "..\\x.safetensors", "a\x00.safetensors",
        "a\n.safetensors", "..", ".", "", "model.bin", "model.safetensors/", 1, None, ["a.safetensors"], {"a": 1},
    ],
)  # fmt: skip
def test_an_index_names_files_of_its_kind_within_its_folder(tmp_path, file):
    write_index(tmp_path, {"good": "model-1.safetensors", "w": file})
    with pytest.raises(CheckpointError) as refused:
        read_weights(tmp_path, "model.safetensors.index.json")
    assert "index.json places tensor 'w' in " in str(refused.value)
    assert str(refused.value).endswith("expected a path within the checkpoint that ends in .safetensors")
    assert str(refused.value).isprintable()


@pytest.mark.parametrize("weight_map", [None, {}, [], ["model.safetensors"], "model.safetensors"])
def test_an_index_without_a_map(tmp_path, weight_map):
    write_index(tmp_path, weight_map)
    with pytest.raises(CheckpointError, match="is no index of shards: expected 'weight_map'"):
        read_weights(tmp_path, "model.safetensors.index.json")


def test_an_index_without_anything(tmp_path):
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}}))
    with pytest.raises(CheckpointError, match="is no index of shards"):
        read_weights(tmp_path, "pytorch_model.bin.index.json")
