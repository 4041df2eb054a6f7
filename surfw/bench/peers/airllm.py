"""AirLLM, which splits a copy of the checkpoint by layer and reads each layer for every token."""

from dataclasses import replace

from surfw.bench.comparison import Comparison, Measurement

MOST_TOKENS = 4
"""Every token is equally slow, so more of them would only take longer."""


def run(work: Comparison) -> Measurement:
    """Measure a generation of a few tokens."""
    import torch
    from airllm import AutoModel
    from transformers import AutoConfig

    from surfw.bench.peers.generation import measure_generation

    assert work.airllm_dir is not None, "AirLLM runs only where it is named"
    dtype = AutoConfig.from_pretrained(work.airllm_dir).dtype or torch.float32
    model = AutoModel.from_pretrained(work.airllm_dir, device="cpu", dtype=dtype)
    return measure_generation(model.generate, replace(work, new_tokens=min(work.new_tokens, MOST_TOKENS)))
