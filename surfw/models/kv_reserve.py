"""Reserves memory for the KV cache: it counts in the budget, so weights are evicted for it.

Before a generation, the reserve is set to the cache's size according to the model's configuration. The actual size is
measured after forwards; if it is larger, the reserve grows as far as possible.
"""

import logging
import weakref
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from surfw.config import MIB
from surfw.errors import ConfigurationError
from surfw.runtime.engine import Engine
from surfw.runtime.kv_cache import KvCost, Quantised, cache_bytes, kv_cost, output_cache

logger = logging.getLogger("surfw.models")

_STEP_BYTES = 4 * MIB
"""The reserve grows by at least this much, since each growth makes a new plan."""

_SKIPPED = 15
"""Measuring takes as long as a layer on a fast device: while a cache grows evenly, up to this many forwards skip it."""

_DEFAULT_NEW_TOKENS = 20
"""How many tokens transformers generates by default."""


class KvReserve:
    """The part of a model's budget that is reserved for its KV cache.

    Attributes:
        held_bytes: size of the cache after the last forward that had one; extrapolated between measurements.
        beside_bytes: memory reserved for training, in addition to any cache.
    """

    def __init__(self, model: PreTrainedModel, engine: Engine) -> None:
        """Hook the model's forwards; the engine keeps weights out of the reserve."""
        self.held_bytes = self.beside_bytes = 0
        self._engine = engine
        self._has_warned = False
        self._seen: weakref.ref[object] | None = None  # the cache that was measured last
        self._measured_bytes = self._growth_bytes = 0  # its size then, and its growth per forward
        self._skipped = self._left = 0  # forwards since then, and forwards still to skip
        self._cost = kv_cost(model.config, model.dtype) if model.can_generate() else KvCost(0, 0)
        self._hook = model.register_forward_hook(self._measure)

    def reserve_for(
        self, prompt_tokens: int, new_tokens: int, sequences: int = 1, quantised: Quantised | None = None
    ) -> None:
        """Reserve the memory of a generation's cache, replacing the previous reserve.

        If a default budget is too small, this only warns: most generations end before their limit.

        Raises:
            ConfigurationError: a given budget is too small for the cache.
        """
        self._left = 0  # the next cache may be larger
        size_bytes = self._cost.total_bytes(prompt_tokens, new_tokens, sequences=sequences)
        if quantised is not None:
            size_bytes = self._cost.quantised_bytes(prompt_tokens, new_tokens, quantised, sequences=sequences)
        self._reserve(size_bytes, size_bytes, or_fail=not self._engine.limit.reason)

    def reserve_bytes(self, size_bytes: int) -> None:
        """Reserve `size_bytes` for a cache that the caller manages, replacing the previous reserve.

        Raises:
            ConfigurationError: the budget is too small for it.
        """
        self._reserve(size_bytes, size_bytes, or_fail=True)

    def hold_beside(self, size_bytes: int) -> None:
        """Reserve `size_bytes` for training in addition to any cache, replacing the previous training reserve.

        Raises:
            ConfigurationError: the budget is too small for it.
        """
        if size_bytes != self.beside_bytes:
            before = self._cache_bytes
            self.beside_bytes, was = size_bytes, self.beside_bytes
            try:
                self._reserve(before, before, or_fail=True)
            except ConfigurationError as exc:
                self.beside_bytes = was
                raise ConfigurationError(f"the training does not fit: {exc}") from exc

    @property
    def _cache_bytes(self) -> int:
        return max(0, self._engine.limit.reserved_bytes - self.beside_bytes)

    def close(self) -> None:
        """Remove the hook."""
        self._hook.remove()

    def _measure(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        if (cache := output_cache(output)) is None:
            return
        is_same = self._seen is not None and self._seen() is cache
        if is_same and self._left:
            self._left, self._skipped = self._left - 1, self._skipped + 1
            self.held_bytes += self._growth_bytes
            return
        self.held_bytes = cache_bytes(cache)
        grown = self.held_bytes - self._measured_bytes if is_same else 0
        self._growth_bytes, self._measured_bytes = max(0, grown // (self._skipped + 1)), self.held_bytes
        free = self._cache_bytes - self.held_bytes
        self._left = max(0, min(_SKIPPED, free // self._growth_bytes)) if self._growth_bytes else 0
        self._skipped, self._seen = 0, _reference(cache)
        if free < 0:
            steps = -(-self.held_bytes // _STEP_BYTES) + 1
            self._reserve(steps * _STEP_BYTES, self.held_bytes, or_fail=False)

    def _reserve(self, size_bytes: int, least_bytes: int, *, or_fail: bool) -> None:
        """Reserve `size_bytes`; without `or_fail`, as much as possible, with one warning if below `least_bytes`."""
        if self._engine.limit.budget_bytes is None:
            return
        size_bytes, least_bytes = size_bytes + self.beside_bytes, least_bytes + self.beside_bytes
        try:
            self._engine.reserve(size_bytes)
        except ConfigurationError as exc:
            if or_fail:
                raise
            self._engine.reserve(size_bytes, or_less=True)
            if self._engine.limit.reserved_bytes < least_bytes and not self._has_warned:
                self._has_warned = True
                logger.warning("%s", exc)


def _reference(cache: object) -> "weakref.ref[object] | None":
    """A weak reference, if the type allows one."""
    try:
        return weakref.ref(cache)
    except TypeError:  # older caches are tuples
        return None


def generation_size(model: Any, args: Any, kwargs: Any) -> tuple[int, int, int]:
    """The largest size that a call of `generate()` may reach.

    Returns:
        Tokens of the longest prompt, the most new tokens, and the number of sequences, beams included.
    """
    named = dict(zip(("inputs", "generation_config"), args, strict=False)) | kwargs
    given = next((named[name] for name in ("input_ids", "inputs") if named.get(name) is not None), None)
    inputs = given if given is not None else named.get("inputs_embeds")
    wanted = partial(_wanted, model, named)
    has_rows = isinstance(inputs, torch.Tensor) and inputs.dim() > 1
    rows, length = (inputs.shape[0], inputs.shape[1 if given is None else -1]) if has_rows else (1, 1)
    new, whole = wanted("max_new_tokens"), wanted("max_length")
    if new is None:
        before = 0 if model.config.is_encoder_decoder else length
        new = _DEFAULT_NEW_TOKENS if whole is None else max(0, whole - before)
    beams = max(wanted("num_beams") or 1, wanted("num_return_sequences") or 1)
    return int(length), int(new), int(rows * beams)


def find_quantised(model: Any, args: Any, kwargs: Any) -> Quantised | None:
    """How a call of `generate()` quantises its cache; None if it does not."""
    named = dict(zip(("inputs", "generation_config"), args, strict=False)) | kwargs
    if _wanted(model, named, "cache_implementation") != "quantized":
        return None
    given = _wanted(model, named, "cache_config") or {}
    if given.get("backend") == "fp8":
        return Quantised(bits=8, residual_tokens=0)
    names = {"nbits": "bits", "q_group_size": "group_size", "residual_length": "residual_tokens"}
    return Quantised(**{own: given[name] for name, own in names.items() if isinstance(given.get(name), int)})


def _wanted(model: Any, named: Mapping[str, Any], name: str) -> Any:
    """A setting of a `generate()` call: from its arguments, its generation config, or the model's, in this order."""
    configs = [one for one in (named.get("generation_config"), model.generation_config) if one is not None]
    values = [named.get(name), *(getattr(config, name, None) for config in configs)]
    return next((value for value in values if value is not None), None)
