"""Compare several ranks with alternatives without surfw, for a model of 1.1B; no test, for an idle machine.

    python -m tests.bench.together make FOLDER     # the checkpoint and its store
    python -m tests.bench.ranks load FOLDER        # four ranks: FSDP2 by surfw and by dcp, all by transformers
    python -m tests.bench.ranks pipeline FOLDER    # two ranks answer 8 prompts, beside one process with as much memory
    python -m tests.bench.ranks train FOLDER       # a LoRA over streamed weights, and over resident ones: memory

Each prints one JSON object. `load` needs root, to empty the page cache.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from surfw.bench.cap import drop_page_cache, memory_group
from surfw.runtime.memory import peak_rss_bytes
from tests.bench.cold_start import tell
from tests.bench.together import prompts

RANKS, ROUNDS, NEW, STEPS = 4, 3, (4, 20), 20
WAYS = ("surfw", "dcp", "transformers")
PIPELINE_BUDGET = "1.3GB"


def torchrun(ranks: int, *command: str) -> list[str]:
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m", *command
    ]  # fmt: skip


def run(command: list[str]) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-4000:])


def fill(how: str, folder: Path) -> None:
    """On a rank: load the weights; write the seconds since all ranks were ready, and the bytes read."""
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from transformers import AutoModelForCausalLM

    from surfw import WeightClient
    from surfw.distributed import build_model, load_sharded
    from surfw.distributed.place import place_model

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    saved = folder / f"dcp-{dist.get_world_size()}"
    dist.barrier()
    begun, read = time.perf_counter(), 0
    model: Any
    if how in {"surfw", "save"}:
        with WeightClient(folder / "store") as client:
            model = build_model(client, name="random")
            read = load_sharded(model, client, mesh, name="random").read_bytes
    elif how == "dcp":
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(_config(folder), dtype=torch.bfloat16)
        place_model(model, mesh, "fsdp")
        model.to_empty(device="cpu")
        before = _read_bytes()
        dcp.load({"model": get_model_state_dict(model)}, checkpoint_id=saved)
        read = _read_bytes() - before
    else:
        model = AutoModelForCausalLM.from_pretrained(folder / "random")
        read = (folder / "random/model.safetensors").stat().st_size
        sum(float(one.sum()) for one in model.parameters())  # it is mapped, and read at its first use
    dist.barrier()
    seconds = time.perf_counter() - begun
    if how == "save":
        dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=saved)
    else:
        found = {"seconds": seconds, "bytes": read, "peak_bytes": peak_rss_bytes()}
        (folder / f"rank-{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder / "random")


def _read_bytes() -> int:
    """The bytes that this process has read by system calls."""
    return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["rchar"])


def load(folder: Path) -> dict[str, Any]:
    """Load each way in turn, with a cold and a warm page cache."""
    run(torchrun(RANKS, "tests.bench.ranks", "save", str(folder)))
    found: dict[str, list[dict[str, Any]]] = {f"{way}, {cache}": [] for way in WAYS for cache in ("cold", "warm")}
    for _ in range(ROUNDS):
        for name, rounds in found.items():
            way, cache = name.split(", ")
            if cache == "cold":
                drop_page_cache()
            run(torchrun(RANKS, "tests.bench.ranks", way, str(folder)))
            ranks = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(RANKS)]
            rounds.append({
                "seconds": max(one["seconds"] for one in ranks), "bytes": [one["bytes"] for one in ranks],
                "peak_bytes": max(one["peak_bytes"] for one in ranks),
            })  # fmt: skip
    return {
        name: rounds[-1] | {"seconds": statistics.median(one["seconds"] for one in rounds)}
        for name, rounds in found.items()
    }


def pipeline(folder: Path) -> dict[str, Any]:
    """Return the tokens per second for 8 prompts, from answers of two lengths, so that the start does not count.

    On each rank, prompts are computed one after another, as by `generate()` in one process. Without a pipeline,
    `surfw infer --prompts` computes all in a batch, whose tokens may differ.
    """
    asked = folder / "prompts.jsonl"
    asked.write_text("".join(json.dumps({"prompt_ids": ids, "ignore_eos": True}) + "\n" for ids in prompts(8)))
    infer = ["infer", "random", "--source", str(folder / "store"), "--prompts", str(asked), "--ordered", "-q"]
    infer += ["--memory-budget", PIPELINE_BUDGET]
    ways = {
        "two ranks": [*torchrun(2, "surfw"), *infer, "--pipeline"],
        "one process, one after another": [sys.executable, "-m", "tests.bench.ranks", "answer", str(folder)],
        "one process, a batch": [sys.executable, "-m", "surfw", *infer],
    }

    def seconds(way: str, new: int) -> tuple[float, list[Any]]:
        output = Path(tempfile.mkdtemp(dir=folder)) / "answers"
        begun = time.perf_counter()
        run([*ways[way], "--output", str(output), "--max-new-tokens", str(new)])
        return time.perf_counter() - begun, [json.loads(one)["token_ids"] for one in output.read_text().splitlines()]

    rates: dict[str, list[float]] = {way: [] for way in ways}
    answers = {}
    for _ in range(ROUNDS):
        for way, found in rates.items():
            (short, _), (long, answers[way]) = (seconds(way, new) for new in NEW)
            found.append(8 * (NEW[1] - NEW[0]) / (long - short))
    return {
        "tokens_per_second": {way: statistics.median(found) for way, found in rates.items()}, "rounds": rates,
        "ranks_and_one_after_another_give_the_same": answers["two ranks"] == answers["one process, one after another"],
    }  # fmt: skip


def answer(folder: Path, output: Path, new: int) -> None:
    """Answer the prompts of `pipeline` by `generate()`, one after another."""
    import torch

    from surfw import StreamingModel

    with StreamingModel.open(folder / "store", "random", memory_budget=PIPELINE_BUDGET) as model:
        for ids in prompts(8):
            found = model.generate(torch.tensor([ids]), max_new_tokens=new, pad_token_id=0)[0, len(ids) :]
            with output.open("a") as file:
                file.write(json.dumps({"token_ids": found.tolist()}) + "\n")


def learn(folder: Path) -> None:
    """Run the example's training over resident weights."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from examples import lora_training

    learner = lora_training.make_learner(AutoModelForCausalLM.from_pretrained(folder / "random"))
    lora_training.learn(learner, lora_training.encode(AutoTokenizer.from_pretrained(folder / "random"), 64))
    tell(f"at most {peak_rss_bytes() / 1e9:.2f} GB of memory in this process")


def train(folder: Path) -> dict[str, Any]:
    """Return the output of each training: the last loss, the seconds per step, and the process's memory."""
    found: dict[str, Any] = {}
    streamed = [sys.executable, "examples/lora_training.py", str(folder / "random"), "700MB", "64"]
    resident = [sys.executable, "-m", "tests.bench.ranks", "learn", str(folder)]
    for name, command in (("streamed", streamed), ("resident", resident)):
        with memory_group(8 << 30) as group:
            done = subprocess.run(group.command(command), check=True, capture_output=True, text=True)
            lines = [one for one in done.stdout.splitlines() if one.startswith(("step", "at most"))]
            found[name] = {"losses": [one.split(",")[0] for one in lines[:STEPS]], "end": lines[-2:]}
    found["same_losses"] = found["streamed"].pop("losses") == found["resident"].pop("losses")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["load", "pipeline", "train", "answer", "learn", "save", *WAYS])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--max-new-tokens", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.what == "answer":
        return answer(asked.folder, asked.output, asked.max_new_tokens)
    if asked.what == "learn":
        return learn(asked.folder)
    if asked.what in {"save", *WAYS}:
        return fill(asked.what, asked.folder)
    tell(json.dumps({"load": load, "pipeline": pipeline, "train": train}[asked.what](asked.folder), indent=1))
    return None


if __name__ == "__main__":
    main()
