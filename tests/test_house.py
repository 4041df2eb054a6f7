"""The house rules hold: import contracts, linter, types."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent


@pytest.mark.parametrize(
    "command",
    [["lint-imports"], ["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]],
    ids=["import contracts", "lint", "format", "types"],
)
def test_house_rules(command: list[str]) -> None:
    done = subprocess.run([str(BIN / command[0]), *command[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_nothing_at_the_top_level_but_what_belongs_there() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    top = {path.partition("/")[0] for path in tracked.stdout.split()}
    assert top <= {
        "surfw", "tests", "examples", "completions", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md",
        ".gitignore", ".ci",
    }  # fmt: skip
