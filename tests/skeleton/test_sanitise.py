"""What is accepted from an untrusted configuration: no code, and no absurd sizes."""

import json
import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedConfig

from surfw.errors import UnsupportedModelError
from surfw.skeleton.sanitise import (
    IMPLEMENTATIONS,
    refuse_absurd_sizes,
    refuse_endless_numbers,
    refuse_kernels,
    sanitise_config,
    tag_floats,
    untag_floats,
)

CODE = {
    "auto_map": {"AutoModel": "modeling_evil.Evil"},
    "custom_generate": "org/evil",
    "custom_pipelines": {"x": {"impl": "evil.Pipeline"}},
    "trust_remote_code": True,
    "use_kernels": True,
    "kernel_config": {"RMSNorm": "org/kernel:RMSNorm"},
    "use_pretrained_backbone": True,
    "attribute_map": {"innocent": "_attn_implementation_internal"},
    "backbone": "org/backbone",
    "attn_implementation": "org/kernel",
    "_attn_implementation": "org/kernel@main:flash",
    "_attn_implementation_internal": "org/kernel",
    "_attn_implementation_autoset": "org/kernel",
    "experts_implementation": "org/experts",
    "_experts_implementation": {"": "eager", "text_config": "org/experts"},
}
WRAPPERS: dict[str, Any] = {
    "at the top": lambda inner: inner,
    "in a part": lambda inner: {"text_config": inner},
    "deep": lambda inner: {"a": {"b": {"c": inner}}},
    "in a list": lambda inner: {"parts": [1, inner]},
    "in a list of lists": lambda inner: {"parts": [[inner], []]},
}


@pytest.mark.parametrize("key", CODE)
@pytest.mark.parametrize("where", WRAPPERS)
def test_requests_for_code_are_taken_out_at_any_depth(key: str, where: str) -> None:
    wrap = WRAPPERS[where]
    dirty = wrap({"hidden_size": 8, key: CODE[key]})
    clean, dropped = sanitise_config(dirty)
    assert clean == wrap({"hidden_size": 8})
    (line,) = dropped
    assert f"{key}: " in line
    assert dirty == wrap({"hidden_size": 8, key: CODE[key]})  # the original is unchanged


@pytest.mark.parametrize(
    "config",
    [
        {"auto_map": {}, "use_kernels": False, "custom_generate": None},
        {"attn_implementation": "sdpa", "experts_implementation": "grouped_mm"},
        {"_attn_implementation": {"text_config": "eager", "vision_config": "sdpa"}, "attn_implementation": None},
        {"layer_types": ["full_attention"], "rope_parameters": {"rope_type": "llama3"}},
    ],
)
def test_what_asks_for_nothing_stays(config: dict[str, Any]) -> None:
    assert sanitise_config(config) == (config, [])
    refuse_kernels(config, where="here")


@pytest.mark.parametrize("name", ["flash_attention_2", "flex_attention"])
def test_implementations_that_may_be_fetched_or_compiled_are_not_used_and_not_refused(name: str) -> None:
    config = {"attn_implementation": name, "text_config": {"_attn_implementation": {"": "sdpa", "x": name}}}
    refuse_kernels(config, where="here")
    clean, dropped = sanitise_config(config)
    assert clean == {"text_config": {}}
    assert dropped[0] == f"attn_implementation: {name}"


def test_attention_and_experts_have_implementations_of_their_own() -> None:
    config = {"attn_implementation": "eager", "experts_implementation": "batched_mm"}
    assert sanitise_config(config) == (config, [])
    assert sanitise_config({"attn_implementation": "grouped_mm", "experts_implementation": "sdpa"})[0] == {}


plain = st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(sorted(IMPLEMENTATIONS))
configs = st.recursive(
    plain,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([*CODE, "a", "b_implementation"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from([*CODE, "a"]), configs, max_size=5))
def test_a_clean_configuration_has_nothing_more_to_take_out(config: dict[str, Any]) -> None:
    clean, _ = sanitise_config(config)
    assert sanitise_config(clean) == (clean, [])
    refuse_kernels(clean, where="here")


@pytest.mark.parametrize(
    ("config", "asked", "key"),
    [
        (
            {"attn_implementation": "kernels-community/flash-attn"},
            "kernels-community/flash-attn",
            "attn_implementation",
        ),
        ({"text_config": {"_attn_implementation": "org/k"}}, "org/k", "_attn_implementation"),
        ({"parts": [{"experts_implementation": {"": "org/e"}}]}, "org/e", "experts_implementation"),
        ({"attn_implementation": "my_attention"}, "my_attention", "attn_implementation"),
        ({"use_kernels": True}, "True", "use_kernels"),
        ({"kernel_config": {"a": "org/k"}}, "{'a': 'org/k'}", "kernel_config"),
    ],
)
def test_a_kernel_from_a_repository_is_refused_with_what_to_change(
    config: dict[str, Any], asked: str, key: str
) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        refuse_kernels(config, where="./model")
    assert str(caught.value) == (
        f"./model asks for the implementation {asked!r} ({key}), which is code from elsewhere, and surfw runs only "
        f"transformers' own; remove {key} from config.json, or set it to eager or sdpa"
    )


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000, expected at most 10000"),
        ({"n_layer": 10_001}, "n_layer = 10001, expected at most 10000"),
        ({"encoder_layers": -(10**6)}, "encoder_layers = -1000000, expected at most 10000"),
        ({"num_local_experts": 10**5}, "num_local_experts = 100000, expected at most 10000"),
        ({"text_config": {"num_layers": 10**5}}, "num_layers = 100000, expected at most 10000"),
        ({"parts": [{"n_layers": 10**5}]}, "n_layers = 100000, expected at most 10000"),
        ({"num_labels": 10**9}, "num_labels = 1000000000, expected at most 100000"),
        ({"vocab_size": 1 << 41}, f"vocab_size = {1 << 41}, expected at most {1 << 40}"),
        ({"depths": [2, 1 << 50]}, f"depths = {1 << 50}, expected at most {1 << 40}"),
        ({"hidden_size": 10**4000}, f"hidden_size = 1{'0' * 39}, expected at most {1 << 40}"),
    ],
)
def test_absurd_sizes_are_refused(config: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        refuse_absurd_sizes(config, where="here")
    assert str(caught.value) == f"here has {complaint}; the file is damaged"


def test_ordinary_sizes_pass() -> None:
    config = {
        "num_hidden_layers": 126,
        "hidden_size": 16384,
        "num_experts": 256,
        "x": True,
        "eps": 1e-30,
        "y": "10" * 99,
    }
    refuse_absurd_sizes(config, where="here")


def nested(depth: int) -> dict[str, Any]:
    config: dict[str, Any] = {}
    for _ in range(depth):
        config = {"a": [config]}
    return config


def test_a_configuration_that_is_nested_without_end_is_refused() -> None:
    for check in (sanitise_config, lambda c: refuse_kernels(c, where="x"), lambda c: refuse_absurd_sizes(c, where="x")):
        with pytest.raises(UnsupportedModelError, match="nested more than 24 deep"):
            check(nested(200))
    assert sanitise_config(nested(5)) == (nested(5), [])


def test_a_clean_configuration_is_still_json() -> None:
    clean, _ = sanitise_config({"a": [1, {"b": None}], **CODE})
    assert json.loads(json.dumps(clean)) == clean == {"a": [1, {"b": None}]}


def test_numbers_that_json_does_not_have_are_tagged_as_transformers_tags_them() -> None:
    config = json.loads('{"limits": [0.0, Infinity, [-Infinity]], "part": {"eps": NaN, "on": true}, "name": null}')
    tagged = tag_floats(config)
    assert tagged == PreTrainedConfig._encode_special_floats(config)
    assert json.loads(json.dumps(tagged, allow_nan=False)) == tagged
    read = untag_floats(tagged)
    assert math.isnan(read["part"].pop("eps"))
    config["part"].pop("eps")
    assert read == config


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.just("__float__"), inner, max_size=3)
    ),
    max_leaves=10,
)


@given(JSON)
def test_tags_are_read_as_transformers_reads_them(value: Any) -> None:
    assert untag_floats(value) == PreTrainedConfig._decode_special_floats(value)
    assert tag_floats(value) == PreTrainedConfig._encode_special_floats(value)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"rms_norm_eps": math.inf}, "has rms_norm_eps = inf"),
        ({"rms_norm_eps": {"__float__": "Infinity"}}, "has rms_norm_eps = inf"),
        ({"text_config": {"rope_parameters": {"rope_theta": -math.inf}}}, "has rope_theta = -inf"),
        ({"scales": [1.0, {"__float__": "-Infinity"}]}, "has scales = -inf"),
        ({"time_step_limit": [0.0, math.nan]}, "has time_step_limit = nan"),
        ({"max_time": {"__float__": "NaN"}}, "has max_time = nan"),
    ],
)
def test_a_number_without_an_end_is_refused(config: dict[str, Any], text: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"^here {re.escape(text)}, expected a finite number; the file"):
        refuse_endless_numbers(config, where="here")


@pytest.mark.parametrize(
    "config",
    [
        {"time_step_limit": [0.0, math.inf], "max_time": {"__float__": "Infinity"}, "time_step_max": math.inf},
        {"rms_norm_eps": 1e-6, "layers": 3, "other": {"__float__": "text"}, "nothing": None, "more": {"__float__": []}},
    ],
)
def test_a_bound_may_be_infinite(config: dict[str, Any]) -> None:
    refuse_endless_numbers(config, where="here")
