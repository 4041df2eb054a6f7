"""Configurations as plain data: what may be believed of one that somebody else wrote.

A configuration can name code: modelling files (`auto_map`), attention and expert kernels named by repository, custom
generation. surfw never fetches or runs any. `sanitise_config` takes such requests out; `refuse_kernels` is for the
moment a checkpoint is chunked, when its owner can still be asked to change it. Knows neither torch nor transformers.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from surfw.errors import UnsupportedModelError

_ATTENTION, _EXPERTS = {"eager", "sdpa"}, {"eager", "batched_mm", "grouped_mm"}
IMPLEMENTATIONS = _ATTENTION | _EXPERTS
"""The attention and expert implementations that a configuration may choose: they are torch's own, and ready at once."""

COMPILED = {"flex_attention"}
"""Those that transformers compiles first: for whoever names a class of one's own."""

_UNUSED = {"flash_attention_2", "flash_attention_3", "flash_attention_4"} | COMPILED
"""Names of transformers' own for which it may fetch a kernel, or compiles one for a minute and keeps it elsewhere on
the machine: not used, but no reason to refuse a checkpoint."""

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


def sanitise_config(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The configuration without its requests for foreign code, and a line for each request taken out."""
    dropped: list[str] = []
    clean: dict[str, Any] = _clean(dict(config), "", dropped, 0)
    return clean, dropped


def _clean(value: Any, path: str, dropped: list[str], depth: int) -> Any:
    if depth > _MAX_DEPTH:
        raise UnsupportedModelError(f"the configuration is nested more than {_MAX_DEPTH} deep at {path[:80]}")
    if isinstance(value, list):
        return [_clean(inner, f"{path}{index}.", dropped, depth + 1) for index, inner in enumerate(value)]
    if not isinstance(value, dict):
        return value
    clean = {}
    for key, inner in value.items():
        if _asks_for_code(key, inner):
            dropped.append(f"{path}{key}: {str(inner)[:80]}")
        else:
            clean[key] = _clean(inner, f"{path}{key}.", dropped, depth + 1)
    return clean


def _asks_for_code(key: str, value: Any) -> bool:
    if key in _CODE_KEYS:
        return bool(value)
    if key == "backbone":
        return isinstance(value, str) and "/" in value
    allowed = _EXPERTS if "expert" in key else _ATTENTION
    return bool(_IMPLEMENTATION_KEY.fullmatch(key)) and not set(_texts(value)) <= allowed


def _texts(value: Any) -> Iterator[str]:
    """All texts in a value, however it is nested."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


def tag_floats(value: Any) -> Any:
    """The value with the numbers that JSON does not have in the form in which transformers writes them.

    `config.json` files are read by Python, which knows `NaN`, `Infinity` and `-Infinity`; others that read JSON do not.
    transformers 5 writes `{"__float__": "Infinity"}`. The depth is bounded by `sanitise_config`.
    """
    if isinstance(value, dict):
        return {key: tag_floats(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [tag_floats(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {_FLOAT_KEY: "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"}
    return value


def untag_floats(value: Any) -> Any:
    """What `tag_floats` was given; every other value as it is."""
    if isinstance(value, dict):
        if (number := _untag_float(value)) is not None:
            return number
        return {key: untag_floats(inner) for key, inner in value.items()}
    return [untag_floats(inner) for inner in value] if isinstance(value, list) else value


def _untag_float(value: Any) -> float | None:
    """The number that is meant, if the value is one in the form of `tag_floats`."""
    tag = value.get(_FLOAT_KEY) if isinstance(value, dict) and len(value) == 1 else None
    return _FLOATS.get(tag) if isinstance(tag, str) else None


def refuse_kernels(config: Mapping[str, Any], *, where: str) -> None:
    """Refuse a configuration that asks for a kernel from a repository, however deep.

    Raises:
        UnsupportedModelError: it does; the text names the key and what to change.
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
    """Refuse numbers that no model has, before anything is built from them.

    Raises:
        UnsupportedModelError: a number of layers or experts over 10,000, of labels over 100,000, or any integer over
            2^40.
    """
    for key, value in _walk(config):
        if isinstance(value, bool) or not isinstance(value, int):
            continue
        most = _MAX_LAYERS if _LAYER_KEY.fullmatch(key) else _MAX_LABELS if key == _LABELS_KEY else _MAX_INTEGER
        if abs(value) > most:
            raise UnsupportedModelError(
                f"{where} has {key[:80]} = {str(value)[:40]}, expected at most {most}; the file is damaged"
            )


def refuse_endless_numbers(config: Mapping[str, Any], *, where: str) -> None:
    """Refuse settings that are no number, or infinite.

    An infinite bound sets none, as in Mamba-2's `time_step_limit`: it is accepted where the key speaks of a limit, a
    maximum, a minimum, a clip or a threshold. An infinite epsilon, scale or frequency makes every result the same.

    Raises:
        UnsupportedModelError: there is one; the text names the key.
    """
    for key, value in _walk(config):
        if not isinstance(value, float) or math.isfinite(value):
            continue
        if math.isnan(value) or not _BOUND_KEY.fullmatch(key):
            raise UnsupportedModelError(
                f"{where} has {key[:80]} = {value}, expected a finite number; the file is damaged, or the model "
                "computes nothing with it: then remove it from there"
            )


def _walk(value: Any, key: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Every value with its key, however deep; the items of a list have the list's."""
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
