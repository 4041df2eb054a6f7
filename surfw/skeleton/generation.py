"""Generation settings as plain data: what may be believed of those that somebody else wrote.

A file may say how a model's next token is chosen. It may not choose code from elsewhere, another way to run the model,
or how it is compiled and cached: that is for whoever calls `generate()`. Knows neither torch nor transformers.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from surfw.errors import UnsupportedModelError

_NOT_FROM_A_FILE = {
    # transformers fetches their code from repositories
    "constraints", "diversity_penalty", "dola_layers", "force_words_ids", "num_beam_groups", "penalty_alpha",
    # generation by parts of the model, or with prompts that are changed
    "assistant_early_exit", "is_assistant", "speculation_type", "token_healing", "use_mtp",
    # how it is compiled, and what its cache is made of
    "cache_config", "cache_implementation", "compile_config", "continuous_batching_config", "max_cache_len",
    # nothing implements it any more
    "low_memory",
}  # fmt: skip

_ASK_FOR_NOTHING = {"num_beam_groups": 1, "cache_implementation": "dynamic"}
_CACHES_OF_OLD = ("hybrid",)
"""Transformers takes no notice of them, since its default cache does the same."""

_ARGUMENTS = {
    "assistant_model", "assistant_tokenizer", "custom_generate", "generation_config", "inputs", "logits_processor",
    "negative_prompt_attention_mask", "negative_prompt_ids", "prefix_allowed_tokens_fn", "stopping_criteria",
    "streamer", "synced_gpus", "tokenizer", "trust_remote_code", "use_model_defaults",
}  # fmt: skip
"""What `generate()` takes, and no settings."""

_PRIVATE = {"_commit_hash", "_from_model_config"}
"""What transformers itself wrote into files."""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return _is_whole(value) and value > 0


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool) or (_is_whole(value) and value in {0, 1})


def _is_list(value: Any, of: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(of, value))


def _are_tokens(value: Any) -> bool:
    return _is_whole(value) or _is_list(value, _is_whole)


def _is_output(value: Any) -> bool:
    return _is_flag(value) or _is_list(value, _is_whole)


def _are_texts(value: Any) -> bool:
    return isinstance(value, str) or _is_list(value, lambda one: isinstance(one, str))


def _is_bias(value: Any) -> bool:
    return _is_list(
        value,
        lambda one: isinstance(one, list) and len(one) == 2 and _is_list(one[0], _is_whole) and _is_number(one[1]),
    )


_KINDS: list[tuple[str, Callable[[Any], bool], tuple[str, ...]]] = [
    ("a number", _is_number, (
        "assistant_confidence_threshold", "assistant_ensemble_weight", "encoder_repetition_penalty", "epsilon_cutoff",
        "eta_cutoff", "guidance_scale", "length_penalty", "max_time", "min_p", "repetition_penalty", "temperature",
        "top_h", "top_p", "typical_p",
    )),
    ("a whole number", _is_whole, (
        "assistant_lookbehind", "encoder_no_repeat_ngram_size", "max_length", "max_matching_ngram_size",
        "max_new_tokens", "min_length", "min_new_tokens", "no_repeat_ngram_size", "num_beams", "num_return_sequences",
        "target_lookbehind", "top_k",
    )),
    ("a whole number above 0", _is_count, (
        "num_assistant_tokens", "prefill_chunk_size", "prompt_lookup_num_tokens",
    )),
    ("true or false", _is_flag, (
        "_from_model_config", "disable_compile", "do_sample", "output_attentions", "output_logits", "output_scores",
        "remove_invalid_values", "renormalize_logits", "return_dict_in_generate", "use_cache",
    )),
    ("true, false or layers", _is_output, ("output_hidden_states",)),
    ("true, false or 'never'", lambda value: _is_flag(value) or value == "never", ("early_stopping",)),
    ("a token id", _is_whole, ("pad_token_id",)),
    ("a token id, or a list of them", _are_tokens, (
        "bos_token_id", "decoder_start_token_id", "eos_token_id", "forced_bos_token_id", "forced_eos_token_id",
    )),
    ("a list of token ids", lambda value: _is_list(value, _is_whole), ("begin_suppress_tokens", "suppress_tokens")),
    ("lists of token ids", lambda value: _is_list(value, lambda one: _is_list(one, _is_whole)), ("bad_words_ids",)),
    ("a text, or a list of them", _are_texts, ("stop_strings",)),
    ("two numbers", lambda value: _is_list(value, _is_number) and len(value) == 2,
     ("exponential_decay_length_penalty",)),
    ("lists of token ids and a number", _is_bias, ("sequence_bias",)),
    ("an object", lambda value: isinstance(value, dict), ("watermarking_config",)),
    ("a text", lambda value: isinstance(value, str), ("num_assistant_tokens_schedule",)),
]  # fmt: skip
_RULES = {name: (kind, fits) for kind, fits, names in _KINDS for name in names}

_SHARED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "chunk_size_feed_forward": ("a whole number", _is_whole),
    "output_hidden_states": ("true, false or layers", lambda value: value is None or _is_output(value)),
}
_NOT_FROM_A_CONFIGURATION = {"cache_implementation", "compile_config", "continuous_batching_config", "use_return_dict"}


def sanitise_outputs(config: Mapping[str, Any], *, where: str) -> tuple[dict[str, Any], list[str]]:
    """A model's configuration without settings that break the model, or say how it is run, at any depth.

    With `return_dict` false, classes of transformers look for names in the tuples that their own parts return.

    Returns:
        The configuration, and a line for each that was taken out and asked for something.

    Raises:
        UnsupportedModelError: another setting that all models share is of a kind that none computes with.
    """
    dropped: list[str] = []

    def clean(value: Any) -> Any:
        if isinstance(value, list):
            return [clean(inner) for inner in value]
        if not isinstance(value, dict):
            return value
        kept = {}
        for key, inner in value.items():
            if key in _NOT_FROM_A_CONFIGURATION or (key == "return_dict" and inner is not True):
                asks = key == "return_dict" or (bool(inner) and inner not in _CACHES_OF_OLD)
                dropped.extend([f"{key}: {str(inner)[:80]}"] * asks)
            elif key in _SHARED and not (fits := _SHARED[key])[1](inner):
                raise UnsupportedModelError(
                    f"{where} has {key} = {inner!a:.80}, expected {fits[0]}; correct config.json"
                )
            else:
                kept[key] = clean(inner)
        return kept

    return clean(dict(config)), dropped


def sanitise_generation(settings: Mapping[str, Any], *, taken: Collection[str]) -> tuple[dict[str, Any], list[str]]:
    """The settings without those that no file may choose, and a line for each of these that asked for something.

    Args:
        settings: as of `generation_config.json`.
        taken: names that settings cannot have, since methods have them.
    """
    clean, dropped = {}, []
    for key, value in settings.items():
        is_private = key.startswith("_") and key not in _PRIVATE
        if key in _NOT_FROM_A_FILE or key in _ARGUMENTS or key in taken or is_private:
            asks = bool(value) and value != _ASK_FOR_NOTHING.get(key) and value not in _CACHES_OF_OLD
            dropped += [f"{key}: {str(value)[:80]}"] * asks
        else:
            clean[key] = value
    return clean, dropped


def check_generation(settings: Mapping[str, Any], *, where: str) -> None:
    """Make sure that settings are of the kinds that transformers computes with; a model's own may be anything.

    Raises:
        UnsupportedModelError: one is not; the text names it.
    """
    for key, value in settings.items():
        if value is None or key not in _RULES:
            continue
        kind, fits = _RULES[key]
        if not fits(value):
            raise UnsupportedModelError(
                f"{where} has the generation setting {key} = {value!a:.80}, expected {kind}; correct it in its "
                "generation_config.json or config.json, and chunk it again"
            )
