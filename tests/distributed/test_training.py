"""A model streamed into FSDP2 trains like the resident one, and what ranks save of it can be chunked directly."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from surfw import ModelChunker, WeightClient
from surfw.manifest import Manifest
from tests.cli.run import surfw
from tests.distributed.job import STEPS, run_jobs
from tests.exactness.families import FAMILIES

MODELS = ("llama", "llama-tied", "gpt2")
TRAINED = [("llama", "fsdp"), ("llama-tied", "fsdp"), ("gpt2", "fsdp"), ("llama", "mixed"), ("gpt2", "frozen")]
"""Models by placement: with a policy of mixed precision, and with frozen embeddings."""
SAVED = {
    2: [
        ("llama", "fsdp", "model"), ("llama-tied", "fsdp", "app"), ("llama", "tp", "model"),
        ("llama", "fsdp", "safetensors"),
    ],
    4: [
        ("gpt2", "fsdp", "model"), ("llama", "fsdp and tp", "app"), ("llama", "fsdp by columns", "model"),
        ("llama", "fsdp by columns", "safetensors"),
    ],
}  # fmt: skip
"""Models, placements, and how they are saved: the tables in a checkpoint, or safetensors files; by ranks."""
NAMES = [
    "-".join((*case, str(ranks))).replace(" ", "-") for ranks, cases in SAVED.items() for case in cases
]  # fmt: skip
JOBS: list[dict[str, Any]] = [
    {"ranks": 2, "cases": [{"kind": "trained", "model": model, "placement": how} for model, how in TRAINED]},
    *(
        {"ranks": ranks, "cases": [
            {"kind": "saved", "model": model, "placement": how, "form": form,
             "name": f"{model}-{how}-{form}-{ranks}".replace(" ", "-")} for model, how, form in cases
        ]} for ranks, cases in SAVED.items()
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small models, and a store of each."""
    made = tmp_path_factory.mktemp("training")
    for name in MODELS:
        torch.manual_seed(0)
        FAMILIES[name].build().save_pretrained(made / name)
        ModelChunker(made / name, made / "stores" / name).chunk_model_sync()
    return made


@pytest.fixture(scope="module")
def results(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[list[dict[str, Any]]]]:
    """The results of the ranks of each job, case by case."""
    return run_jobs(JOBS, folder, tmp_path_factory.mktemp("results"))


@pytest.mark.parametrize("at", range(len(TRAINED)), ids=["-".join(case) for case in TRAINED])
def test_losses_fall_and_are_those_of_the_resident_model(results: Any, at: int) -> None:
    for seen in results[0][at]:
        assert seen.get("trace") is None, seen["trace"]
        assert len(seen["losses"]) == STEPS
        assert seen["losses"] == seen["right"]
        assert seen["names"]
        assert seen["wrong"] == []
        assert seen["unchanged"] == (["transformer.wte.weight"] if seen["placement"] == "frozen" else [])
        assert seen["losses"][-1] < 0.8 * seen["losses"][0]
        tolerance = 5e-3 if seen["placement"] == "mixed" else 1e-5  # it computes in bfloat16, a single process does not
        assert seen["losses"] == pytest.approx(seen["alone"], rel=tolerance)


def manifest_of(store: Path, name: str) -> Manifest:
    with WeightClient(store) as client:
        return client.run(lambda source: source.manifest(name))


@pytest.mark.parametrize("name", NAMES)
def test_what_ranks_saved_is_chunked_as_what_save_pretrained_saved(
    results: Any, folder: Path, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert all(seen.get("trace") is None for job in results[1:] for case in job for seen in case)
    saved, plain, store = folder / "saved" / name, folder / "saved" / f"{name}-plain", tmp_path / "store"
    ModelChunker(saved, store, config_from=plain).chunk_model_sync()
    ModelChunker(plain, store).chunk_model_sync()
    found, expected = manifest_of(store, name), manifest_of(store, f"{name}-plain")
    assert [chunk.id for chunk in found.chunks] == [chunk.id for chunk in expected.chunks]
    assert (found.ties, found.order, found.config) == (expected.ties, expected.order, expected.config)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_the_command_says_what_is_missing_and_takes_it(results: Any, folder: Path, tmp_path: Path) -> None:
    saved, store = folder / "saved" / NAMES[0], str(tmp_path / "store")
    done = surfw(tmp_path, "chunk", str(saved), "--store", store)
    assert done.returncode == 1
    said = " ".join(done.stderr.split())
    assert said == (
        f"surfw: error: {saved} has weights that torch.distributed.checkpoint saved, and no config.json; name the "
        "folder that has the model's, and its tokenizer: --config-from FOLDER"
    )
    done = surfw(tmp_path, "chunk", str(saved), "--store", store, "--config-from", str(folder / "llama"), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"] == NAMES[0]
    done = surfw(tmp_path, "infer", "--source", store, "--prompt-ids", "1,2,3", "--max-new-tokens", "3")
    assert done.returncode == 0, done.stderr
