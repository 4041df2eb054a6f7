"""What the README says works as it stands there."""

import json
import re
import tomllib
from pathlib import Path

import pytest

from tests.cli.run import surfw

README = (Path(__file__).parent.parent.parent / "README.md").read_text()


def test_the_first_command_prints_english(tmp_path: Path) -> None:
    (command,) = re.findall(r"^python3 -m venv .* && \.venv/bin/surfw (infer .*)$", README, re.MULTILINE)
    prompt = re.fullmatch(r'infer --prompt "(.*)"', command)
    assert prompt is not None
    done = surfw(tmp_path, "infer", "--prompt", prompt[1], "--model", "demo")
    assert done.returncode == 0
    assert "the demo model" in done.stderr
    assert done.stdout.rstrip().endswith(".")
    assert {"layer", "weights", "memory", "model"} & set(done.stdout.lower().replace(".", " ").split())
    assert (tmp_path / "demo").is_dir()


SETTINGS_FILES = re.findall(r"^```toml\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("example", SETTINGS_FILES, ids=["of all commands", "of a storage"])
def test_an_example_of_a_settings_file_is_one(example: str, tmp_path: Path) -> None:
    (tmp_path / "surfw.toml").write_text(example)
    shown = json.loads(surfw(tmp_path, "--config", str(tmp_path / "surfw.toml"), "config", "--json").stdout)
    given = {name: one["value"] for name, one in shown.items() if one["from"] == str(tmp_path / "surfw.toml")}
    assert given == tomllib.loads(example)["tool"]["surfw"]
    assert {"store", "port", "model", "live"} <= given.keys() or given.keys() == {"storage_options"}
