"""The peers that surfw is compared with, one module each; every peer runs in its own process.

Every module but `runai`, `generation`, `download` and `gguf_file` has a function `run` that takes the `Comparison`, or
the module's own `Work`, and measures; `__main__` calls it. Each imports the library that it measures only in `run`, so
that a missing one can be reported. `streaming` is surfw itself, and `reads` measures the disk.
"""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from surfw.bench.comparison import Comparison


class Peer(NamedTuple):
    """Another way to run a model.

    Attributes:
        module: its module in this package.
        package: import name of the package that it requires; None if surfw requires that package anyway.
        installation: how to install the package.
        needs: the field of `Comparison` that it requires; None if it requires no field.
        advice: how to provide that field.
        gguf_kind: the kind of GGUF file that is made of the checkpoint, if none is given; see `gguf_file`.
        options: values that replace fields of the `Comparison`.
        is_usual: whether it runs by default.
    """

    module: str
    package: str | None = None
    installation: str = ""
    needs: str | None = None
    advice: str = ""
    gguf_kind: str | None = None
    options: Mapping[str, str] = {}
    is_usual: bool = True

    def installed(self) -> str | None:
        """Return how to install the package, or None if it is installed."""
        return self.installation if self.package is not None and find_spec(self.package) is None else None

    def missing(self, comparison: "Comparison") -> str | None:
        """Return what is missing and how to provide it, or None if nothing is missing."""
        from surfw.bench.peers.gguf_file import check_gguf

        if self.needs is None or (self.is_usual and getattr(comparison, self.needs) is not None):
            return None
        reason = check_gguf(comparison.model_dir) if self.gguf_kind else ""
        return None if reason is None else "; ".join(filter(None, (reason, self.advice)))


_LLAMA = Peer(
    "llama_cpp",
    "llama_cpp",
    "llama.cpp is not installed; 'pip install llama-cpp-python gguf' compiles it, which takes some minutes",
    "gguf",
)
STREAMING = Peer("streaming", is_usual=False)
"""surfw itself."""

LLAMA_CRASH = (
    "llama.cpp's kernels for AMX crash on some processors; a build without them runs: CMAKE_ARGS='-DGGML_NATIVE=OFF "
    "-DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_AVX512=ON -DGGML_AVX512_VNNI=ON -DGGML_AVX512_BF16=ON' "
    "pip install --no-binary :all: llama-cpp-python"
)
"""The note for a llama.cpp process that was killed by a signal."""

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
    "llama.cpp": _LLAMA._replace(
        gguf_kind="bf16",
        advice="llama.cpp needs the model as a GGUF file (gguf, --gguf FILE); llama.cpp's own converter makes one: "
        "convert_hf_to_gguf.py MODEL_DIR --outtype bf16 --outfile FILE",
    ),
    "llama.cpp-q8_0": _LLAMA._replace(gguf_kind="q8_0", is_usual=False),
    "llama.cpp-q4_0": _LLAMA._replace(gguf_kind="q4_0", is_usual=False),
    "lru": STREAMING._replace(options={"policy": "lru"}, is_usual=True),
    **{codec: STREAMING._replace(options={"codec": codec}) for codec in ("none", "lossless", "int8", "int4")},
}
"""The peers by name, in the order in which they run."""
