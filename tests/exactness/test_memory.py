"""With any memory budget and use of memory, the bits are those of the resident model."""

import asyncio
import bisect
import copy
import inspect
import itertools
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from surfw.chunking import prepare_model, write_model
from surfw.config import MIB, Policy
from surfw.errors import ConfigurationError
from surfw.models import StreamingModel, WeightClient, assembly
from surfw.runtime.kv_cache import kv_cost
from surfw.runtime.plan import Limit
from surfw.storage import open_backend
from tests.exactness.families import Family
from tests.servers import serve

ROWS, WIDTH = 16384, 64
"""A table takes 4.2 MB, or 2.1 in bfloat16; a layer takes at least 2 MB."""
PROMPT, NEW_TOKENS = 9, 8
_PLAIN = {
    "hidden_size": WIDTH, "intermediate_size": 4096, "num_hidden_layers": 4, "num_attention_heads": 4,
    "vocab_size": ROWS, "max_position_embeddings": 128,
}  # fmt: skip
_GROUPED = _PLAIN | {"num_key_value_heads": 2}
FAMILIES = {
    "llama": Family("LlamaForCausalLM", _GROUPED | {"tie_word_embeddings": False}),
    "gpt2-tied": Family(
        "GPT2LMHeadModel", {"n_embd": WIDTH, "n_layer": 4, "n_head": 4, "n_inner": 4096, "vocab_size": ROWS,
         "n_positions": 128}
    ),
    "bert": Family("BertForMaskedLM", _PLAIN),
    "t5": Family(
        "T5ForConditionalGeneration",
        {
            "num_layers": 3, "d_model": WIDTH, "d_kv": 16, "d_ff": 4096, "num_heads": 4, "vocab_size": ROWS,
            "decoder_start_token_id": 0,
        },
    ),
    "gemma2-tied": Family("Gemma2ForCausalLM", _GROUPED | {"head_dim": 16}),
    "mixtral-experts": Family("MixtralForCausalLM", _GROUPED | {"num_local_experts": 4}),
}  # fmt: skip
GREEDY = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "num_beams": 1, "eos_token_id": None, "pad_token_id": 0}
BUDGETS = ("least", "middle", "everything but a byte", "everything")


@dataclass(frozen=True)
class Setting:
    """How a model is run."""

    budget: str
    policy: Policy
    prefetch: bool
    source: str
    dtype: str | None

    def __str__(self) -> str:
        ahead = "ahead" if self.prefetch else "late"
        return f"{self.budget}, {self.policy}, {ahead}, {self.source}, {self.dtype}"


def settings() -> Iterator[Setting]:
    """Eight settings that include all pairs of values of any two parameters: an orthogonal array of strength two."""
    for budget, bits in zip(BUDGETS, (0b0000, 0b0011, 0b0101, 0b0110), strict=True):
        for turned in (0b0000, 0b1111):
            policy, prefetch, source, dtype = (bool((bits ^ turned) >> place & 1) for place in (3, 2, 1, 0))
            yield Setting(
                budget,
                "lru" if policy else "auto",
                not prefetch,
                "server" if source else "folder",
                "bfloat16" if dtype else None,
            )


def test_every_two_values_meet() -> None:
    values = [(one.budget, one.policy, one.prefetch, one.source, one.dtype) for one in settings()]
    for first, second in itertools.combinations(range(5), 2):
        met = {(value[first], value[second]) for value in values}
        assert len(met) == len({value[first] for value in values}) * len({value[second] for value in values})


@dataclass
class Place:
    """A store with all families, and its server; the resident models' results are computed once."""

    store: Path
    checkpoints: Path
    server: str
    residents: dict[tuple[str, str | None], Any] = field(default_factory=dict)
    expected: dict[tuple[str, str | None], dict[str, torch.Tensor]] = field(default_factory=dict)
    bounds: dict[tuple[str, str, str | None], tuple[int, int]] = field(default_factory=dict)

    def resident(self, name: str, dtype: str | None) -> Any:
        if (name, dtype) not in self.residents:
            cls = getattr(transformers, FAMILIES[name].class_name)
            model = cls.from_pretrained(self.checkpoints / name, dtype=dtype or "auto")
            self.residents[name, dtype] = copy.deepcopy(model)
        return self.residents[name, dtype]

    def outputs(self, name: str, dtype: str | None) -> dict[str, torch.Tensor]:
        if (name, dtype) not in self.expected:
            self.expected[name, dtype] = outputs(self.resident(name, dtype), self.resident(name, dtype))
        return self.expected[name, dtype]

    def open(self, name: str, budget: int, setting: Setting) -> StreamingModel:
        source = self.server if setting.source == "server" else self.store
        return StreamingModel.open(
            source, name, memory_budget=budget, policy=setting.policy, prefetch=setting.prefetch, dtype=setting.dtype
        )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("memory")
    for name, family in FAMILIES.items():
        torch.manual_seed(0)
        family.build().save_pretrained(folder / "checkpoints" / name)
        prepared = prepare_model(str(folder / "checkpoints" / name), name=name)
        asyncio.run(write_model(prepared, open_backend(folder / "store")))
    with serve(folder / "store") as served:
        yield Place(folder / "store", folder / "checkpoints", served.url)


@pytest.fixture(autouse=True)
def _few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set little memory for rows, so that tables of a few MB are read row by row."""
    monkeypatch.setattr(assembly, "ROWS_BYTES", MIB)


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("surfw")] == []


def prompt(rows: int) -> torch.Tensor:
    """Seeded token ids of shape (rows, 9)."""
    return torch.randint(3, ROWS, (rows, PROMPT), generator=torch.Generator().manual_seed(rows))


@torch.no_grad()
def outputs(model: Any, inner: Any) -> dict[str, torch.Tensor]:
    """Logits of one prompt and of three; of their last two positions alone; and greedy tokens."""
    found = {}
    for rows in (1, 3):
        more = {"decoder_input_ids": prompt(rows)[:, :4]} if inner.config.is_encoder_decoder else {}
        found[f"logits of {rows}"] = model(input_ids=prompt(rows), **more).logits
        if "logits_to_keep" in inspect.signature(inner.forward).parameters:
            found[f"last logits of {rows}"] = model(input_ids=prompt(rows), logits_to_keep=2).logits
        if inner.can_generate():
            found[f"tokens of {rows}"] = model.generate(prompt(rows), **GREEDY)
    return found


def assert_equal(seen: Mapping[str, torch.Tensor], want: Mapping[str, torch.Tensor]) -> None:
    assert seen.keys() == want.keys()
    for key in want:
        assert seen[key].dtype == want[key].dtype
        assert torch.equal(seen[key], want[key]), f"{key} differ"


def cache_bytes(model: Any) -> int:
    """The bytes of the KV cache of the largest generation here."""
    if not model.can_generate():
        return 0
    return kv_cost(model.config, model.dtype).total_bytes(PROMPT, NEW_TOKENS, sequences=3)


def runs_with(model: StreamingModel, budget: int) -> bool:
    """Whether an open model has a plan for this many bytes."""
    assert model._parts is not None
    try:
        model._parts.engine.plan_with(Limit(budget_bytes=budget))
    except ConfigurationError:
        return False
    return True


def budget_of(place: Place, name: str, setting: Setting) -> int:
    """The budget in bytes, which includes the KV cache in addition to the weights."""
    key = (name, setting.source, setting.dtype)
    if key not in place.bounds:
        with place.open(name, 10**9, setting) as model:
            everything = model.plan.peak_bytes
            least = bisect.bisect_left(range(everything), 1, key=lambda budget: runs_with(model, budget))
            place.bounds[key] = least, everything
        with pytest.raises(ConfigurationError, match=r"needs .* at least") as caught:
            place.open(name, least - 1, setting)
        (told,) = map(int, re.findall(r"\((\d+) bytes\) at least", str(caught.value)))
        assert told == least
    least, everything = place.bounds[key]
    assert least < everything
    sizes = dict(zip(BUDGETS, (least, (least + everything) // 2, everything - 1, everything), strict=True))
    return sizes[setting.budget] + cache_bytes(place.resident(name, setting.dtype))


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        pytest.param(name, setting, id=f"{name}, {setting}")
        for name in FAMILIES
        for setting in list(settings())[:: 1 if name in {"llama", "t5"} else 2]
    ],
)
def test_every_setting_gives_the_bits_of_the_resident_model(
    name: str, setting: Setting, place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    want = place.outputs(name, setting.dtype)
    budget = budget_of(place, name, setting)
    caplog.clear()
    with place.open(name, budget, setting) as model:
        over: list[int] = []

        def look(*_: Any) -> None:
            plan = model.plan
            held = model.statistics()["cache"]["resident_bytes"] + plan.overhead_bytes + plan.reserved_bytes
            over.extend([held - budget] if held > budget else [])

        for module in model.model.modules():
            module.register_forward_hook(look)
        assert_equal(outputs(model, model.model), want)
        assert over == []
        assert model.plan.everything_fits is (setting.budget == "everything")
        assert model.plan.tables or setting.budget != "least"
        more = {"decoder_input_ids": prompt(3)[:, :4]} if model.model.config.is_encoder_decoder else {}
        assert torch.equal(model(input_ids=prompt(3), **more).logits, want["logits of 3"])
    assert [record.message for record in caplog.records if "LRU" not in record.message] == []


TIGHT = Setting("least", "auto", True, "folder", None)


def tight_budget(place: Place, name: str, sequences: int, setting: Setting = TIGHT) -> int:
    """The smallest budget, with the KV cache of this many sequences."""
    model = place.resident(name, None)
    cache = kv_cost(model.config, model.dtype).total_bytes(PROMPT, NEW_TOKENS, sequences=sequences)
    return budget_of(place, name, setting) - cache_bytes(model) + cache


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize(
    ("options", "sequences"),
    [({"num_beams": 3}, 3), ({"num_beams": 3, "num_return_sequences": 2}, 3), ({"do_sample": True, "top_k": 50,
      "num_return_sequences": 3}, 3)],
    ids=["beams", "several of the beams", "several samples"],
)  # fmt: skip
def test_beams_and_several_sequences_in_the_least_memory(
    name: str, options: dict[str, Any], sequences: int, place: Place
) -> None:
    wanted = GREEDY | options
    with place.open(name, tight_budget(place, name, sequences), TIGHT) as model:
        for _ in range(2):  # the second generation starts from the first one's state
            torch.manual_seed(1)
            expected = place.resident(name, None).generate(prompt(1), **wanted)
            torch.manual_seed(1)
            assert torch.equal(model.generate(prompt(1), **wanted), expected)


def test_two_models_over_one_client_in_turn(place: Place) -> None:
    names, served = ("gemma2-tied", "mixtral-experts"), replace(TIGHT, source="server")
    budgets = [tight_budget(place, name, 1, served) for name in names]
    with WeightClient(place.server) as client, ExitStack() as models_open:
        models = [
            models_open.enter_context(StreamingModel.open(client, name, memory_budget=budget))
            for name, budget in zip(names, budgets, strict=True)
        ]
        for _ in range(2):
            for name, model in zip(names, models, strict=True):
                expected = place.outputs(name, None)["tokens of 1"]
                assert torch.equal(model.generate(prompt(1), **GREEDY), expected)


def test_the_cache_size_set_between_two_generations_changes_no_bit(place: Place) -> None:
    expected = place.outputs("llama", None)
    with place.open("llama", tight_budget(place, "llama", sequences=1), TIGHT) as model:
        assert torch.equal(model.generate(prompt(1), **GREEDY), expected["tokens of 1"])
        for layers in (1, 3, 100, 2):
            model.cache_size = layers
            assert model.plan.everything_fits is (layers == 100)
            assert torch.equal(model.generate(prompt(1), **GREEDY), expected["tokens of 1"])
            assert torch.equal(model(prompt(3), logits_to_keep=2).logits, expected["last logits of 3"])
