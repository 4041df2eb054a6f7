"""Memory reserved for what a generation remembers: the KV cache counts towards the budget, so weights make way for it.

Before a generation begins, as much of the budget is reserved as its cache will take by the model's configuration. What
the cache really takes is measured after every forward; if that is more, as much more is reserved as there can be.
"""

import logging
from typing import Any

import torch
from transformers import PreTrainedModel

from surfw.config import MIB
from surfw.errors import ConfigurationError
from surfw.runtime.engine import Engine
from surfw.runtime.kv_cache import cache_bytes, kv_cost, output_cache

logger = logging.getLogger("surfw.models")

_STEP_BYTES = 4 * MIB
"""The reserve grows by at least this much, since each growth makes a new plan."""

_DEFAULT_NEW_TOKENS = 20
"""How many tokens transformers generates by default."""


class KvReserve:
    """The part of a model's budget that its KV cache has.

    Attributes:
        held_bytes: what the cache took after the last forward that had one.
    """

    def __init__(self, model: PreTrainedModel, engine: Engine) -> None:
        """Watch the model's forwards; the engine keeps weights out of the reserve."""
        self.held_bytes = 0
        self._engine = engine
        self._has_warned = False
        self._cost = kv_cost(model.config, model.dtype)
        self._hook = model.register_forward_hook(self._measure)

    def reserve_for(self, prompt_tokens: int, new_tokens: int, sequences: int = 1) -> None:
        """Reserve what the cache of a generation takes, instead of what was reserved before.

        A default budget that is too small for it only costs a warning: most generations end sooner than they might.

        Raises:
            ConfigurationError: the budget was given, and is too small for it.
        """
        size_bytes = self._cost.total_bytes(prompt_tokens, new_tokens, sequences=sequences)
        self._reserve(size_bytes, size_bytes, or_fail=not self._engine.limit.reason)

    def close(self) -> None:
        """Watch no more."""
        self._hook.remove()

    def _measure(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        if (cache := output_cache(output)) is not None:
            self.held_bytes = cache_bytes(cache)
            if self.held_bytes > self._engine.limit.reserved_bytes:
                steps = -(-self.held_bytes // _STEP_BYTES) + 1
                self._reserve(steps * _STEP_BYTES, self.held_bytes, or_fail=False)

    def _reserve(self, size_bytes: int, least_bytes: int, *, or_fail: bool) -> None:
        """Reserve so much, or as much as there can be; warn once if that is less than the least."""
        if self._engine.limit.budget_bytes is None:
            return
        try:
            self._engine.reserve(size_bytes)
        except ConfigurationError as exc:
            if or_fail:
                raise
            self._engine.reserve(size_bytes, or_less=True)
            if self._engine.limit.reserved_bytes < least_bytes and not self._has_warned:
                self._has_warned = True
                logger.warning("%s", exc)


def generation_size(model: Any, args: Any, kwargs: Any) -> tuple[int, int, int]:
    """How large a call of `generate()` may become.

    Returns:
        Tokens of the longest prompt, new tokens at most, and sequences, beams included.
    """
    named = dict(zip(("inputs", "generation_config"), args, strict=False)) | kwargs
    given = next((named[name] for name in ("input_ids", "inputs") if named.get(name) is not None), None)
    inputs = given if given is not None else named.get("inputs_embeds")
    configs = [one for one in (named.get("generation_config"), model.generation_config) if one is not None]

    def wanted(name: str) -> Any:
        values = [named.get(name), *(getattr(config, name, None) for config in configs)]
        return next((value for value in values if value is not None), None)

    has_rows = isinstance(inputs, torch.Tensor) and inputs.dim() > 1
    rows, length = (inputs.shape[0], inputs.shape[1 if given is None else -1]) if has_rows else (1, 1)
    new, whole = wanted("max_new_tokens"), wanted("max_length")
    if new is None:
        before = 0 if model.config.is_encoder_decoder else length
        new = _DEFAULT_NEW_TOKENS if whole is None else max(0, whole - before)
    beams = max(wanted("num_beams") or 1, wanted("num_return_sequences") or 1)
    return int(length), int(new), int(rows * beams)
