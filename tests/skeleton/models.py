"""Skeletons of small models."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from surfw.checkpoint import Checkpoint, open_directory
from surfw.skeleton.build import Skeleton, build_skeleton, read_config, resolve_class
from tests.exactness.families import FAMILIES


def settings_of(family: str) -> dict[str, Any]:
    """A family's configuration, as in its `config.json`."""
    found = FAMILIES[family]
    config = getattr(transformers, found.class_name).config_class(**found.settings)
    return dict(json.loads(config.to_json_string(use_diff=False)))


def skeleton_of(
    family: str,
    *,
    dtype: torch.dtype = torch.float32,
    class_name: str | None = None,
    tensor_count: int = 500,
    accepts: Callable[[tuple[int, ...]], bool] = lambda _: True,
    **settings: Any,
) -> Skeleton:
    """The skeleton of a family, with some settings changed."""
    config = read_config(settings_of(family) | settings, where=family)
    cls = resolve_class(class_name or FAMILIES[family].class_name, config, where=family)
    return build_skeleton(config, cls, dtype, tensor_count=tensor_count, accepts=accepts, where=family)


def skeleton_for(
    folder: Path, *, class_name: str | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Skeleton, Checkpoint]:
    """The skeleton of a saved checkpoint, and the checkpoint."""
    checkpoint = open_directory(folder)
    config = read_config(checkpoint.config, where=folder.name)
    cls = resolve_class(class_name or checkpoint.config["architectures"][0], config, where=folder.name)
    return build_skeleton(config, cls, dtype, tensor_count=500, where=folder.name), checkpoint
