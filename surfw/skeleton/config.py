"""Configurations as plain data: what may be believed of one that somebody else wrote.

A configuration can name code: modelling files (`auto_map`), attention and expert kernels named by repository, custom
generation. surfw never fetches or runs any. `sanitise_config` takes such requests out; `refuse_kernels` is for the moment
a checkpoint is chunked, when its owner can still be asked to change it. Knows neither torch nor transformers.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from surfw.errors import UnsupportedModelError

IMPLEMENTATIONS = {
    "eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4",
    "batched_mm", "grouped_mm",
}  # fmt: skip
"""The attention and expert implementations that are transformers' own."""

_CODE_KEYS = {
    "auto_map", "custom_generate", "custom_pipelines", "distributed_config", "fusion_config", "kernel_config",
    "kernels_config", "trust_remote_code", "use_kernels", "use_pretrained_backbone",
}  # fmt: skip
_IMPLEMENTATION_KEY = re.compile(r"_?(attn|experts?|attention)_implementation(_internal|_autoset)?")
_LAYER_KEY = re.compile(r"(num|n)_.*layers?|n_layers?|.*_layers|num_blocks|num_experts|.*_experts")
_MAX_LAYERS = 10_000
_MAX_INTEGER = 1 << 40
_MAX_DEPTH = 24


def sanitise_config(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The configuration without its requests for foreign code, and a line for each request taken out."""
    dropped: list[str] = []
    return _clean(config, "", dropped, 0), dropped


def _clean(config: Mapping[str, Any], path: str, dropped: list[str], depth: int) -> dict[str, Any]:
    if depth > _MAX_DEPTH:
        raise UnsupportedModelError(f"the configuration is nested more than {_MAX_DEPTH} deep at {path}")
    clean: dict[str, Any] = {}
    for key, value in config.items():
        if _asks_for_code(key, value):
            dropped.append(f"{path}{key}: {str(value)[:80]}")
        elif isinstance(value, dict):
            clean[key] = _clean(value, f"{path}{key}.", dropped, depth + 1)
        else:
            clean[key] = value
    return clean


def _asks_for_code(key: str, value: Any) -> bool:
    if key in _CODE_KEYS:
        return bool(value)
    return bool(_IMPLEMENTATION_KEY.fullmatch(key)) and bool(_foreign_implementations(value))


def _foreign_implementations(value: Any) -> list[str]:
    values = list(value.values()) if isinstance(value, dict) else [value]
    return [str(one) for one in values if isinstance(one, str) and one not in IMPLEMENTATIONS]


def refuse_kernels(config: Mapping[str, Any], *, where: str) -> None:
    """Refuse a configuration that asks for a kernel from a repository, however deep.

    Raises:
        UnsupportedModelError: it does; the text names the key and what to change.
    """
    for key, value in _walk(config):
        named = _foreign_implementations(value) if _IMPLEMENTATION_KEY.fullmatch(key) else []
        if named or (key in {"use_kernels", "kernel_config"} and value):
            asked = named[0] if named else str(value)
            raise UnsupportedModelError(
                f"{where} asks for the implementation {asked[:120]!r} ({key}), which is code from elsewhere, and surfw runs "
                f"only transformers' own; remove {key} from config.json, or set it to eager or sdpa"
            )


def refuse_absurd_sizes(config: Mapping[str, Any], *, where: str) -> None:
    """Refuse numbers that no model has, before anything is built from them.

    Raises:
        UnsupportedModelError: a number of layers or experts over 10,000, or any integer over 2^40.
    """
    for key, value in _walk(config):
        if isinstance(value, bool) or not isinstance(value, int):
            continue
        most = _MAX_LAYERS if _LAYER_KEY.fullmatch(key) else _MAX_INTEGER
        if abs(value) > most:
            raise UnsupportedModelError(f"{where} has {key} = {str(value)[:40]}, expected at most {most}; the file is damaged")


def _walk(config: Mapping[str, Any], depth: int = 0) -> Iterator[tuple[str, Any]]:
    if depth > _MAX_DEPTH:
        raise UnsupportedModelError(f"the configuration is nested more than {_MAX_DEPTH} deep")
    for key, value in config.items():
        yield key, value
        if isinstance(value, dict):
            yield from _walk(value, depth + 1)
