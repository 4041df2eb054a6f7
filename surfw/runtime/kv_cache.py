"""The size of KV caches: how many bytes one will take, from the model's configuration, and how many one holds.

A budget for weights has to leave memory for the cache. The code knows no models; it uses the field names that
transformers' configurations share. Nothing here computes with tensors or copies them.
"""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

CACHE_NAMES = ("cache", "past_key_values", "cache_params")
"""Names of the cache among a forward's arguments and outputs; transformers 5.24 renamed the second and the third."""

_NO_KEYS = frozenset({"linear_attention", "conv", "moe", "mlp"})
"""Types of layers that keep no keys and values per token, but a state of fixed size or nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantised:
    """How transformers' quantised cache, which is not exact, keeps keys and values; the defaults are transformers'.

    Attributes:
        bits: per number.
        group_size: how many numbers share a scale and a zero point.
        residual_tokens: how many of the last generated tokens are kept unquantised.
    """

    bits: int = 4
    group_size: int = 64
    residual_tokens: int = 128


@dataclass(frozen=True, slots=True)
class KvCost:
    """What one sequence adds to the KV cache; each beam counts as a sequence.

    Attributes:
        prompt_token_bytes: per token of the prompt. With an encoder: per position of its output, which the decoder's
            layers attend to.
        new_token_bytes: per generated token that is fed back into the model, which the last one is not. With an
            encoder: per token that is fed into the decoder, including its start token.
        layers: how many layers keep keys and values.
        itemsize: bytes per number.
    """

    prompt_token_bytes: int
    new_token_bytes: int
    layers: int = 1
    itemsize: int = 4

    def total_bytes(self, prompt_tokens: int, new_tokens: int, *, sequences: int = 1) -> int:
        """The size of a generation's cache, with this many tokens in each of its sequences."""
        return sequences * (prompt_tokens * self.prompt_token_bytes + new_tokens * self.new_token_bytes)

    def quantised_bytes(self, prompt_tokens: int, new_tokens: int, how: Quantised, *, sequences: int = 1) -> int:
        """The same for a quantised cache, of which attention dequantises one layer at a time."""
        whole = self.total_bytes(prompt_tokens, new_tokens, sequences=sequences)
        residual = self.total_bytes(0, min(new_tokens, how.residual_tokens), sequences=sequences)
        share = how.bits / 8 / self.itemsize + 2 / how.group_size
        return min(whole, int(whole * share) + residual + whole // max(1, self.layers))


def kv_cost(config: PreTrainedConfig, dtype: torch.dtype) -> KvCost:
    """What generation with a model of this configuration adds to its KV cache.

    Exact if every layer keeps a key and a value of every token (or, in latent attention, what both are computed from).
    An upper bound if a layer keeps less: with a sliding window, or if layers share or compress keys. Layers with a
    state of fixed size (Mamba, linear attention) count as nothing, and so does a model without attention.
    Concatenation, which briefly doubles one layer at a time, is not counted.

    Args:
        config: of the model. If the model does not generate, the result is what it would take as a decoder.
        dtype: the dtype that the model computes in.
    """
    text = config.get_text_config(decoder=True)
    layers = list(_attention_layers(config, text))
    own = sum(_numbers_per_token(layer) for layer in layers) * dtype.itemsize
    prompt = sum(_plain_numbers(layer, "cross_") for layer in layers) * dtype.itemsize
    return KvCost(prompt if config.is_encoder_decoder else own, own, len(layers), dtype.itemsize)


def output_cache(output: object) -> object | None:
    """The cache among the outputs of a forward, if there is one; reading it raises no deprecation warning."""
    if not isinstance(output, dict):
        return None
    found = (dict.get(output, name) for name in CACHE_NAMES)  # an output's own `get` warns about the older names
    return next((cache for cache in found if cache is not None), None)


def cache_name(model: nn.Module) -> str:
    """The name of the forward's argument for the cache.

    Raises:
        StopIteration: the forward takes none.
    """
    taken = inspect.signature(model.forward).parameters
    return next(name for name in CACHE_NAMES if name in taken)


def cache_bytes(cache: object) -> int:
    """The memory that a transformers cache holds: all tensors of all kinds of layers; legacy tuples work, too.

    A view counts with all the memory that it keeps alive, such as that of a sliding window after a long prompt; memory
    that several tensors share counts once. For None it is 0.
    """
    held = {}
    for tensor in _tensors(cache, set()):
        if not tensor.is_meta:
            storage = tensor.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
    return sum(held.values())


def _attention_layers(config: PreTrainedConfig, text: PreTrainedConfig) -> Iterator[Any]:
    """The configuration of every layer that keeps keys and values."""
    count = getattr(config, "num_decoder_layers", None) if config.is_encoder_decoder else None
    if count is not None:  # T5's `num_layers` is the encoder's
        yield from [text] * count
        return
    if getattr(text, "num_hidden_layers", None) is None:  # a custom class that does not declare its layers
        return
    layers = list(text.per_layer_config)
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * len(layers)
    for layer, kind in zip(layers, kinds, strict=False):
        if kind not in _NO_KEYS:
            yield layer


def _numbers_per_token(layer: Any) -> int:
    """How many numbers a layer's self-attention keeps per token."""
    latent = getattr(layer, "kv_lora_rank", None)
    numbers = latent + layer.qk_rope_head_dim if latent else _plain_numbers(layer)
    return int(numbers + (getattr(layer, "index_head_dim", None) or 0))


def _plain_numbers(layer: Any, prefix: str = "") -> int:
    """Numbers in a key and a value for each key-value head; `prefix` selects the field names of cross-attention."""
    attention_heads = _first(layer, "num_attention_heads")
    if not attention_heads:
        return 0
    shared_by_all = getattr(layer, "multi_query", False) and not getattr(layer, "new_decoder_architecture", False)
    heads = 1 if shared_by_all else _first(layer, f"{prefix}num_key_value_heads", "num_key_value_heads")
    key = _first(layer, f"{prefix}head_dim", "head_dim", "d_kv") or layer.hidden_size // attention_heads
    return (heads or attention_heads) * (key + (_first(layer, "v_head_dim") or key))


def _first(layer: Any, *names: str) -> int:
    """The first of these fields that the configuration has; for a list, its largest number; 0 if it has none."""
    for name in names:
        value = getattr(layer, name, None)
        if value:
            return int(max(value) if isinstance(value, list | tuple) else value)
    return 0


def _tensors(place: object, seen: set[int]) -> Iterator[torch.Tensor]:
    """Every tensor in a cache, at any depth."""
    if id(place) in seen:
        return
    seen.add(id(place))
    flatten = getattr(place, "__tensor_flatten__", None)
    if isinstance(place, torch.Tensor) and flatten is None:
        yield place
        return
    inner: Iterable[object] = ()
    if flatten is not None:  # a tensor that consists of others, such as a quantised one
        inner = [getattr(place, name) for name in flatten()[0]]
    elif isinstance(place, Mapping):
        inner = place.values()
    elif isinstance(place, list | tuple):
        inner = place
    elif not isinstance(place, type | nn.Module | PreTrainedConfig):
        inner = getattr(place, "__dict__", {}).values()
    for part in inner:
        yield from _tensors(part, seen)
