"""What building a class needs of torch, transformers and the hub in places that the whole process shares.

Whatever is put there looks at the thread that comes by, and is nothing to the others: they may build, load and download
models meanwhile. One thing is left that cannot: the default dtype, which transformers sets while it builds a class,
here as in `from_pretrained`. Runs of surfw's models in other threads wait meanwhile, see `Runs`; whatever else computes
with torch there, or loads with `from_pretrained`, is out of reach.
"""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import wraps
from typing import Any

import huggingface_hub.constants
import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from surfw.errors import ModelError, SurfwError, UnsupportedModelError

_MODULES_PER_TENSOR = 32
_BUILDING_TRIES = 6000
_LOOK_SECONDS = 0.05
"""How often whoever waits for others looks whether it is still wanted."""
_LAYER_SECONDS = 300.0
"""How long a build waits for the runs of other threads to reach their next layer: longer than any layer takes."""


class Runs:
    """Threads that compute with models of surfw, and the builder that has them wait under another default dtype.

    A run waits at its next layer (`Run.pause`). One that waits for something else (`resting`) is not waited for, and
    computes on only when nobody builds. Locks that are held throughout a run, or a build, are taken with `holding`:
    a thread that computed and waited for one would be waited for in vain.

    Attributes:
        build: done when the build has ended that waits for the runs, or goes on; None if there is none.
        builder: the thread that builds, once all others wait.
    """

    def __init__(self) -> None:
        """Nothing runs, and nobody builds."""
        self.build: Future[None] | None = None
        self.builder: int | None = None
        self._computing: set[int] = set()
        self._changed = threading.Condition()

    def computing(self) -> AbstractContextManager[None]:
        """What this thread computes is not to see another default dtype."""
        return self._being(computes=True)

    def resting(self) -> AbstractContextManager[None]:
        """This thread waits for something, within a run or not, and computes nothing meanwhile."""
        return self._being(computes=False)

    @contextmanager
    def holding(
        self, lock: "threading.Lock | threading.RLock", check: Callable[[], object] = lambda: None
    ) -> Iterator[None]:
        """Hold a lock, which this rests for; `check` raises when it is no longer wanted."""
        with ExitStack() as held:
            with self.resting():
                while not lock.acquire(timeout=_LOOK_SECONDS):
                    check()
                held.callback(lock.release)
            yield

    @contextmanager
    def building(self, dtype: torch.dtype, check: Callable[[], object], *, where: str) -> Iterator[None]:
        """Have all runs of other threads wait, if this is another default dtype; one thread at a time.

        Raises:
            ModelError: they neither reach a layer nor end.
            Exception: that of `check`, which says that it is no longer wanted.
        """
        if dtype == torch.get_default_dtype():
            yield
            return
        me, until = threading.get_ident(), time.monotonic() + _LAYER_SECONDS
        self.build = build = Future[None]()
        try:
            with self._changed:
                while self._computing - {me}:
                    self._changed.wait(_LOOK_SECONDS)
                    check()
                    if time.monotonic() > until:
                        raise ModelError(
                            f"{where} cannot be built: for {_LAYER_SECONDS:.0f} s, a run of another model has neither "
                            "reached its next layer nor ended, and would compute in another dtype; if a hook or "
                            "callback of it waits for this one, open this one before it"
                        )
                self.builder = me
            yield
        finally:
            with self._changed:
                self.build = self.builder = None
                self._changed.notify_all()
            build.set_result(None)

    @contextmanager
    def _being(self, *, computes: bool) -> Iterator[None]:
        me = threading.get_ident()
        before = me in self._computing
        try:
            self._become(me, computes=computes)
            yield
        finally:
            self._become(me, computes=before)

    def _become(self, me: int, *, computes: bool) -> None:
        if computes is (me in self._computing):
            return
        with self._changed:
            if not computes:
                self._computing.remove(me)
                self._changed.notify_all()
                return
            try:
                self._changed.wait_for(lambda: self.builder in {None, me})
            finally:  # an interrupt of the program, too, leaves the thread as it was
                self._computing.add(me)


runs = Runs()


class _Here(threading.local):
    """What holds in this thread alone.

    Attributes:
        guard: watches the class that is being built.
        offline: how many times it was said that nothing may be fetched.
    """

    guard: "Guard | None" = None
    offline = 0


_here = _Here()


class _OfflineHere:
    """Stands in for `HF_HUB_OFFLINE`: true in threads that may not fetch anything, in others what it was before."""

    def __init__(self, elsewhere: object) -> None:
        self.elsewhere = elsewhere
        self.users = 0

    def __bool__(self) -> bool:
        return bool(_here.offline or self.elsewhere)


_hub_lock = threading.Lock()


@contextmanager
def no_hub() -> Iterator[None]:
    """Whatever a configuration names, nothing is fetched because of it; other threads may use the hub meanwhile."""
    constants: Any = huggingface_hub.constants
    with _hub_lock:
        if not isinstance(constants.HF_HUB_OFFLINE, _OfflineHere):
            constants.HF_HUB_OFFLINE = _OfflineHere(constants.HF_HUB_OFFLINE)
        switch = constants.HF_HUB_OFFLINE
        switch.users += 1
    _here.offline += 1
    try:
        yield
    finally:
        _here.offline -= 1
        with _hub_lock:
            switch.users -= 1
            if not switch.users and constants.HF_HUB_OFFLINE is switch:  # else somebody set it meanwhile
                constants.HF_HUB_OFFLINE = switch.elsewhere


class RealLinspace(TorchFunctionMode):
    """As transformers' `meta_device_safe_creation_ops`, in this thread: classes compute plain numbers with it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return func(*args, **({"device": "cpu"} | kwargs if func is torch.linspace else kwargs))


class Guard:
    """Stops a build that registers too many modules or parameters, or parameters of shapes that nothing has."""

    def __init__(self, tensor_count: int, accepts: Callable[[tuple[int, ...]], bool], where: str) -> None:
        self._tensor_count, self._accepts, self._where = tensor_count, accepts, where
        self._most_parameters = 4 * tensor_count + 256
        self._parameters = self._modules = 0

    def on_parameter(self, module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        """Count a parameter, and look at its shape."""
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
        """Count a module."""
        self._modules += 1
        if self._modules > _MODULES_PER_TENSOR * self._most_parameters:
            raise self._too_many(_MODULES_PER_TENSOR * self._most_parameters, "modules")

    def _too_many(self, limit: int, what: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"the configuration of {self._where} asks for more than {limit} {what}, there are {self._tensor_count} "
            "tensors; the configuration does not belong to these weights"
        )


@contextmanager
def guarded(guard: Guard) -> Iterator[None]:
    """Have a guard watch what this thread builds, and leave its weights untied."""
    _here.guard = guard
    try:
        yield
    finally:
        _here.guard = None


def _on_parameter(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
    if _here.guard is not None:
        _here.guard.on_parameter(module, name, parameter)


def _on_module(*_: object) -> None:
    if _here.guard is not None:
        _here.guard.on_module()


def _tie_weights_elsewhere() -> Any:
    """`PreTrainedModel.tie_weights` for all threads but those that build here.

    Transformers' `no_tie_weights` replaces the method while a class is built. Where two threads do that at once, one
    takes the other's replacement for the method, and no model of the process has its weights tied from then on.
    """
    for _ in range(_BUILDING_TRIES):
        if not (original := PreTrainedModel.tie_weights).__qualname__.startswith("no_tie_weights."):
            break
        time.sleep(0.01)  # another thread builds a class just now
    else:
        raise SurfwError(
            "surfw is imported while transformers builds a model, in this thread or, for a minute already, in another "
            "one; import surfw before"
        )

    @wraps(original)
    def tie_weights(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        return original(self, *args, **kwargs) if _here.guard is None else None

    return tie_weights


# Set once and for all: whoever goes through such a registry while a hook is taken out of it fails.
torch_module.register_module_parameter_registration_hook(_on_parameter)
torch_module.register_module_module_registration_hook(_on_module)
_pretrained: Any = PreTrainedModel
_pretrained.tie_weights = _tie_weights_elsewhere()


@contextmanager
def foreign_errors(what: str) -> Iterator[None]:
    """Whatever transformers raises while it digests a configuration, as one of ours."""
    try:
        yield
    except SurfwError:
        raise
    except Exception as exc:
        first = str(exc).strip().splitlines()[0] if str(exc).strip() else ""
        raise UnsupportedModelError(f"{what} cannot be used: {type(exc).__name__}: {first[:300]}") from exc
