"""llama.cpp, which memory-maps a GGUF file and relies on the page cache."""

import os
import time

from surfw.bench.comparison import Comparison, Measurement

_SPARE_POSITIONS = 16


def run(work: Comparison) -> Measurement:
    """Measure a generation on every core that this process may use."""
    from llama_cpp import Llama

    from surfw.runtime.memory import peak_rss_bytes

    positions = work.prompt_tokens + work.new_tokens + _SPARE_POSITIONS
    threads = len(os.sched_getaffinity(0))
    model = Llama(work.gguf, n_ctx=positions, n_threads=threads, n_threads_batch=threads, verbose=False)
    for count in (1, work.new_tokens):
        model.reset()
        token_ids: list[int] = []
        times: list[float] = []
        start = time.perf_counter()
        for token in model.generate(work.prompt_ids, temp=0.0):
            token_ids.append(int(token))
            times.append(time.perf_counter() - start)
            if len(token_ids) == count:
                break
    return Measurement(
        token_ids=token_ids,
        seconds=times[-1],
        ttft_seconds=times[0],
        decode_seconds=times[-1] - times[0],
        peak_rss_bytes=peak_rss_bytes(),
    )
