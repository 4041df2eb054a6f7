"""The house rules hold: import contracts, linter, types."""

import re
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


def test_the_map_names_every_room() -> None:
    """`surfw/README.md` has one row per room and module, and names no file that is not there."""
    package = ROOT / "surfw"
    text = (package / "README.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| [`")]
    named = {name for row in rows for name in re.findall(r"\[`([a-z_/]+(?:\.py)?)`\]", row.split("|")[1])}
    rooms = {f"{path.name}/" for path in package.iterdir() if (path / "__init__.py").exists()}
    modules = {path.name for path in package.glob("*.py")} - {"__init__.py", "__main__.py"}
    assert named == rooms | modules
    mentioned = set(re.findall(r"`([a-z_/]+(?:\.py|/))`", text))
    missing = {path for path in mentioned if not ((package if path[:6] != "tests/" else ROOT) / path).exists()}
    assert not missing
