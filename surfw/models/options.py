"""The options for opening a model, and their validation."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from ssl import SSLContext
from types import UnionType
from typing import Any, TypedDict

import torch
from transformers import PreTrainedModel

from surfw.config import (
    CodecChoice,
    OnMissing,
    Policy,
    SourceOrder,
    TlsFiles,
    check_codec,
    check_on_missing,
    check_policy,
    expect,
    is_size,
    parse_size,
    suggest_size,
)
from surfw.errors import ConfigurationError
from surfw.retry import RetryPolicy
from surfw.runtime.device import check_device
from surfw.runtime.plan import Limit
from surfw.skeleton.build import check_model_class


class ConnectionOptions(TypedDict, total=False):
    """Connection options for a server or storage; see `WeightClient`."""

    token: str | None
    ssl: SSLContext | TlsFiles | None
    retry: RetryPolicy | None
    connect_timeout: float
    silence_timeout: float
    storage_options: Mapping[str, Any] | None
    disk_cache: int | str | None
    cache_dir: str | os.PathLike[str] | None
    offline: bool | None
    deadline: float | None
    encryption_key_file: str | os.PathLike[str] | None
    verify_key: str | os.PathLike[str] | None
    source_order: SourceOrder


class ModelOptions(ConnectionOptions, total=False):
    """Options for opening a model, without its memory limits; see `StreamingBaseModel`."""

    prefetch: bool
    device: str | torch.device
    dtype: str | None
    on_missing: OnMissing
    policy: Policy
    codec: CodecChoice
    adapter: str | None


class OpenOptions(ModelOptions, total=False):
    """Options for opening a model; see `StreamingBaseModel`."""

    cache_size: int | None
    memory_budget: int | str | None
    device_memory: int | str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenSettings:
    """Validated settings for opening a model; see `StreamingBaseModel` for their meaning.

    Attributes:
        limit: limit of the weights in memory; with neither bytes nor layers, the default applies.
        device_budget_bytes: budget on the device; None for the default.
        is_pinned: whether the model is identified by a pin; see `Loader`.
    """

    limit: Limit
    device: str = "cpu"
    device_budget_bytes: int | None = None
    prefetch: bool
    dtype: str | None
    on_missing: OnMissing
    codec: CodecChoice
    adapter: str | None = None
    is_pinned: bool = False
    model_class: type[PreTrainedModel] | None

    def __post_init__(self) -> None:
        """Raise ConfigurationError for an invalid setting."""
        expect("dtype", self.dtype, str | None, "a dtype's name or None")
        expect("adapter", self.adapter, str | None, "an adapter's name or None")
        check_model_class(self.model_class)
        check_on_missing(self.on_missing)
        check_policy(self.limit.policy)
        check_codec(self.codec)
        check_device(self.device)


def expect_number(name: str, value: Any, least: int, most: float = math.inf, *, kind: type | UnionType = int) -> None:
    """Raise ConfigurationError unless an argument is of type `kind`, and None or a finite number within the bounds."""
    bounds = f"{least} or more" if most == math.inf else f"from {least} to {most}"
    expect(name, value, kind, f"a number, {bounds}")
    if value is not None and not (least <= value <= most and value < math.inf):
        raise ConfigurationError(f"{name} is {value}, expected a number, {bounds}")


def budget_bytes(memory_budget: int | str | None, name: str = "memory_budget") -> int | None:
    """A budget in bytes, from a number of bytes or a size such as `1.5GB`; None for None.

    Raises:
        ConfigurationError: it is not a size, or not over 0.
    """
    if memory_budget is None:
        return None
    if isinstance(memory_budget, str) and (meant := suggest_size(memory_budget)):
        raise ConfigurationError(f"{name} is {memory_budget!r}, which is bytes; did you mean {meant!r}?")
    size = parse_size(memory_budget) if isinstance(memory_budget, str) and is_size(memory_budget) else memory_budget
    if isinstance(size, bool) or not isinstance(size, int) or size <= 0:
        raise ConfigurationError(
            f"{name} is {memory_budget!a:.80}, expected a number of bytes, or a size such as '1.2GB'"
        )
    return size
