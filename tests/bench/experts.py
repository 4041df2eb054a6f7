"""Measure expert prediction: the share of right guesses, and pairs of runs with and without them.

    python examples/mixture.py MIXTURE
    python -m tests.bench.experts MIXTURE [PAIRS]     # prints one JSON object; for an idle machine

Each run is a new process with 1.2 GB and without saved usage. It answers once to warm up, and is timed the second time.
The order within a pair alternates. With `on`, guesses are used as usual: only while at least half of the recent ones,
of those at missing experts, were right.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import PropertyMock, patch

from surfw import ModelChunker
from surfw.bench.cap import memory_group

CAP, WARM, NEW = 1_200_000_000, 64, 128


def measure(store: str, how: str) -> dict[str, Any]:
    """Answer in this process: tokens per second, and the right guesses, of all and of those at missing experts."""
    import torch

    from surfw import StreamingModel
    from surfw.runtime import experts

    made = right = 0
    compare = experts.ExpertPool._compare

    def count(self: experts.ExpertPool, path: str, used: Any) -> None:
        nonlocal made, right
        _, new = self._expected.get(path, (set(), set()))
        made, right = made + len(new), right + len(new.intersection(used))
        compare(self, path, used)

    with ExitStack() as patches:
        patches.enter_context(patch.object(experts.ExpertPool, "_compare", count))
        if how == "off":
            patches.enter_context(patch.object(experts.ExpertPool, "foresees", PropertyMock(return_value=False)))
        elif how == "always":
            patches.enter_context(patch.object(experts, "_MOSTLY", -1.0))
        model = patches.enter_context(StreamingModel.open(store))
        ids = torch.arange(1000, 1024).reshape(1, -1)
        model.generate(ids, max_new_tokens=WARM, pad_token_id=0)
        made = right = 0
        start = time.perf_counter()
        tokens = model.generate(ids + 24, max_new_tokens=NEW, pad_token_id=0)
        rate = (tokens.shape[1] - ids.shape[1]) / (time.perf_counter() - start)
        counts = model.statistics()["experts"]
        return {
            "rate": rate, "tokens": tokens[0].tolist(), "guesses": counts["guesses"], "foreseen": counts["foreseen"],
            "guesses_at_missing": made, "foreseen_of_missing": right,
        }  # fmt: skip


def run(store: Path, how: str) -> dict[str, Any]:
    with memory_group(CAP) as group, tempfile.TemporaryDirectory() as home:
        command = group.command([sys.executable, "-m", "tests.bench.experts", str(store), how])
        env = os.environ | {"SURFW_HOME": home}  # the file of the experts' usage
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=env)
        if done.returncode:
            raise SystemExit(f"a run ended with {done.returncode}: {done.stderr[-3000:]}")
        found: dict[str, Any] = json.loads(done.stdout)
        return found


def main(checkpoint: Path, pairs: int) -> dict[str, Any]:
    """Measure in turn."""
    with tempfile.TemporaryDirectory(dir=checkpoint.parent) as folder:
        store = Path(folder) / "store"
        ModelChunker(checkpoint, store, codecs=("none",)).chunk_model_sync()
        always = run(store, "always")
        rounds = [{how: run(store, how) for how in (("on", "off"), ("off", "on"))[pair % 2]} for pair in range(pairs)]
    on, off = rounds[-1]["on"], rounds[-1]["off"]
    rates = {how: [one[how]["rate"] for one in rounds] for how in ("on", "off")}
    medians = {how: statistics.median(found) for how, found in rates.items()}
    return {
        "tokens_per_second": medians | {"always": always["rate"]},
        "on_beside_off": statistics.median(mine / none for mine, none in zip(*rates.values(), strict=True)),
        "rates": rates, "right_of_all": always["foreseen"] / always["guesses"],
        "right_of_those_not_in_memory": always["foreseen_of_missing"] / always["guesses_at_missing"],
        "same_tokens": on["tokens"] == off["tokens"] == always["tokens"],
    }  # fmt: skip


if __name__ == "__main__":
    if sys.argv[2:] and not sys.argv[2].isdigit():
        found = measure(sys.argv[1], sys.argv[2])
    else:
        found = main(Path(sys.argv[1]), int(sys.argv[2]) if sys.argv[2:] else 10)
    sys.stdout.write(json.dumps(found, indent=None if "rate" in found else 1) + "\n")
