"""Writes llama.cpp's logits for passages of token ids to a file."""

import json
import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """The passages to evaluate, and the model.

    Attributes:
        gguf: the model's GGUF file.
        passages: a JSON file: a list of lists of token ids.
        out: where to write the logits of each token but a passage's last: float32 of shape (tokens, vocabulary), row by
            row, one passage after another.
        cap_bytes: see `Comparison`.
        folder: see `Comparison`.
        patience_seconds: see `Comparison`.
    """

    gguf: str
    passages: str
    out: str
    cap_bytes: int | None = None
    folder: str | None = None
    patience_seconds: float = 1800.0


@dataclass(frozen=True, slots=True)
class Logits:
    """The shape of the logits that were written.

    Attributes:
        tokens: number of rows.
        vocabulary: number of columns.
    """

    tokens: int
    vocabulary: int


def run(work: Work) -> Logits:
    """Evaluate each passage on its own, on every core that this process may use."""
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
