"""Brings generated parts of the repository up to date: completions, and the help texts in the README."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
COMMANDS = ("chunk", "serve", "infer", "stats", "bench wire", "bench chunk")


def completions() -> dict[Path, str]:
    """The completion scripts, by their file."""
    found = {}
    for shell in ("bash", "zsh", "fish"):
        script = _run([], _SURFW_COMPLETE=f"source_{shell}")
        found[ROOT / "completions" / f"surfw.{shell}"] = script.rstrip("\n") + "\n"
    return found


def readme() -> str:
    """The README with the help texts as they are now."""
    text = (ROOT / "README.md").read_text()
    for command in COMMANDS:
        shown = _run([*command.split(), "--help"]).rstrip()
        block = f"<!-- help:{command} -->\n```\n$ surfw {command} --help\n{shown}\n```\n<!-- end -->"
        text = re.sub(rf"<!-- help:{command} -->.*?<!-- end -->", lambda _, block=block: block, text, flags=re.DOTALL)
    return text


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
