"""The smallest budget is the same wherever it is shown and wherever weights come from, and it suffices."""

import asyncio
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from surfw.chunking import prepare_model, write_model
from surfw.chunking.in_place import write_in_place
from surfw.errors import ConfigurationError
from surfw.models import StreamingModel
from surfw.models.planned import PlannedModel
from surfw.storage import open_backend
from tests.servers import serve

IDS = torch.arange(3, 9)[None]


def build(family: str) -> Any:
    """A model with a table whose rows are looked up, and layers of more than a block."""
    torch.manual_seed(0)
    if family == "llama":
        config = LlamaConfig(
            hidden_size=256, intermediate_size=512, num_hidden_layers=12, num_attention_heads=4, vocab_size=5000
        )
        return LlamaForCausalLM(config)
    if family == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_embd=128, n_layer=4, n_head=4, vocab_size=5000, n_positions=128))
    config = T5Config(
        d_model=128, d_kv=32, d_ff=256, num_layers=3, num_heads=4, vocab_size=5000, decoder_start_token_id=0
    )
    return T5ForConditionalGeneration(config)


CASES = [
    ("llama", "float32", None),
    ("llama", "bfloat16", "float32"),
    ("gpt2", "bfloat16", None),
    ("t5", "float32", None),
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(map(str, case)))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A model in a store, behind a server, and in place; its dtype, and its planned smallest budget."""
    family, stored, dtype = request.param
    folder = tmp_path_factory.mktemp(family)
    build(family).to(getattr(torch, stored)).save_pretrained(folder / "m")
    with prepare_model(str(folder / "m")) as prepared:
        asyncio.run(write_model(prepared, open_backend(folder / "store")))
    with prepare_model(str(folder / "m")) as prepared:
        asyncio.run(write_in_place(prepared, open_backend(folder / "in-place")))
        planned_bytes = PlannedModel(prepared).least_budget_bytes(("none",))
    auto = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
    resident = auto.from_pretrained(folder / "m", dtype=getattr(torch, dtype or stored)).eval()
    with ExitStack() as stack:
        served = stack.enter_context(serve(folder / "store"))
        yield {
            "sources": [str(folder / "store"), served.url, str(folder / "in-place")],
            "dtype": dtype,
            "is_streamed": family == "llama",  # the other models fit into it completely
            "planned": planned_bytes,
            "inputs": {"input_ids": IDS} | ({"decoder_input_ids": IDS} if family == "t5" else {}),
            "resident": resident,
        }


def refused(source: str, dtype: str | None, budget: int) -> tuple[int, int]:
    """The smallest budget that an error names for this source, and for any other source."""
    with pytest.raises(
        ConfigurationError, match=r"too small for m, which needs .* at least.*; give that or more$"
    ) as no:
        StreamingModel.open(source, memory_budget=budget, dtype=dtype)
    found = re.search(r"\((\d+) bytes\) at least(?:, and .* \((\d+) bytes\) from any other source)?", str(no.value))
    assert found is not None
    return int(found[1]), int(found[2] or found[1])


def test_the_least_budget_of_a_source_works_there_and_the_other_everywhere(case: dict[str, Any]) -> None:
    _, least = refused(case["sources"][0], case["dtype"], 1)
    if case["dtype"] is None:
        assert case["planned"] == least
    with torch.no_grad():
        expected = case["resident"](**case["inputs"]).logits
    for source in case["sources"]:
        here, anywhere = refused(source, case["dtype"], least // 4)
        assert here <= anywhere == least
        refused(source, case["dtype"], here - 1)
        with StreamingModel.open(source, memory_budget=here, dtype=case["dtype"]) as model:
            assert model.explain().least_budget_bytes == least
            assert bool(model.plan.streamed) == case["is_streamed"]
            assert model.plan.peak_bytes <= here
            for _ in range(2):
                assert torch.equal(model(**case["inputs"]).logits, expected)


def test_a_budget_of_more_than_there_is_is_taken_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build("gpt2").save_pretrained(tmp_path / "m")
    for budget in ("999TB", "64MB"):
        StreamingModel.open(str(tmp_path / "m"), memory_budget=budget).close()
    (line,) = [one for one in caplog.messages if "budget" in one]
    there = r"(this machine has|the limit in /sys/\S+ is) [0-9.]+ [GT]B"
    assert re.fullmatch(rf"the memory budget of 999\.00 TB is more than there is: {there}; .*", line)
