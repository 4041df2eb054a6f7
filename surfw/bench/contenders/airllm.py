"""AirLLM, which splits a copy of the checkpoint by layer, and reads each layer at every token."""

from dataclasses import replace
from importlib.util import find_spec

from surfw.bench.contenders.work import Measurement, Work

MOST_TOKENS = 4
"""It is slow, and as slow at every token: more of them would only take longer."""


def installed() -> str | None:
    """Whether AirLLM is there."""
    return None if find_spec("airllm") else "airllm is not installed; 'pip install airllm' does it"


def run(work: Work) -> Measurement:
    """Measure it, over a few tokens."""
    import torch
    from airllm import AutoModel
    from transformers import AutoConfig

    from surfw.bench.contenders.generation import measure_generation

    assert work.airllm_dir is not None, "who asks for AirLLM names its folder"
    dtype = AutoConfig.from_pretrained(work.airllm_dir).dtype or torch.float32
    model = AutoModel.from_pretrained(work.airllm_dir, device="cpu", dtype=dtype)
    return measure_generation(model.generate, replace(work, new_tokens=min(work.new_tokens, MOST_TOKENS)))
