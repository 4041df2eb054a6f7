"""A LoRA adapter as peft saves it: `adapter_config.json`, and its tensors in `adapter_model.safetensors` or `.bin`.

The format is peft's own (its documentation, "PEFT checkpoint format"): a tensor's name is `base_model.model.`, the path
of the module that it changes, and its role. Only settings that are known to have no effect, or that
`surfw.skeleton.lora` implements, are accepted; any other setting that is in effect is refused by name.
"""

import math
import re
import sys
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from surfw.checkpoint.companions import companions, list_files
from surfw.checkpoint.layout import (
    ADAPTER_CONFIG_FILE,
    CONFIG_BYTES,
    HUB,
    find_adapter_weights,
    read_json,
)
from surfw.checkpoint.reader import Checkpoint, folder_name, local_directory, open_shard, refuse_revision
from surfw.checkpoint.shard import Shard, translate_errors
from surfw.config import printable, quote
from surfw.errors import UnsupportedModelError

PREFIX = "base_model.model."

_TOLD = {
    "auto_mapping", "base_model_name_or_path", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode",
    "layers_pattern", "layers_to_transform", "lora_dropout", "megatron_core", "peft_version", "qalora_group_size",
    "revision", "runtime_config", "target_modules", "task_type",
}  # fmt: skip
"""Settings of training or of the adapter's origin, which have no effect on the result."""

_USED = (
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_bias", "modules_to_save",
)  # fmt: skip
"""Settings that determine the result."""

_PLAIN_STARTS = ("gaussian", "eva", "orthogonal")
"""Initialisations for training that do not change the base's weights."""


def open_adapter(model: str, *, revision: str | None = None, show_progress: bool = False) -> Checkpoint:
    """Open an adapter by name, downloading it from the hub if it is not a local directory.

    Args:
        model: a local directory, or a hub id (`org/name`).
        revision: branch, tag or commit of the hub repository.
        show_progress: let the hub library draw progress bars on stderr, if that is a terminal.

    Returns:
        Its files as a checkpoint, whose `config` has the settings that determine the result.

    Raises:
        CheckpointError: it is damaged, incomplete, or missing.
        UnsupportedModelError: it is not a LoRA adapter, or uses features that surfw does not support.
        ConfigurationError: `revision` is given for a local directory.
    """
    folder = local_directory(model, "an adapter")
    if folder is None:
        from surfw.checkpoint.hub import download_adapter

        where = f"{HUB}{model}"
        check = partial(_read_settings, where=where)
        folder = download_adapter(model, revision, check, show_progress=show_progress)
        return open_adapter_folder(folder, name=model, where=where)
    refuse_revision(revision, model)
    return open_adapter_folder(folder)


def open_adapter_folder(
    folder: Path,
    *,
    name: str | None = None,
    names: Collection[str] | None = None,
    open_shard: Callable[[Path], Shard] = open_shard,
    where: str | None = None,
) -> Checkpoint:
    """Open the adapter in a local directory; see `open_directory` for the arguments, and `open_adapter` for errors."""
    if names is None:
        with translate_errors(folder):
            names = list_files(folder)
    where = where or str(folder)
    file = find_adapter_weights(names, where)
    clean = _read_settings(folder, where)
    return Checkpoint(
        name=name or folder_name(folder),
        path=folder,
        config=clean,
        generation_config=None,
        files={one: folder / one for one in companions(names)},
        shards=(open_shard(folder / file),),
        url=str(folder.absolute()),
    )


def _read_settings(folder: Path, where: str) -> dict[str, Any]:
    """Read the settings of an adapter in a folder; `where` names it in errors."""
    path = f"{where}/{ADAPTER_CONFIG_FILE}"
    return check_settings(read_json(folder / ADAPTER_CONFIG_FILE, CONFIG_BYTES, path), where=path)


def check_settings(settings: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """Check the settings of an adapter, and return those that determine the result.

    Raises:
        UnsupportedModelError: a setting requests something that surfw does not support, or has the wrong type.
    """
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise UnsupportedModelError(
            f"{where} is an adapter of the kind {quote(kind)} (peft_type), and surfw applies 'LORA' alone; merge it "
            "into its base with peft (merge_and_unload), and chunk the result"
        )
    start = settings.get("init_lora_weights", True)
    refuse = partial(_refuse, where=where)
    if not isinstance(start, bool) and start is not None and start not in _PLAIN_STARTS:
        raise refuse("init_lora_weights", start, "with it, peft changes the weights of the base as well")
    if settings.get("bias", "none") != "none":
        raise refuse("bias", settings["bias"], "biases of the base were trained with it")
    for key, value in settings.items():
        if key not in _TOLD and key not in _USED and key not in {"init_lora_weights", "bias"} and _asks(value):
            raise refuse(key, value, "surfw does not compute with that")
    used = {key: settings[key] for key in _USED if key in settings and settings[key] is not None}
    for key, fits in _TYPES.items():
        if key in used and not fits(used[key]):
            raise refuse(key, used[key], "it is of another type than peft writes")
    return used


def _asks(value: Any) -> bool:
    """Whether a setting is in effect; empty values, and objects with only empty values, are not."""
    return any(map(_asks, value.values())) if isinstance(value, Mapping) else bool(value)


def _refuse(key: str, value: Any, why: str, *, where: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{where} has {printable(key)[:120]} = {quote(value)}: {why}; merge the adapter into its base with peft "
        "(merge_and_unload), and chunk the result"
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 20


def _is_table(value: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, Mapping) and all(isinstance(key, str) and fits(one) for key, one in value.items())


_TYPES: Mapping[str, Callable[[Any], bool]] = {
    "r": _is_rank,
    "lora_alpha": _is_number,
    "rank_pattern": partial(_is_table, fits=_is_rank),
    "alpha_pattern": partial(_is_table, fits=_is_number),
    "use_rslora": lambda value: isinstance(value, bool),
    "lora_bias": lambda value: isinstance(value, bool),
    "modules_to_save": lambda value: isinstance(value, list) and all(isinstance(one, str) for one in value),
}


def scaling_of(settings: Mapping[str, Any], module: str) -> tuple[int, float]:
    """Return the rank and the scaling factor of a module's adapter according to the settings.

    They are computed as in peft's `LoraModel._create_and_replace` and `LoraLayer.update_layer`.
    """
    rank = _by_pattern(settings.get("rank_pattern", {}), module, settings.get("r", 8))
    alpha = _by_pattern(settings.get("alpha_pattern", {}), module, settings.get("lora_alpha", 8))
    return rank, alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank


def is_saved(settings: Mapping[str, Any], path: str) -> bool:
    """Whether a module or tensor, or a module that contains it, is saved whole: see `modules_to_save`."""
    return any(f".{name}." in f".{path}." for name in settings.get("modules_to_save", ()))


def strip_prefix(names: Collection[str], *, where: str) -> dict[str, str]:
    """Map the tensor names in a file to those in the base.

    Raises:
        UnsupportedModelError: a name does not have peft's prefix.
    """
    for name in names:
        if not name.startswith(PREFIX):
            raise UnsupportedModelError(
                f"{where} holds {quote(name)}, expected names that begin with {PREFIX}, as peft writes them; save the "
                "adapter with peft's save_pretrained"
            )
    return {name: name.removeprefix(PREFIX) for name in names}


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """Return the value of the first pattern that matches the end of a module's path, as in peft's `get_pattern_key`."""
    for pattern, value in patterns.items():
        try:
            found = re.match(rf"(.*\.)?({pattern})$", module)
        except (re.error, RecursionError, OverflowError) as exc:
            raise UnsupportedModelError(
                f"an adapter has the pattern {quote(pattern)}, which is no regular expression ({exc}); correct its "
                f"{ADAPTER_CONFIG_FILE}"
            ) from exc
        if found:
            return value
    return default
