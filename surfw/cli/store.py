"""`surfw list`, `show`, `rm`, `prune` and `verify`: inspect and maintain a store.

`housekeeping` does the work and shows the results.
"""

from typing import Annotated, Any

import typer

from surfw.cli import completion, options

LIST_EXAMPLES = """\b
Examples:
  surfw list
  surfw list --store s3://bucket/prefix --json
  surfw list --cached
"""
SHOW_EXAMPLES = """\b
Examples:
  surfw show my-model
  surfw show org/name --json
"""
RM_EXAMPLES = """\b
Examples:
  surfw rm my-model
  surfw rm org/name --store s3://bucket/prefix
  surfw rm my-model --cached
"""
PRUNE_EXAMPLES = """\b
Examples:
  surfw prune --dry-run
  surfw prune --store s3://bucket/prefix
"""
VERIFY_EXAMPLES = """\b
Examples:
  surfw verify
  surfw verify my-model --json
"""


def _name(meaning: str) -> Any:
    """Make the argument that names a model."""
    return typer.Argument(metavar="NAME", help=meaning, autocompletion=completion.models_in_store)


Cached = Annotated[bool, typer.Option("--cached", help="Use the disk cache instead of a store.")]


@options.with_settings("store", "storage_options", "cache_dir")
def list_(
    *,
    configuration: options.Configuration,
    cached: Cached = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """List the models in a store, and anything else in it."""
    from surfw.cli import housekeeping

    if cached:
        from surfw.cli.cached import list_cached

        list_cached(configuration.settings, json=json)
        return
    housekeeping.list_models(configuration.settings, json=json, quiet=quiet)


@options.with_settings("store", "storage_options")
def show(
    *,
    name: Annotated[str, _name("The model's name in the store, or a unique last part of it.")],
    configuration: options.Configuration,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Show a model in a store: its chunks, sizes and files."""
    from surfw.cli import housekeeping

    housekeeping.show_model(configuration.settings, name, json=json, quiet=quiet)


@options.with_settings("store", "storage_options", "cache_dir")
def rm(
    *,
    name: Annotated[str, _name("The model's full name in the store.")],
    configuration: options.Configuration,
    cached: Cached = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Remove a model from a store. Its blobs stay until 'surfw prune'."""
    from surfw.cli import housekeeping

    if cached:
        from surfw.cli.cached import remove_cached

        remove_cached(configuration.settings, name, json=json)
        return
    housekeeping.remove_model(configuration.settings, name, json=json, quiet=quiet)


@options.with_settings("store", "storage_options")
def prune(
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be removed; remove nothing.")] = False,
    configuration: options.Configuration,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Remove the blobs that no model needs."""
    from surfw.cli import housekeeping

    housekeeping.prune(configuration.settings, dry_run=dry_run, json=json, quiet=quiet)


@options.with_settings("store", "storage_options", "verify_key")
def verify(
    *,
    name: Annotated[
        str | None, _name("The model's name in the store, or a unique last part of it. [default: all models]")
    ] = None,
    configuration: options.Configuration,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Verify every byte of the models in a store. With --verify-key, also verify who signed them."""
    from surfw.cli import housekeeping

    housekeeping.verify(configuration.settings, name, json=json, quiet=quiet)
