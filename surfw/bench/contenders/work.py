"""What every contender is asked to do, and what it tells of it: plain data, which travels as JSON between processes."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """A greedy generation that no end token ends.

    Attributes:
        model_dir: the checkpoint, in a local directory.
        source: where surfw reads it: a store, or a server's address.
        model: its name there.
        memory_budget: what surfw's weights may take, as `1.5GB`; None for surfw's own choice.
        gguf: the same model for llama.cpp.
        airllm_dir: a copy of `model_dir`, into which AirLLM writes.
        prompt_tokens: how many; the ids are 1, 2, 3 and so on.
        new_tokens: how many to generate, 2 or more.
        scratch_dir: an empty folder for what is written meanwhile; whoever starts the contender removes it.
    """

    model_dir: str
    source: str
    model: str
    memory_budget: str | None = None
    gguf: str | None = None
    airllm_dir: str | None = None
    prompt_tokens: int = 16
    new_tokens: int = 16
    scratch_dir: str = ""

    @property
    def prompt_ids(self) -> list[int]:
        """The prompt."""
        return list(range(1, self.prompt_tokens + 1))


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """One generation; the warm-up before it, and loading, are not in it.

    Attributes:
        token_ids: what was generated.
        seconds: all of it, the prompt included.
        ttft_seconds: until the first token was there.
        decode_seconds: from the first token to the last one.
        peak_rss_bytes: the most that the process had in memory so far, mapped files included.
        streamed_bytes: weights that surfw fetched between the first token and the last one; None for others.
    """

    token_ids: list[int]
    seconds: float
    ttft_seconds: float
    decode_seconds: float
    peak_rss_bytes: int
    streamed_bytes: int | None = None
