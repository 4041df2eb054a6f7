"""How often each expert of a model was chosen, stored between runs. Without torch.

The counts are in `$SURFW_HOME/experts`, one file per set of weights, independent of the stored forms: a BLAKE3, then a
line of JSON. They are only a hint: a file that is damaged or of another model is ignored. The last run to end
overwrites the file.
"""

import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surfw.config import MIB, surfw_home
from surfw.files import read_regular
from surfw.manifest import Manifest, decode_line, encode_line

logger = logging.getLogger("surfw.storage")

_MOST_BYTES = 16 * MIB


@dataclass(frozen=True, slots=True)
class ExpertUsage:
    """How often experts were chosen.

    Attributes:
        tokens: how many tokens each layer has seen, in all runs.
        counts: for each module, how many tokens each expert has computed; earlier tokens count less.
    """

    tokens: int
    counts: Mapping[str, tuple[float, ...]]

    def concentration(self, part: float = 0.25) -> float:
        """Return the share of all choices that fell on the most-chosen `part` of the experts of each module."""
        chosen = [sorted(counts, reverse=True) for counts in self.counts.values()]
        total = sum(map(sum, chosen))
        return sum(sum(counts[: math.ceil(len(counts) * part)]) for counts in chosen) / total if total else 0.0


def read_usage(manifest: Manifest) -> ExpertUsage | None:
    """Read the saved expert usage of a model; None if the file is absent or damaged."""
    try:
        entry = decode_line(read_regular(_path(manifest), _MOST_BYTES).strip())
        counts = {path: _counts(entry["counts"][path], len(one.chunks)) for path, one in manifest.experts.items()}
        return ExpertUsage(int(entry["tokens"]), counts)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def keep_usage(manifest: Manifest, usage: ExpertUsage) -> None:
    """Store the expert usage of a model. If it cannot be written, the next run starts without it."""
    path = _path(manifest)
    counts = {module: [round(count, 3) for count in counts] for module, counts in usage.counts.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(f".{os.getpid()}.tmp")
        new.write_bytes(encode_line({"model": manifest.name, "tokens": usage.tokens, "counts": counts}))
        new.replace(path)
    except OSError as exc:
        logger.info("%s cannot be written, so it is not known next time which experts are used: %s", path, exc.strerror)


def _path(manifest: Manifest) -> Path:
    return surfw_home() / "experts" / f"{manifest.weights_key}.json"


def _counts(values: Any, number: int) -> tuple[float, ...]:
    """Parse stored counts; raises ValueError if they are invalid."""
    counts = tuple(float(value) for value in values)
    if len(counts) != number or not all(0 <= count < math.inf for count in counts):
        raise ValueError(f"expected {number} counts")
    return counts
