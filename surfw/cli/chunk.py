"""`surfw chunk`: a checkpoint into a store."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Annotated, Any

import typer

from surfw.cli import options
from surfw.config import count, display_url, format_size
from surfw.settings import Settings

EXAMPLES = """\b
Examples:
  surfw chunk org/model
  surfw chunk ./my-model --name mine --dtype bfloat16
  surfw chunk ./my-model --dry-run
  surfw chunk s3://bucket/my-model --in-place
  surfw chunk --list
  surfw chunk --verify my-model --json
  surfw chunk --remove my-model
  surfw chunk --prune --dry-run --store s3://bucket/prefix
"""


@options.with_settings("store", "storage_options", "on_missing")
def chunk(
    *,
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A hub id (org/name), a local directory, or a storage URL; with --verify, a name in the store.",
        ),
    ] = None,
    configuration: options.Configuration,
    name: Annotated[
        str | None, typer.Option(help="The model's name in the store. [default: the hub id, or the directory's name]")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the hub repository.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Convert the weights, such as to bfloat16. [default: as they are]")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show layers and sizes, or what would be pruned, and write nothing.")
    ] = False,
    in_place: Annotated[
        bool,
        typer.Option("--in-place", help="Write no weights: the chunks are byte ranges of the checkpoint's own files."),
    ] = False,
    listing: Annotated[bool, typer.Option("--list", help="In place of chunking: show what lies in the store.")] = False,
    remove: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="In place of chunking: remove a model; its blobs stay until --prune."),
    ] = None,
    prune: Annotated[
        bool, typer.Option("--prune", help="In place of chunking: remove the blobs that no model needs.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="In place of chunking: read every byte of all models, or of MODEL.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Cut a checkpoint into chunks by layer, and write them into a store; or keep the store in order.

    An interrupted run leaves nothing visible; the same command goes on where it stopped.
    """
    from surfw.cli import housekeeping

    settings, origins = configuration.settings, configuration.origins
    chunking = {
        "--name": name is not None, "--revision": revision is not None, "--dtype": dtype is not None,
        "--in-place": in_place, "--on-missing": origins["on_missing"].kind == "argument",
    }  # fmt: skip
    wish = housekeeping.Wish(listing=listing, remove=remove, prune=prune, verify=verify)
    housekeeping.check(wish, model=model, dry_run=dry_run, chunking=chunking)
    if wish:
        housekeeping.keep(wish, settings.store, settings.storage_options, model=model, dry_run=dry_run, json=json)
        return
    assert model is not None, "checked above"
    how = {"name": name, "revision": revision, "dtype": dtype, "on_missing": settings.on_missing}
    try:
        _chunk(model, how, settings, dry_run=dry_run, in_place=in_place, json=json)
    except KeyboardInterrupt as exc:
        raise KeyboardInterrupt("" if dry_run else "the same command goes on where it stopped") from exc


def _chunk(model: str, how: dict[str, Any], settings: Settings, *, dry_run: bool, in_place: bool, json: bool) -> None:
    """Chunk a checkpoint, or show what that would be."""
    import asyncio

    from surfw.chunking.chunker import prepare_model, write_model
    from surfw.chunking.in_place import build_manifest, check_reach, write_in_place
    from surfw.cli import render
    from surfw.storage import open_backend
    from surfw.storage.origins import PlacedOptions, is_local_url

    place, given = settings.store, settings.storage_options
    # A folder takes no options, so those that are given with one are for the checkpoint.
    source_options = PlacedOptions(model if is_local_url(place) else place, given)
    backend = open_backend(place, given)
    if in_place:
        check_reach(model, backend)
    bars = not json and render.err.is_terminal
    options = source_options.for_url(model)
    with prepare_model(model, **how, show_progress=bars, storage_options=options) as prepared:
        facts = _facts(prepared)
        if dry_run:
            if in_place:
                asyncio.run(build_manifest(prepared))  # which refuses what is not in the checkpoint as it is used
            _show(facts, _show_plan, json=json)
            return
        with _progress(prepared.plan.payload_bytes, quiet=json) as progress:
            if in_place:
                writing = write_in_place(prepared, backend, origin_options=source_options, progress=progress)
            else:
                writing = write_model(prepared, backend, progress=progress)
            manifest = asyncio.run(writing)
    _show(facts | {"store": display_url(place), "digest": manifest.digest}, partial(_show_made, in_place), json=json)


def _show(facts: dict[str, Any], show: Callable[[dict[str, Any]], None], *, json: bool) -> None:
    from surfw.cli import render

    if json:
        render.print_json(facts)
    else:
        show(facts)


def _show_made(in_place: bool, facts: dict[str, Any]) -> None:
    from surfw.cli import render

    chunks, layers = count(len(facts["chunks"]), "chunk"), count(facts["layers"], "layer")
    render.out.print(
        f"{facts['model']}: {chunks} ({layers}), {format_size(facts['payload_bytes'])} in {facts['store']}"
        f"{', which points at the checkpoint' if in_place else ''}",
        soft_wrap=True,
    )


@contextmanager
def _progress(total_bytes: int, *, quiet: bool) -> Iterator[Any]:
    """A bar in bytes with the time that is left, in a terminal; nothing elsewhere."""
    from surfw.cli import render

    with render.byte_bar(quiet=quiet) as bar:
        task = bar.add_task("chunking", total=total_bytes)
        yield lambda count, name: bar.update(task, advance=count, description=name)


def _facts(prepared: Any) -> dict[str, Any]:
    """What a dry run tells."""
    from surfw.models.assembly import plan_least_budget

    least, per_token = plan_least_budget(prepared)
    return {
        "model": prepared.name,
        "class": prepared.class_name,
        "dtype": prepared.dtype,
        "payload_bytes": prepared.plan.payload_bytes,
        "layers": sum(chunk.kind == "layer" for chunk in prepared.plan.chunks),
        "least_budget_bytes": least,
        "kv_token_bytes": per_token,
        "chunks": [
            {"name": chunk.name, "kind": chunk.kind, "tensors": len(chunk.tensors), "bytes": chunk.payload_bytes}
            for chunk in prepared.plan.chunks
        ],
    }


def _show_plan(facts: dict[str, Any]) -> None:
    from rich.table import Table

    from surfw.cli import render

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("chunk")
    table.add_column("kind")
    table.add_column("tensors", justify="right")
    table.add_column("size", justify="right")
    for one in facts["chunks"]:
        table.add_row(one["name"], one["kind"], str(one["tensors"]), format_size(one["bytes"]))
    render.out.print(table)
    render.out.print(
        f"{facts['model']} ({facts['class']}, {facts['dtype']}): {count(len(facts['chunks']), 'chunk')}, "
        f"{count(facts['layers'], 'layer')}, "
        f"{format_size(facts['payload_bytes'])}; the smallest budget for weights that can run it: "
        f"{format_size(facts['least_budget_bytes'])}{_for_tokens(facts)}. Nothing was written.",
        soft_wrap=True,
    )


def _for_tokens(facts: dict[str, Any]) -> str:
    per_token = facts["kv_token_bytes"]
    return f", and {format_size(per_token)} for each token of a generation" if per_token else ""
