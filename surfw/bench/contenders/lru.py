"""surfw with the plain policy: keep what was used last, and evict what was not."""

from surfw.bench.contenders.streaming import measure_streaming
from surfw.bench.contenders.work import Measurement, Work


def installed() -> str | None:
    """It comes with surfw."""
    return None


def run(work: Work) -> Measurement:
    """Measure it."""
    return measure_streaming(work, policy="lru")
