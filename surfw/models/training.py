"""Training over streamed weights: the memory that training takes counts in the budget as it grows.

The base is frozen. The trainable parameters, such as peft's LoRA, were added to the transformers model before. Their
memory, and that of gradients and optimiser state, is known when training starts; that of activations is measured in
every forward pass, before its backward pass needs it (`surfw.runtime.recompute`).
"""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from surfw.codec import packed_codec
from surfw.config import MIB
from surfw.errors import ConfigurationError, ModelError
from surfw.models.assembly import ModelParts
from surfw.runtime.absent import AbsentParameter
from surfw.runtime.recompute import Recomputing

_STEP_BYTES = 4 * MIB
"""Activations reserve memory in steps, since each growth makes a new plan."""

_FOR_GRADIENTS = 2
"""During a unit's backward pass, gradients take at most as much memory as what autograd keeps of the unit."""


@contextmanager
def training(parts: ModelParts, optimizer_states: int) -> Iterator[None]:
    """Enable training of a model during the body; afterwards it is in evaluation mode again.

    Raises:
        ConfigurationError: there are no trainable parameters, or the memory budget is too small for them.
        ModelError: the weights are quantised.
    """
    if packed := packed_codec(parts.manifest):
        raise ModelError(
            f"{parts.manifest.name} is read as {packed}, and gradients do not pass through quantised weights; open it "
            "with codec='none' or 'lossless'"
        )
    parts.hooks.recover()
    learning = [one for one in parts.model.parameters() if one.requires_grad and not isinstance(one, AbsentParameter)]
    if not learning:
        raise ConfigurationError(
            f"nothing of {parts.manifest.name} learns: its streamed weights do not; before the training, put what does "
            "into model.model, as peft.get_peft_model(model.model, LoraConfig(…)) does"
        )
    fixed_bytes = sum((2 + optimizer_states) * one.nbytes for one in learning)

    def make_room() -> None:
        steps = -(-(units.kept_bytes + _FOR_GRADIENTS * units.unit_bytes) // _STEP_BYTES)
        parts.kv.hold_beside(max(parts.kv.beside_bytes, fixed_bytes + steps * _STEP_BYTES))

    parts.kv.hold_beside(fixed_bytes)
    try:
        units = Recomputing(parts.hooks, make_room)
        try:
            with _without_kv_cache(parts.model):
                parts.engine.foresee(_order(parts))
                parts.model.train()
                yield
        finally:
            parts.model.train(mode=False)
            units.detach()
    finally:
        parts.kv.hold_beside(0)


def _order(parts: ModelParts) -> list[str]:
    """The paths of the units in the order of a training step: forward, then in reverse to the first trainable one."""
    forwards = [use.module for use in parts.manifest.order]
    learns = {path for path, module in parts.hooks.units if any(one.requires_grad for one in module.parameters())}
    first = next((index for index, path in enumerate(forwards) if path in learns), 1)
    return [*forwards, *reversed(forwards[first:])]


@contextmanager
def _without_kv_cache(model: PreTrainedModel) -> Iterator[None]:
    """Turn off KV caches by default during the body, also in the separate configurations of encoder and decoder."""
    configs = {id(one): one for module in model.modules() if (one := getattr(module, "config", None)) is not None}
    before = [(one, one.use_cache) for one in configs.values() if hasattr(one, "use_cache")]
    for config, _ in before:
        config.use_cache = False
    try:
        yield
    finally:
        for config, uses_cache in before:
            config.use_cache = uses_cache
