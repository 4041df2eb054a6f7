"""Sanitises untrusted configurations and generation settings, as plain data.

A configuration can name code: modelling files (`auto_map`), attention and expert kernels named by repository, custom
generation. surfw never fetches or runs such code. `sanitise_config` removes these requests; `refuse_kernels` rejects
them when a checkpoint is chunked, because its owner can still change it then.

Generation settings may say how the next token is chosen. They may not select foreign code, another way to run the
model, or how it is compiled and cached: that is up to the caller of `generate()`.

Depends on neither torch nor transformers.
"""

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

from surfw.config import printable
from surfw.errors import UnsupportedModelError

_ATTENTION, _EXPERTS = {"eager", "sdpa"}, {"eager", "batched_mm", "grouped_mm"}
IMPLEMENTATIONS = _ATTENTION | _EXPERTS
"""The attention and expert implementations that a configuration may choose: torch's own, without compilation."""

COMPILED = {"flex_attention"}
"""Implementations that transformers compiles first: allowed only with the caller's own class."""

_UNUSED = {"flash_attention_2", "flash_attention_3", "flash_attention_4"} | COMPILED
"""Transformers' own names for which it may fetch a kernel, or compile one for a minute and cache it on disk: not used,
but no reason to refuse a checkpoint."""

_CODE_KEYS = {
    "attribute_map", "auto_map", "custom_generate", "custom_pipelines", "distributed_config", "fusion_config",
    "kernel_config", "kernels_config", "trust_remote_code", "use_kernels", "use_pretrained_backbone",
}  # fmt: skip
_IMPLEMENTATION_KEY = re.compile(r"_?(attn|experts?|attention)_implementation(_internal|_autoset)?")
_LAYER_KEY = re.compile(r"(num|n)_.*layers?|n_layers?|.*_layers|num_blocks|num_experts|.*_experts")
_FLOAT_KEY = "__float__"
_FLOATS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_BOUND_KEY = re.compile(r".*(limit|max|min|clip|threshold).*")
_LABELS_KEY = "num_labels"
_MAX_LAYERS = 10_000
_MAX_LABELS = 100_000
_MAX_INTEGER = 1 << 40
_MAX_DEPTH = 24
"""The deepest nesting of a configuration; published ones are far below it."""


class Sanitised(NamedTuple):
    """A safe configuration and generation settings, with descriptions of what was removed from them."""

    config: dict[str, Any]
    generation: dict[str, Any] | None
    code: list[str]  # requests for foreign code
    unfit: list[str]  # settings that no file may choose


def sanitise(config: Mapping[str, Any], generation: Mapping[str, Any] | None, *, where: str) -> Sanitised:
    """Sanitise a model's configuration and generation settings.

    Raises:
        UnsupportedModelError: they have absurd sizes, non-finite numbers, or settings of the wrong type.
    """
    refuse_absurd_sizes(config, where=where)
    refuse_endless_numbers(config, where=where)
    refuse_endless_numbers(generation or {}, where=where)
    clean, code = sanitise_config(config)
    clean, unfit = sanitise_outputs(clean, where=where)
    if generation is None:
        return Sanitised(clean, None, code, unfit)
    settings, code_of_generation = sanitise_config(generation)
    return Sanitised(clean, settings, code + code_of_generation, unfit)


def sanitise_config(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Remove requests for foreign code from a configuration; returns it with one line per removed request."""
    dropped: list[str] = []

    def keep(path: str, key: str, value: Any) -> bool:
        if asks := _asks_for_code(key, value):
            dropped.append(f"{path}{key}: {str(value)[:80]}")
        return not asks

    return _filter(dict(config), keep), dropped


def _filter(value: Any, keep: Callable[[str, str, Any], bool], path: str = "", depth: int = 0) -> Any:
    """The value without the object entries, at any depth, for which `keep(path, key, value)` is false."""
    if depth > _MAX_DEPTH:
        raise UnsupportedModelError(f"the configuration is nested more than {_MAX_DEPTH} deep at {path[:80]}")
    if isinstance(value, list):
        return [_filter(inner, keep, f"{path}{index}.", depth + 1) for index, inner in enumerate(value)]
    if not isinstance(value, dict):
        return value
    return {
        key: _filter(inner, keep, f"{path}{key}.", depth + 1) for key, inner in value.items() if keep(path, key, inner)
    }


def _asks_for_code(key: str, value: Any) -> bool:
    if key in _CODE_KEYS:
        return bool(value)
    if key == "backbone":
        return isinstance(value, str) and "/" in value
    allowed = _EXPERTS if "expert" in key else _ATTENTION
    return bool(_IMPLEMENTATION_KEY.fullmatch(key)) and not set(_texts(value)) <= allowed


def _texts(value: Any) -> Iterator[str]:
    """All strings in a value, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


def tag_floats(value: Any) -> Any:
    """Encode non-finite numbers, which JSON cannot express, as transformers 5 does: `{"__float__": "Infinity"}`.

    Python's JSON parser accepts `NaN`, `Infinity` and `-Infinity` in a `config.json`; other parsers do not. The depth
    is bounded by `sanitise_config`.
    """
    if isinstance(value, dict):
        return {key: tag_floats(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [tag_floats(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {_FLOAT_KEY: "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"}
    return value


def untag_floats(value: Any) -> Any:
    """The reverse of `tag_floats`."""
    if isinstance(value, dict):
        if (number := _untag_float(value)) is not None:
            return number
        return {key: untag_floats(inner) for key, inner in value.items()}
    return [untag_floats(inner) for inner in value] if isinstance(value, list) else value


def _untag_float(value: Any) -> float | None:
    """The number that `tag_floats` encoded as this value; None if it is something else."""
    tag = value.get(_FLOAT_KEY) if isinstance(value, dict) and len(value) == 1 else None
    return _FLOATS.get(tag) if isinstance(tag, str) else None


def refuse_kernels(config: Mapping[str, Any], *, where: str) -> None:
    """Refuse a configuration that asks for a kernel from a repository, at any depth.

    Raises:
        UnsupportedModelError: it does.
    """
    for key, value in _walk(config):
        named = sorted(set(_texts(value)) - IMPLEMENTATIONS - _UNUSED) if _IMPLEMENTATION_KEY.fullmatch(key) else []
        if named or (key in {"use_kernels", "kernel_config"} and value):
            asked = named[0] if named else str(value)
            raise UnsupportedModelError(
                f"{where} asks for the implementation {asked[:120]!r} ({key}), which is code from elsewhere, and surfw "
                f"runs only transformers' own; remove {key} from config.json, or set it to eager or sdpa"
            )


def refuse_absurd_sizes(config: Mapping[str, Any], *, where: str) -> None:
    """Refuse absurd numbers: over 10,000 layers or experts, over 100,000 labels, any integer over 2^40.

    Raises:
        UnsupportedModelError: there is one.
    """
    for key, value in _walk(config):
        if isinstance(value, bool) or not isinstance(value, int):
            continue
        most = _MAX_LAYERS if _LAYER_KEY.fullmatch(key) else _MAX_LABELS if key == _LABELS_KEY else _MAX_INTEGER
        if abs(value) > most:
            raise UnsupportedModelError(
                f"{where} has {printable(key)[:80]} = {str(value)[:40]}, expected at most {most}; the file is damaged"
            )


def refuse_endless_numbers(config: Mapping[str, Any], *, where: str) -> None:
    """Refuse settings that are NaN or infinite.

    An infinite bound means no bound, as in Mamba-2's `time_step_limit`. It is accepted if the key contains limit, max,
    min, clip or threshold. An infinite epsilon, scale or frequency makes every result the same.

    Raises:
        UnsupportedModelError: there is one.
    """
    for key, value in _walk(config):
        if not isinstance(value, float) or math.isfinite(value):
            continue
        if math.isnan(value) or not _BOUND_KEY.fullmatch(key):
            raise UnsupportedModelError(
                f"{where} has {printable(key)[:80]} = {value}, expected a finite number; the file is damaged, or the "
                "model computes nothing with it: then remove it from there"
            )


def _walk(value: Any, key: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Every value with its key, at any depth; the items of a list have the list's key."""
    if depth > _MAX_DEPTH:
        raise UnsupportedModelError(f"the configuration is nested more than {_MAX_DEPTH} deep")
    if (number := _untag_float(value)) is not None:
        yield key, number
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield name, inner
            yield from _walk(inner, name, depth + 1)
    elif isinstance(value, list):
        for inner in value:
            yield key, inner
            yield from _walk(inner, key, depth + 1)


NOT_FROM_A_FILE = {
    # transformers fetches their code from repositories
    "constraints", "diversity_penalty", "dola_layers", "force_words_ids", "num_beam_groups", "penalty_alpha",
    # generation with parts of the model, or with modified prompts
    "assistant_early_exit", "is_assistant", "speculation_type", "token_healing", "use_mtp",
    # compilation and the kind of cache
    "cache_config", "cache_implementation", "compile_config", "continuous_batching_config", "max_cache_len",
    # no longer implemented
    "low_memory",
}  # fmt: skip
"""Generation settings that no file may choose."""

_ASK_FOR_NOTHING = {"num_beam_groups": 1, "cache_implementation": "dynamic"}
_CACHES_OF_OLD = ("hybrid",)
"""Cache implementations that transformers ignores, because its default cache does the same."""

_ARGUMENTS = {
    "assistant_model", "assistant_tokenizer", "custom_generate", "generation_config", "inputs", "logits_processor",
    "negative_prompt_attention_mask", "negative_prompt_ids", "prefix_allowed_tokens_fn", "stopping_criteria",
    "streamer", "synced_gpus", "tokenizer", "trust_remote_code", "use_model_defaults",
}  # fmt: skip
"""Arguments of `generate()` that are not settings."""

_PRIVATE = {"_commit_hash", "_from_model_config"}
"""Private settings that transformers itself writes into files."""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool) or (_is_whole(value) and value in {0, 1})


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _list_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(fits, value))


def _either(*kinds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: any(fits(value) for fits in kinds)


def _pair_of(first: Callable[[Any], bool], second: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and len(value) == 2 and first(value[0]) and second(value[1])


_are_whole = _list_of(_is_whole)
_are_layers = _either(_is_flag, _are_whole)

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
    ("a whole number above 0", lambda value: _is_whole(value) and value > 0, (
        "num_assistant_tokens", "prefill_chunk_size", "prompt_lookup_num_tokens",
    )),
    ("true or false", _is_flag, (
        "_from_model_config", "disable_compile", "do_sample", "output_attentions", "output_logits", "output_scores",
        "remove_invalid_values", "renormalize_logits", "return_dict_in_generate", "use_cache",
    )),
    ("true, false or layers", _are_layers, ("output_hidden_states",)),
    ("true, false or 'never'", lambda value: _is_flag(value) or value == "never", ("early_stopping",)),
    ("a token id", _is_whole, ("pad_token_id",)),
    ("a token id, or a list of them", _either(_is_whole, _are_whole), (
        "bos_token_id", "decoder_start_token_id", "eos_token_id", "forced_bos_token_id", "forced_eos_token_id",
    )),
    ("a list of token ids", _are_whole, ("begin_suppress_tokens", "suppress_tokens")),
    ("lists of token ids", _list_of(_are_whole), ("bad_words_ids",)),
    ("a text, or a list of them", _either(_is_text, _list_of(_is_text)), ("stop_strings",)),
    ("two numbers", _pair_of(_is_number, _is_number), ("exponential_decay_length_penalty",)),
    ("lists of token ids and a number", _list_of(_pair_of(_are_whole, _is_number)), ("sequence_bias",)),
    ("an object", lambda value: isinstance(value, dict), ("watermarking_config",)),
    ("a text", _is_text, ("num_assistant_tokens_schedule",)),
]  # fmt: skip
_RULES = {name: (kind, fits) for kind, fits, names in _KINDS for name in names}

_SHARED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "chunk_size_feed_forward": ("a whole number", _is_whole),
    "output_hidden_states": ("true, false or layers", lambda value: value is None or _are_layers(value)),
}
_NOT_FROM_A_CONFIGURATION = {"cache_implementation", "compile_config", "continuous_batching_config", "use_return_dict"}


def sanitise_outputs(config: Mapping[str, Any], *, where: str) -> tuple[dict[str, Any], list[str]]:
    """Remove settings, at any depth, that break the model or say how to run it.

    One of them is a false `return_dict`: transformers' classes then look for names in the tuples that their own parts
    return.

    Returns:
        The configuration, and one line per removed setting that had an effect.

    Raises:
        UnsupportedModelError: a setting in `_SHARED`, which all models have, has the wrong type.
    """
    dropped: list[str] = []

    def keep(_: str, key: str, value: Any) -> bool:
        if key in _NOT_FROM_A_CONFIGURATION or (key == "return_dict" and value is not True):
            if key == "return_dict" or (value and value not in _CACHES_OF_OLD):
                dropped.append(f"{key}: {str(value)[:80]}")
            return False
        if key in _SHARED and not (fits := _SHARED[key])[1](value):
            raise UnsupportedModelError(f"{where} has {key} = {value!a:.80}, expected {fits[0]}; correct config.json")
        return True

    return _filter(dict(config), keep), dropped


def sanitise_generation(settings: Mapping[str, Any], *, taken: Collection[str]) -> tuple[dict[str, Any], list[str]]:
    """Remove settings that no file may choose.

    Args:
        settings: the contents of a `generation_config.json`.
        taken: names of methods, which no setting may have.

    Returns:
        The remaining settings, and one line per removed setting that had an effect.
    """
    clean, dropped = {}, []
    for key, value in settings.items():
        is_private = key.startswith("_") and key not in _PRIVATE
        if key in NOT_FROM_A_FILE or key in _ARGUMENTS or key in taken or is_private:
            asks = bool(value) and value != _ASK_FOR_NOTHING.get(key) and value not in _CACHES_OF_OLD
            dropped += [f"{key}: {str(value)[:80]}"] * asks
        else:
            clean[key] = value
    return clean, dropped


def check_generation(settings: Mapping[str, Any], *, where: str) -> None:
    """Refuse generation settings of the wrong type; unknown names may have any value.

    Raises:
        UnsupportedModelError: a setting has the wrong type.
    """
    for key, value in settings.items():
        kind, fits = _RULES.get(key, ("", lambda _: True))
        if value is not None and not fits(value):
            raise UnsupportedModelError(
                f"{where} has the generation setting {key} = {value!a:.80}, expected {kind}; correct it in its "
                "generation_config.json or config.json, and chunk it again"
            )
