"""The settings of a comparison of generations, and the measurements of one generation.

All of it is plain data: a peer's process receives a `Comparison` as JSON, and returns what it measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from surfw.bench.cap import memory_group
from surfw.bench.peers import PEERS
from surfw.config import CodecChoice, Policy, parse_size
from surfw.errors import ConfigurationError


def check_peers(names: Sequence[str]) -> None:
    """Check that all names are in `PEERS`.

    Raises:
        ConfigurationError: a name is not.
    """
    if unknown := sorted(set(names) - PEERS.keys()):
        raise ConfigurationError(f"{unknown[0]!r:.80} is no peer; there are {', '.join(PEERS)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """A greedy generation without an end token, the peers that run it, and how often.

    Attributes:
        model_dir: the checkpoint, in a local directory.
        against: names of `PEERS`; None for all default peers that can run.
        gguf: a GGUF file of the same model for `llama.cpp`; None to convert the checkpoint, if possible.
        airllm_dir: a copy of `model_dir` for AirLLM, which writes into it.
        cap_bytes: memory cap of each process, page cache included; None for no cap.
        codec: the form of the weights that surfw reads.
        policy: which layers surfw keeps resident.
        memory_budget: budget for surfw's weights, such as `1.5GB`; None lets surfw choose.
        store: folder of surfw's store, created if missing and kept; None for a temporary store.
        folder: where to write temporary files; None for the temporary folder. Each peer gets its own empty folder.
        source: a server or a store that surfw reads instead of `store`.
        model: the model's name at the source; None for the checkpoint's name.
        bandwidth_bytes: bytes per second of the source's link; None to measure it, which takes a local store.
        prompt_tokens: length of the prompt, whose ids are 1, 2, 3 and so on.
        new_tokens: number of tokens to generate; 2 or more.
        rounds: how often each peer runs; medians are reported.
        patience_seconds: time limit for one peer in one round.
    """

    model_dir: str
    against: Sequence[str] | None = None
    gguf: str | None = None
    airllm_dir: str | None = None
    cap_bytes: int | None = None
    codec: CodecChoice = "auto"
    policy: Policy = "auto"
    memory_budget: str | None = None
    store: str | None = None
    folder: str | None = None
    source: str | None = None
    model: str | None = None
    bandwidth_bytes: int | None = None
    prompt_tokens: int = 16
    new_tokens: int = 16
    rounds: int = 3
    patience_seconds: float = 1800.0

    @property
    def prompt_ids(self) -> list[int]:
        """The token ids of the prompt."""
        return list(range(1, self.prompt_tokens + 1))

    def check(self) -> None:
        """Check that the comparison can run.

        Raises:
            ConfigurationError: an argument cannot be used, or a named peer lacks something it requires.
        """
        if not (Path(self.model_dir) / "config.json").is_file():
            raise ConfigurationError(
                f"{self.model_dir} is no checkpoint in a local directory (it has no config.json); name one: what surfw "
                "is compared with reads it there"
            )
        check_peers(self.against or ())
        for name in self.against or ():
            if missing := PEERS[name].missing(self):
                raise ConfigurationError(missing)
        self._check_places()
        if self.memory_budget is not None:
            parse_size(self.memory_budget)
        if self.cap_bytes is not None:
            with memory_group(self.cap_bytes):
                pass  # fails if the cap cannot be set: nothing may run without a requested cap

    def _check_places(self) -> None:
        for what, path in (("gguf file", self.gguf), ("airllm_dir", self.airllm_dir), ("folder", self.folder)):
            if path is not None and not Path(path).exists():
                raise ConfigurationError(f"the {what} {path} is not there; name one that is")
        if self.airllm_dir is not None and Path(self.airllm_dir).samefile(self.model_dir):
            raise ConfigurationError(PEERS["airllm"].advice)
        if self.store is not None and self.source is not None:
            raise ConfigurationError("store and source exclude each other; give one of them")


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """The measurements of one generation; loading and the warm-up are not included.

    Attributes:
        token_ids: the generated tokens.
        seconds: total time, prompt included.
        ttft_seconds: time to first token.
        decode_seconds: from the first token to the last one.
        peak_rss_bytes: peak resident memory of the process so far, mapped files included.
        streamed_bytes: bytes of weights that surfw fetched between the first token and the last; None for other peers.
    """

    token_ids: list[int]
    seconds: float
    ttft_seconds: float
    decode_seconds: float
    peak_rss_bytes: int
    streamed_bytes: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Bandwidth:
    """A measured read rate.

    Attributes:
        bytes_per_second: the mean over all reads.
        direct: whether reads bypassed the page cache; otherwise each file was only dropped from it beforehand.
    """

    bytes_per_second: float
    direct: bool
