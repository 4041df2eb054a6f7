"""The output of `stats --run`: where the time of a traced run went, by phase, by token, and by layer."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from surfw.cli import render
from surfw.cli.status import percent
from surfw.config import count, format_size
from surfw.timeline import LayerTime, RunTimes, TokenTime, read_run

_BAR = 24
_FULL, _PARTS = "█", " ▏▎▍▌▋▊▉"


def show_run(path: Path, *, json: bool) -> None:
    """Print where the time of a traced run went."""
    run = read_run(path)
    if json:
        render.print_json(asdict(run))
        return
    for number, part in enumerate((_whole(run), _tokens(run), _layers(run.layers))):
        if part:
            if number:
                render.out.print()
            headings, rows = part
            render.print_table(headings, rows, numbers=headings[1:-1])
    for line in _remarks(run):
        render.say(line)


Table = tuple[Sequence[str], list[tuple[str, ...]]]


def _whole(run: RunTimes) -> Table:
    """Make the table of the whole run."""
    running = run.wall_seconds * run.covered_share - sum(one.seconds for one in run.phases)
    parts = [(one.name, one.seconds) for one in run.phases]
    if run.layers:
        parts.insert(max(0, len(parts) - 1), (count(run.tokens, "token") if run.tokens else "running", running))
    rows = [(name, render.seconds(taken), bar(taken / run.wall_seconds)) for name, taken in parts]
    return ("the run", "time", ""), [*rows, ("in all", render.seconds(run.wall_seconds), "")]


def _tokens(run: RunTimes) -> Table | None:
    """Make the table of the first token, and the mean of the later ones."""
    found = [one for one in (run.first_token, run.later_token) if one is not None]
    if not found:
        return None
    shown = found[-1]

    def row(name: str, taken: list[float]) -> tuple[str, ...]:
        return name, *map(render.seconds, taken), bar(taken[-1] / shown.seconds if shown.seconds else 0)

    untraced = [_untraced(one) for one in found]
    rows = [
        row("layers compute", [one.layers_seconds for one in found]),
        row("between layers", [one.between_seconds for one in found]),
        row("waiting for weights", [one.stall_seconds for one in found]),
    ]
    if untraced[-1] > shown.seconds / 100:
        rows.append(row("what is not traced", untraced))
    return ("a token's time", *("the first", "later ones")[: len(found)], ""), rows


def _untraced(one: TokenTime) -> float:
    return max(0.0, one.seconds - one.layers_seconds - one.between_seconds - one.stall_seconds)


def _layers(layers: Sequence[LayerTime]) -> Table | None:
    """Make the table of each layer in a pass."""
    if not layers:
        return None
    most = max(one.compute_seconds + one.stall_seconds for one in layers) or 1.0
    columns = {
        "computes": [one.compute_seconds for one in layers],
        "waited for": [one.stall_seconds for one in layers],
        "fetch": [one.fetch_seconds for one in layers],
        "decode": [one.decode_seconds for one in layers],
        "copy": [one.copy_seconds for one in layers],
    }
    shown = {name: values for name, values in columns.items() if name == "computes" or any(values)}
    rows = []
    for place, one in enumerate(layers):
        cells = [render.seconds(values[place]) if values[place] else "–" for values in shown.values()]
        size = format_size(one.fetched_bytes) if one.fetched_bytes else "–"
        rows.append((one.layer, *cells, size, bar((one.compute_seconds + one.stall_seconds) / most)))
    return ("a layer in a pass", *shown, "fetched", ""), rows


def _remarks(run: RunTimes) -> Iterator[str]:
    if run.background_seconds:
        busy = ", ".join(f"{kind} {render.seconds(taken)}" for kind, taken in run.background_seconds.items())
        yield f"beside the main thread: {busy}; several at once count each"
    if run.covered_share < 0.98:
        yield f"the trace says what the main thread did in {percent(run.covered_share)} of the time"
    if run.dropped_spans:
        yield f"the trace lacks {count(run.dropped_spans, 'span')}: it was full; trace fewer tokens"


def bar(share: float) -> str:
    """Draw a bar for a share from 0 to 1, in eighths of a column."""
    eighths = round(min(1.0, max(0.0, share)) * _BAR * 8)
    return (_FULL * (eighths // 8) + _PARTS[eighths % 8]).rstrip()
