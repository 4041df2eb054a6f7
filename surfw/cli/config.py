"""`surfw config`: every setting, its value, and where it comes from."""

import os
from typing import Any

import typer

from surfw.cli import options
from surfw.config import display_url
from surfw.settings import TOKEN_VARIABLE, SeveralTokensError
from surfw.storage_options import shown_options

EXAMPLES = """\b
Examples:
  surfw config
  surfw --config surfw.toml config
  surfw config --json
"""


def config(
    context: typer.Context,
    file: options.ConfigFile = None,
    json: options.Json = False,
    quiet: options.Quiet = False,  # noqa: ARG001 - as all commands have it; nothing else is printed here
) -> None:
    """Show every setting, its value, and where it comes from.

    A token is never shown, only whether one is set; storage options are shown only if they are known to be harmless.
    """
    from surfw.cli import render

    found = options.load_configuration(context, file, {})
    shown = {
        name: {"value": _shown(name, getattr(found.settings, name)), "from": origin.name}
        for name, origin in found.origins.items()
    }
    try:
        is_set = found.settings.token is not None
    except SeveralTokensError:
        is_set = True
    place = TOKEN_VARIABLE if os.environ.get(TOKEN_VARIABLE) else "token_file" if is_set else "default"
    shown["token"] = {"value": "set" if is_set else "not set", "from": place}
    if json:
        render.print_json(shown)
        return
    rows = [(name, _text(one["value"]), one["from"]) for name, one in shown.items()]
    render.print_table(("setting", "value", "from"), rows)


def _shown(name: str, value: Any) -> Any:
    """Return a value without the credentials that a URL or storage options may hold."""
    if name == "storage_options":
        return shown_options(value)
    return display_url(value) if name in {"store", "source", "redis_url"} and value is not None else value


def _text(value: Any) -> str:
    """Return a value as a person writes it."""
    if value is None or value == {}:
        return "not set"
    if isinstance(value, dict):
        return ", ".join(f"{name}={_text(one)}" for name, one in value.items())
    return str(value).lower() if isinstance(value, bool) else str(value)
