"""A model stays within its memory budget: by its own count at every layer, and by the system's."""

import asyncio
import inspect
import json
import logging
import re
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from surfw.bench.cap import memory_group
from surfw.chunking import prepare_model, write_model
from surfw.config import MIB
from surfw.errors import ConfigurationError
from surfw.models import StreamingModel, assembly
from surfw.runtime.kv_cache import CACHE_NAMES, kv_cost, output_cache
from surfw.runtime.memory import DefaultBudget
from surfw.storage import open_backend
from tests.checkpoints import resident

SLACK = 48 * MIB
"""For activations, memory kept by kernels and allocators, and the interpreter's own objects."""


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a model of 200 MB in 20 layers, and a tiny one of the same kind."""
    folder = tmp_path_factory.mktemp("bounded")
    sizes = {"large": (512, 2048, 20, 16384), "small": (64, 96, 2, 512)}
    for name, (hidden, inner, layers, vocabulary) in sizes.items():
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, vocab_size=vocabulary,
            num_attention_heads=8, num_key_value_heads=8, dtype="bfloat16",
        )  # fmt: skip
        with torch.device("meta"):
            model = LlamaForCausalLM(config).to(torch.bfloat16)
        model = model.to_empty(device="cpu")
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        model.save_pretrained(folder / name)
        asyncio.run(write_model(prepare_model(str(folder / name), name=name), open_backend(folder / "store")))
    return folder / "store"


RUN = """
import json, sys
import torch
from surfw.models import StreamingModel
from surfw.runtime.kv_cache import kv_cost
from surfw.runtime.memory import peak_rss_bytes

store, shares = sys.argv[1], json.loads(sys.argv[2])
ids, options = torch.arange(3, 12)[None], dict(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)

def run(name, budget):
    told = {"budget": budget, "most": 0}
    with StreamingModel.open(store, name, memory_budget=budget) as model:
        def look(*_):
            plan = model.plan
            held = model.statistics()["cache"]["resident_bytes"] + plan.overhead_bytes + plan.reserved_bytes
            told["most"] = max(told["most"], held)
        for module in model.model.modules():
            module.register_forward_hook(look)
        model.generate(ids, **options)
        before = model.metrics.count("fetched_bytes")
        told["tokens"] = model.generate(ids, **options).tolist()
        told["fetched"] = model.metrics.count("fetched_bytes") - before
        told["kv"] = model.statistics()["cache"]["kv_cache_bytes"]
        told["reserved"] = model.plan.reserved_bytes
        told["peak"] = peak_rss_bytes()
    return told

run("small", 10**9)  # all code is there, and has run once
base = peak_rss_bytes()
with StreamingModel.open(store, "large", memory_budget=10**10, prefetch=False) as model:
    everything = model.plan.peak_bytes
    cache = kv_cost(model.model.config, torch.bfloat16).total_bytes(9, 6)
try:
    StreamingModel.open(store, "large", memory_budget=1)
except Exception as exc:
    least = int(str(exc).split("(")[1].split(" bytes")[0])
found = [run("large", least + int(share * (everything - least)) + cache) for share in shares]
print(json.dumps({"base": base, "runs": found, "everything": everything}))
"""


def in_a_process(*arguments: str) -> dict[str, Any]:
    done = subprocess.run([*arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_the_process_takes_what_the_budget_says_and_a_larger_one_reads_less(large: Path) -> None:
    """All budgets run in one process, smallest first, so that each sets a new high-water mark."""
    shares = [0.0, 0.5, 1.0]
    told = in_a_process(sys.executable, "-c", RUN, str(large), json.dumps(shares))
    runs = told["runs"]
    assert runs[0]["budget"] < told["everything"] / 4
    for run in runs:
        assert run["most"] <= run["budget"]
        assert 0 < run["kv"] <= run["reserved"]
        assert run["peak"] <= told["base"] + run["budget"] + SLACK
        assert run["tokens"] == runs[0]["tokens"]
    fetched = [run["fetched"] for run in runs]
    assert fetched == sorted(set(fetched), reverse=True)
    assert fetched[0] > 4 * told["everything"]
    assert fetched[-1] == 0


TWICE = """
import json, sys
from pathlib import Path
import torch
from surfw.models import StreamingModel
from surfw.runtime.memory import claimed_bytes, find_default_budget

store, group, spare, run_first = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "run"
ids, options = torch.arange(3, 12)[None], dict(max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
with StreamingModel.open(store, "small") as small:
    small.generate(ids, **options)
for limit in ("memory.limit_in_bytes", "memory.max"):
    if (group / limit).exists():
        now = int((group / limit).read_text())
        (group / limit).write_text(str(now - find_default_budget().budget_bytes + spare))
told = {"spare": find_default_budget().budget_bytes}
with StreamingModel.open(store, "large") as first:
    if run_first:
        first.generate(ids, **options)
    with StreamingModel.open(store, "large") as second:
        told["budgets"] = [model.plan.budget_bytes for model in (first, second)]
        told["peaks"] = [model.plan.peak_bytes for model in (first, second)]
        told["tokens"] = [model.generate(ids, **options).tolist() for model in (first, second, first)]
        told["promised"] = claimed_bytes() + sum(model._engine.anonymous_bytes for model in (first, second))
print(json.dumps(told))
"""


@pytest.mark.parametrize("first", ["run", "not yet run"])
def test_two_models_do_not_promise_themselves_the_same_memory(first: str, large: Path) -> None:
    """The group has 300 MiB to spare; the first model takes 200 MB of it, and the second one the rest.

    After the first model has run, all its weights are in memory; the second model is the same, so it shares these.
    """
    spare = 300 * MIB
    with ExitStack() as made:
        try:
            group = made.enter_context(memory_group(2048 * MIB))
        except ConfigurationError as exc:
            pytest.skip(str(exc))
        program = [sys.executable, "-c", TWICE, str(large), str(group.path), str(spare), first]
        told = in_a_process(*group.command(program))
        assert group.kills == 0
    assert told["spare"] == pytest.approx(spare, abs=8 * MIB)
    assert told["budgets"][0] == pytest.approx(spare, abs=8 * MIB)
    there = told["peaks"][0] if first == "run" else 0
    assert told["budgets"][1] <= told["budgets"][0] - told["peaks"][0] + there + 8 * MIB
    assert sum(told["peaks"]) <= spare + there + 8 * MIB
    assert told["promised"] <= spare + 8 * MIB
    assert told["tokens"][0] == told["tokens"][1] == told["tokens"][2]


PROMPT = torch.arange(3, 3 + 20).repeat(8, 1)
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}


def everything_of(store: Path) -> int:
    with StreamingModel.open(str(store), "llama", memory_budget=10**9) as model:
        assert model.plan.everything_fits
        return model.plan.peak_bytes


def cache_of(model: StreamingModel) -> int:
    return kv_cost(model.model.config, model.model.dtype).total_bytes(20, 8, sequences=8)


def watch(model: StreamingModel) -> list[int]:
    """Record the model's own count of its memory at the end of each module's forward."""
    held: list[int] = []

    def look(*_: Any) -> None:
        plan = model.plan
        held.append(model.statistics()["cache"]["resident_bytes"] + plan.overhead_bytes + plan.reserved_bytes)

    for module in model.model.modules():
        module.register_forward_hook(look)
    return held


def test_weights_make_way_for_the_cache_of_a_generation(store: Path) -> None:
    budget = everything_of(store)
    with StreamingModel.open(str(store), "llama", memory_budget=budget) as model:
        first = model.generate(PROMPT[:1], max_new_tokens=1, do_sample=False, pad_token_id=2)
        pinned = model.plan.pinned
        held = watch(model)
        tokens = model.generate(PROMPT, **GREEDY)
        assert max(held) <= budget
        assert model.plan.pinned < pinned
        assert model.plan.reserved_bytes == cache_of(model)
        assert 0 < model.statistics()["cache"]["kv_cache_bytes"] <= model.plan.reserved_bytes
        assert torch.equal(tokens[:1, :21], first)


def test_a_cache_that_nobody_announced_is_measured_and_given_room(store: Path) -> None:
    budget = everything_of(store)
    with StreamingModel.open(str(store), "llama", memory_budget=budget) as model:
        (name,) = set(CACHE_NAMES).intersection(inspect.signature(model.model.forward).parameters)
        cache = output_cache(model(input_ids=PROMPT))
        held = watch(model)
        for _ in range(3):
            cache = output_cache(model(input_ids=PROMPT[:, :1], **{name: cache}))
            assert model.plan.reserved_bytes >= model.statistics()["cache"]["kv_cache_bytes"] > 0
        assert max(held) <= budget
        assert not model.plan.everything_fits


def test_a_budget_that_was_given_and_is_too_small_for_a_generation_is_refused(store: Path) -> None:
    budget = everything_of(store)
    with StreamingModel.open(str(store), "llama", memory_budget=budget) as model:
        before = model.plan
        with pytest.raises(ConfigurationError, match=r"too small for llama, which needs .* of it for the KV cache[,;]"):
            model.generate(PROMPT, **GREEDY | {"max_new_tokens": 1000})
        assert model.plan == before
        assert model.generate(PROMPT, **GREEDY).shape == (8, 28)


def test_a_prompt_in_pieces_is_transformers_own_and_reads_the_weights_once_for_each(
    store: Path, checkpoints: Path
) -> None:
    asked: dict[str, Any] = {**GREEDY, "max_new_tokens": 1}
    reference, read = resident(checkpoints, "llama"), []
    with StreamingModel.open(str(store), "llama", cache_size=1) as model:
        model.generate(PROMPT[:1], **asked)
        for pieces in ({}, {"prefill_chunk_size": 2}):
            before = model.metrics.count("fetched_bytes")
            found = model.generate(PROMPT[:1], **asked, **pieces)
            read.append(model.metrics.count("fetched_bytes") - before)
            assert torch.equal(found, reference.generate(PROMPT[:1], **asked, **pieces))
    assert read[1] > 4 * read[0] > 0


def test_a_quantised_cache_has_room_where_another_has_none(store: Path, checkpoints: Path) -> None:
    asked: dict[str, Any] = {**GREEDY, "max_new_tokens": 60}
    small: dict[str, Any] = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    with StreamingModel.open(str(store), "llama", memory_budget=10**9) as model:
        whole = kv_cost(model.model.config, model.model.dtype).total_bytes(20, 60, sequences=8)
        with pytest.raises(ConfigurationError) as refused:
            model.memory_budget = 1000
    budget = int(re.findall(r"\((\d+) bytes\) at least", str(refused.value))[0]) + whole * 3 // 5
    with StreamingModel.open(str(store), "llama", memory_budget=budget) as model:
        with pytest.raises(ConfigurationError, match=r"or have the KV cache quantised, .*cache_implementation='quanti"):
            model.generate(PROMPT, **asked)
        held = watch(model)
        found = model.generate(PROMPT, **asked, **small)
        assert max(held) <= budget
        assert model.statistics()["cache"]["kv_cache_bytes"] <= model.plan.reserved_bytes <= whole * 3 // 5
    assert torch.equal(found, resident(checkpoints, "llama").generate(PROMPT, **asked, **small))


def test_a_budget_that_surfw_found_out_only_warns(
    store: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    everything_of_llama = DefaultBudget(everything_of(store), "this machine allows so much")
    monkeypatch.setattr(assembly, "find_default_budget", lambda: everything_of_llama)
    with caplog.at_level(logging.WARNING, "surfw"), StreamingModel.open(str(store), "llama") as model:
        eos = int(model.generate(PROMPT, **GREEDY)[0, 20])
        assert caplog.messages == []
        for _ in range(2):  # it is reported once
            ended = model.generate(PROMPT, **GREEDY | {"max_new_tokens": 1000, "eos_token_id": eos})
            assert ended.shape == (8, 21)
    (message,) = caplog.messages
    assert message.startswith("there is too little memory for llama: it needs ")
    assert "of it for the KV cache, and " in message
    assert "free for it (this machine allows so much); make some free or raise that limit, or ask for fewer" in message


def test_a_machine_that_is_too_full_is_told_of_and_no_budget_of_nothing(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for free, said in ((0, "none is"), (1000, "1.0 kB is")):
        full = DefaultBudget(free, "/proc/meminfo allows 8.0 GB, 7.9 GB of it is in use, 429.5 MB is headroom")
        monkeypatch.setattr(assembly, "find_default_budget", lambda full=full: full)
        with pytest.raises(ConfigurationError) as refused:
            StreamingModel.open(str(store), "llama")
        text = str(refused.value)
        assert text.startswith("there is too little memory for llama: it needs ")
        assert f"and {said} free for it (/proc/meminfo allows 8.0 GB, 7.9 GB of it is in use, 429.5 MB is " in text
        assert "--memory-budget" in text
        assert "tokens" not in text
        assert " 0 B" not in text


def test_the_budget_may_change_while_the_model_runs(large: Path) -> None:
    ids = torch.arange(3, 12)[None]
    with StreamingModel.open(large, "large", memory_budget="1GB") as model:
        expected = model(ids).logits
        assert model.plan.everything_fits
        small, held = model._engine.least_budget_bytes + 2 * max(model.plan.sizes.values()), []
        changed = model.model.get_submodule("model.layers.9").register_forward_hook(
            lambda *_: setattr(model, "memory_budget", small)
        )
        assert torch.equal(model(ids).logits, expected)
        assert model.memory_budget == small
        changed.remove()
        for module in model.model.modules():
            module.register_forward_hook(
                lambda *_: held.append(model._engine.resident_bytes + model.plan.overhead_bytes)
            )
        assert torch.equal(model(ids).logits, expected)
        assert max(held) + model.plan.overhead_bytes <= small
        with pytest.raises(ConfigurationError, match="too small"):
            model.memory_budget = "1MB"
        assert model.memory_budget == small
        model.memory_budget = "1GB"
        assert model.plan.everything_fits
        assert torch.equal(model(ids).logits, expected)
    assert StreamingModel(large, "large", memory_budget="2MB").memory_budget == 2_000_000


def test_a_model_gives_back_what_it_can(large: Path) -> None:
    ids = torch.arange(3, 12)[None]
    with StreamingModel.open(large, "large", memory_budget="100MB") as model:
        expected, engine = model(ids).logits, model._engine
        claimed = engine.claimed_bytes
        assert claimed <= 100_000_000
        assert engine.shrink(30_000_000) == (claimed, claimed - 30_000_000)
        assert model.memory_budget == claimed - 30_000_000
        assert torch.equal(model(ids).logits, expected)
        assert engine.claimed_bytes <= claimed - 30_000_000
        claimed = engine.claimed_bytes
        assert engine.shrink(10**9) == (claimed, engine.least_budget_bytes)
        assert engine.shrink(1) is None
        assert torch.equal(model(ids).logits, expected)
    with StreamingModel.open(large, "large", cache_size=5) as model:
        claimed = model._engine.claimed_bytes
        assert model._engine.shrink(1_000_000) == (claimed, claimed - 1_000_000)
        assert torch.equal(model(ids).logits, expected)
    with StreamingModel.open(large, "large", memory_budget="1GB") as model:
        assert torch.equal(model(ids).logits, expected)
        assert model._engine.shrink(1_000_000) is None, "mapped pages are not its own"


SHORT = """
import json, logging, sys, time
from pathlib import Path
import torch
from surfw.models import StreamingModel
from surfw.runtime import pressure
from surfw.runtime.memory import read_smallest_limit

logging.basicConfig(level=logging.WARNING)
store, group = sys.argv[1], Path(sys.argv[2])
pressure.watch._interval = 0.05
ids = torch.arange(3, 12)[None]
options = dict(max_new_tokens=2, do_sample=False, eos_token_id=None, pad_token_id=0)
with StreamingModel.open(store, "large", memory_budget="150MB") as model:
    expected = model.generate(ids, **options).tolist()
    for name in ("memory.limit_in_bytes", "memory.max"):
        if (group / name).exists():
            (group / name).write_text(str(read_smallest_limit().in_use_bytes + 110 * 2**20))
    taken = []
    for _ in range(20):  # of 160 MB, which are not there
        taken.append(bytearray(b"x" * (8 * 10**6)))
        assert model.generate(ids, **options).tolist() == expected
    print(json.dumps({"budget": model.memory_budget, "least": model._engine.least_budget_bytes}))
"""


def test_a_process_whose_memory_runs_short_is_not_killed(large: Path) -> None:
    with ExitStack() as made:
        try:
            group = made.enter_context(memory_group(2048 * MIB))
        except ConfigurationError as exc:
            pytest.skip(str(exc))
        command = group.command([sys.executable, "-c", SHORT, str(large), str(group.path)])
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, group.kills) == (0, 0), done.stderr[-2000:]
    told = json.loads(done.stdout)
    assert told["least"] <= told["budget"] < 110_000_000
    assert "WARNING:surfw.runtime:large: memory runs short" in done.stderr


@pytest.mark.parametrize("wrong", ["much", 0, None, True])
def test_a_budget_that_is_none_is_refused(large: Path, wrong: Any) -> None:
    with (
        StreamingModel.open(large, "small", memory_budget="1GB") as model,
        pytest.raises(ConfigurationError, match="memory_budget is"),
    ):
        model.memory_budget = wrong
