"""What more tokens per sweep bring, as ratios in one run; for an idle machine, and no test.

    python -m tests.bench.together make FOLDER        # checkpoints of 1.1B and their store: 10 GB, some minutes
    python -m tests.bench.together many FOLDER        # 16 prompts together, one after another, and accelerate
    python -m tests.bench.together guess FOLDER       # prompt lookup, on a cycle and on random weights
    python -m tests.bench.together draft FOLDER       # the same with an int4 draft (--cap 1.7GB)
    python -m tests.bench.together switch FOLDER      # between two fine-tunes that share 20 of 22 layers (--cap 6GB)
    python -m tests.bench.together adapters FOLDER    # 20 of them over one base: what memory they take (--cap 6GB)
    python -m tests.bench.together thousand FOLDER    # prompts of mixed lengths for the demo model: memory, and padding
    python -m tests.bench.together sessions FOLDER    # four sessions beside one
    python -m tests.bench.together openai FOLDER      # 16 clients of the OpenAI example beside one

Each measures in a process of its own, which may have 1.2 GB (`--cap 1.2GB`), and prints one JSON object.
"""

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from surfw.bench.cap import drop_page_cache, memory_group
from surfw.config import parse_size
from surfw.runtime.memory import peak_rss_bytes, rss_bytes
from tests.checkpoints import save_llama

SIZES: dict[str, Any] = {
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
    "num_key_value_heads": 4, "vocab_size": 32000, "eos_token_id": None, "dtype": "bfloat16",
}  # fmt: skip
CYCLE = range(100, 116)
BUDGET, DRAFT_BUDGET, THOUSAND_BUDGET = "700MB", "1GB", "64MB"
NEW = 32
ADAPTERS = 20


def save_random(folder: Path) -> Any:
    """Save a LLaMA of 1.1B in bf16: 2.2 GB of random weights, always the same. Returns the model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SIZES)).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.ones_(parameter)
        else:
            torch.nn.init.normal_(parameter, std=0.02)
    model.model.rotary_emb.__init__(model.config)  # its buffers are not in the checkpoint
    model.save_pretrained(folder)
    return model


def make(folder: Path) -> None:
    """Make a model of random weights; a fine-tune of it; one whose greedy decoding follows a cycle; and their store."""
    from safetensors.torch import load_file, save_file

    from surfw import ModelChunker

    model = save_random(folder / "random")
    for file in save_llama(folder / "words").glob("tokenizer*"):  # a small vocabulary, so most text is empty
        shutil.copy(file, folder / "random")
    make_adapters(folder, model)
    weights = load_file(folder / "random/model.safetensors")
    tuned = {
        name: one * 1.25 if ".layers.7." in name or ".layers.14." in name else one for name, one in weights.items()
    }
    walk_a_cycle(weights)
    for name, made in (("tuned", tuned), ("cycle", weights)):
        shutil.copytree(folder / "random", folder / name)
        save_file(made, folder / name / "model.safetensors", metadata={"format": "pt"})
    for name in ("random", "tuned", "cycle"):
        codecs = ("none", "int4") if name != "tuned" else ("none",)
        ModelChunker(folder / name, folder / "store", codecs=codecs).chunk_model_sync()
    for name in adapter_names():
        ModelChunker(folder / name, folder / "store", base="random").chunk_model_sync()


def adapter_names() -> list[str]:
    return [f"adapter-{index}" for index in range(ADAPTERS)]


def make_adapters(folder: Path, model: Any) -> None:
    """LoRA adapters over the model of random weights, as peft saves them."""
    import peft
    import torch

    adapted = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
    for name in adapter_names():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.02)
        adapted.save_pretrained(folder / name)


def walk_a_cycle(weights: dict[str, Any]) -> None:
    """Make the model follow each token of the cycle with the next: layers hardly change the head's input."""
    small = [name for name in weights if name.endswith(("o_proj.weight", "down_proj.weight"))]
    weights |= {name: weights[name] * 0.01 for name in small}
    embeddings, head = weights["model.embed_tokens.weight"], weights["lm_head.weight"].clone()
    weights["lm_head.weight"] = head  # a fine-tune keeps the one it had
    for token in CYCLE:
        following = CYCLE[(token - CYCLE[0] + 1) % len(CYCLE)]
        head[following] = embeddings[token]


def prompts(count: int, length: int = 24) -> list[list[int]]:
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randint(200, 30000, (count, length), generator=generator).tolist()


def timed(work: Callable[[], int]) -> float:
    """Return the tokens per second."""
    start = time.perf_counter()
    tokens = work()
    return tokens / (time.perf_counter() - start)


def many(folder: Path) -> dict[str, Any]:
    """16 prompts: in a batch, one after another, and by accelerate's disk offload with the same batch."""
    import torch
    from transformers import AutoConfig, LlamaForCausalLM

    from surfw import StreamingModel
    from surfw.bench.peers.accelerate import place_modules

    asked = prompts(16)
    with StreamingModel.open(folder / "store", "random", memory_budget=BUDGET) as model:
        found: dict[int, list[int]] = {}

        def keep(one: Any) -> None:
            found[one.index] = one.result.token_ids

        def together() -> int:
            model.answer_many(asked, on_result=keep, max_new_tokens=NEW, ignore_eos=True, sequences=16)
            return sum(map(len, found.values()))

        def one_after_another() -> int:
            ids = torch.tensor(asked[:1])
            return model.generate(ids, max_new_tokens=NEW, do_sample=False, pad_token_id=0).shape[1] - ids.shape[1]

        model.generate(torch.tensor(asked[:1]), max_new_tokens=2, pad_token_id=0)
        ours, alone = timed(together), timed(one_after_another)
    config = AutoConfig.from_pretrained(folder / "random")
    with torch.device("meta"):
        places = place_modules(LlamaForCausalLM(config))
    peer = LlamaForCausalLM.from_pretrained(
        folder / "random", dtype="auto", device_map=places, offload_folder=folder / "offload"
    )
    batch = torch.tensor(asked)
    options = {"attention_mask": torch.ones_like(batch), "do_sample": False, "pad_token_id": 0}
    peer.generate(batch, max_new_tokens=2, **options)

    def by_peer() -> int:
        found: torch.Tensor = peer.generate(batch, max_new_tokens=8, **options)
        return found[:, batch.shape[1] :].numel()

    accelerate = timed(by_peer)
    return {
        "tokens_per_second": ours, "one_after_another": alone, "times": ours / alone, "accelerate": accelerate,
        "times_accelerate": ours / accelerate,
    }  # fmt: skip


def guess(folder: Path) -> dict[str, Any]:
    """Compare prompt lookup with plain decoding."""
    return speculate(folder, BUDGET, prompt_lookup=8)


def draft(folder: Path) -> dict[str, Any]:
    """Compare a draft with plain decoding without a draft."""
    return speculate(folder, DRAFT_BUDGET, draft="self:int4")


def speculate(folder: Path, budget: str, **options: Any) -> dict[str, Any]:
    """Run plain decoding and two generations with guesses in one model."""
    import torch

    from surfw import StreamingModel

    told: dict[str, Any] = {}
    for name, ids in (("cycle", [CYCLE[0], CYCLE[1], *CYCLE]), ("random", prompts(1)[0])):
        with StreamingModel.open(folder / "store", name, memory_budget=budget, codec="none") as model:
            tokens: list[list[int]] = []

            def generate(model: Any = model, ids: Any = ids, tokens: Any = tokens) -> int:
                found = model.generate(torch.tensor([ids]), max_new_tokens=2 * NEW, do_sample=False, pad_token_id=0)
                tokens.append(found[0, len(ids) :].tolist())
                return len(tokens[-1])

            model.generate(torch.tensor([ids]), max_new_tokens=2, pad_token_id=0)
            plain = timed(generate)
            model.speculate(**options)
            ours, again = timed(generate), timed(generate)
            told[name] = {
                "plain": plain, "guessing": ours, "times": ours / plain, "times_again": again / plain,
                "equal": tokens[0] == tokens[1] == tokens[2],
                **(model.statistics()["speculation"] or {}),
            }  # fmt: skip
    return told


COLD = """
import sys, time
import torch
from surfw import StreamingModel
from tests.bench.together import prompts
start = time.perf_counter()
with StreamingModel.open(sys.argv[1], "tuned", memory_budget=sys.argv[2]) as model:
    model.generate(torch.tensor(prompts(1)), max_new_tokens=1, pad_token_id=0)
    print(time.perf_counter() - start, model.metrics.count("fetched_bytes"))
"""


def switch(folder: Path) -> dict[str, Any]:
    """Compare a switch to a fine-tune, up to the first token, with opening it in a new process.

    The result includes the time per token of the open model, because no switch can be faster than that.
    """
    import torch

    from surfw import StreamingModel

    ids = torch.tensor(prompts(1))
    told: dict[str, Any] = {}
    for budget in (BUDGET, "3GB"):
        drop_page_cache()
        start = time.perf_counter()
        command = [sys.executable, "-c", COLD, str(folder / "store"), budget]
        found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        process, cold, read = time.perf_counter() - start, float(found[0]), int(found[1])
        drop_page_cache()
        with StreamingModel.open(folder / "store", "random", memory_budget=budget) as model:
            model.generate(ids, max_new_tokens=1, pad_token_id=0)
            start = time.perf_counter()
            model.generate(ids, max_new_tokens=1, pad_token_id=0)
            token = time.perf_counter() - start
            start, before = time.perf_counter(), model.metrics.count("fetched_bytes")
            model.switch("tuned")
            switched = time.perf_counter() - start
            model.generate(ids, max_new_tokens=1, pad_token_id=0)
            took = time.perf_counter() - start
            told[budget] = {
                "cold_process_seconds": process, "cold_seconds": cold, "cold_bytes": read,
                "switch_seconds": switched, "first_token_seconds": took, "token_seconds": token,
                "of_cold": took / cold, "of_cold_process": took / process, "least_of_cold": token / cold,
                "bytes": model.metrics.count("fetched_bytes") - before, "streamed_bytes": model.plan.bytes_per_pass,
            }  # fmt: skip
    return told


def memory_now() -> dict[str, int]:
    """Return this process's memory as the kernel reports it: resident, and the part that is not backed by files."""
    lines = (line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    return {name.rstrip(":"): int(size) * 1024 for name, size, *_ in lines}


def adapters(folder: Path) -> dict[str, Any]:
    """20 adapters: one after another in one place, all in one model, and each in a model of its own."""
    import torch

    from surfw import StreamingModel
    from surfw.runtime.memory import claimed_bytes

    ids, names = torch.tensor(prompts(1)), adapter_names()
    told: dict[str, Any] = {}

    def grown(before: dict[str, int]) -> dict[str, int]:
        now = memory_now()
        return {name: now[name] - before[name] for name in ("Rss", "Pss", "Anonymous")}

    with StreamingModel.open(folder / "store", "random", memory_budget="3GB") as model:
        model.generate(ids, max_new_tokens=1, pad_token_id=0)
        base, read, start = memory_now(), model.metrics.count("fetched_bytes"), time.perf_counter()
        told["base"] = base | {"resident_bytes": model._engine.resident_bytes, "read_bytes": read}
        for name in names:
            model.switch(name)
            model.generate(ids, max_new_tokens=1, pad_token_id=0)
        told["switched"] = grown(base) | {
            "base_bytes_read": model.metrics.count("fetched_bytes") - read,
            "held_bytes": model._open_here().adapters.held_bytes,
            "seconds_each": (time.perf_counter() - start) / len(names),
        }
        before = memory_now()
        for name in names:
            model.set_adapter(name)
            model.generate(ids, max_new_tokens=1, pad_token_id=0)
        told["all in one model"] = grown(before) | {"held_bytes": model._open_here().adapters.held_bytes}
    with contextlib.ExitStack() as opened:
        first = opened.enter_context(StreamingModel.open(folder / "store", "random", memory_budget="3GB"))
        first.generate(ids, max_new_tokens=1, pad_token_id=0)
        before, held = memory_now(), 0
        for name in names:
            model = opened.enter_context(StreamingModel.open(folder / "store", name, memory_budget="3GB"))
            model.generate(ids, max_new_tokens=1, pad_token_id=0)
            held += model._open_here().adapters.held_bytes
        told["a model for each"] = grown(before) | {"held_bytes": held, "claimed_bytes": claimed_bytes()}
    return told


def thousand(folder: Path) -> dict[str, Any]:
    """1,000 prompts of mixed lengths: peak memory compared with that of two prompts, and padding."""
    import gc

    import torch

    from surfw import ManyResult, ModelChunker, StreamingModel, demo_checkpoint

    budget = parse_size(THOUSAND_BUDGET)
    ModelChunker(demo_checkpoint(), folder / "demo").chunk_model_sync()
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 256, (1000,), generator=generator).tolist()
    asked = [torch.randint(3, 1280, (length,), generator=generator).tolist() for length in lengths]
    answers: list[ManyResult] = []
    computed = passes = 0

    def count(_: object, args: tuple[torch.Tensor, ...], _output: object) -> None:
        nonlocal computed, passes
        computed, passes = computed + args[0].numel(), passes + 1

    def answer(asked: list[list[int]]) -> None:
        with StreamingModel.open(folder / "demo", memory_budget=budget) as model:
            model.model.get_input_embeddings().register_forward_hook(count)
            model.answer_many(asked, on_result=answers.append, max_new_tokens=NEW, ignore_eos=True)

    answer(asked[:2])
    answers.clear()
    gc.collect()
    computed = passes = 0
    Path("/proc/self/clear_refs").write_text("5")  # reset the high-water mark
    before, start = rss_bytes(), time.perf_counter()
    answer(asked)
    seconds, peak = time.perf_counter() - start, peak_rss_bytes() - before
    tokens = [one.result.token_ids for one in answers if one.result is not None]
    needed = sum(lengths) + sum(len(one) - 1 for one in tokens)
    return {
        "answers": len(tokens), "seconds": seconds, "tokens_per_second": sum(map(len, tokens)) / seconds,
        "passes": passes, "tokens_per_pass": computed / passes, "padding": 1 - needed / computed,
        "budget_bytes": budget, "peak_beside_the_process_bytes": peak, "of_budget": peak / budget,
    }  # fmt: skip


def sessions(folder: Path) -> dict[str, Any]:
    """Compare four concurrent sessions with one: bytes, tokens and seconds."""
    from surfw import StreamingModel

    async def measure(count: int) -> dict[str, Any]:
        async with StreamingModel(folder / "store", "random", memory_budget=BUDGET) as model:
            await model.session(max_new_tokens=2, ignore_eos=True).answer(prompts(1)[0])
            before, start = model.metrics.count("fetched_bytes"), time.perf_counter()
            made = [model.session(max_new_tokens=NEW, ignore_eos=True) for _ in range(count)]
            found = await asyncio.gather(*(one.answer(ids) for one, ids in zip(made, prompts(4), strict=False)))
            return {
                "tokens": sum(len(one.token_ids) for one in found), "seconds": time.perf_counter() - start,
                "bytes": model.metrics.count("fetched_bytes") - before, "first": found[0].token_ids,
            }  # fmt: skip

    one, four = asyncio.run(measure(1)), asyncio.run(measure(4))
    same = one.pop("first") == four.pop("first")
    return {"one": one, "four": four, "times_bytes": four["bytes"] / one["bytes"], "first_equals_alone": same}


@contextlib.contextmanager
def served(folder: Path, group: Any) -> Iterator[str]:
    """Run the example as a service under a memory cap."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = {"SURFW_SOURCE": str(folder / "store"), "SURFW_MODEL": "random", "SURFW_MEMORY_BUDGET": BUDGET}
    command = [sys.executable, "-m", "uvicorn", "openai_server:app", "--app-dir", "examples", "--port", str(port)]
    with subprocess.Popen(group.command(command), env=os.environ | settings) as service:
        try:
            for _ in range(600):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            service.terminate()


def serve_openai(folder: Path, cap: int) -> dict[str, Any]:
    """Compare 16 concurrent streaming clients with one."""
    import openai

    async def ask(client: Any, index: int) -> int:
        answer = await client.completions.create(model="random", prompt=f"token {index}", max_tokens=NEW, stream=True)
        return sum([1 async for _ in answer])

    async def measure(url: str, count: int) -> float:
        async with openai.AsyncOpenAI(base_url=url, api_key="none", timeout=3600) as client:
            start = time.perf_counter()
            found = await asyncio.gather(*(ask(client, index) for index in range(count)))
            assert all(found)
            return count * NEW / (time.perf_counter() - start)

    with memory_group(cap) as group, served(folder, group) as url:
        asyncio.run(measure(url, 1))
        one, sixteen = asyncio.run(measure(url, 1)), asyncio.run(measure(url, 16))
        return {
            "one": one,
            "sixteen": sixteen,
            "times": sixteen / one,
            "peak_bytes": group.peak_bytes,
            "kills": group.kills,
        }


MEASURED: dict[str, Callable[[Path], dict[str, Any]]] = {
    "many": many, "guess": guess, "draft": draft, "switch": switch, "adapters": adapters, "thousand": thousand,
    "sessions": sessions,
}  # fmt: skip


def tell(found: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(found, indent=2) + "\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["make", "openai", *MEASURED])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cap", default="1.2GB")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.what == "make":
        make(given.folder)
        return
    if given.what == "openai":
        tell(serve_openai(given.folder, parse_size(given.cap)))
        return
    if given.inside:
        tell(MEASURED[given.what](given.folder))
        return
    drop_page_cache()
    with memory_group(parse_size(given.cap)) as group:
        command = [sys.executable, "-m", "tests.bench.together", given.what, str(given.folder), "--inside"]
        done = subprocess.run(group.command(command), check=False)
        tell({"peak_bytes": group.peak_bytes, "kills": group.kills})
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
