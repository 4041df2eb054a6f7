"""What a comparison of generations is asked to do, and what one generation came to.

All of it is plain data: a peer's process is given a `Comparison` as JSON, and gives back what it measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from surfw.bench.cap import memory_group
from surfw.bench.peers import PEERS
from surfw.config import CodecChoice, Policy, parse_size
from surfw.errors import ConfigurationError


def check_peers(names: Sequence[str]) -> None:
    """Check that all of these are names of `PEERS`.

    Raises:
        ConfigurationError: one is not.
    """
    if unknown := sorted(set(names) - PEERS.keys()):
        raise ConfigurationError(f"{unknown[0]!r:.80} is no peer; there are {', '.join(PEERS)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """A greedy generation that no end token ends, and who runs it how often.

    Attributes:
        model_dir: the checkpoint, in a local directory.
        against: names of `PEERS`; None for all that are usual and can run.
        gguf: the same model for `llama.cpp`; None for one that is made of the checkpoint, if it can be.
        airllm_dir: a copy of `model_dir` for AirLLM, which writes into it.
        cap_bytes: all the memory that each process can have, page cache included; None for no cap.
        codec: the form of the weights that surfw reads.
        policy: which layers surfw keeps.
        memory_budget: what surfw's weights may take, as `1.5GB`; None for its own choice.
        store: a folder that is, or becomes, surfw's store, and stays; None for one that is removed afterwards.
        folder: where to write what is removed afterwards; None for the temporary folder. To a peer it is empty.
        source: a server or a store that surfw reads instead of `store`.
        model: the model's name there; None for that of the checkpoint.
        bandwidth_bytes: bytes per second of the source's link; None for a local store, which is measured.
        prompt_tokens: of the prompt, whose ids are 1, 2, 3 and so on.
        new_tokens: to generate; 2 or more.
        rounds: how often each peer runs; medians are reported.
        patience_seconds: how long one of them may take in one round.
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
        """The prompt."""
        return list(range(1, self.prompt_tokens + 1))

    def check(self) -> None:
        """Refuse what cannot be compared.

        Raises:
            ConfigurationError: an argument cannot be used, or a peer that was named lacks what it needs.
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
                pass  # it can be made: nothing is ever run without the cap that was asked for

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
    """One generation; the warm-up before it, and loading, are not in it.

    Attributes:
        token_ids: what was generated.
        seconds: all of it, the prompt included.
        ttft_seconds: until the first token was there.
        decode_seconds: from the first token to the last one.
        peak_rss_bytes: the peak of the process so far, mapped files included.
        streamed_bytes: weights that surfw fetched between the first token and the last one; None for others.
    """

    token_ids: list[int]
    seconds: float
    ttft_seconds: float
    decode_seconds: float
    peak_rss_bytes: int
    streamed_bytes: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Bandwidth:
    """A rate of reading.

    Attributes:
        bytes_per_second: over all reads.
        direct: whether the page cache was bypassed; otherwise the files were only dropped from it before.
    """

    bytes_per_second: float
    direct: bool
