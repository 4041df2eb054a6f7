"""Which generation settings a file may choose: those that request code or another way to run are removed."""

import json
import math
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig

from surfw.errors import UnsupportedModelError
from surfw.skeleton.sanitise import (
    check_generation,
    refuse_absurd_sizes,
    refuse_endless_numbers,
    sanitise_generation,
    sanitise_outputs,
)

TAKEN = frozenset(dir(GenerationConfig))
PUBLISHED: list[dict[str, Any]] = [
    {
        "_from_model_config": True, "bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": -1, "max_length": 4096,
        "transformers_version": "4.40.0", "do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 50,
    },
    {
        "forced_decoder_ids": [[1, None]], "suppress_tokens": [], "begin_suppress_tokens": [220, 50257],
        "is_multilingual": 1, "lang_to_id": {"<|en|>": 5}, "return_timestamps": False, "alignment_heads": [[1]],
    },
    {
        "early_stopping": "never", "length_penalty": 2, "no_repeat_ngram_size": 3, "num_beams": 4, "max_time": 3,
        "bad_words_ids": [[5], [6, 7]], "sequence_bias": [[[5, 6], -1.5]], "stop_strings": ["a"],
        "exponential_decay_length_penalty": [5, 1.1], "num_assistant_tokens_schedule": "constant",
        "output_hidden_states": [0, -1], "use_cache": True, "guidance_scale": None, "prompt_lookup_num_tokens": 3,
        "watermarking_config": {}, "num_return_sequences": 1,
    },
]  # fmt: skip


@pytest.mark.parametrize("settings", PUBLISHED)
def test_what_published_models_say_stays(settings: dict[str, Any]) -> None:
    assert sanitise_generation(settings, taken=TAKEN) == (settings, [])
    check_generation(settings, where="here")


@pytest.mark.parametrize(
    ("settings", "dropped"),
    [
        ({"low_memory": None, "num_beam_groups": 1, "diversity_penalty": 0.0, "is_assistant": False}, []),
        ({"cache_implementation": "hybrid"}, []),
        ({"cache_implementation": "dynamic", "cache_config": None}, []),
        ({"cache_implementation": "static"}, ["cache_implementation: static"]),
        ({"cache_implementation": ["x"]}, ["cache_implementation: ['x']"]),
        ({"compile_config": {"fullgraph": True}}, ["compile_config: {'fullgraph': True}"]),
        ({"dola_layers": "high", "penalty_alpha": 0.6}, ["dola_layers: high", "penalty_alpha: 0.6"]),
        ({"streamer": 1, "assistant_model": "org/x"}, ["streamer: 1", "assistant_model: org/x"]),
        ({"to_dict": 3, "validate": "x", "__class__": "y", "_eos_token_tensor": 1},
         ["to_dict: 3", "validate: x", "__class__: y", "_eos_token_tensor: 1"]),
    ],
)  # fmt: skip
def test_what_no_file_may_choose_is_taken_out(settings: dict[str, Any], dropped: list[str]) -> None:
    assert sanitise_generation({**settings, "top_k": 3}, taken=TAKEN) == ({"top_k": 3}, dropped)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"eos_token_id": "x"}, "eos_token_id = 'x', expected a token id, or a list of them; correct it in its"),
        ({"max_time": []}, "max_time = [], expected a number"),
        ({"prefill_chunk_size": 0}, "prefill_chunk_size = 0, expected a whole number above 0"),
        ({"prefill_chunk_size": True}, "prefill_chunk_size = True, expected a whole number above 0"),
        ({"no_repeat_ngram_size": True}, "no_repeat_ngram_size = True, expected a whole number"),
        ({"sequence_bias": [1]}, "sequence_bias = [1], expected lists of token ids and a number"),
        ({"output_hidden_states": {"a": 1}}, "output_hidden_states = {'a': 1}, expected true, false or layers"),
    ],
)
def test_a_setting_of_another_kind_is_named(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        check_generation(settings, where="here")
    assert str(caught.value).startswith(f"here has the generation setting {text}")


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
)
names = [*sorted(vars(GenerationConfig())), "to_dict", "streamer", "x"]


@given(st.dictionaries(st.sampled_from(names), anything, max_size=4))
def test_whatever_a_file_says_it_is_checked_without_another_error(settings: dict[str, Any]) -> None:
    clean, _ = sanitise_generation(settings, taken=TAKEN)
    assert sanitise_generation(clean, taken=TAKEN) == (clean, [])
    with suppress(UnsupportedModelError):
        check_generation(clean, where="here")


def test_every_setting_of_transformers_has_a_rule_or_is_taken_out() -> None:
    """A new setting must be added to the rules, or to those that no file may choose."""
    asked = {name: "x" for name in vars(GenerationConfig()) if not name.startswith("_")}
    free = {"transformers_version"}
    clean, _ = sanitise_generation(asked, taken=())
    unchecked = set()
    for name in clean:
        try:
            check_generation({name: object()}, where="here")
            unchecked.add(name)
        except UnsupportedModelError:
            pass
    assert unchecked == free


def test_a_configuration_does_not_say_how_it_is_run() -> None:
    config = {
        "return_dict": False, "use_return_dict": True, "cache_implementation": "static", "compile_config": {"a": 1},
        "text_config": {"return_dict": False, "cache_implementation": "hybrid", "hidden_size": 8},
        "parts": [{"return_dict": True}],
    }  # fmt: skip
    before = json.dumps(config)
    assert sanitise_outputs(config, where="here") == (
        {"text_config": {"hidden_size": 8}, "parts": [{"return_dict": True}]},
        [
            "return_dict: False", "use_return_dict: True", "cache_implementation: static", "compile_config: {'a': 1}",
            "return_dict: False",
        ],
    )  # fmt: skip
    assert json.dumps(config) == before


@pytest.mark.parametrize(
    "config",
    [{"output_hidden_states": "x"}, {"parts": [{"chunk_size_feed_forward": None}]}, {"output_hidden_states": {}}],
)
def test_what_all_models_share_is_of_the_kind_they_compute_with(config: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModelError, match=r"^here has \w+ = .*, expected .*; correct config\.json"):
        sanitise_outputs(config, where="here")


def test_a_key_from_outside_stays_in_its_line() -> None:
    for refuse, value in ((refuse_absurd_sizes, 2**46), (refuse_endless_numbers, math.nan)):
        with pytest.raises(UnsupportedModelError, match=r"^config\.json has \? = "):
            refuse({"\n": value}, where="config.json")
