"""Find the files of a checkpoint: its weights by transformers' precedence, its index, configuration and tokenizer.

This module uses only file names and JSON files; it opens no weights. JSON is capped before it is parsed, and the paths
that an index lists must lie in its own folder.
"""

import errno
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from surfw.checkpoint.shard import refuse_pointer, translate_errors
from surfw.config import DEQUANTISED, MAX_JSON_DEPTH, MAX_JSON_PARTS, MAX_JSON_VALUES, MIB, is_crowded, quote
from surfw.errors import CheckpointError, ConfigurationError, UnsupportedModelError
from surfw.files import read_regular

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
HUB = "hub model "
"""The prefix of a hub id in errors."""

ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_WEIGHTS_FILES = ("adapter_model.safetensors", "adapter_model.bin")
"""Possible weight files of an adapter, in the order in which peft looks for them."""

WEIGHTS_FILES = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
"""Possible weight files, in the order in which transformers looks for them."""

DISTRIBUTED_FILE = ".metadata"
"""The metadata file of a `torch.distributed.checkpoint`, next to the files of all ranks."""

_RANKS_FILE = re.compile(r"shard-[0-9]{5,}-model-[0-9]{5,}-of-[0-9]{5,}\.safetensors")
"""Names of the ranks' files, as written by its safetensors writer, which writes no metadata file."""

_VARIANT = re.compile(
    r"(?:model|pytorch_model)(?:\.(?:safetensors|bin)\.index)?\.([A-Za-z0-9_-]{1,32})\.(?:safetensors|bin|json)"
)
"""Names of a variant's files, as transformers writes them: `model.fp16.safetensors`."""

_SHARDS = {
    "model.safetensors.index.json": "model-*-of-*.safetensors",
    "pytorch_model.bin.index.json": "pytorch_model-*-of-*.bin",
}
"""Name patterns of shards, by the name of their index."""

CONFIG_BYTES = 16 * MIB
"""The maximum size of a configuration file."""

_QUANTISATION = ("quantization_config", "compression_config")
_INDEX_BYTES = 256 * MIB

_FOREIGN = {
    "*.gguf": "GGUF weights, of which surfw chunk takes one file",
    "*.msgpack": "Flax weights",
    "*.h5": "TensorFlow weights",
    "consolidated.*": "weights in their publisher's own layout",
    "*.onnx": "an ONNX graph",
    DISTRIBUTED_FILE: "weights saved by torch.distributed.checkpoint, of which surfw chunk takes a folder",
    "model_index.json": "a diffusion pipeline",
}


@dataclass(frozen=True, slots=True)
class Weights:
    """The shards of a checkpoint, in transformers' order, and the shard of each tensor according to the index."""

    shards: tuple[str, ...]
    promised: Mapping[str, str]


def weights_files(variant: str | None) -> tuple[str, ...]:
    """Return `WEIGHTS_FILES` for a variant: `model.fp16.safetensors` for `fp16`.

    Raises:
        ConfigurationError: the variant's name is not valid.
    """
    if variant is None:
        return WEIGHTS_FILES
    if not _VARIANT.fullmatch(f"model.{variant}.bin"):
        raise ConfigurationError(f"variant {quote(variant)} is not a word, such as fp16 (variant, --variant)")
    ends = (name.rpartition(".") for name in WEIGHTS_FILES)
    return tuple(f"{begin}.{variant}.{end}" for begin, _, end in ends)


def find_weights(names: Collection[str], where: str, variant: str | None = None) -> str:
    """Return the one of `weights_files` that transformers would load from a checkpoint with these files.

    Raises:
        ConfigurationError: the variant's name is not valid.
        UnsupportedModelError: there is an adapter, or the weights are of another kind or variant only.
        CheckpointError: there is no model.
    """
    entry = next((name for name in weights_files(variant) if name in names), None)
    if ADAPTER_CONFIG_FILE in names:
        raise has_adapter(where, entry)
    if entry is not None:
        return entry
    named = {found[1] for name in names if (found := _VARIANT.fullmatch(name))} - {"index"}
    variants = sorted(one for one in named if "-of-" not in one)
    if variants and variant is None:
        raise UnsupportedModelError(
            f"{where} has its weights as {', '.join(variants[:5])} only; name the one to take: --variant (variant=) "
            f"{variants[0]}"
        )
    if variant is not None:
        raise UnsupportedModelError(
            f"{where} has no weights called {variant}: expected {' or '.join(weights_files(variant))}, it has "
            f"{', '.join(variants) or 'no variants'}"
        )
    seen = [
        f"{name} ({what})" for pattern, what in _FOREIGN.items() for name in sorted(names) if fnmatchcase(name, pattern)
    ]
    if not seen and CONFIG_FILE not in names:
        raise no_checkpoint(where)
    index = next((entry for entry, shards in _SHARDS.items() if any(fnmatchcase(name, shards) for name in names)), None)
    advice = f"its shards lack their index: download {index} as well, or save" if index else "save"
    raise UnsupportedModelError(
        f"{where} has no weights that surfw reads: expected {' or '.join(WEIGHTS_FILES)}, "
        f"it has {', '.join(seen[:3] or sorted(names)[:8])}; {advice} the model with save_pretrained"
    )


def is_distributed(names: Collection[str]) -> bool:
    """Whether files were saved by `torch.distributed.checkpoint`, with no transformers weights next to them."""
    return (DISTRIBUTED_FILE in names or bool(ranks_files(names))) and not set(WEIGHTS_FILES).intersection(names)


def ranks_files(names: Collection[str]) -> list[str]:
    """Return the files that hold one rank's part of the model each, in order."""
    return sorted(filter(_RANKS_FILE.fullmatch, names))


def find_adapter_weights(names: Collection[str], where: str) -> str:
    """Return the one of `ADAPTER_WEIGHTS_FILES` that peft would load from an adapter with these files.

    Raises:
        CheckpointError: the files are not an adapter, or lack its weights.
    """
    if ADAPTER_CONFIG_FILE not in names:
        raise no_adapter(where)
    if file := next((one for one in ADAPTER_WEIGHTS_FILES if one in names), None):
        return file
    raise CheckpointError(
        f"{where} has no weights of an adapter: expected {' or '.join(ADAPTER_WEIGHTS_FILES)}, it has "
        f"{', '.join(sorted(names)[:8])}; download it again"
    )


def has_adapter(where: str, entry: str | None) -> UnsupportedModelError:
    """Return the error for an adapter, alone or next to weights: surfw applies an adapter only on request."""
    if entry is None:
        place = where.removeprefix(HUB)
        return UnsupportedModelError(
            f"{where} is an adapter ({ADAPTER_CONFIG_FILE}), no whole model: chunk its base first, and then the "
            f"adapter over it, with surfw chunk {place} --base NAME"
        )
    return UnsupportedModelError(
        f"{where} has an adapter ({ADAPTER_CONFIG_FILE}) beside the weights in {entry}, and transformers would apply "
        "it where peft is installed; move the adapter's files into a folder of their own, chunk the model, and then "
        "the adapter over it, with surfw chunk FOLDER --base NAME"
    )


def quantisation_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a configuration's quantisation settings from where transformers reads them; None if it has none."""
    text = config.get("text_config")
    for place in (config, text if isinstance(text, dict) else {}):
        if found := next((place[key] for key in _QUANTISATION if place.get(key)), None):
            return found if isinstance(found, dict) else {}
    return None


def without_quantisation(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration without quantisation settings, as for a dequantised model."""
    clean = {key: value for key, value in config.items() if key not in _QUANTISATION}
    if isinstance(text := clean.get("text_config"), dict):
        clean["text_config"] = {key: value for key, value in text.items() if key not in _QUANTISATION}
    return clean


def _expect_dense(quantised: Mapping[str, Any], path: str, *, may_be_quantised: bool) -> None:
    """Refuse quantised weights unless they may and can be dequantised.

    Raises:
        UnsupportedModelError: names the quantisation method.
    """
    method = quantised.get("quant_method")
    named = f"{path} asks for quantised weights ({quote(method or 'of an unnamed kind')})"
    if method not in DEQUANTISED:
        raise UnsupportedModelError(
            f"{named}, and surfw makes dense ones of {', '.join(DEQUANTISED)} alone, as transformers does on a CPU; "
            "take the model's unquantised weights"
        )
    if not may_be_quantised:
        raise UnsupportedModelError(
            f"{named}; make dense ones of them with --dequantize (dequantize=) bfloat16, or take the model's "
            "unquantised weights"
        )


def read_config(folder: Path, where: str | None = None, *, may_be_quantised: bool = False) -> dict[str, Any]:
    """Read the folder's `config.json`; `where` names the folder in errors if it holds copies.

    Raises:
        CheckpointError: it is missing, or not a JSON object of reasonable size.
        UnsupportedModelError: surfw cannot chunk the weights that it describes.
    """
    if not (folder / CONFIG_FILE).exists():
        raise no_checkpoint(where or str(folder))
    path = f"{where or folder}/{CONFIG_FILE}"
    config = read_json(folder / CONFIG_FILE, CONFIG_BYTES, path)
    if (quantised := quantisation_of(config)) is not None:
        _expect_dense(quantised, path, may_be_quantised=may_be_quantised)
    if named := config.get("transformers_weights"):
        raise UnsupportedModelError(
            f"{path} keeps its weights in {quote(named)} (transformers_weights), "
            f"expected {' or '.join(WEIGHTS_FILES)}; load the model with transformers and save it again"
        )
    return config


def read_generation_config(folder: Path, where: str | None = None) -> dict[str, Any] | None:
    """Read the folder's `generation_config.json`, if there is one."""
    path = folder / GENERATION_FILE
    return read_json(path, CONFIG_BYTES, f"{where or folder}/{path.name}") if path.exists() else None


def read_weights(folder: Path, name: str, where: str | None = None) -> Weights:
    """Return the shards that one of `weights_files` consists of.

    Raises:
        CheckpointError: the file is an invalid index.
    """
    if ".index." not in name:
        return Weights((name,), {})
    path = f"{where or folder}/{name}"
    promised = read_json(folder / name, _INDEX_BYTES, path).get("weight_map")
    if not isinstance(promised, dict) or not promised:
        raise CheckpointError(
            f"{path} is no index of shards: expected 'weight_map', an object from tensor to file name"
        )
    suffix = ".safetensors" if "safetensors" in name else ".bin"
    for tensor, file in promised.items():
        if not is_plain(file, suffix):
            raise CheckpointError(
                f"{path} places tensor {quote(tensor)} in {quote(file)}, "
                f"expected a path within the checkpoint that ends in {suffix}"
            )
    return Weights(tuple(sorted(set(promised.values()))), promised)


def read_json(path: Path, limit_bytes: int, where: str | None = None) -> dict[str, Any]:
    """Read a JSON object from a file of at most `limit_bytes`; `where` names it in errors if it is a copy.

    Raises:
        CheckpointError: the file is larger, cannot be read, or is not a JSON object.
    """
    where = where or str(path)
    text = read_small(path, limit_bytes, where)
    refuse_pointer(text, where)
    if is_crowded(text):
        raise CheckpointError(
            f"{where} has more than {MAX_JSON_PARTS} objects and lists, or {MAX_JSON_VALUES} values, which no file of "
            "this kind needs; download it again"
        )
    try:
        document = json.loads(text.decode())
    except RecursionError as exc:
        raise CheckpointError(f"{where} is not JSON that can be read: it is nested too deeply") from exc
    except ValueError as exc:
        raise CheckpointError(f"{where} is not JSON ({exc}); download it again") from exc
    if not isinstance(document, dict):
        raise CheckpointError(f"{where} is not a JSON object but {quote(document)}; download it again")
    _refuse_depth(document, where)
    return document


def read_small(path: Path, limit_bytes: int, where: str | None = None) -> bytes:
    """Read a regular file of at most `limit_bytes`.

    Raises:
        CheckpointError: the file is larger, or cannot be read.
    """
    where = where or str(path)
    with translate_errors(where):
        try:
            return read_regular(path, limit_bytes)
        except OSError as exc:
            if exc.errno != errno.EFBIG:
                raise
            raise CheckpointError(
                f"{where} has more than {limit_bytes} bytes, which no file of this kind needs"
            ) from exc


def _refuse_depth(document: Any, where: str) -> None:
    """Raise CheckpointError if a document is nested too deeply for the rest of surfw."""
    level, depth = [document], 0
    while level:
        depth += 1
        if depth > MAX_JSON_DEPTH:
            raise CheckpointError(f"{where} is nested too deeply: expected at most {MAX_JSON_DEPTH} levels")
        inside = (value.values() if isinstance(value, dict) else value for value in level)
        level = [one for values in inside for one in values if isinstance(one, dict | list)]


def no_checkpoint(where: str) -> CheckpointError:
    """Return the error for a location without a model."""
    return CheckpointError(
        f"{where} is not a checkpoint: no {CONFIG_FILE}; give the directory that save_pretrained wrote, or a hub id"
    )


def no_adapter(where: str) -> CheckpointError:
    """Return the error for a location without an adapter."""
    return CheckpointError(
        f"{where} is no adapter: there is no {ADAPTER_CONFIG_FILE}; name the folder that peft's save_pretrained wrote, "
        "and leave --base (base=) out for a whole model"
    )


def is_plain(file: Any, suffix: str) -> bool:
    """Whether a file name read from a checkpoint is a path within its folder, with this suffix."""
    if not isinstance(file, str) or not file.endswith(suffix) or not file.isprintable() or "\\" in file:
        return False
    return not {"", ".", ".."} & set(file.split("/"))
