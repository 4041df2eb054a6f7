"""`surfw schema`: the JSON Schemas of what commands print with `--json`, kept as files in `surfw/schemas`.

A schema says which keys are always present, and what they hold. Later versions may add keys, but remove none.
"""

from pathlib import Path
from typing import Annotated

import typer

from surfw.cli.addresses import Mistake

EXAMPLES = """\b
Examples:
  surfw schema infer
  surfw schema bench wire > wire.schema.json
"""

FOLDER = Path(__file__).parent.parent / "schemas"


def schema(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="COMMAND", help="A command, such as 'bench wire'. [default: list all]")
    ] = None,
) -> None:
    """Print the JSON Schema of a command's --json output."""
    if not words:
        for name in sorted(path.stem for path in FOLDER.glob("*.json")):
            typer.echo(name.replace("-", " "))
        return
    typer.echo(schema_file(words).read_text(encoding="utf-8"), nl=False)


def schema_file(words: list[str]) -> Path:
    """Return the file with a command's schema; most benchmarks share one.

    Raises:
        Mistake: the command has no schema.
    """
    from surfw.cli.bench import app

    named = [" ".join(words)]
    if words[0] == "bench" and words[1:] and words[1] in {one.name for one in app.registered_commands}:
        named.append("bench")
    for name in named:
        if name.replace(" ", "").isalpha() and (path := FOLDER / f"{name.replace(' ', '-')}.json").is_file():
            return path
    raise Mistake(f"there is no schema for {' '.join(words)[:80]!r}; 'surfw schema' lists those that there are")
