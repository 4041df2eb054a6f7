"""Builds a model from its configuration as `from_pretrained` would: parameters on the meta device, buffers real.

The configuration is untrusted: hooks check every parameter and module while the class is being built, so that it
cannot ask for more than the checkpoint or manifest holds.
"""

import logging
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from surfw.errors import ConfigurationError, UnsupportedModelError
from surfw.skeleton.default_dtype import runs
from surfw.skeleton.experts import ExpertModule, find_experts
from surfw.skeleton.guards import RealLinspace, foreign_errors, guarded, no_hub, quiet_prints
from surfw.skeleton.sanitise import COMPILED, IMPLEMENTATIONS, untag_floats
from surfw.skeleton.units import Slot, Unit, find_units

logger = logging.getLogger("surfw.skeleton")

_MAX_BUFFER_BYTES = 1 << 30
_BUILDING = threading.Lock()
"""Held because transformers changes the default dtype and torch's `init` functions for the whole process."""


@dataclass(frozen=True)
class Skeleton:
    """A model without weights.

    Attributes:
        model: in evaluation mode, untied; parameters and checkpointed buffers on the meta device, other buffers real.
        dtype: the dtype it was built with.
    """

    model: PreTrainedModel
    dtype: torch.dtype

    @cached_property
    def units(self) -> list[Unit]:
        """The executed modules, in registration order."""
        return find_units(self.model)

    @cached_property
    def experts(self) -> dict[str, ExpertModule]:
        """The modules that hold routed experts, by path."""
        return {one.path: one for one in find_experts(self.model)}

    @cached_property
    def slots(self) -> dict[str, Slot]:
        """Every slot of the state dict, by name."""
        return {slot.name: slot for unit in self.units for slot in unit.slots}

    @cached_property
    def inherent_ties(self) -> dict[str, str]:
        """Maps slots that share a parameter by construction, without transformers' tying, to the first such slot."""
        first: dict[int, str] = {}
        original = {name: first.setdefault(id(slot.tensor), name) for name, slot in self.slots.items()}
        return {name: one for name, one in original.items() if one != name}


def read_config(
    config: Mapping[str, Any], *, where: str, model_class: type[PreTrainedModel] | None = None
) -> PreTrainedConfig:
    """Make the configuration object for a decoded `config.json`.

    Args:
        config: the decoded file.
        where: names the model in errors.
        model_class: the caller's own class, whose `config_class` is used; by default, transformers' class or a
            registered one for the model type.

    Raises:
        UnsupportedModelError: the model type is unknown, is not that of `model_class`, or a value is refused.
    """
    model_type = config.get("model_type")
    if model_class is not None:
        config_class: Any = model_class.config_class
        if model_type != getattr(config_class, "model_type", None):
            raise UnsupportedModelError(
                f"{where} has model type {str(model_type)[:80]!r}, but {model_class.__name__} is for "
                f"{getattr(config_class, 'model_type', None)!r}; open it with another class"
            )
    elif isinstance(model_type, str) and model_type in transformers.CONFIG_MAPPING:
        config_class = transformers.CONFIG_MAPPING[model_type]
    else:
        raise UnsupportedModelError(
            f"{where} has model type {str(model_type)[:80]!r}, which transformers {transformers.__version__} does not "
            "know; name its class (model_class=…), or register it with AutoConfig.register and AutoModel.register"
        )
    with foreign_errors(f"the configuration of {where}"), no_hub():
        found: PreTrainedConfig = config_class.from_dict(untag_floats(dict(config)))
        _refuse_implementations(found, IMPLEMENTATIONS if model_class is None else IMPLEMENTATIONS | COMPILED, where)
        return found


def _refuse_implementations(config: PreTrainedConfig, allowed: set[str], where: str) -> None:
    """Refuse foreign implementations in a configuration object, in case they got past `sanitise_config`."""
    asked = {config._attn_implementation, config._experts_implementation} - {None}  # noqa: SLF001 - the names in use
    if not asked <= allowed:
        raise UnsupportedModelError(
            f"the configuration of {where} asks for the implementation {min(asked - allowed)!r}, "
            f"expected one of {', '.join(sorted(allowed))}"
        )
    for name in config.sub_configs:
        if isinstance(inner := getattr(config, name, None), PreTrainedConfig):
            _refuse_implementations(inner, allowed, where)


def check_model_class(model_class: object) -> None:
    """Check the caller's own model class, if given.

    Raises:
        ConfigurationError: it is not a subclass of `PreTrainedModel`.
    """
    if model_class is not None and not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
        raise ConfigurationError(
            f"model_class is {getattr(model_class, '__name__', model_class)!a:.80}, expected a subclass of "
            "transformers.PreTrainedModel"
        )


def resolve_class(name: str | None, config: PreTrainedConfig, *, where: str) -> type[PreTrainedModel]:
    """Find the class to build: transformers' class of that name, or a registered one; without a name, the base model.

    Raises:
        UnsupportedModelError: there is no such class.
    """
    found: Any = None
    with foreign_errors(f"class {name} of {where}"):
        if name is None:
            found = transformers.MODEL_MAPPING.get(type(config), None)
        elif hasattr(transformers, name):
            found = getattr(transformers, name)
        else:
            found = next((cls for cls in _registered_classes() if cls.__name__ == name), None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise UnsupportedModelError(
            f"{where} asks for the class {str(name)[:80]!r}, which is neither in transformers "
            f"{transformers.__version__} nor registered with AutoModel.register; surfw never runs code that comes "
            "with a model"
        )
    return found


def _registered_classes() -> Iterator[type]:
    modeling = transformers.models.auto.modeling_auto
    for name, mapping in vars(modeling).items():
        if name.endswith("_MAPPING") and hasattr(mapping, "_extra_content"):
            for classes in mapping._extra_content.values():  # noqa: SLF001 - where AutoModel.register keeps them
                yield from classes if isinstance(classes, tuple) else (classes,)


def build_skeleton(
    config: PreTrainedConfig,
    cls: type[PreTrainedModel],
    dtype: torch.dtype,
    *,
    tensor_count: int,
    accepts: Callable[[tuple[int, ...]], bool] = lambda _: True,
    check: Callable[[], object] = lambda: None,
    where: str,
) -> Skeleton:
    """Build the model on the meta device. If `dtype` is not the default, runs in other threads wait meanwhile.

    Args:
        config: its configuration; modified by transformers.
        cls: its class.
        dtype: the default dtype of its parameters.
        tensor_count: the number of tensors in the checkpoint or manifest; many more are refused.
        accepts: whether a parameter of this shape is plausible; the first implausible one aborts the build.
        check: called while waiting for other threads; raises if the model is no longer wanted.
        where: names the model in errors.

    Raises:
        UnsupportedModelError: the model cannot be built, or asks for more than `tensor_count` and `accepts` allow.
        ModelError: a run in another thread does not reach its next layer.
    """
    quiet_prints(cls)
    with ExitStack() as stack:
        stack.enter_context(runs.holding(_BUILDING, check))
        stack.enter_context(runs.building(dtype, check, where=where))
        stack.enter_context(guarded(tensor_count, accepts, where))
        stack.enter_context(foreign_errors(f"model {where} ({cls.__name__})"))
        stack.enter_context(no_hub())
        stack.enter_context(torch.device("meta"))
        stack.enter_context(RealLinspace())
        untyped: Any = cls
        model = untyped._from_config(config, dtype=dtype).eval()  # noqa: SLF001 - what AutoModel.from_config calls
    if not hasattr(model, "all_tied_weights_keys"):
        raise UnsupportedModelError(
            f"{where}: {cls.__name__} is not a whole model: transformers demands that its __init__ ends with "
            "self.post_init()"
        )
    return Skeleton(model, dtype)


def fill_rest(skeleton: Skeleton, loaded: set[str], *, where: str) -> None:
    """Initialise everything that the checkpoint does not provide, with transformers' own initialisation.

    This covers buffers, and missing parameters that the caller accepts.

    Args:
        skeleton: modified in place.
        loaded: names of the tensors that will come from the checkpoint; they stay on the meta device.
        where: names the model in errors.

    Raises:
        UnsupportedModelError: the buffers are absurdly large, or `_init_weights` leaves one of them unset.
    """
    model = skeleton.model
    for slot in skeleton.slots.values():
        if not slot.is_buffer and slot.name not in loaded:
            slot.put(nn.Parameter(_unmade(slot.tensor), requires_grad=False))
        else:
            slot.tensor._is_hf_initialized = True  # type: ignore[attr-defined]  # noqa: SLF001 - transformers' own mark
    places = [(s.module, s.leaf) for s in skeleton.slots.values() if s.is_buffer and s.name not in loaded]
    places += [
        (module, leaf)
        for module in model.modules()
        for leaf in module._non_persistent_buffers_set  # noqa: SLF001 - torch's registries
        if module._buffers.get(leaf) is not None  # noqa: SLF001 - torch's registries
    ]
    size = sum(getattr(module, leaf).nbytes for module, leaf in places)
    if size > _MAX_BUFFER_BYTES:
        raise UnsupportedModelError(f"{where} wants {size} bytes of buffers, expected at most {_MAX_BUFFER_BYTES}")
    for module, leaf in places:
        setattr(module, leaf, _unmade(getattr(module, leaf)))
    with runs.holding(_BUILDING), foreign_errors(f"the buffers of {where}"):
        initialise: Any = model.initialize_weights
        initialise()
    for module, leaf in places:
        if _is_unmade(getattr(module, leaf)):
            raise UnsupportedModelError(
                f"{where}: the buffer {leaf} of {type(module).__name__} is neither in the checkpoint nor made by the "
                f"_init_weights of {type(model).__name__}, so nobody knows its values; register it as persistent"
            )


def _unmade(like: torch.Tensor) -> torch.Tensor:
    """Memory filled with a value that no real buffer holds, so that a buffer that is never computed is detected."""
    return torch.full_like(like, _unmade_value(like.dtype), device="cpu")


def _is_unmade(buffer: torch.Tensor) -> bool:
    if buffer.numel() == 0 or buffer.dtype is torch.bool:
        return False
    value = _unmade_value(buffer.dtype)
    return bool((buffer.isnan() if math.isnan(value) else buffer == value).all())


def _unmade_value(dtype: torch.dtype) -> float:
    if dtype is torch.bool:
        return False
    return math.nan if dtype.is_floating_point or dtype.is_complex else torch.iinfo(dtype).max
