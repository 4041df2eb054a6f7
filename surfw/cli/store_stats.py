"""What `stats --store` shows: each model's sizes, form by form, and what it shares with others."""

import asyncio
from typing import Any

from surfw.cli import render
from surfw.config import count, display_url, format_size
from surfw.errors import StorageError
from surfw.settings import Settings
from surfw.storage.housekeeping import Housekeeping, StoreContents
from surfw.storage.housekeeping.details import ModelDetails, describe_model

_HEADINGS = ("model", "weights", "in the store", "shared", "forms")


def show_store(settings: Settings, *, json: bool, quiet: bool) -> None:
    """Print the sizes of a store and its models.

    Raises:
        StorageError: the store cannot be read; or a manifest is not understood, raised after the others were shown.
    """
    with render.busy(f"reading {display_url(settings.store)}", quiet=json or quiet):
        contents, models = asyncio.run(_look(settings))
    if json:
        render.print_json(_facts(contents, models))
    else:
        _show(contents, models)
    if contents.complaints:
        raise StorageError(f"{contents.store}: not understood: {contents.complaints[0]}")


async def _look(settings: Settings) -> tuple[StoreContents, list[ModelDetails]]:
    options = settings.storage_options
    async with Housekeeping(settings.store, storage_options=options) as store:
        contents = await store.contents()
    return contents, [
        await describe_model(settings.store, one.name, storage_options=options) for one in contents.models
    ]


def _facts(contents: StoreContents, models: list[ModelDetails]) -> dict[str, Any]:
    return {
        "store": contents.store,
        "stored_bytes": contents.stored_bytes,
        "shared_bytes": _saved(contents),
        "unneeded_bytes": contents.unneeded_bytes,
        "models": [
            {
                "name": one.name,
                "payload_bytes": one.payload_bytes,
                "stored_bytes": one.stored_bytes,
                "shared_bytes": one.shared_bytes,
                "form_bytes": dict(one.form_bytes),
            }
            for one in models
        ],
    }


def _saved(contents: StoreContents) -> int:
    """Return the bytes that the models save by sharing."""
    return max(0, sum(one.stored_bytes for one in contents.models) - contents.stored_bytes)


def _show(contents: StoreContents, models: list[ModelDetails]) -> None:
    if models:
        rows = [
            (
                one.name,
                format_size(one.payload_bytes),
                format_size(one.stored_bytes),
                format_size(one.shared_bytes),
                ", ".join(f"{codec} {format_size(size)}" for codec, size in one.form_bytes.items()),
            )
            for one in models
        ]
        render.print_table(_HEADINGS, rows, numbers=_HEADINGS[1:4])
    saved = f", {format_size(_saved(contents))} less than without sharing" if _saved(contents) else ""
    render.say(f"{count(len(models), 'model')}, {format_size(contents.stored_bytes)} in {contents.store}{saved}")
