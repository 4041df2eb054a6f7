"""Update generated parts of the repository: completions, screens, and the output on pages.

Run `python -m tests.regenerate` in the repository's root.
"""

import os
import re
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

import click
import typer

from surfw import __version__, errors
from surfw.cli import options
from surfw.cli.app import app
from surfw.settings import SETTINGS
from tests import pages
from tests.pages import ROOT
from tests.sandbox import Sandbox

COMMANDS = "surfw/cli/COMMANDS.md"
CHECKPOINTS = "surfw/models/CHECKPOINTS.md"


def root_command() -> options.Group:
    """The command line, with all its commands imported."""
    root = typer.main.get_command(app)
    assert isinstance(root, options.Group)
    root.commands |= {name: one.load() for name, one in root.commands.items() if isinstance(one, options.Deferred)}
    return root


def commands() -> list[str]:
    """Every command that `surfw --help` leads to, such as `bench wire`."""
    return list(_commands(root_command(), ""))


def _commands(group: click.Command, path: str) -> Iterator[str]:
    inner = getattr(group, "commands", None)
    if inner is None:
        yield path
        return
    for name, command in inner.items():
        if not command.hidden:
            yield from _commands(command, f"{path} {name}".strip())


def options_of(command: str) -> list[str]:
    """The options of a command, such as `--json`."""
    found = root_command()
    for word in command.split():
        found = found.commands[word]  # type: ignore[attr-defined]
    return [name for one in found.params for name in one.opts if name.startswith("--")]


def completions() -> dict[Path, str]:
    """The completion scripts, by their file."""
    found = {}
    for shell in ("bash", "zsh", "fish"):
        script = _run([], _SURFW_COMPLETE=f"source_{shell}")
        found[ROOT / "completions" / f"surfw.{shell}"] = script.rstrip("\n") + "\n"
    return found


def man_page() -> dict[Path, str]:
    """The man page, made from the help of all commands, by its file."""
    lines = [
        f'.TH SURFW 1 "" "surfw {__version__}"',
        ".SH NAME",
        "surfw \\- run models whose weights are remote or bigger than memory",
    ]
    root = root_command()
    lines += [".SH SYNOPSIS", ".B surfw", "COMMAND [OPTIONS]", ".SH DESCRIPTION", _roff(root.help or "")]
    lines += [
        "Exit codes: 0 done, 1 failed, 2 wrong usage or a wrong setting, 3 a benchmark is worse than the one it was"
    ]
    lines += ["compared with, 130 interrupted, 143 ended by SIGTERM, 129 ended by SIGHUP."]
    for name in sorted(commands()):
        command = root
        for word in name.split():
            command = command.commands[word]  # type: ignore[attr-defined]
        context = typer.Context(command, info_name=f"surfw {name}")
        pieces = " ".join(command.collect_usage_pieces(context))
        lines += [f'.SH "SURFW {name.upper()}"', f".B surfw {name}", _roff(pieces), ".PP"]
        lines += [_roff(part) for part in (command.help or "").split("\n\n")]
        for parameter in command.params:
            if record := parameter.get_help_record(context):
                lines += [".TP", f".B {_roff(record[0])}", _roff(" ".join(record[1].split()))]
        if examples := (command.epilog or "").partition("\n")[2]:
            lines += [".PP", ".nf", *map(_roff, examples.splitlines()), ".fi"]
    return {ROOT / "completions" / "surfw.1": "\n".join(line for line in lines if line) + "\n"}


def _roff(text: str) -> str:
    """Escape a text for roff, so that no line of it is a command."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-")
    return "\n".join("\\&" + line if line.startswith((".", "'")) else line for line in escaped.split("\n"))


def pages_now() -> dict[str, str]:
    """Return the pages with their current help texts, settings and tree of errors, by path.

    A new command gets a section before the one about scripts.
    """
    parts = {"settings": settings_table(), "errors": f"```text\n{error_tree()}\n```"}
    for command in commands():
        shown = _run([*command.split(), "--help"]).rstrip()
        parts[f"help:{command}"] = f"```console\n$ surfw {command} --help\n{shown}\n```"
    found = {page: pages.read(page) for page in pages.PAGES}
    for name in parts:
        if not any(f"<!-- {name} -->" in text for text in found.values()):
            section = f"## surfw {name.removeprefix('help:')}\n\n<!-- {name} -->\n<!-- end -->\n\n"
            found[COMMANDS] = found[COMMANDS].replace("## For scripts\n", f"{section}## For scripts\n")
    for name, block in parts.items():
        found = {page: _fill(text, name, block) for page, text in found.items()}
    return found


def with_formats(text: str) -> str:
    """Update the table of formats on the page about checkpoints."""
    from tests import formats  # it imports torch

    return _fill(text, "formats", formats.table())


def with_outputs(page: str, text: str, folder: Path) -> str:
    """Return a page with the current output of its commands; `folder` is an empty folder to run them in.

    In a block with the flag `figures`, which shows a machine's figures, only the labels are compared.
    """
    shown = [one for one in pages.blocks_of(page, text) if one.kind == "console" and not one.is_generated]
    with Sandbox(folder) as here:
        for block in shown:
            for command in block.before:
                done = here.run(command)
                assert done.code == 0, f"{block}: {command}\n{done.shown}"
            printed = _outputs(here, block.text)
            if "figures" in block.flags and _labels(printed) == _labels(block.text):
                continue
            text = text.replace(f"\n{block.text}```", f"\n{printed}```", 1)
    return text


def _outputs(here: Sandbox, block: str) -> str:
    """Return a `console` block with the current output of its commands; a continuation line begins with `> `."""
    printed = ""
    for command in re.findall(r"^\$ (.*(?:\n> .*)*)", block, re.MULTILINE):
        done = here.run(command.replace("\\\n> ", " "))
        printed += f"$ {command}\n{done.shown.rstrip()}\n"
    return printed


def _labels(block: str) -> list[str]:
    """Return the part of each line before the first wide gap or digit."""
    return [re.split(r"  |[0-9]", line)[0].strip() for line in block.splitlines()]


def error_tree() -> str:
    """The tree in the docstring of the errors' module."""
    lines = (errors.__doc__ or "").splitlines()
    return textwrap.dedent("\n".join(line for line in lines if line.startswith("    ")))


def settings_table() -> str:
    """A table of all settings, from the registry."""
    root_command()  # a command's options are known once it is imported
    rows = ["| key | variable | option | default | meaning |", "|---|---|---|---|---|"]
    for name, setting in SETTINGS.items():
        commands = ", ".join(options.commands_with(name))
        expected = f"{setting.expected}, in the variable as JSON" if setting.kind is dict else setting.expected
        bounds = f" ({expected})" if setting.choices or setting.form or setting.least is not None else ""
        default = setting.default_text or ("false" if setting.kind is bool else "none")
        option = f"`{setting.option}`: {commands}" if commands else "none"
        rows.append(f"| `{name}` | `{setting.variable}` | {option} | {default} | {setting.help}{bounds} |")
    return "\n".join(rows)


def _fill(text: str, name: str, block: str) -> str:
    return re.sub(
        rf"<!-- {name} -->.*?<!-- end -->", lambda _: f"<!-- {name} -->\n{block}\n<!-- end -->", text, flags=re.DOTALL
    )


def _run(arguments: list[str], **environment: str) -> str:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SURFW_")}
    done = subprocess.run(
        [str(Path(sys.executable).parent / "surfw"), *arguments],
        env=clean | {"TERM": "dumb", "NO_COLOR": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout


def main() -> None:
    """Write all generated files."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    for path, script in (completions() | man_page()).items():
        path.write_text(script)
    from tests.cli import test_screens  # it imports torch

    for name in test_screens.VIEWS:
        (test_screens.FOLDER / f"{name}.txt").write_text(test_screens.draw(name))
    for page, text in pages_now().items():
        (ROOT / page).write_text(text)
    (ROOT / CHECKPOINTS).write_text(with_formats(pages.read(CHECKPOINTS)))
    for page in sorted({one.page for one in pages.blocks("console") if not one.is_generated}):
        with tempfile.TemporaryDirectory() as folder:
            (ROOT / page).write_text(with_outputs(page, pages.read(page), Path(folder)))


if __name__ == "__main__":
    main()
