"""What generates tokens in a comparison, each in a process of its own; see `run_contender` in `surfw.bench.process`.

One module for each. None of them imports what it measures before it runs, so that the process which starts them stays
small, and a peer that is not installed can be named.
"""

from collections.abc import Mapping
from typing import Protocol

from surfw.bench.contenders import airllm, llama_cpp, lru, offload, resident, streaming
from surfw.bench.contenders.work import Measurement, Work


class Contender(Protocol):
    """What each module has."""

    def installed(self) -> str | None:
        """Why it cannot run here; None if it can."""

    def run(self, work: Work) -> Measurement:
        """Warm up, and measure one generation, in a process that does nothing else."""


SURFW = "surfw"

PEERS: Mapping[str, Contender] = {
    "resident": resident,
    "accelerate": offload,
    "airllm": airllm,
    "llama.cpp": llama_cpp,
    "lru": lru,
}
"""What surfw is compared with, in the order in which they run."""

CONTENDERS: Mapping[str, Contender] = {SURFW: streaming, **PEERS}
