"""What surfw is compared with: one file for each, which runs in a process of its own.

Every file but `runai`, `generation` and `download` has a function `run` that takes the `Comparison` and measures;
`__main__` calls it. None of them imports what it measures before that, so that a peer that is not installed can be
named. `streaming` is surfw itself, and `reads` measures the disk.
"""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import NamedTuple


class Peer(NamedTuple):
    """Another way to run a model.

    Attributes:
        module: its file in this package.
        package: what has to be installed for it, as Python imports it; None for what comes with surfw.
        installation: how to install that.
        needs: what the `Comparison` must name for it; None for nothing.
        advice: how to make that.
    """

    module: str
    package: str | None = None
    installation: str = ""
    needs: str | None = None
    advice: str = ""

    def installed(self) -> str | None:
        """Return how to install it if that has to be done first."""
        return self.installation if self.package is not None and find_spec(self.package) is None else None

    def missing(self, comparison: object) -> str | None:
        """Return what it needs and was not given, or None if it has everything."""
        return self.advice if self.needs is not None and getattr(comparison, self.needs) is None else None


PEERS: Mapping[str, Peer] = {
    "resident": Peer("resident"),
    "accelerate": Peer("accelerate", "accelerate", "accelerate is not installed; 'pip install accelerate' does it"),
    "airllm": Peer(
        "airllm",
        "airllm",
        "airllm is not installed; 'pip install airllm' does it",
        "airllm_dir",
        "airllm writes into the checkpoint that it is given: name a copy of it, with room for a second one "
        "(airllm_dir, --airllm-dir COPY)",
    ),
    "llama.cpp": Peer(
        "llama_cpp",
        "llama_cpp",
        "llama.cpp is not installed; 'pip install llama-cpp-python' compiles it, which takes some minutes",
        "gguf",
        "llama.cpp needs the model as a GGUF file (gguf, --gguf FILE); llama.cpp's own converter makes one: "
        "convert_hf_to_gguf.py MODEL_DIR --outtype bf16 --outfile FILE",
    ),
    "lru": Peer("lru"),
    "none": Peer("none"),
    "lossless": Peer("lossless"),
}
"""What surfw is compared with, in the order in which they run."""
