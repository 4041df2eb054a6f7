"""surfw reading only the compressed forms of the weights, where there are any."""

from surfw.bench.comparison import Comparison, Measurement
from surfw.bench.peers.streaming import measure_streaming


def run(work: Comparison) -> Measurement:
    """Measure it."""
    return measure_streaming(work, codec="lossless")
