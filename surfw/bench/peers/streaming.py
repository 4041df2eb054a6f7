"""surfw itself, with its own choice of what stays in memory."""

from typing import Any

from surfw.bench.comparison import Comparison, Measurement


def run(work: Comparison) -> Measurement:
    """Measure it."""
    return measure_streaming(work)


def measure_streaming(work: Comparison, **options: Any) -> Measurement:
    """Measure a streaming model that is opened with these options."""
    from surfw.bench.peers.generation import measure_generation
    from surfw.config import is_server_url
    from surfw.models.streaming import StreamingModel
    from surfw.settings import Settings

    assert work.source is not None, "bench_infer names it"
    if is_server_url(work.source):
        options["token"] = Settings.load().token
    with StreamingModel.open(work.source, work.model, memory_budget=work.memory_budget, **options) as model:
        return measure_generation(
            model.generate, work, fetched_bytes=lambda: model.statistics()["cache"]["fetched_bytes"]
        )
