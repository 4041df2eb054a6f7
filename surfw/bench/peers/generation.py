"""Measures a generation, for all peers that have transformers' `generate()`."""

import time
from collections.abc import Callable
from typing import Any

import torch
import transformers

from surfw.bench.comparison import Comparison, Measurement
from surfw.models.inference import TokenClock
from surfw.runtime.memory import peak_rss_bytes


def measure_generation(
    generate: Callable[..., Any], work: Comparison, *, fetched_bytes: Callable[[], int] | None = None
) -> Measurement:
    """Generate one token to warm up, then measure.

    Args:
        generate: the model's `generate()`.
        work: what to generate.
        fetched_bytes: returns the bytes of weights fetched so far, if they are counted.
    """
    prompt = torch.tensor([work.prompt_ids])
    for count in (1, work.new_tokens):
        token_ids: list[int] = []
        fetched: list[int] = []

        def note(token: int, _: float, token_ids: list[int] = token_ids, fetched: list[int] = fetched) -> None:
            token_ids.append(token)
            if fetched_bytes is not None:
                fetched.append(fetched_bytes())

        clock = TokenClock(None, note)
        generate(
            prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0,
            streamer=clock,
        )  # fmt: skip
        seconds = time.perf_counter() - clock.start
    return Measurement(
        token_ids=token_ids,
        seconds=seconds,
        ttft_seconds=clock.times[0],
        decode_seconds=clock.times[-1] - clock.times[0],
        peak_rss_bytes=peak_rss_bytes(),
        streamed_bytes=fetched[-1] - fetched[0] if fetched else None,
    )


def model_class(config: Any) -> Any:
    """The transformers class that a checkpoint names, which is also the one surfw builds."""
    return getattr(transformers, (config.architectures or [""])[0], transformers.AutoModelForCausalLM)
