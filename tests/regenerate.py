"""Brings generated parts of the repository up to date: completions; help texts, settings and errors in the README."""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import surfw.cli.app  # noqa: F401 - the commands declare their options
from surfw import errors
from surfw.cli.options import commands_with
from surfw.settings import SETTINGS

ROOT = Path(__file__).parent.parent
COMMANDS = (
    "chunk",
    "serve",
    "infer",
    "stats",
    "config",
    "bench wire",
    "bench flood",
    "bench chunk",
    "bench storage",
    "bench infer",
)


def completions() -> dict[Path, str]:
    """The completion scripts, by their file."""
    found = {}
    for shell in ("bash", "zsh", "fish"):
        script = _run([], _SURFW_COMPLETE=f"source_{shell}")
        found[ROOT / "completions" / f"surfw.{shell}"] = script.rstrip("\n") + "\n"
    return found


def readme() -> str:
    """The README with the help texts, the settings and the errors as they are now."""
    text = (ROOT / "README.md").read_text()
    for command in COMMANDS:
        shown = _run([*command.split(), "--help"]).rstrip()
        text = _fill(text, f"help:{command}", f"```\n$ surfw {command} --help\n{shown}\n```")
    return _fill(_fill(text, "settings", settings_table()), "errors", f"```\n{error_tree()}\n```")


def error_tree() -> str:
    """The tree that the errors' own module shows."""
    lines = (errors.__doc__ or "").splitlines()
    return textwrap.dedent("\n".join(line for line in lines if line.startswith("    ")))


def settings_table() -> str:
    """Every setting, from the registry."""
    rows = ["| key | variable | option | default | meaning |", "|---|---|---|---|---|"]
    for name, setting in SETTINGS.items():
        commands = ", ".join(commands_with(name))
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
    """Write them."""
    for path, script in completions().items():
        path.write_text(script)
    (ROOT / "README.md").write_text(readme())


if __name__ == "__main__":
    main()
