"""Chunking adapters: errors name the file, what was found, and what to do."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from surfw.chunking import copy_model, prepare_adapter, prepare_model, read_base, write_model
from surfw.errors import CheckpointError, ConfigurationError, NotAStoreError, SurfwError, UnsupportedModelError
from surfw.manifest import Manifest
from surfw.storage import open_backend
from surfw.storage.housekeeping import Housekeeping
from surfw.storage.store_source import StorageSource
from tests.adapters import change_settings, save_adapter
from tests.checkpoints import save_llama

Q = "base_model.model.model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, its adapter, and a store with the base."""
    home = tmp_path_factory.mktemp("home")
    save_llama(home / "base")
    save_adapter(home / "base", home / "lora", r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    with prepare_model(str(home / "base")) as prepared:
        asyncio.run(write_model(prepared, open_backend(home / "store")))
    return home


@pytest.fixture
def adapter(home: Path, tmp_path: Path) -> Path:
    """A copy of the adapter, to be changed."""
    folder = tmp_path / "changed"
    folder.mkdir()
    for file in (home / "lora").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def chunk(adapter: Path, home: Path, **options: Any) -> Manifest:
    backend = open_backend(home / "store")
    with prepare_adapter(str(adapter), asyncio.run(read_base(backend, "base")), backend, **options) as prepared:
        return asyncio.run(write_model(prepared, backend))


def change(work: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def changed(adapter: Path) -> None:
        tensors = load_file(adapter / "adapter_model.safetensors")
        work(tensors)
        save_file(tensors, adapter / "adapter_model.safetensors")

    return changed


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"peft_type": "IA3"}, "is an adapter of the kind 'IA3' (peft_type), and surfw applies 'LORA' alone"),
        ({"use_dora": True}, "has use_dora = 'True': surfw does not compute with that"),
        ({"bias": "all"}, "has bias = 'all': biases of the base were trained with it"),
        (
            {"init_lora_weights": "pissa"},
            "has init_lora_weights = 'pissa': with it, peft changes the weights of the base",
        ),
        ({"target_parameters": ["experts"]}, "has target_parameters = \"['experts']\": surfw does not compute"),
        ({"invented_later": {"x": 1}}, "has invented_later = \"{'x': 1}\": surfw does not compute with that"),
        ({"r": True}, "has r = 'True': it is of another type than peft writes"),
        ({"rank_pattern": {"q_proj": 0}}, "has rank_pattern = \"{'q_proj': 0}\": it is of another type"),
    ],
)
def test_settings_that_ask_for_more_are_refused_by_name(
    adapter: Path, home: Path, settings: dict[str, Any], said: str
) -> None:
    change_settings(adapter, **settings)
    with pytest.raises(UnsupportedModelError) as refused:
        chunk(adapter, home)
    assert str(refused.value).startswith(f"{adapter}/adapter_config.json {said}")
    assert "merge" in str(refused.value)


@pytest.mark.parametrize(
    ("work", "said"),
    [
        (lambda t: t.pop(f"{Q}.lora_B.weight"), "'model.layers.1.self_attn.q_proj.lora_A.weight' stands alone"),
        (
            lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(4, 32)}),
            "'model.layers.1.self_attn.q_proj.lora_A.weight' has shape (4, 32), expected (4, 64)",
        ),
        (
            lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.zeros(64)}),
            "'model.layers.1.self_attn.q_proj.lora_magnitude_vector' is neither a part of a low-rank product",
        ),
        (
            lambda t: t.update({"base_model.model.model.layers.9.x.lora_A.weight": torch.zeros(4, 64)}),
            "'model.layers.9.x.lora_A.weight' has no module there (base: LlamaForCausalLM)",
        ),
        (
            lambda t: t.update({"base_model.model.model.norm.lora_A.weight": torch.zeros(4, 64)}),
            "'model.norm.lora_A.weight' changes a LlamaRMSNorm, which surfw does not apply an adapter to",
        ),
        (
            lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(303, 64)}),
            "'lm_head.weight' has shape (303, 64), expected (300, 64): the base was resized for it",
        ),
        (
            lambda t: t.update({"base_model.model.model.embed_tokens.weight": torch.zeros(300, 64)}),
            "'base_model.model.model.embed_tokens.weight' of F32 [300, 64], and its base base has other values there",
        ),
        (
            lambda t: t.update({"lora_A": torch.zeros(1)}),
            "holds 'lora_A', expected names that begin with base_model.model.",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(
    adapter: Path, home: Path, work: Callable[[Any], object], said: str
) -> None:
    change(work)(adapter)
    with pytest.raises(UnsupportedModelError) as refused:
        chunk(adapter, home)
    assert said in str(refused.value)
    assert str(adapter) in str(refused.value)


@pytest.mark.parametrize(
    ("work", "error", "said"),
    [
        (lambda one: change_settings(one, r=8), CheckpointError, "has rank 4, but its settings say 8"),
        (
            lambda one: (one / "adapter_config.json").unlink(),
            CheckpointError,
            "is no adapter: there is no adapter_config",
        ),
        (lambda one: (one / "adapter_config.json").write_text("[]"), CheckpointError, "is not a JSON object"),
        (lambda one: (one / "adapter_model.safetensors").unlink(), CheckpointError, "has no weights of an adapter"),
    ],
)
def test_damaged_folders_are_refused(
    adapter: Path, home: Path, work: Callable[[Path], object], error: type[SurfwError], said: str
) -> None:
    work(adapter)
    with pytest.raises(error) as refused:
        chunk(adapter, home)
    assert said in str(refused.value)


def test_the_base_has_to_be_there_and_a_whole_model(home: Path, tmp_path: Path) -> None:
    with pytest.raises(NotAStoreError, match="is no store yet, so it has no base 'base'"):
        asyncio.run(read_base(open_backend(tmp_path), "base"))
    chunk(home / "lora", home, name="first")
    with pytest.raises(ConfigurationError, match="first is an adapter itself, over base"):
        asyncio.run(read_base(open_backend(home / "store"), "first"))
    with pytest.raises(ConfigurationError, match="would take the name of its base, base"):
        chunk(home / "lora", home, name="base")


def test_a_pickled_adapter_is_the_same_adapter(adapter: Path, home: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    safe = chunk(adapter, home, name="safe")
    torch.save(load_file(weights), adapter / "adapter_model.bin")
    weights.unlink()
    pickled = chunk(adapter, home, name="pickled")
    assert pickled.weights_key == safe.weights_key
    assert json.loads(json.dumps(pickled.config)) == safe.config


def test_a_base_stays_while_adapters_need_it_and_verify_misses_it(home: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"

    async def keep() -> None:
        source = StorageSource(open_backend(home / "store"))
        with pytest.raises(
            ConfigurationError, match=r"lora is an adapter over base, which .* does not have; copy that"
        ):
            await copy_model(source, "lora", open_backend(store))
        for name in ("base", "lora"):
            await copy_model(source, name, open_backend(store))
        await source.close()
        async with Housekeeping(store) as kept:
            listed = {one.name: one.base for one in (await kept.contents()).models}
            assert listed == {"base": None, "lora": "base"}
            with pytest.raises(ConfigurationError, match=r"base is the base of 1 adapter in .*, such as lora; remove"):
                await kept.remove("base")
            assert not (await kept.verify()).damage
            (store / "models" / "base.json").rename(tmp_path / "base.json")
            (missing,) = (await kept.verify("lora")).damage
            assert (missing.model, missing.part, missing.complaint) == ("base", "", "it is missing; lora needs it")
            (store / "models" / "base.json").write_text("{}")
            for name in (None, "lora"):  # one damage, of the base, whether it is verified itself or not
                (damaged,) = (await kept.verify(name)).damage
                assert (damaged.model, damaged.part) == ("base", "")
                assert "model base is not valid" in damaged.complaint
            (tmp_path / "base.json").rename(store / "models" / "base.json")
            await kept.remove("lora")
            await kept.remove("base")
            assert (await kept.prune()).blobs > 0
            assert not (await kept.contents()).stored_bytes

    chunk(home / "lora", home)
    asyncio.run(keep())
