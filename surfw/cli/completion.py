"""Shell completion on Tab: names of models, dtypes, and fixed choices.

Completion must be fast and silent. A source that fails, or does not answer within a second, offers nothing: an error
message would appear in the middle of the line being typed.
"""

import logging
import os
import threading
from collections.abc import Callable, Sequence
from functools import partial

import typer

from surfw.config import DEFAULT_HOST, DTYPES
from surfw.settings import Settings

_SECONDS = 1.0

Completion = Callable[[str], list[str]]


def models_in_store(context: typer.Context, incomplete: str) -> list[str]:
    """Complete the names of models in the store given on the command line, or else in the settings."""
    return _beginning_with(incomplete, _in_time(partial(_list_store, context)))


def models_in_source(context: typer.Context, incomplete: str) -> list[str]:
    """Complete the names of models that `infer` would find: in its source, on this machine's server, in the store."""
    return _beginning_with(incomplete, _in_time(partial(_list_source, context)))


def dtypes(incomplete: str) -> list[str]:
    """Complete the names of dtypes."""
    return _beginning_with(incomplete, list(DTYPES))


def choices(texts: Sequence[str]) -> Completion:
    """Return a completion that offers fixed texts."""

    def complete(incomplete: str) -> list[str]:
        return _beginning_with(incomplete, texts)

    return complete


def _beginning_with(incomplete: str, names: Sequence[str]) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


def _in_time(look: Callable[[], list[str]]) -> list[str]:
    """Return what `look` finds; nothing if it fails. If it takes over a second, end the process."""
    found: list[str] = []

    def run() -> None:
        try:
            found.extend(look())
        except BaseException:  # noqa: BLE001 - nothing may be said here
            found.clear()

    logging.disable(logging.CRITICAL)
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(_SECONDS)
    if thread.is_alive():
        os._exit(1)  # an ordinary exit would wait for threads
    return found


def _settings(context: typer.Context, *names: str) -> Settings:
    """Load the settings, with the options typed so far."""
    config = context.params.get("config") or context.find_root().params.get("config")
    return Settings.load(config, **{name: context.params.get(name) or None for name in names})


def _list_store(context: typer.Context) -> list[str]:
    settings = _settings(context, "store")
    return _models_of_storage(settings, settings.store)


def _list_source(context: typer.Context) -> list[str]:
    from surfw.cli.addresses import read_address
    from surfw.client import read_stats
    from surfw.errors import SurfwError

    settings = _settings(context, "source", "token_file", "ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
    if settings.sources:
        address = read_address(settings.sources[0])
        if not address.is_server:
            return _models_of_storage(settings, address.url)
        tls = settings.tls_for(address.url)
        return read_stats(address.url, token=settings.token, ssl=tls, timeout_seconds=_SECONDS)["models"]
    try:
        url = f"ws://{DEFAULT_HOST}:{settings.port}"
        return read_stats(url, token=settings.token, timeout_seconds=_SECONDS / 2)["models"]
    except SurfwError:
        return _models_of_storage(settings, settings.store)


def _models_of_storage(settings: Settings, place: str) -> list[str]:
    import asyncio

    from surfw.storage import Store, open_backend

    return asyncio.run(Store(open_backend(place, settings.storage_options)).models())
