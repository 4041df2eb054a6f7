"""`surfw bench`: measurements against a baseline of the same run."""

from typing import Annotated, Any

import typer

from surfw.cli import options

app = typer.Typer(
    help="Measure surfw against a baseline in the same run.",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
)


@app.command("wire", epilog="Example:  surfw bench wire --rounds 7 --json")
def wire(
    rounds: Annotated[int, typer.Option(min=1, help="Alternations with the baseline; medians are shown.")] = 7,
    json: options.Json = False,
) -> None:
    """From a server's cache into a client's memory, against a raw TCP socket that moves the same bytes."""
    from surfw.bench.wire import bench_wire

    show(bench_wire(rounds=rounds), json=json)


@app.command("chunk", epilog="Example:  surfw bench chunk ./my-model --rounds 3")
def chunk(
    model: Annotated[str, typer.Argument(help="A hub id or a local directory.")],
    folder: Annotated[
        str | None, typer.Option("--dir", help="Where to write; removed afterwards. [default: the temporary folder]")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Alternations with the baseline; medians are shown.")] = 3,
    json: options.Json = False,
) -> None:
    """Chunking a checkpoint, against `cp` of the same bytes, both synced to the disk."""
    from surfw.bench.chunk import bench_chunk

    show(bench_chunk(model, folder=folder, rounds=rounds), json=json)


def show(result: Any, *, json: bool) -> None:
    """A result as a table, or as one JSON object."""
    from rich.table import Table

    from surfw.cli import render

    if json:
        render.print_json(result.as_dict())
        return
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("what", "value", "baseline", "ratio", "ceiling", "share", "verified"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    for row in result.rows:
        table.add_row(
            row.name,
            f"{row.value:.3g} {row.unit}",
            *("" if value is None else f"{value:.3g}" for value in (row.baseline, row.ratio, row.ceiling, row.share)),
            "" if row.verified is None else ("yes" if row.verified else "no"),
        )
    render.out.print(table)
    render.out.print("on " + ", ".join(f"{name} {value}" for name, value in result.machine.items()), style="dim")
