"""`surfw chunk`: a checkpoint into a store. `housekeeping` has what its options do with a store instead."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from surfw.cli import options
from surfw.config import count, display_url, format_size
from surfw.settings import Settings

if TYPE_CHECKING:
    from surfw.chunking import PreparedModel

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
    listing: Annotated[bool, typer.Option("--list", help="Instead of chunking, show what is in the store.")] = False,
    remove: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Instead of chunking, remove a model; its blobs stay until --prune."),
    ] = None,
    prune: Annotated[
        bool, typer.Option("--prune", help="Instead of chunking, remove the blobs that no model needs.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Instead of chunking, read every byte of all models, or of MODEL.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Cut a checkpoint into chunks by layer, and write them into a store; or keep the store in order.

    An interrupted run leaves nothing visible; the same command goes on where it stopped.
    """
    settings = configuration.settings
    tasks = {"--list": listing, "--remove": remove is not None, "--prune": prune, "--verify": verify}
    chunking = {
        "--name": name is not None, "--revision": revision is not None, "--dtype": dtype is not None,
        "--in-place": in_place, "--on-missing": configuration.origins["on_missing"].kind == "argument",
    }  # fmt: skip
    if task := _only_task(tasks, model=model, dry_run=dry_run, chunking=chunking):
        from surfw.cli import housekeeping

        match task:
            case "--list":
                housekeeping.list_models(settings, json=json)
            case "--remove":
                housekeeping.remove_model(settings, remove or "", json=json)
            case "--prune":
                housekeeping.prune(settings, dry_run=dry_run, json=json)
            case "--verify":
                housekeeping.verify(settings, model, json=json)
        return
    if model is None:
        raise typer.BadParameter(
            "name a checkpoint to chunk, or say --list, --remove, --prune or --verify", param_hint="MODEL"
        )
    try:
        _chunk(
            model, settings, name=name, revision=revision, dtype=dtype, dry_run=dry_run, in_place=in_place, json=json
        )
    except KeyboardInterrupt as exc:
        raise KeyboardInterrupt("" if dry_run else "the same command goes on where it stopped") from exc


def _only_task(
    tasks: Mapping[str, bool], *, model: str | None, dry_run: bool, chunking: Mapping[str, bool]
) -> str | None:
    """Return the one task that was asked for; None for chunking, which has options of its own.

    Raises:
        BadParameter: options that exclude each other were given.
    """
    given = [option for option, is_given in tasks.items() if is_given]
    if not given:
        return None
    task = given[0]
    if len(given) > 1:
        raise typer.BadParameter(f"give one of {' and '.join(given)} at a time", param_hint=given[1])
    if model is not None and task != "--verify":
        raise typer.BadParameter(f"{task} takes no MODEL to chunk", param_hint="MODEL")
    if dry_run and task != "--prune":
        raise typer.BadParameter(f"does not go with {task}", param_hint="--dry-run")
    for option, is_given in chunking.items():
        if is_given:
            raise typer.BadParameter(f"is for chunking, and does not go with {task}", param_hint=option)
    return task


def _chunk(
    model: str,
    settings: Settings,
    *,
    name: str | None,
    revision: str | None,
    dtype: str | None,
    dry_run: bool,
    in_place: bool,
    json: bool,
) -> None:
    """Chunk a checkpoint, or show what that would write."""
    import asyncio

    from surfw.chunking import prepare_model, write_model
    from surfw.chunking.in_place import build_manifest, check_reach, write_in_place
    from surfw.cli import render
    from surfw.storage import open_backend
    from surfw.storage.origins import PlacedOptions, is_local_url

    # A folder takes no options, so those that are given with one are for the checkpoint.
    options = PlacedOptions(model if is_local_url(settings.store) else settings.store, settings.storage_options)
    backend = open_backend(settings.store, settings.storage_options)
    if in_place:
        check_reach(model, backend)
    with prepare_model(
        model,
        name=name,
        revision=revision,
        dtype=dtype,
        on_missing=settings.on_missing,
        show_progress=not json and render.err.is_terminal,
        storage_options=options.for_url(model),
    ) as prepared:
        from surfw.models.assembly import plan_least_budget  # torch is there by now

        least_bytes, token_bytes = plan_least_budget(prepared)
        facts = _facts(prepared, least_bytes, token_bytes)
        if dry_run:
            if in_place:
                asyncio.run(build_manifest(prepared))  # refuses weights that are not in the checkpoint as they are used
            if json:
                render.print_json(facts)
            else:
                _show_plan(prepared, least_bytes, token_bytes)
            return
        with render.byte_bar("chunking", prepared.plan.payload_bytes, quiet=json) as update:

            def progress(size: int, chunk: str) -> None:
                update(advance=size, description=chunk)

            if in_place:
                writing = write_in_place(prepared, backend, origin_options=options, progress=progress)
            else:
                writing = write_model(prepared, backend, progress=progress)
            manifest = asyncio.run(writing)
    place = display_url(settings.store)
    if json:
        render.print_json(facts | {"store": place, "digest": manifest.digest})
    else:
        render.say(
            f"{manifest.name}: {count(len(manifest.chunks), 'chunk')} ({count(manifest.layer_count, 'layer')}), "
            f"{format_size(manifest.payload_bytes)} in {place}{', which points at the checkpoint' if in_place else ''}"
        )


def _facts(prepared: "PreparedModel", least_bytes: int, token_bytes: int) -> dict[str, Any]:
    """What `--json` prints of the plan."""
    return {
        "model": prepared.name,
        "class": prepared.class_name,
        "dtype": prepared.dtype,
        "payload_bytes": prepared.plan.payload_bytes,
        "layers": _layer_count(prepared),
        "least_budget_bytes": least_bytes,
        "kv_token_bytes": token_bytes,
        "chunks": [
            {"name": chunk.name, "kind": chunk.kind, "tensors": len(chunk.tensors), "bytes": chunk.payload_bytes}
            for chunk in prepared.plan.chunks
        ],
    }


def _show_plan(prepared: "PreparedModel", least_bytes: int, token_bytes: int) -> None:
    from surfw.cli import render

    chunks = prepared.plan.chunks
    rows = [(one.name, one.kind, str(len(one.tensors)), format_size(one.payload_bytes)) for one in chunks]
    render.out.print(render.table(("chunk", "kind", "tensors", "size"), rows, numbers=("tensors", "size")))
    for_tokens = f", and {format_size(token_bytes)} for each token of a generation" if token_bytes else ""
    render.say(
        f"{prepared.name} ({prepared.class_name}, {prepared.dtype}): {count(len(chunks), 'chunk')}, "
        f"{count(_layer_count(prepared), 'layer')}, {format_size(prepared.plan.payload_bytes)}; "
        f"the smallest budget for weights that can run it: {format_size(least_bytes)}{for_tokens}. Nothing was written."
    )


def _layer_count(prepared: "PreparedModel") -> int:
    return sum(chunk.kind == "layer" for chunk in prepared.plan.chunks)
