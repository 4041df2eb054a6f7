"""A mixture of experts at the command line: `show` prints the usage, and the next run starts with those experts."""

import json
from pathlib import Path

import torch

from tests.cli.run import surfw
from tests.exactness.families import MIXTURES


def test_usage_is_shown_and_the_next_run_starts_warm(tmp_path: Path) -> None:
    torch.manual_seed(0)
    MIXTURES["qwen3-moe"].build().save_pretrained(tmp_path / "mix")
    chunked = surfw(tmp_path, "chunk", str(tmp_path / "mix"), "--codec", "none,int4", "--quantize", "experts", "-q")
    assert chunked.returncode == 0, chunked.stderr
    assert "experts" not in json.loads(surfw(tmp_path, "show", "mix", "--json").stdout)
    loads = []
    for _ in range(2):
        answer = surfw(
            tmp_path, "infer", "mix", "--prompt-ids", "7,8,9", "--max-new-tokens", "4", "--ignore-eos", "--json"
        )
        assert answer.returncode == 0, answer.stderr
        loads.append(json.loads(answer.stdout)["experts"]["loads"])
    assert loads[1] < loads[0]
    shown = json.loads(surfw(tmp_path, "show", "mix", "--json").stdout)["experts"]
    assert shown["tokens"] == 2 * (3 + 3)
    assert 0.25 < shown["quarter_share"] <= 1
    said = surfw(tmp_path, "show", "mix").stdout
    assert "of the choices fell on the most chosen quarter, in 12 tokens so far" in " ".join(said.split())
