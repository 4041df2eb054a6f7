"""Check the commands' `--json` output against the published schemas."""

import json
from collections.abc import Sequence
from functools import cache
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from surfw.cli.schema import schema_file
from tests.regenerate import commands

_HIDDEN = {"--list": "list", "--remove": "rm", "--prune": "prune", "--verify": "verify"}
"""Options of `chunk` that run another command."""


def check(arguments: Sequence[str], printed: str) -> None:
    """Fail if a printed line violates its schema, or has a key that the schema lacks."""
    typed = list(arguments[2:] if arguments[0] == "--config" else arguments)
    words = next((name for name in _longest_first() if typed[: name.count(" ") + 1] == name.split()), None)
    assert words is not None, arguments
    words = next((_HIDDEN[name] for name in arguments if words == "chunk" and name in _HIDDEN), words)
    for line in printed.splitlines():
        wrong = best_match(validator(words).iter_errors(json.loads(line)))
        assert wrong is None, (
            f"surfw {words} --json: {wrong.json_path}: {wrong.message}; see {schema_file(words.split())}"
        )


@cache
def _longest_first() -> list[str]:
    return sorted(commands(), key=len, reverse=True)


@cache
def validator(command: str) -> Draft202012Validator:
    """A validator of the command's output. It is stricter than the schema, which allows keys of later versions."""
    return Draft202012Validator(_closed(json.loads(schema_file(command.split()).read_text())))


def _closed(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: _closed(value) for name, value in schema.items()}
    return {"additionalProperties": False} | closed if isinstance(schema.get("properties"), dict) else closed
