"""Plain transformers: `from_pretrained`, with everything in memory."""

from surfw.bench.comparison import Comparison, Measurement


def run(work: Comparison) -> Measurement:
    """Measure a generation."""
    from transformers import AutoConfig

    from surfw.bench.peers.generation import measure_generation, model_class

    config = AutoConfig.from_pretrained(work.model_dir)
    model = model_class(config).from_pretrained(work.model_dir, dtype="auto")
    return measure_generation(model.generate, work)
