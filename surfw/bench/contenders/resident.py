"""transformers as it is: `from_pretrained`, everything in memory."""

from surfw.bench.contenders.work import Measurement, Work


def installed() -> str | None:
    """Transformers comes with surfw."""
    return None


def run(work: Work) -> Measurement:
    """Measure it."""
    from transformers import AutoConfig

    from surfw.bench.contenders.generation import measure_generation, model_class

    config = AutoConfig.from_pretrained(work.model_dir)
    model = model_class(config).from_pretrained(work.model_dir, dtype="auto")
    return measure_generation(model.generate, work)
