"""What a generation remembers: the bytes its KV cache will take, from the configuration, and those that one holds.

A budget for weights has to leave memory for it. No model is known by its name; the numbers come from the names that
transformers' configurations share. Nothing here computes, and no tensor is copied.
"""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

CACHE_NAMES = ("cache", "past_key_values", "cache_params")
"""What forwards have called the cache that they take and give: transformers 5.24 renamed the second and the third."""

_NO_KEYS = frozenset({"linear_attention", "conv", "moe", "mlp"})
"""Types of layers that keep no key and value per token, but a state of a fixed size or nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantised:
    """How transformers' quantised cache keeps keys and values, which is not exact; the defaults are its own.

    Attributes:
        bits: of a number.
        group_size: numbers that share a scale and a zero point.
        residual_tokens: the last generated ones, which are kept as they are until there are more.
    """

    bits: int = 4
    group_size: int = 64
    residual_tokens: int = 128


@dataclass(frozen=True, slots=True)
class KvCost:
    """What one sequence adds to the KV cache, a beam counting as a sequence.

    Attributes:
        prompt_token_bytes: for each token of the prompt. With an encoder: for each position that the encoder puts out,
            which the layers of the decoder look at.
        new_token_bytes: for each generated token that is put into the model again, which the last one is not. With an
            encoder: for each token that is put into the decoder, its start token included.
        layers: that keep keys and values.
        itemsize: bytes of a number.
    """

    prompt_token_bytes: int
    new_token_bytes: int
    layers: int = 1
    itemsize: int = 4

    def total_bytes(self, prompt_tokens: int, new_tokens: int, *, sequences: int = 1) -> int:
        """All of a generation's cache, with so many tokens in each of its sequences."""
        return sequences * (prompt_tokens * self.prompt_token_bytes + new_tokens * self.new_token_bytes)

    def quantised_bytes(self, prompt_tokens: int, new_tokens: int, how: Quantised, *, sequences: int = 1) -> int:
        """The same of a cache that is quantised; attention has one layer at a time of it as it was."""
        whole = self.total_bytes(prompt_tokens, new_tokens, sequences=sequences)
        residual = self.total_bytes(0, min(new_tokens, how.residual_tokens), sequences=sequences)
        share = how.bits / 8 / self.itemsize + 2 / how.group_size
        return min(whole, int(whole * share) + residual + whole // max(1, self.layers))


def kv_cost(config: PreTrainedConfig, dtype: torch.dtype) -> KvCost:
    """What generation with a model of this configuration adds to its KV cache.

    Exact where every layer keeps a key and a value of every token (or, in latent attention, what both are made of). An
    upper bound where a layer keeps less: within a sliding window, when layers share their keys, or when it compresses
    them. Layers that keep a state of a fixed size (Mamba, linear attention) count as nothing, and so does a model
    without attention. What concatenating briefly doubles, one layer at a time, is not counted.

    Args:
        config: of a model that generates; of one that does not, what it would take as a decoder.
        dtype: what the model computes in.
    """
    text = config.get_text_config(decoder=True)
    layers = list(_attention_layers(config, text))
    own = sum(_numbers_per_token(layer) for layer in layers) * dtype.itemsize
    prompt = sum(_plain_numbers(layer, "cross_") for layer in layers) * dtype.itemsize
    return KvCost(prompt if config.is_encoder_decoder else own, own, len(layers), dtype.itemsize)


def output_cache(output: object) -> object | None:
    """The cache among the outputs of a forward, if it gave one; reading it by the name it has draws no notice."""
    if not isinstance(output, dict):
        return None
    found = (dict.get(output, name) for name in CACHE_NAMES)  # an output's own `get` warns of the older names
    return next((cache for cache in found if cache is not None), None)


def cache_name(model: nn.Module) -> str:
    """By which name a forward takes its cache.

    Raises:
        StopIteration: it takes none.
    """
    taken = inspect.signature(model.forward).parameters
    return next(name for name in CACHE_NAMES if name in taken)


def cache_bytes(cache: object) -> int:
    """The memory that a cache of transformers holds: all of its tensors, of whatever kind of layer, also legacy tuples.

    A view counts with all the memory that it keeps alive, as a sliding window's does after a long prompt; memory that
    several tensors share counts once. None holds nothing.
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
    if count is not None:  # T5's other count is the encoder's
        yield from [text] * count
        return
    if getattr(text, "num_hidden_layers", None) is None:  # a class of one's own that says nothing of layers
        return
    layers = list(text.per_layer_config)
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * len(layers)
    for layer, kind in zip(layers, kinds, strict=False):
        if kind not in _NO_KEYS:
            yield layer


def _numbers_per_token(layer: Any) -> int:
    """How many numbers a layer's self-attention keeps of a token."""
    latent = getattr(layer, "kv_lora_rank", None)
    numbers = latent + layer.qk_rope_head_dim if latent else _plain_numbers(layer)
    return int(numbers + (getattr(layer, "index_head_dim", None) or 0))


def _plain_numbers(layer: Any, prefix: str = "") -> int:
    """A key and a value for each of the heads that have their own; `prefix` stands before names of cross-attention."""
    attention_heads = _first(layer, "num_attention_heads")
    if not attention_heads:
        return 0
    shared_by_all = getattr(layer, "multi_query", False) and not getattr(layer, "new_decoder_architecture", False)
    heads = 1 if shared_by_all else _first(layer, f"{prefix}num_key_value_heads", "num_key_value_heads")
    key = _first(layer, f"{prefix}head_dim", "head_dim", "d_kv") or layer.hidden_size // attention_heads
    return (heads or attention_heads) * (key + (_first(layer, "v_head_dim") or key))


def _first(layer: Any, *names: str) -> int:
    """The first of these numbers that the configuration has; of a list, the largest. 0 if it has none."""
    for name in names:
        value = getattr(layer, name, None)
        if value:
            return int(max(value) if isinstance(value, list | tuple) else value)
    return 0


def _tensors(place: object, seen: set[int]) -> Iterator[torch.Tensor]:
    """Every tensor in a cache, however deep."""
    if id(place) in seen:
        return
    seen.add(id(place))
    flatten = getattr(place, "__tensor_flatten__", None)
    if isinstance(place, torch.Tensor) and flatten is None:
        yield place
        return
    inner: Iterable[object] = ()
    if flatten is not None:  # a tensor that is made of others, as quantised ones are
        inner = [getattr(place, name) for name in flatten()[0]]
    elif isinstance(place, Mapping):
        inner = place.values()
    elif isinstance(place, list | tuple):
        inner = place
    elif not isinstance(place, type | nn.Module | PreTrainedConfig):
        inner = getattr(place, "__dict__", {}).values()
    for part in inner:
        yield from _tensors(part, seen)
