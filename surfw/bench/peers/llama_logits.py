"""llama.cpp's logits on some passages of token ids, in a file."""

import json
import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What to read, and with which model.

    Attributes:
        gguf: the model.
        passages: a JSON file: a list of lists of token ids.
        out: where to write the logits of each token that has a next one: float32 of shape (tokens, vocabulary), row by
            row, the passages one after another.
        cap_bytes: as of `Comparison`.
        folder: as of `Comparison`.
        patience_seconds: as of `Comparison`.
    """

    gguf: str
    passages: str
    out: str
    cap_bytes: int | None = None
    folder: str | None = None
    patience_seconds: float = 1800.0


@dataclass(frozen=True, slots=True)
class Logits:
    """What was written.

    Attributes:
        tokens: rows.
        vocabulary: columns.
    """

    tokens: int
    vocabulary: int


def run(work: Work) -> Logits:
    """Read the passages, each by itself, on every core that this process may use."""
    from llama_cpp import Llama

    passages: list[list[int]] = json.loads(Path(work.passages).read_text("utf-8"))
    longest, threads = max(map(len, passages)), len(os.sched_getaffinity(0))
    model = Llama(
        work.gguf, n_ctx=longest, n_batch=longest, n_threads=threads, n_threads_batch=threads, logits_all=True,
        verbose=False,
    )  # fmt: skip
    with Path(work.out).open("wb") as out:
        for ids in passages:
            model.reset()
            model.eval(ids)
            out.write(model.scores[: len(ids) - 1].astype("<f4").tobytes())
    return Logits(sum(len(ids) - 1 for ids in passages), model.n_vocab())
