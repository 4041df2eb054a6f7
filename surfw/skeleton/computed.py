"""Parameters that no checkpoint needs to hold, because transformers computes them, such as sinusoidal positions.

A class may list such parameters in `_keys_to_ignore_on_load_missing`, but that list is neither complete nor limited to
them. So they are recognised by the result of `_init_weights`: it must be the same for two random seeds, and must not be
constant, which is how untrained norms and biases are initialised. For listed parameters, a constant is accepted.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from surfw.config import MIB
from surfw.skeleton.build import Skeleton
from surfw.skeleton.units import Slot

_MOST_BYTES = 256 * MIB
_SEEDS = (0, 1)


def compute_missing(
    skeleton: Skeleton, missing: Iterable[str], dtypes: Mapping[str, torch.dtype]
) -> dict[str, torch.Tensor]:
    """Compute the missing parameters that transformers computes; returns their values, on the CPU, by name.

    Args:
        skeleton: the model; unchanged afterwards.
        missing: the names of the missing parameters.
        dtypes: the dtype that each parameter is loaded with.
    """
    model: Any = skeleton.model
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]  # noqa: SLF001 - no other
    found = {}
    for name in missing:
        slot = skeleton.slots[name]
        if slot.tensor.nbytes > _MOST_BYTES:
            continue
        one, other = (_initialise(model, slot, dtypes[name], seed) for seed in _SEEDS)
        if one is None or other is None or not torch.equal(one, other):
            continue
        is_ignored = any(pattern.search(name) for pattern in ignored)
        if is_ignored or bool((one != one.flatten()[:1]).any()):
            found[name] = one
    return found


def _initialise(model: PreTrainedModel, slot: Slot, dtype: torch.dtype, seed: int) -> torch.Tensor | None:
    """The parameter as `_init_weights` sets it; None if it does not set it, or fails on a model without weights."""
    held, empty = slot.tensor, torch.full_like(slot.tensor, torch.nan, device="cpu", dtype=dtype)
    slot.put(nn.Parameter(empty, requires_grad=False))
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            _owner(model, slot.name)._init_weights(slot.module)  # noqa: SLF001 - what from_pretrained calls
        made = slot.tensor.detach()
    except Exception:  # noqa: BLE001 - classes that initialise several modules at once
        return None
    finally:
        slot.put(held)
    return None if made.isnan().any() else made


def _owner(model: PreTrainedModel, name: str) -> Any:
    """The innermost `PreTrainedModel` that contains a parameter."""
    parts = name.split(".")
    for count in range(len(parts) - 1, 0, -1):
        module = model.get_submodule(".".join(parts[:count]))
        if isinstance(module, PreTrainedModel):
            return module
    return model
