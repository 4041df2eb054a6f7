"""surfw reading only the plain forms of the weights."""

from surfw.bench.comparison import Comparison, Measurement
from surfw.bench.peers.streaming import measure_streaming


def run(work: Comparison) -> Measurement:
    """Measure it."""
    return measure_streaming(work, codec="none")
