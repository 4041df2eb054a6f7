"""Quantised experts are packed in memory, give the same bits at every budget, and match the quantised values."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from surfw import ModelChunker
from surfw.chunking import prepare_model, write_model
from surfw.chunking.copy import copy_model
from surfw.codec import exact_forms, for_run
from surfw.errors import ConfigurationError, ManifestError
from surfw.manifest import Manifest
from surfw.metrics import Metrics
from surfw.models import StreamingModel
from surfw.models.assembly import model_needs
from surfw.models.client import WeightClient
from surfw.runtime.experts import ExpertPool
from surfw.runtime.loader import Loader
from surfw.runtime.plan import Limit, plan_residency
from surfw.storage import open_backend
from tests.exactness.families import MIXTURES, VOCABULARY, Family
from tests.exactness.test_families import assert_equal, inputs, outputs
from tests.servers import serve

WIDER = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64}
"""Wide enough that both matrices of an expert are quantised."""
IDS = torch.arange(3, VOCABULARY)[None, :40]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home per test, so that no test uses the expert usage saved by another."""
    monkeypatch.setenv("SURFW_HOME", str(tmp_path / "home"))


def save(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Save a family's checkpoint, and return the model."""
    torch.manual_seed(0)
    model = Family(MIXTURES[name].class_name, dict(MIXTURES[name].settings) | WIDER).build().to(dtype)
    model.save_pretrained(folder)
    return getattr(transformers, MIXTURES[name].class_name).from_pretrained(folder)


def chunk(folder: Path, store: Path, *codecs: str, name: str = "mixed") -> Manifest:
    with prepare_model(str(folder), name=name) as prepared:
        return asyncio.run(write_model(prepared, open_backend(store), codecs=codecs))


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize(("name", "codec"), [("qwen3-moe", "int4"), ("granite-moe", "int8")])
def test_products_are_those_of_the_values(name: str, codec: Any, implementation: str, tmp_path: Path) -> None:
    resident = save(name, tmp_path / name)
    manifest = chunk(tmp_path / name, tmp_path / "store", codec)
    kinds = {form.kinds for one in manifest.chunks if one.kind == "expert" for form in one.forms}
    assert kinds == {(codec, codec)}
    with StreamingModel.open(str(tmp_path / "store"), codec=codec) as streaming:
        for own, parameter in resident.named_parameters():
            parameter.copy_(streaming.model.get_parameter(own) + 0)
        for model in (resident, streaming.model):
            model.set_experts_implementation(implementation)
        torch.testing.assert_close(
            streaming(input_ids=IDS).logits, resident(input_ids=IDS).logits, rtol=1e-4, atol=1e-5
        )


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "codec", "dtype"),
    [("qwen3-moe", "int4", torch.float32), ("olmoe", "int8", torch.bfloat16), ("deepseek-v3", "int4", torch.bfloat16)],
)
def test_bits_are_the_same_at_every_budget_and_from_everywhere(
    name: str, codec: Any, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = save(name, tmp_path / name, dtype)
    manifest = chunk(tmp_path / name, tmp_path / "store", "none", codec)
    with StreamingModel.open(str(tmp_path / "store"), codec=codec) as streaming:
        expected = [outputs(streaming, inputs(model, batch)) for batch in (1, 2)]
        least = streaming.explain(prompt_tokens=32).least_budget_bytes + 100_000
        assert streaming.plan.everything_fits
        kept = streaming.plan.expert_bytes
    assert kept < sum(one.payload_bytes for one in manifest.chunks if one.kind == "expert")
    with serve(tmp_path / "store") as served:
        for source, options in (
            (str(tmp_path / "store"), {"memory_budget": least}),
            (served.url, {"memory_budget": least}),
            (served.url, {"device": "simulated", "cache_size": 1}),
        ):
            with StreamingModel.open(source, codec=codec, **options) as streaming:
                for batch, want in zip((1, 2), expected, strict=True):
                    if "device" in options and dtype is torch.bfloat16:
                        continue  # the CPU's kernels need its own memory
                    assert_equal(outputs(streaming, inputs(model, batch)), want, f"{source}, {options}, batch {batch}")


@torch.no_grad()
def test_experts_alone_are_quantised_and_the_rest_keeps_its_bits(tmp_path: Path) -> None:
    resident = save("qwen3-moe", tmp_path / "model")
    store = tmp_path / "store"
    info = ModelChunker(
        tmp_path / "model", store, name="mixed", codecs=("none", "int4"), quantize="experts"
    ).chunk_model_sync()
    with StreamingModel.open(str(store), info.name, codec="int4") as streaming:
        packed = {one.name for one in streaming.manifest.chunks if any(form.is_packed for form in one.forms)}
        assert packed == {one.name for one in streaming.manifest.chunks if one.kind == "expert"}
        for own, parameter in resident.named_parameters():
            assert torch.equal(streaming.model.get_parameter(own) + 0, parameter) is ("experts" not in own), own
        expected = streaming(input_ids=IDS).logits
    assert not torch.equal(expected, resident(input_ids=IDS).logits)
    with StreamingModel.open(str(store), info.name) as streaming:
        assert torch.equal(streaming(input_ids=IDS).logits, resident(input_ids=IDS).logits), "the exact form is there"
    chunk(tmp_path / "model", tmp_path / "exact", "none")
    with WeightClient(str(tmp_path / "exact")) as client:
        client.run(
            lambda source: copy_model(
                source, "mixed", open_backend(tmp_path / "copy"), codecs=("int4",), only_experts=True
            )
        )
    with StreamingModel.open(str(tmp_path / "copy")) as streaming:
        assert torch.equal(streaming(input_ids=IDS).logits, expected), "a copy is quantised as a checkpoint"


def test_a_model_without_experts_has_none_to_be_quantised(tmp_path: Path) -> None:
    save("gpt-oss", tmp_path / "model")
    chunker = ModelChunker(tmp_path / "model", tmp_path / "store", codecs=("int4",), quantize="experts")
    with pytest.raises(ConfigurationError, match="model has no experts that can be quantised"):
        chunker.chunk_model_sync()
    for wrong, said in (
        ({"codecs": ("none",), "quantize": "experts"}, "name one of"),
        ({"quantize": "most"}, "'most'"),
    ):
        with pytest.raises(ConfigurationError, match=said):
            ModelChunker(tmp_path / "model", tmp_path / "store", **wrong)


def test_experts_that_are_not_quantised_alike_are_refused(tmp_path: Path) -> None:
    save("qwen3-moe", tmp_path / "model")
    manifest = chunk(tmp_path / "model", tmp_path / "store", "none", "int4")
    run = for_run(manifest, "int4", where=str(tmp_path))
    third = next(one for one in run.chunks if one.name.endswith("experts[2]"))
    mixed = replace(
        run,
        chunks=tuple(
            replace(one, forms=exact_forms(manifest.by_name[one.name])) if one is third else one for one in run.chunks
        ),
    )
    plan = plan_residency(model_needs(mixed, {}, {}), Limit())
    with WeightClient(str(tmp_path / "store")) as client, pytest.raises(ManifestError, match="not all quantised alike"):
        ExpertPool(mixed, Loader(client.source, mixed), io=client.io, metrics=Metrics(), plan=plan)
