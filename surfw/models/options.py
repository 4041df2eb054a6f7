"""What models are opened with: the keywords, and the checks that they go through."""

from collections.abc import Mapping
from dataclasses import dataclass
from ssl import SSLContext
from typing import Any, TypedDict

import torch
from transformers import PreTrainedModel

from surfw.config import OnMissing, Policy, check_on_missing, check_policy, expect, is_size, parse_size
from surfw.errors import ConfigurationError
from surfw.retry import RetryPolicy
from surfw.runtime.plan import check_cache_layers
from surfw.skeleton.build import check_model_class


class ConnectionOptions(TypedDict, total=False):
    """How a server or a storage is reached; see `WeightClient`."""

    token: str | None
    ssl: SSLContext | None
    retry: RetryPolicy | None
    connect_timeout: float
    silence_timeout: float
    storage_options: Mapping[str, Any] | None


class ModelOptions(ConnectionOptions, total=False):
    """How a model is opened, except for how much memory it takes; see `StreamingBaseModel`."""

    prefetch: bool
    device: str | torch.device
    dtype: str | None
    on_missing: OnMissing
    policy: Policy


class OpenOptions(ModelOptions, total=False):
    """How a model is opened; see `StreamingBaseModel`."""

    cache_size: int | None
    memory_budget: int | str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenSettings:
    """The checked settings that a model is opened with; see `StreamingBaseModel` for what each means."""

    cache_size: int | None
    budget_bytes: int | None
    prefetch: bool
    dtype: str | None
    on_missing: OnMissing
    policy: Policy
    model_class: type[PreTrainedModel] | None

    def __post_init__(self) -> None:
        """Check them.

        Raises:
            ConfigurationError: one cannot be used.
        """
        if self.cache_size is not None:
            check_cache_layers(self.cache_size)
        expect("dtype", self.dtype, str | None, "a dtype's name or None")
        check_model_class(self.model_class)
        check_on_missing(self.on_missing)
        check_policy(self.policy)


def check_device(device: str | torch.device) -> None:
    """Make sure that surfw computes there.

    Raises:
        ConfigurationError: it does not.
    """
    try:
        kind = torch.device(device).type
    except (RuntimeError, TypeError) as exc:
        raise ConfigurationError(f"device {str(device)[:80]!r} is not a device; expected 'cpu'") from exc
    if kind != "cpu":
        raise ConfigurationError(f"device {str(device)!r} cannot be used: surfw computes on the CPU; leave it out")


def budget_bytes(memory_budget: int | str | None) -> int | None:
    """A budget in bytes, from a number of bytes or a size such as `1.5GB`; None for None.

    Raises:
        ConfigurationError: it is not a size, or not over 0.
    """
    if memory_budget is None:
        return None
    size = parse_size(memory_budget) if isinstance(memory_budget, str) and is_size(memory_budget) else memory_budget
    if isinstance(size, bool) or not isinstance(size, int) or size <= 0:
        raise ConfigurationError(
            f"memory_budget is {memory_budget!a:.80}, expected a number of bytes, or a size such as '1.2GB'"
        )
    return size
