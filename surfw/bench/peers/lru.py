"""surfw with the plain policy: keep what was used last, and evict what was not."""

from surfw.bench.comparison import Comparison, Measurement
from surfw.bench.peers.streaming import measure_streaming


def run(work: Comparison) -> Measurement:
    """Measure it."""
    return measure_streaming(work, policy="lru")
