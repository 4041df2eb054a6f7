"""Memory reserved for what a generation remembers: the KV cache counts towards the budget, so weights make way for it.

Before a generation begins, as much of the budget is reserved as its cache will take by the model's configuration. What
the cache really takes is measured after every forward; if that is more, as much more is reserved as there can be.
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
"""Measuring takes as long as a layer does on a fast device: while a cache grows evenly, so many forwards go without."""

_DEFAULT_NEW_TOKENS = 20
"""How many tokens transformers generates by default."""


class KvReserve:
    """The part of a model's budget that its KV cache has.

    Attributes:
        held_bytes: what the cache took after the last forward that had one; since it was measured, it grew evenly.
        beside_bytes: what is reserved for a training, beside any cache.
    """

    def __init__(self, model: PreTrainedModel, engine: Engine) -> None:
        """Watch the model's forwards; the engine keeps weights out of the reserve."""
        self.held_bytes = self.beside_bytes = 0
        self._engine = engine
        self._has_warned = False
        self._seen: weakref.ref[object] | None = None  # the cache that was measured last
        self._measured_bytes = self._growth_bytes = 0  # what it took then, and what each forward adds to it
        self._skipped = self._left = 0  # forwards since then, and those to come that are not worth measuring
        self._cost = kv_cost(model.config, model.dtype) if model.can_generate() else KvCost(0, 0)
        self._hook = model.register_forward_hook(self._measure)

    def reserve_for(
        self, prompt_tokens: int, new_tokens: int, sequences: int = 1, quantised: Quantised | None = None
    ) -> None:
        """Reserve what the cache of a generation takes, instead of what was reserved before.

        A default budget that is too small for it only costs a warning: most generations end sooner than they might.

        Raises:
            ConfigurationError: the budget was given, and is too small for it.
        """
        self._left = 0  # what comes may be larger than what came
        size_bytes = self._cost.total_bytes(prompt_tokens, new_tokens, sequences=sequences)
        if quantised is not None:
            size_bytes = self._cost.quantised_bytes(prompt_tokens, new_tokens, quantised, sequences=sequences)
        self._reserve(size_bytes, size_bytes, or_fail=not self._engine.limit.reason)

    def reserve_bytes(self, size_bytes: int) -> None:
        """Reserve so much, instead of what was reserved before, for a cache of one's own.

        Raises:
            ConfigurationError: the budget is too small for it.
        """
        self._reserve(size_bytes, size_bytes, or_fail=True)

    def hold_beside(self, size_bytes: int) -> None:
        """Reserve so much for a training, beside any cache, instead of what was reserved for one before.

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
        """What is reserved for a cache."""
        return max(0, self._engine.limit.reserved_bytes - self.beside_bytes)

    def close(self) -> None:
        """Watch no more."""
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
        """Reserve so much, or as much as there can be; warn once if that is less than the least."""
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
    """A weak reference, where there can be one."""
    try:
        return weakref.ref(cache)
    except TypeError:  # tuples, which older caches are
        return None


def generation_size(model: Any, args: Any, kwargs: Any) -> tuple[int, int, int]:
    """How large a call of `generate()` may become.

    Returns:
        Tokens of the longest prompt, new tokens at most, and sequences, beams included.
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
    """How a call of `generate()` has its cache quantised; None if it does not."""
    named = dict(zip(("inputs", "generation_config"), args, strict=False)) | kwargs
    if _wanted(model, named, "cache_implementation") != "quantized":
        return None
    given = _wanted(model, named, "cache_config") or {}
    if given.get("backend") == "fp8":
        return Quantised(bits=8, residual_tokens=0)
    names = {"nbits": "bits", "q_group_size": "group_size", "residual_length": "residual_tokens"}
    return Quantised(**{own: given[name] for name, own in names.items() if isinstance(given.get(name), int)})


def _wanted(model: Any, named: Mapping[str, Any], name: str) -> Any:
    """What a call of `generate()` asks for: itself, in the settings given with it, or in the model's."""
    configs = [one for one in (named.get("generation_config"), model.generation_config) if one is not None]
    values = [named.get(name), *(getattr(config, name, None) for config in configs)]
    return next((value for value in values if value is not None), None)
