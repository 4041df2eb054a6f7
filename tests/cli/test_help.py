"""Help is fast, imports little, and equals the copy in the repository."""

import asyncio
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from surfw.cli import options
from surfw.cli.app import app
from surfw.storage import FilesystemBackend, Store
from tests import pages, regenerate
from tests.cli.run import environment, surfw
from tests.stores import make_store


@pytest.mark.parametrize("command", [[], ["chunk"], ["serve"], ["infer"], ["stats"], ["bench"]])
def test_help_imports_neither_torch_nor_transformers(command: list[str]) -> None:
    code = (
        "import sys, json\n"
        "from surfw.cli.app import app\n"
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


def test_the_list_of_commands_says_what_each_says_of_itself_and_imports_none() -> None:
    code = (
        "import sys\n"
        "from surfw.cli.app import app\n"
        "try: app(['--help'])\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "print(*(name for name in sys.modules if name.startswith('surfw.cli.')))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = ("bench", "cached", "chat", "chunk", "config", "infer", "schema", "serve", "stats", "store")
    assert not {f"surfw.cli.{name}" for name in modules} & set(done.stdout.split())
    listed = typer.main.get_command(app)
    assert isinstance(listed, options.Group)
    everyday = [name for name, one in listed.commands.items() if getattr(one, "rich_help_panel", None) != options.MORE]
    assert everyday == ["chunk", "serve", "infer", "stats", "bench"]
    for name, one in regenerate.root_command().commands.items():
        assert one.get_short_help_str(1000) == listed.commands[name].get_short_help_str(1000)


def test_sources_of_weights_are_opened_without_torch(tmp_path: Path) -> None:
    asyncio.run(Store(FilesystemBackend(tmp_path)).create())
    code = (
        "import sys\n"
        "from surfw.models import WeightClient\n"
        "with WeightClient(sys.argv[1]) as client:\n"
        "    assert client.models() == [], client.models()\n"
        "print(*(name for name in ('torch', 'transformers', 'numpy', 's3fs') if name in sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "\n"), done.stderr


def test_every_command_shows_an_example(tmp_path: Path) -> None:
    for command in ("chunk", "serve", "infer", "stats"):
        done = surfw(tmp_path, command, "--help")
        assert done.returncode == 0
        assert f"  surfw {command}" in done.stdout.partition("Examples:")[2]


def test_a_long_help_has_sections(tmp_path: Path) -> None:
    sections = {
        command: re.findall(r"^([A-Z].*):$", surfw(tmp_path, command, "--help").stdout, re.MULTILINE)
        for command in ("infer", "chat", "serve", "chunk", "pull", "stats")
    }
    first, last = "Model and source", ["Tokens, certificates and keys", "Output and general"]
    inner = [first, "Memory, cache and speed"]
    assert sections == {
        "infer": ["Arguments", "Prompt and answer", *inner, "Many prompts", "Network", *last],
        "chat": ["Arguments", "Prompt and answer", *inner, "Network", *last],
        "serve": ["Arguments", *inner, "Network", *last],
        "chunk": ["Arguments", first, "Form of the weights", *last],
        "pull": ["Arguments", *inner, "Network", *last],
        "stats": ["Arguments", "Options"],
    }
    for command in sections:
        shown = surfw(tmp_path, command, "--help").stdout
        places = [
            len(re.findall(f"^  (-., )?{one}(?![\\w-])", shown, re.MULTILINE)) for one in _visible_options(command)
        ]
        assert set(places) == {1}
        arguments = re.findall(r"^  ([A-Z]+) ", shown, re.MULTILINE)
        assert len(arguments) == len(set(arguments)), "each argument is in one place"


def _visible_options(command: str) -> list[str]:
    found = regenerate.root_command().commands[command].params
    return [one.opts[0] for one in found if one.param_type_name == "option" and not getattr(one, "hidden", False)]


def test_usage_errors_exit_with_2(tmp_path: Path) -> None:
    for arguments in (
        ["infer"],
        ["infer", "--prompt", "a", "--prompt-ids", "1"],
        ["chunk"],
        ["nonsense"],
        ["serve", "--port", "x"],
        ["serve", "./my-model", "--store", "x"],
    ):
        done = surfw(tmp_path, *arguments)
        assert done.returncode == 2, arguments
        assert "Usage:" in done.stderr
    assert surfw(tmp_path, "infer", "--prompt-ids", "1,x").returncode == 2


def test_usage_lines_name_arguments_in_one_way() -> None:
    lines = re.findall("^Usage: .*", pages.read("surfw/cli/COMMANDS.md"), re.MULTILINE)
    assert len(lines) == len(regenerate.commands())
    for line in lines:
        assert re.fullmatch(r"Usage: surfw [a-z ]+ \[OPTIONS\]( [A-Z_]+| \[[A-Z_]+\](\.\.\.)?)*", line)


def test_what_can_be_refused_at_once_is_refused_before_torch_is_imported(tmp_path: Path) -> None:
    asyncio.run(Store(FilesystemBackend(tmp_path / "store")).create())
    make_store(tmp_path / "models", "small")
    make_store(tmp_path / "other", "larger", vocabulary=10)
    (tmp_path / "my-model").mkdir()
    (tmp_path / "my-model" / "config.json").write_text("{}")
    (tmp_path / "my-model" / "model-00001-of-00002.safetensors").touch()
    refused = {
        "infer": "give either --prompt or --prompt-ids",
        "infer --prompt-ids 1,a": "'1,a' is not a list of ids",
        "infer --prompt a --on-missing ignore": "Invalid value for '--on-missing': 'ignore' is not one of",
        "infer --prompt a --dtype bfloat61": "dtype is 'bfloat61', expected one of float32",
        "infer --prompt a --memory-budget 2": "did you mean 2GB?",
        "infer --prompt a --system b --raw": "--system does not go with --raw",
        "infer ./store --prompt a --source ./store": "--source does not go with MODEL './store'",
        "infer ./store a --model nosuch": "/store holds no model yet; put one there with ",
        "infer --prompt a --source ./nosuch": "(named with --source)\nsurfw: error: there is no folder ",
        "infer --prompt a --source ./store --model nosuch": "/store holds no model yet; put one there with ",
        "infer ./models a --adapter nosuch": "/models has no model 'nosuch'; it has: small",
        "infer ./models a --adapter small": "small is a whole model, and no adapter; name an adapter over",
        "infer ./models a --draft nosuch": "/models has no model 'nosuch'; it has: small",
        "infer ./models a --draft self:int4": "small is stored as it is (none) in",
        "infer ./models a --draft ./nosuch": "there is no folder ",
        "infer ./models a --draft ./other": "the draft larger has a vocabulary of 10 tokens, and small one of 9",
        "chunk ./my-model --name ../x": "model name '../x' cannot be used",
        "chunk ./my-model --dtype bfloat61": "--dtype is 'bfloat61', expected one of float32",
        "chunk ./my-model --in-place --store memory://x": "a remote store, which cannot point at local files",
        "chunk ./nosuch": "./nosuch is not a directory here",
        "chunk ./my-model": "its shards lack their index: download model.safetensors.index.json",
    }
    code = (
        "import contextlib, io, json, sys\n"
        "from surfw.cli.main import main\n"
        "def run(line):\n"
        "    sys.argv[1:] = line.split()\n"
        "    with contextlib.redirect_stderr(io.StringIO()) as said:\n"
        "        try: main()\n"
        "        except SystemExit as end: return end.code, said.getvalue()\n"
        "print(json.dumps([run(line) for line in sys.stdin.read().splitlines()]))\n"
        "print(json.dumps([name for name in ('torch', 'transformers') if name in sys.modules]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input="\n".join(refused), capture_output=True, text=True, check=True, cwd=tmp_path, env=environment(tmp_path),
    )  # fmt: skip
    results, heavy = map(json.loads, done.stdout.splitlines())
    assert heavy == []
    for text, (status, said) in zip(refused.values(), results, strict=True):
        assert status in {1, 2}
        assert text in said


def test_version(tmp_path: Path) -> None:
    from surfw import __version__

    assert surfw(tmp_path, "--version").stdout == f"surfw {__version__}\n"


def test_completions_are_current() -> None:
    for path, script in regenerate.completions().items():
        assert path.read_text() == script, "run python -m tests.regenerate"


def test_the_man_page_is_current() -> None:
    for path, page in regenerate.man_page().items():
        assert path.read_text() == page, "run python -m tests.regenerate"
        for command in regenerate.commands():
            assert f'.SH "SURFW {command.upper()}"' in page


def test_generated_parts_of_the_pages_are_current() -> None:
    for page, text in regenerate.pages_now().items():
        assert pages.read(page) == text, "run python -m tests.regenerate"


def test_completion_completes(tmp_path: Path) -> None:
    done = surfw(tmp_path, _SURFW_COMPLETE="complete_bash", COMP_WORDS="surfw in", COMP_CWORD="1")
    assert done.stdout.split() == ["infer"]
