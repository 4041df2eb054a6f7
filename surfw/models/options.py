"""The keywords of everything that opens a model, and what they are checked for."""

from collections.abc import Mapping
from ssl import SSLContext
from typing import Any, TypedDict

import torch

from surfw.config import OnMissing, Policy, is_size, parse_size
from surfw.errors import ConfigurationError
from surfw.retry import RetryPolicy


class ConnectionOptions(TypedDict, total=False):
    """How a server or a storage is reached; see `WeightClient`."""

    token: str | None
    ssl: SSLContext | None
    retry: RetryPolicy | None
    connect_timeout: float
    silence_timeout: float
    storage_options: Mapping[str, Any] | None


class ModelOptions(ConnectionOptions, total=False):
    """How a model is opened, but for how much memory it takes; see `StreamingBaseModel`."""

    prefetch: bool
    device: str | torch.device
    dtype: str | None
    on_missing: OnMissing
    policy: Policy


class OpenOptions(ModelOptions, total=False):
    """How a model is opened; see `StreamingBaseModel`."""

    cache_size: int | None
    memory_budget: int | str | None


def check_device(device: str | torch.device) -> None:
    """Make sure that surfw computes there.

    Raises:
        ConfigurationError: it does not.
    """
    try:
        kind = torch.device(device).type
    except (RuntimeError, TypeError) as exc:
        raise ConfigurationError(f"device {str(device)[:80]!r} is not one; expected 'cpu'") from exc
    if kind != "cpu":
        raise ConfigurationError(f"device {str(device)!r} cannot be used: surfw computes on the CPU; leave it out")


def budget_bytes(memory_budget: int | str | None) -> int | None:
    """A budget in bytes, of a number of bytes or a size such as `1.5GB`.

    Raises:
        ConfigurationError: it is not a size, or none at all.
    """
    if memory_budget is None:
        return None
    size = parse_size(memory_budget) if isinstance(memory_budget, str) and is_size(memory_budget) else memory_budget
    if isinstance(size, bool) or not isinstance(size, int) or size <= 0:
        raise ConfigurationError(
            f"memory_budget is {memory_budget!a:.80}, expected a number of bytes, or a size such as '1.2GB'"
        )
    return size
