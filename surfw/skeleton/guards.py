"""Guards for building a model class, hooked into process-wide state of torch, transformers and the hub.

Each guard applies to the building thread only; other threads may build, load and download models meanwhile. The one
thing that cannot be confined to a thread is the default dtype; see `default_dtype`.
"""

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import huggingface_hub.constants
import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from surfw.errors import SurfwError, UnsupportedModelError

logger = logging.getLogger("surfw.skeleton")

_MODULES_PER_TENSOR = 32
_UNTIED_TRIES = 6000


def quiet_prints(cls: type[PreTrainedModel]) -> None:
    """Redirect `print` in a transformers class's module to the log, because stdout is for results."""
    if cls.__module__.startswith("transformers."):
        vars(sys.modules[cls.__module__]).setdefault("print", _log)


def _log(*texts: object, **_: object) -> None:
    logger.info("%s", " ".join(map(str, texts)))


class _ThisThread(threading.local):
    """Thread-local state."""

    guard: "_Guard | None" = None  # checks the class that is being built
    offline = 0  # the number of `no_hub` contexts that the thread is in


_this_thread = _ThisThread()


class _OfflineHere:
    """Replaces `HF_HUB_OFFLINE`: true in threads inside `no_hub`, the original value in others."""

    def __init__(self, elsewhere: object) -> None:
        self.elsewhere = elsewhere
        self.users = 0

    def __bool__(self) -> bool:
        return bool(_this_thread.offline or self.elsewhere)


_hub_lock = threading.Lock()


@contextmanager
def no_hub() -> Iterator[None]:
    """Forbid access to the hub in this thread; other threads may use it meanwhile."""
    constants: Any = huggingface_hub.constants
    with _hub_lock:
        if not isinstance(constants.HF_HUB_OFFLINE, _OfflineHere):
            constants.HF_HUB_OFFLINE = _OfflineHere(constants.HF_HUB_OFFLINE)
        switch = constants.HF_HUB_OFFLINE
        switch.users += 1
    _this_thread.offline += 1
    try:
        yield
    finally:
        _this_thread.offline -= 1
        with _hub_lock:
            switch.users -= 1
            if not switch.users and constants.HF_HUB_OFFLINE is switch:  # else the program has set it meanwhile
                constants.HF_HUB_OFFLINE = switch.elsewhere


class RealLinspace(TorchFunctionMode):
    """Runs `torch.linspace` on the CPU in this thread, as transformers' `meta_device_safe_creation_ops` does."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return func(*args, **({"device": "cpu"} | kwargs if func is torch.linspace else kwargs))


class _Guard:
    """Aborts a build that registers too many modules or parameters, or parameters of unexpected shapes."""

    def __init__(self, tensor_count: int, accepts: Callable[[tuple[int, ...]], bool], where: str) -> None:
        self._tensor_count, self._accepts, self._where = tensor_count, accepts, where
        self._most_parameters = 4 * tensor_count + 256
        self._parameters = self._modules = 0

    def on_parameter(self, module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        self._parameters += 1
        if self._parameters > self._most_parameters:
            raise self._too_many(self._most_parameters, "parameters")
        if parameter is not None and not self._accepts(tuple(parameter.shape)):
            raise UnsupportedModelError(
                f"the configuration of {self._where} asks for a {type(module).__name__} with a {name} of shape "
                f"{tuple(parameter.shape)}, which none of its tensors has; the configuration does not belong to these "
                "weights, or this one is missing (on_missing='uninitialized' makes it up)"
            )

    def on_module(self) -> None:
        self._modules += 1
        if self._modules > _MODULES_PER_TENSOR * self._most_parameters:
            raise self._too_many(_MODULES_PER_TENSOR * self._most_parameters, "modules")

    def _too_many(self, limit: int, what: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"the configuration of {self._where} asks for more than {limit} {what}, there are {self._tensor_count} "
            "tensors; the configuration does not belong to these weights"
        )


@contextmanager
def guarded(tensor_count: int, accepts: Callable[[tuple[int, ...]], bool], where: str) -> Iterator[None]:
    """Check everything that this thread builds, and leave its weights untied; see `build_skeleton`."""
    _this_thread.guard = _Guard(tensor_count, accepts, where)
    try:
        yield
    finally:
        _this_thread.guard = None


def _on_parameter(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
    if _this_thread.guard is not None:
        _this_thread.guard.on_parameter(module, name, parameter)


def _on_module(*_: object) -> None:
    if _this_thread.guard is not None:
        _this_thread.guard.on_module()


def _tie_weights_elsewhere() -> Any:
    """Wrap `PreTrainedModel.tie_weights` so that it does nothing in threads that are inside `guarded`.

    Transformers' `no_tie_weights` replaces the method while it builds a class. If two threads do that at once, one
    saves the other's replacement as the original, and the process never ties weights again.
    """
    for _ in range(_UNTIED_TRIES):
        if not (original := PreTrainedModel.tie_weights).__qualname__.startswith("no_tie_weights."):
            break
        time.sleep(0.01)  # another thread is building a class
    else:
        raise SurfwError(
            "surfw is imported while transformers builds a model, in this thread or, for a minute already, in another "
            "one; import surfw before"
        )

    @wraps(original)
    def tie_weights(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        return original(self, *args, **kwargs) if _this_thread.guard is None else None

    return tie_weights


# Set once: removing a hook breaks every thread that is iterating over the registry.
torch_module.register_module_parameter_registration_hook(_on_parameter)
torch_module.register_module_module_registration_hook(_on_module)
_pretrained: Any = PreTrainedModel
_pretrained.tie_weights = _tie_weights_elsewhere()


@contextmanager
def foreign_errors(what: str, advice: str = "") -> Iterator[None]:
    """Convert any exception raised while making `what` from foreign files into a surfw error, ending with `advice`.

    Raises:
        UnsupportedModelError: the body raised an exception other than a `SurfwError`.
    """
    try:
        yield
    except SurfwError:
        raise
    except Exception as exc:
        said = " ".join(str(exc).split())[:300]
        raise UnsupportedModelError(f"{what} cannot be used: {type(exc).__name__}: {said}{advice}") from exc
