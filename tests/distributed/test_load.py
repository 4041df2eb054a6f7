"""Streamed models placed over several ranks have the weights and results of the resident model."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from surfw import ModelChunker, WeightClient
from surfw.config import BLOCK_BYTES
from tests.checkpoints import save_llama
from tests.cli.run import surfw
from tests.distributed.job import run_jobs
from tests.exactness.families import FAMILIES

MODELS = ("llama", "llama-tied", "gpt2", "t5")
_FAILING = {"kind": "failing", "model": "large", "timeout": 60, "cache": "kept"}
JOBS: list[dict[str, Any]] = [
    {
        "ranks": 2,
        "cases": [
            *({"model": model, "placement": placement} for model in MODELS for placement in ("fsdp", "tp")),
            *({"kind": "staged", "model": model, "placement": "stages"} for model in MODELS),
            {"model": "llama", "placement": "fsdp by columns"},
        ],
    },
    {
        "ranks": 4,
        "cases": [
            *({"model": model, "placement": "fsdp"} for model in MODELS[1:]),
            *({"model": model, "placement": "tp"} for model in ("gpt2", "t5")),
            {"kind": "staged", "model": "llama", "placement": "stages"},
            {"model": "llama", "placement": "fsdp and tp"},
        ],
    },
    {"ranks": 3, "cases": [_FAILING | {"fault": "killed"}]},
    {"ranks": 3, "cases": [_FAILING | {"fault": ""}]},
    {"ranks": 2, "cases": [_FAILING | {"fault": "damaged", "cache": "damaged"}]},
    {"ranks": 2, "cases": [_FAILING | {"fault": "hangs", "cache": "hangs", "timeout": 1}]},
]
JOBS += [
    {"ranks": ranks, "cases": [{"kind": "pipelined", "model": model} for model in models]}
    for ranks, models in ((2, ("llama-tied", "gemma2", "t5")), (3, ("llama", "gpt2")), (5, ("llama",)))
]
JOBS[-3]["cases"].append({"kind": "pipelined", "model": "llama-tied", "other": "llama"})
KILLED, AGAIN, DAMAGED, HANGS, TWO_STAGES, THREE_STAGES, FIVE_STAGES = range(2, 9)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small models, and a store of each."""
    folder = tmp_path_factory.mktemp("distributed")
    for name in (*MODELS, "gemma2"):
        torch.manual_seed(0)
        FAMILIES[name].build().save_pretrained(folder / name)
        ModelChunker(folder / name, folder / "stores" / name).chunk_model_sync()
    save_llama(folder / "large", hidden=256)
    ModelChunker(folder / "large", folder / "stores" / "large").chunk_model_sync()
    return folder


@pytest.fixture(scope="module")
def results(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[list[dict[str, Any]]]]:
    """The results of the ranks of each job, case by case; a rank that was killed has none."""
    out = tmp_path_factory.mktemp("results")
    return run_jobs(JOBS, checkpoints, out, with_killed=KILLED)


ALL = [
    pytest.param((at, place), id=f"{case['model']} {case['placement']} {job['ranks']}".replace(" ", "-"))
    for at, job in enumerate(JOBS[:KILLED])
    for place, case in enumerate(job["cases"])
]
Case = tuple[int, int]


@pytest.mark.parametrize("case", ALL)
def test_weights_are_those_of_the_resident_model(results: Any, case: Case) -> None:
    for seen in results[case[0]][case[1]]:
        assert seen.get("trace") is None, seen["trace"]
        assert seen["names"]
        assert seen["wrong"] == []


@pytest.mark.parametrize("case", ALL)
def test_logits_are_equal_or_differ_by_a_sum_in_another_order(results: Any, case: Case) -> None:
    """FSDP computes as one process does; with tensor parallelism, ranks add up partial products."""
    for seen in results[case[0]][case[1]]:
        if "tp" in seen["placement"]:
            assert seen["difference"] <= 1e-5 * seen["scale"]
        else:
            assert seen["equal"]


@pytest.mark.parametrize("case", ALL)
def test_ranks_read_together_what_they_hold_and_no_block_twice(results: Any, case: Case, checkpoints: Path) -> None:
    reports = [seen["report"] for seen in results[case[0]][case[1]]]
    model = results[case[0]][case[1]][0]["model"]
    with WeightClient(checkpoints / "stores" / model) as client:
        sizes = [chunk.payload_bytes for chunk in client.run(lambda source: source.manifest(model)).chunks]
    total = sum(sizes)
    assert sum(report["read_bytes"] for report in reports) == total
    assert sum(report["share_bytes"] for report in reports) == pytest.approx(total, abs=len(reports))
    for seen, report in zip(results[case[0]][case[1]], reports, strict=True):
        assert abs(report["read_bytes"] - report["share_bytes"]) <= max(
            sizes
        )  # each is smaller than a block, so it is read whole
        assert report["staging_bytes"] <= 3 * BLOCK_BYTES
        assert (report["rank"], report["ranks"]) == (reports.index(report), len(reports))
        if "stages" not in seen["placement"]:
            assert seen["progress"] == [] if report["rank"] else seen["progress"][-1] == [total, total]


def test_the_others_end_with_one_error_that_names_a_rank_that_was_killed(results: Any) -> None:
    for seen in results[KILLED][0]:
        assert re.fullmatch(
            r"RankError: rank 2 of 3 is gone while reading bytes \d+ of chunk [a-z0-9.]+ to \d+( of chunk [a-z0-9.]+)? "
            r"from far://folder; .+",
            seen["error"],
        )


def test_a_restart_goes_on_from_the_disk_cache(results: Any, checkpoints: Path) -> None:
    again = results[AGAIN][0]
    assert [seen["wrong"] for seen in again] == [[], [], []]
    with WeightClient(checkpoints / "stores" / "large") as client:
        total = client.run(lambda source: source.manifest("large")).payload_bytes
    loaded = sum(seen["loaded_bytes"] for seen in again)
    assert 0 < loaded < total  # the other ranks had kept some, before they heard of the failure


def test_a_rank_whose_bytes_are_damaged_says_so_and_the_others_say_which_rank(results: Any) -> None:
    other, damaged = results[DAMAGED][0]
    assert damaged["error"].startswith("IntegrityError: reading bytes ")
    assert "has BLAKE3" in damaged["error"]
    assert other["error"].startswith("RankError: rank 1 of 2 failed while reading bytes ")
    assert "is damaged: block" in other["error"]


def test_a_rank_that_hangs_is_named_after_the_timeout(results: Any) -> None:
    seen = results[HANGS][0][0]["error"]
    assert seen.startswith("RankError: rank 1 of 2 did not answer within 1 s while reading bytes ")


@pytest.mark.parametrize(("job", "case"), [(TWO_STAGES, 0), (TWO_STAGES, 1), (THREE_STAGES, 0), (THREE_STAGES, 1)])
def test_the_stages_of_a_pipeline_give_the_tokens_of_one_process(results: Any, job: int, case: int) -> None:
    first, *others = results[job][case]
    assert first["answers"] == first["right"]
    layers = [layer for seen in (first, *others) for layer in seen["layers"]]
    assert len(set(layers)) == len(layers) == 4
    assert all(seen["layers"] for seen in others)


def test_what_cannot_be_a_pipeline_is_refused(results: Any) -> None:
    t5, few = results[TWO_STAGES][2][0]["error"], results[FIVE_STAGES][0][0]["error"]
    assert t5.startswith("UnsupportedModelError: t5 (T5ForConditionalGeneration) cannot be run as a pipeline")
    assert few == ("ConfigurationError: llama has 4 layers, which cannot be 5 stages of a pipeline; take fewer ranks")


def test_stages_of_different_models_are_refused(results: Any) -> None:
    for rank, seen in enumerate(results[TWO_STAGES][3]):
        assert seen["error"].startswith(f"RankError: rank {1 - rank} has another model than rank {rank} (identities ")


def test_the_command_answers_on_one_rank_and_serves_stages_on_the_others(
    results: Any, checkpoints: Path, tmp_path: Path
) -> None:
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8], [9], [10, 11, 12, 13]]
    lines = [json.dumps({"id": at, "prompt_ids": ids, "ignore_eos": True}) for at, ids in enumerate(prompts)]
    (tmp_path / "prompts").write_text("\n".join([*lines, '{"prompt_ids": "wrong"}']))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "surfw"]
    options = ["--prompts", str(tmp_path / "prompts"), "--ordered", "--max-new-tokens", "6", "--memory-budget", "100MB"]
    command = [*torchrun, "infer", str(checkpoints / "stores" / "llama"), "--pipeline", *options]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    *answers, wrong = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one["token_ids"] for one in answers] == results[THREE_STAGES][0][0]["right"]
    assert wrong["error"] == 'prompt_ids is "wrong", expected a list of token ids'
    assert "surfw: 4 prompts answered, 1 failed, 24 tokens in" in done.stderr
    assert done.returncode == 1  # rank 0's, as without a pipeline


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--prompt-ids", "1,2"), "--pipeline needs --prompts FILE; add it, or leave --pipeline out"),
        (("--prompts", "-"), "start them with 'torchrun --nproc-per-node N -m surfw infer --pipeline …'"),
    ],
)
def test_a_pipeline_alone_is_refused(
    checkpoints: Path, tmp_path: Path, options: tuple[str, ...], expected: str
) -> None:
    done = surfw(tmp_path, "infer", str(checkpoints / "stores" / "llama"), "--pipeline", *options)
    assert done.returncode in {1, 2}
    assert expected in " ".join(done.stderr.split())
