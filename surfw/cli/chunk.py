"""`surfw chunk`: a checkpoint into a store."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from surfw.cli import options

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
            help="A hub id (org/name), a local directory, or a storage URL; with --verify, a model's name in the store."
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

    wish = housekeeping.Wish(listing=listing, remove=remove, prune=prune, verify=verify)
    housekeeping.check(
        wish, model=model, dry_run=dry_run, chunking={"--name": name, "--revision": revision, "--dtype": dtype}
    )
    place, given = configuration.settings.store, configuration.settings.storage_options
    if wish:
        housekeeping.keep(wish, place, given, model=model, dry_run=dry_run, json=json)
        return
    assert model is not None, "checked above"
    import asyncio

    from surfw.chunking.chunker import prepare_model, write_model
    from surfw.chunking.in_place import write_in_place
    from surfw.cli import render
    from surfw.config import display_url, format_size
    from surfw.storage import open_backend
    from surfw.storage.origins import PlacedOptions, is_local_url

    # A folder takes no options, so those that are given with one are for the checkpoint.
    source_options = PlacedOptions(model if is_local_url(place) else place, given)
    bars = not json and render.err.is_terminal
    with prepare_model(
        model,
        name=name,
        revision=revision,
        dtype=dtype,
        on_missing=configuration.settings.on_missing,
        show_progress=bars,
        storage_options=source_options.for_url(model),
    ) as prepared:
        facts = _facts(prepared)
        if dry_run:
            if json:
                render.print_json(facts)
            else:
                _show_plan(facts)
            return
        backend = open_backend(place, given)
        with _progress(prepared.plan.payload_bytes, quiet=json) as progress:
            if in_place:
                writing = write_in_place(prepared, backend, origin_options=source_options, progress=progress)
            else:
                writing = write_model(prepared, backend, progress=progress)
            manifest = asyncio.run(writing)
    shown = display_url(place)
    if json:
        render.print_json(facts | {"store": shown, "digest": manifest.digest})
    else:
        render.out.print(
            f"{manifest.name}: {len(manifest.chunks)} chunks ({manifest.layer_count} layers), "
            f"{format_size(manifest.payload_bytes)} in {shown}{', which points at the checkpoint' if in_place else ''}",
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
    from surfw.runtime.buffers import buffer_capacity
    from surfw.runtime.layout import plan_layout
    from surfw.runtime.residency import describe_needs, least_bytes

    kinds = {chunk.name: chunk.kind for chunk in prepared.plan.chunks}
    sizes = {
        chunk.name: buffer_capacity(plan_layout([tensor.info.nbytes for tensor in chunk.tensors])[1])
        for chunk in prepared.plan.chunks
    }
    needs = describe_needs(prepared.name, kinds, sizes, prepared.plan.order)
    return {
        "model": prepared.name,
        "class": prepared.class_name,
        "dtype": prepared.dtype,
        "payload_bytes": prepared.plan.payload_bytes,
        "layers": sum(chunk.kind == "layer" for chunk in prepared.plan.chunks),
        "least_budget_bytes": least_bytes(needs, list(sizes)),
        "chunks": [
            {"name": chunk.name, "kind": chunk.kind, "tensors": len(chunk.tensors), "bytes": chunk.payload_bytes}
            for chunk in prepared.plan.chunks
        ],
    }


def _show_plan(facts: dict[str, Any]) -> None:
    from rich.table import Table

    from surfw.cli import render
    from surfw.config import format_size

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("chunk")
    table.add_column("kind")
    table.add_column("tensors", justify="right")
    table.add_column("size", justify="right")
    for one in facts["chunks"]:
        table.add_row(one["name"], one["kind"], str(one["tensors"]), format_size(one["bytes"]))
    render.out.print(table)
    render.out.print(
        f"{facts['model']} ({facts['class']}, {facts['dtype']}): {len(facts['chunks'])} chunks, "
        f"{facts['layers']} layers, "
        f"{format_size(facts['payload_bytes'])}; the smallest budget for weights that can run it: "
        f"{format_size(facts['least_budget_bytes'])}. Nothing was written.",
        soft_wrap=True,
    )
