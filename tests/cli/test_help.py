"""Help is quick, imports little, and the repository shows it as it is."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import regenerate
from tests.cli.run import surfw


@pytest.mark.parametrize("command", [[], ["chunk"], ["serve"], ["infer"], ["stats"], ["bench"]])
def test_help_imports_neither_torch_nor_transformers(command: list[str]) -> None:
    code = (
        "import sys, json\n"
        "from surfw.cli.main import app\n"
        f"try: app({[*command, '--help']!r})\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "loaded = {name.partition('.')[0] for name in sys.modules}\n"
        "heavy = sorted(loaded & {'torch', 'transformers', 'numpy', 's3fs', 'asyncio'})\n"
        "print(json.dumps(heavy))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    shown, _, heavy = done.stdout.strip().rpartition("\n")
    assert json.loads(heavy) == []
    assert "Usage:" in shown


def test_every_command_shows_an_example(tmp_path: Path) -> None:
    for command in ("chunk", "serve", "infer", "stats"):
        done = surfw(tmp_path, command, "--help")
        assert done.returncode == 0
        assert f"  surfw {command}" in done.stdout.partition("Examples:")[2]


def test_usage_errors_exit_with_2(tmp_path: Path) -> None:
    for arguments in (
        ["infer"],
        ["infer", "--prompt", "a", "--prompt-ids", "1"],
        ["chunk"],
        ["nonsense"],
        ["serve", "--port", "x"],
    ):
        done = surfw(tmp_path, *arguments)
        assert done.returncode == 2, arguments
        assert "Usage:" in done.stderr
    assert surfw(tmp_path, "infer", "--prompt-ids", "1,x").returncode == 2


def test_version(tmp_path: Path) -> None:
    from surfw import __version__

    assert surfw(tmp_path, "--version").stdout == f"surfw {__version__}\n"


def test_completions_are_current() -> None:
    for path, script in regenerate.completions().items():
        assert path.read_text() == script, f"run {sys.executable} tests/regenerate.py"


def test_help_in_the_readme_is_current() -> None:
    assert (regenerate.ROOT / "README.md").read_text() == regenerate.readme(), (
        f"run {sys.executable} tests/regenerate.py"
    )


def test_completion_completes(tmp_path: Path) -> None:
    done = surfw(tmp_path, _SURFW_COMPLETE="complete_bash", COMP_WORDS="surfw in", COMP_CWORD="1")
    assert done.stdout.split() == ["infer"]
