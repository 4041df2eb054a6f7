"""The house rules hold: import contracts, linter, types."""

import os
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


def test_types_are_seen_from_outside(tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(
        "import asyncio\n"
        "from surfw import ModelChunker, StreamingLlamaModel, StreamingModel, WeightServer\n"
        "async def main() -> float:\n"
        "    info = await ModelChunker('x').chunk_model()\n"
        "    async with WeightServer(model_path=info.store, port=0) as server:\n"
        "        model = await StreamingModel.open_async(server.url, model='x', memory_budget='1GB', policy='lru')\n"
        "        async for text in model.stream('a'):\n"
        "            print(text.upper())\n"
        "        async for token in model.stream([1]):\n"
        "            print(token + 1)\n"
        "        async with StreamingLlamaModel('x', websocket_uri=server.url, cache_size=5, token=None) as other:\n"
        "            return other.get_cache_info()['hit_rate'] + len(await model.warmup([0]))\n"
        "asyncio.run(main())\n"
    )
    # Uses the rules and the cache of the previous check; a separate run would take as long.
    rules = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".mypy_cache")]
    seen = os.environ | {"MYPYPATH": str(ROOT)}
    done = subprocess.run(
        [str(BIN / "mypy"), *rules, "user.py"], capture_output=True, text=True, check=False, cwd=tmp_path, env=seen
    )
    assert done.stdout == "Success: no issues found in 1 source file\n"


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
    """`surfw/README.md` has one row per room and module, and names no missing file."""
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
