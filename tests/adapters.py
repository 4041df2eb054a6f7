"""LoRA adapters written by peft, and peft over the resident model, with which surfw's results are compared."""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
import transformers


def save_adapter(base: Path, folder: Path, *, seed: int = 0, **settings: Any) -> Path:
    """Save an adapter with random weights over a checkpoint, as peft does."""
    torch.manual_seed(seed)
    adapted = quietly(peft.get_peft_model, _load(base), peft.LoraConfig(**settings))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    quietly(adapted.save_pretrained, folder)
    return folder


def with_peft(base: Path, adapter: Path) -> Any:
    """Return the resident model of a checkpoint with a peft adapter, in evaluation mode."""
    return quietly(peft.PeftModel.from_pretrained, _load(base), adapter).eval()


def change_settings(adapter: Path, **settings: Any) -> None:
    """Write settings into an adapter's configuration."""
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def _load(base: Path) -> Any:
    (cls,) = json.loads((base / "config.json").read_text())["architectures"]
    return copy.deepcopy(getattr(transformers, cls).from_pretrained(base, dtype="auto"))


def quietly(work: Any, *args: Any, **kwargs: Any) -> Any:
    """Return the result of a call, without the warnings that libraries give about each other."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return work(*args, **kwargs)
