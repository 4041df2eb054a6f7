"""Other tools that run a model larger than a device's memory, for `bench device`: on the same weights."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from surfw.bench.device_model import Timing, prompt, time_generation

Found = Sequence[tuple[str, Timing, str]]
"""For each way: its name, its timing, and the name of the surfw row to compare with it."""

_FEW_TOKENS = 6


def accelerate_offload(model: Any, device: torch.device) -> Found:
    """Time Accelerate's `cpu_offload`: all weights in host memory."""
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_submodules

    model.cpu()
    try:
        found = _time(cpu_offload(model, execution_device=device), device)
    finally:
        remove_hook_from_submodules(model)
    return [("accelerate, everything offloaded", found, "everything streamed")]


def accelerate_half(model: Any, device: torch.device) -> Found:
    """Time Accelerate's device map: the second half of the layers in host memory, everything else on the device."""
    from accelerate import dispatch_model
    from accelerate.hooks import remove_hook_from_submodules

    model.cpu()
    layers = model.config.num_hidden_layers
    place: Any = device.index if device.type == "cuda" else "cpu"
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), place)
    places |= {f"model.layers.{index}": place if index < layers // 2 else "cpu" for index in range(layers)}
    try:
        found = _time(dispatch_model(model, places, main_device=place), device)
    finally:
        remove_hook_from_submodules(model)
    return [("accelerate, half on the device", found, "half on the device")]


def diffusers_groups(model: Any, device: torch.device) -> Found:
    """Time Diffusers' group offloading with a stream, one layer per group."""
    from diffusers.hooks import apply_group_offloading

    model.cpu()
    apply_group_offloading(
        model.model, onload_device=device, offload_device=torch.device("cpu"), offload_type="block_level",
        num_blocks_per_group=1, use_stream=device.type == "cuda", record_stream=device.type == "cuda",
        non_blocking=True,
    )  # fmt: skip
    model.lm_head.to(device)
    return [("diffusers, group offloading", _time(model, device), "everything streamed")]


def _time(model: Any, device: torch.device) -> Timing:
    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return time_generation(model, prompt(1, device), _FEW_TOKENS, synchronize)


Peer = Callable[[Any, torch.device], Found]

PEERS: Mapping[str, Peer] = {
    "accelerate": accelerate_offload,
    "accelerate-half": accelerate_half,
    "diffusers": diffusers_groups,
}
"""The peers by name, in the order in which they run."""

LAST_PEER = "diffusers"
"""Runs last, because it leaves its hooks on the model and does not move the model back."""
