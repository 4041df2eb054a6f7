"""Adapters give the bits of peft over the resident model, and no part of the base is read or stored twice."""

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from surfw import StreamingModel
from surfw.chunking import prepare_adapter, prepare_model, read_base, write_model
from surfw.errors import ConfigurationError, ManifestError, UnknownModelError
from surfw.manifest import Manifest
from surfw.models.conversation import Conversation
from surfw.runtime.buffers import buffer_capacity
from surfw.runtime.memory import claimed_bytes
from surfw.runtime.plan import least_bytes
from surfw.storage import open_backend
from tests.adapters import save_adapter, with_peft
from tests.checkpoints import resident, save_bert, save_llama
from tests.servers import serve

IDS = torch.tensor([[5, 9, 70, 3, 41, 8], [1, 2, 3, 4, 5, 6]])
HEADER_BYTES = 4096
"""The header before a payload in its blob."""

THREE = {
    "a": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "b": {
        "r": 8, "use_rslora": True, "target_modules": ["q_proj", "down_proj"], "modules_to_save": ["lm_head"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"down_proj": 5},
    },
    "c": {"r": 4, "target_modules": ["embed_tokens", "k_proj", "lm_head"], "lora_dropout": 0.1, "lora_bias": False},
}  # fmt: skip


def chunk(checkpoint: Path, store: Path, **options: Any) -> Manifest:
    with prepare_model(str(checkpoint), **options) as prepared:
        return asyncio.run(write_model(prepared, open_backend(store)))


def chunk_adapter(adapter: Path, store: Path, base: str) -> Manifest:
    backend = open_backend(store)
    with prepare_adapter(str(adapter), asyncio.run(read_base(backend, base)), backend) as prepared:
        return asyncio.run(write_model(prepared, backend))


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits
    return found


def stored_bytes(store: Path) -> int:
    return sum(file.stat().st_size for file in (store / "blobs").rglob("*") if file.is_file())


class Place:
    """A folder of checkpoints and adapters, and a store with all of them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.store = folder, folder / "store"
        save_llama(folder / "llama")
        chunk(folder / "llama", self.store)
        self.chunks: dict[str, int] = {}
        self.grown: dict[str, tuple[int, int]] = {}
        for seed, (name, settings) in enumerate(THREE.items(), 1):
            save_adapter(folder / "llama", folder / name, seed=seed, **settings)
            before = stored_bytes(self.store)
            manifest = chunk_adapter(folder / name, self.store, "llama")
            self.chunks[name] = len(manifest.chunks)
            self.grown[name] = manifest.payload_bytes, stored_bytes(self.store) - before

    def peft(self, name: str) -> Any:
        return with_peft(self.folder / "llama", self.folder / name)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(params=["store", "server"])
def source(place: Place, request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "store":
        yield str(place.store)
        return
    with serve(place.store) as served:
        yield served.url


def test_adapters_add_their_own_bytes_to_the_store_and_no_more(place: Place) -> None:
    for name, (payload, grown) in place.grown.items():
        assert grown == payload + place.chunks[name] * HEADER_BYTES


def test_switching_gives_pefts_bits_and_reads_no_chunk_of_the_base(place: Place, source: str) -> None:
    plain = resident(place.folder, "llama")
    with StreamingModel.open(source, "llama") as model:
        assert torch.equal(logits(model), logits(plain))
        for name in THREE:
            before = model._client.source.fetched_bytes
            model.set_adapter(name)
            assert model._client.source.fetched_bytes - before == place.grown[name][0]
            assert torch.equal(logits(model), logits(place.peft(name)))
        before = model._client.source.fetched_bytes
        for name in ("a", "c", "a"):
            model.set_adapter(name)
            assert torch.equal(logits(model), logits(place.peft(name)))
        model.set_adapter(None)
        assert torch.equal(logits(model), logits(plain))
        assert model._client.source.fetched_bytes == before
        assert model.adapters == ["a", "b", "c"]
        assert model.adapter is None


@pytest.mark.parametrize(
    ("kind", "dtype", "settings"),
    [
        ("llama", torch.bfloat16, THREE["b"]),
        ("gpt2", torch.float16, {"target_modules": ["c_attn", "wte"], "fan_in_fan_out": True}),
        ("mamba", torch.float32, {"target_modules": ["in_proj", "x_proj"]}),  # its weights are transposed in memory
        ("bert", torch.float32, {"target_modules": ["query", "dense"], "lora_bias": True, "modules_to_save": ["cls"]}),
    ],
)
def test_families_and_dtypes_have_pefts_bits_where_layers_are_streamed(
    tmp_path: Path, kind: str, dtype: torch.dtype, settings: dict[str, Any]
) -> None:
    base = tmp_path / kind
    if kind == "gpt2":
        torch.manual_seed(3)
        config = transformers.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=32)
        transformers.GPT2LMHeadModel(config).save_pretrained(base)
    elif kind == "mamba":
        torch.manual_seed(3)
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "vocab_size": 96}
        transformers.MambaForCausalLM(transformers.MambaConfig(**sizes)).save_pretrained(base)
    else:
        (save_llama if kind == "llama" else save_bert)(base)
    if dtype != torch.float32:
        resident(tmp_path, kind).to(dtype).save_pretrained(base)
    save_adapter(base, tmp_path / "adapter", **settings)
    chunk(base, tmp_path / "store")
    chunk_adapter(tmp_path / "adapter", tmp_path / "store", kind)
    ours = StreamingModel.open(tmp_path / "store", kind, adapter="adapter", cache_size=1)
    with ours as model:
        found = logits(model)
    assert torch.equal(found, logits(with_peft(base, tmp_path / "adapter")))
    assert not torch.equal(found, logits(resident(tmp_path, kind, dtype="auto")))


def test_an_adapters_name_opens_its_base_with_it(place: Place) -> None:
    with StreamingModel.open(place.store, "a") as model:
        assert (model.adapter, model.manifest.name) == ("a", "llama")
        found = model.generate(IDS[:1], max_new_tokens=6, do_sample=False)
    expected = place.peft("a").generate(input_ids=IDS[:1], max_new_tokens=6, do_sample=False)
    assert torch.equal(found, expected)
    with pytest.raises(ConfigurationError, match="a is an adapter over llama already"):
        StreamingModel.open(place.store, "a", adapter="b")


def test_the_budget_counts_adapters_and_one_that_does_not_fit_changes_nothing(place: Place) -> None:
    with StreamingModel.open(place.store, "llama") as model:
        peak, least = model.plan.peak_bytes, least_bytes(model._engine.needs.in_pieces())
        shown = model._engine.least_budget_bytes
        model.load_adapter("c")
        held = model._parts.adapters.held_bytes  # type: ignore[union-attr]
        assert held >= place.grown["c"][0]
        assert model.plan.peak_bytes == peak + held
        assert model._engine.least_budget_bytes == shown + held
        model.unload_adapter("c")
        assert model.plan.peak_bytes == peak
    with StreamingModel.open(place.store, "llama", memory_budget=least) as model:
        with pytest.raises(ConfigurationError, match=r"the adapter c does not fit: .*budget"):
            model.set_adapter("c")
        assert (model.adapters, model.adapter) == ([], None)
        assert torch.equal(logits(model), logits(resident(place.folder, "llama")))
    with pytest.raises(ConfigurationError, match="does not fit"):
        StreamingModel.open(place.store, "llama", memory_budget=least, adapter="c")
    with StreamingModel.open(place.store, "llama", memory_budget=least + held, adapter="c") as model:
        assert torch.equal(logits(model), logits(place.peft("c")))


def test_nothing_of_an_adapter_remains_on_the_model(place: Place) -> None:
    with StreamingModel.open(place.store, "llama", adapter="b") as model:
        inner = model.model
        assert any("forward" in vars(module) for module in inner.modules())
        logits(model)
    assert not any("forward" in vars(module) for module in inner.modules())
    assert all(parameter.is_meta for parameter in inner.parameters())


def test_what_is_no_adapter_or_not_there_is_refused(place: Place) -> None:
    with StreamingModel.open(place.store, "llama") as model:
        with pytest.raises(ConfigurationError, match="llama is a whole model, and no adapter; "):
            model.set_adapter("llama")
        with pytest.raises(UnknownModelError, match="no model 'nothing'"):
            model.set_adapter("nothing")
        with pytest.raises(ConfigurationError, match="no adapter 'a' is loaded, but none"):
            model.unload_adapter("a")


def test_an_adapter_is_not_applied_to_other_weights_than_its_own(tmp_path: Path) -> None:
    save_llama(tmp_path / "base")
    save_adapter(tmp_path / "base", tmp_path / "lora", target_modules=["q_proj"])
    chunk(tmp_path / "base", tmp_path / "store")
    chunk_adapter(tmp_path / "lora", tmp_path / "store", "base")
    save_llama(tmp_path / "base", seed=1)
    chunk(tmp_path / "base", tmp_path / "store")
    for name, adapter in (("lora", None), ("base", "lora")):
        with pytest.raises(ManifestError, match="lora belongs to base with other weights than base has"):
            StreamingModel.open(tmp_path / "store", name, adapter=adapter)


def test_the_advice_about_an_adapter_names_the_base_that_is_meant(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "other")):
        save_llama(tmp_path / name, seed=seed)
        chunk(tmp_path / name, tmp_path / "store")
    save_adapter(tmp_path / "base", tmp_path / "lora", target_modules=["q_proj"])
    chunk_adapter(tmp_path / "lora", tmp_path / "store", "base")
    with (
        StreamingModel.open(tmp_path / "store", "base") as model,
        pytest.raises(ConfigurationError, match=r"other is a whole model, and no adapter; .* --base base makes"),
    ):
        model.set_adapter("other")
    said = r"belongs to base, and not to other; give base as the model .* --base other"
    with pytest.raises(ManifestError, match=said):
        StreamingModel.open(tmp_path / "store", "other", adapter="lora")


def test_an_adapters_own_tokenizer_is_used_while_it_is_applied(tmp_path: Path) -> None:
    save_llama(tmp_path / "base")
    save_adapter(tmp_path / "base", tmp_path / "lora", target_modules=["q_proj"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "base")
    tokenizer.chat_template = "the adapter's"
    tokenizer.save_pretrained(tmp_path / "lora")
    chunk(tmp_path / "base", tmp_path / "store")
    chunk_adapter(tmp_path / "lora", tmp_path / "store", "base")
    with StreamingModel.open(tmp_path / "store", "base") as model:
        assert model.tokenizer.chat_template is None
        model.set_adapter("lora")
        assert model.tokenizer.chat_template == "the adapter's"
        model.set_adapter(None)
        assert model.tokenizer.chat_template is None


def test_a_conversation_reads_all_again_with_another_adapter(place: Place) -> None:
    with StreamingModel.open(place.store, "llama") as model:
        conversation = Conversation(model, max_new_tokens=3)
        conversation.ask("one")
        assert conversation.ask("two").cached_tokens > 0
        model.set_adapter("a")
        turn = conversation.ask("three")
        assert turn.cached_tokens == 0
        assert conversation.ask("four").cached_tokens > 0


def test_memory_grows_by_the_adapters_only(tmp_path: Path) -> None:
    """Twenty adapters over one base: switched in turn, loaded into one model, and in twenty open models."""
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
    save_llama(tmp_path / "base", hidden=256)
    store, names = tmp_path / "store", [f"adapter-{index}" for index in range(20)]
    base_bytes = chunk(tmp_path / "base", store).payload_bytes
    expected, adapter_bytes = {}, 0
    for seed, name in enumerate(names):
        save_adapter(tmp_path / "base", tmp_path / name, seed=seed, **settings)
        adapter_bytes = chunk_adapter(tmp_path / name, store, "base").payload_bytes  # each of the same size
        if seed in {0, 19}:
            expected[name] = logits(with_peft(tmp_path / "base", tmp_path / name))
    most = base_bytes + 7 * 2 * 4096  # each chunk is mapped with its header, in whole pages
    with StreamingModel.open(store, "base", memory_budget="1GB") as model:
        logits(model)
        for name in names:
            before = model._client.source.fetched_bytes
            model.switch(name)
            found = logits(model)
            assert model._client.source.fetched_bytes - before == adapter_bytes
            assert base_bytes <= mapped_bytes(store) <= most
            assert torch.equal(found, expected.get(name, found))
        for name in names:
            model.load_adapter(name)
        assert model._client.source.fetched_bytes == base_bytes + 39 * adapter_bytes  # the last one was loaded
        rounded = buffer_capacity(adapter_bytes // 4) * 4  # a chunk for each layer
        assert model._open_here().adapters.held_bytes == 20 * rounded
        assert model._open_here().claim.open_bytes + 20 * rounded == model._engine.claimed_bytes
    with contextlib.ExitStack() as opened:
        models = [opened.enter_context(StreamingModel.open(store, name)) for name in names]
        for name, one in zip(names, models, strict=True):
            found = logits(one)
            assert torch.equal(found, expected.get(name, found))
            assert one.plan.everything_fits
            assert base_bytes <= mapped_bytes(store) <= most
            assert one._engine.resident_bytes >= base_bytes, "each counts the base in its own budget"
        claims = [one._open_here().claim for one in models]
        assert sum(claim.open_bytes for claim in claims) >= 20 * base_bytes
        assert claimed_bytes() <= sum(claim.open_bytes for claim in claims) - 19 * base_bytes
    assert mapped_bytes(store) == 0


def mapped_bytes(store: Path) -> int:
    """How many bytes of a store's files this process has mapped."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    spans = [line.split()[0].split("-") for line in lines if str(store) in line]
    return sum(int(stop, 16) - int(start, 16) for start, stop in spans)
