"""Format the status of a run: a few lines that fit the window, from typed figures. Pure."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from surfw.cli.streams import one_line
from surfw.config import format_size

if TYPE_CHECKING:
    from surfw.models.progress import Outage, RunFigures

MOST_LINES = 3
_BETWEEN = " · "
_SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
_FRAMES_PER_SECOND = 10


def status_lines(parts: Iterable[str], width: int, *, most: int = MOST_LINES) -> list[str]:
    """Put parts on lines that are narrower than the window.

    Args:
        parts: the most important first.
        width: of the window, in cells.
        most: the most lines; parts at the end that do not fit are left out, and none is cut.
    """
    from rich.cells import cell_len

    lines: list[str] = []
    for part in parts:
        joined = f"{lines[-1]}{_BETWEEN}{part}" if lines else part
        if lines and cell_len(joined) < width:
            lines[-1] = joined
        elif cell_len(part) < width and len(lines) < most:
            lines.append(part)
        else:
            break
    return lines


def run_parts(run: "RunFigures", place: str) -> list[str]:
    """Describe the progress of a run, the most important figures first.

    Args:
        run: the figures.
        place: what is waited for: `link`, `server`, `disk` or `storage`.
    """
    parts = []
    if run.outage is not None:
        parts.append(_describe_outage(run.outage))
    if run.tokens:
        parts.append(f"{run.tokens}/{run.most_tokens} tokens")
    if run.tokens_per_second is not None:
        parts.append(f"{rate(run.tokens_per_second)} tok/s")
    if run.bytes_per_second is not None:
        parts.append(f"{_megabytes(run.bytes_per_second)}/s")
    if run.layer:
        parts.append(f"layer {run.layer}/{run.layers}")
    if run.stall_share is not None:
        parts.append(f"waits for {place} {percent(run.stall_share)}")
    if run.kept_layers is not None:
        parts.append(f"{run.kept_layers} of {run.layers} layers kept")
    if run.eta_seconds is not None:
        parts.append(f"ETA {clock(run.eta_seconds)}")
    return parts


def _describe_outage(outage: "Outage") -> str:
    """Describe an outage: `link lost 12 s ago, trying 10.0.0.2:8765 in 3 s, 4 s of work buffered`."""
    address = one_line(outage.trying.partition("://")[2] or outage.trying)
    when = f" in {age(outage.in_seconds)}" if outage.in_seconds >= 1 else ""
    buffered = f", {age(outage.buffered_seconds)} of work buffered" if outage.buffered_seconds >= 1 else ""
    return f"link lost {age(outage.seconds)} ago, trying {address}{when}{buffered}"


def spinner(seconds: float) -> str:
    """Return the spinner's frame at a time in seconds."""
    return _SPINNER[int(seconds * _FRAMES_PER_SECOND) % len(_SPINNER)]


def rate(per_second: float) -> str:
    """Format a number per second: `0.12`, `1.08`, `23.5`, `117`."""
    return f"{per_second:.{2 if per_second < 10 else 1 if per_second < 100 else 0}f}"


def percent(share: float, places: int = 0) -> str:
    """Format a share as a percentage with this many decimal places: `55 %`."""
    return f"{share * 100:.{places}f} %"


def duration(seconds: float) -> str:
    """Format how long something took: `0.35 s`, `2.1 s`, `33 s`, `2 min 5 s`, `1 h 2 min`."""
    if seconds < 0.995:
        return f"{seconds:.2f} s"
    return f"{seconds:.1f} s" if seconds < 9.95 else age(round(seconds))


def age(seconds: float) -> str:
    """Format how long something has lasted, in whole units: `45 s`, `3 min 12 s`, `2 h 5 min`, `3 d 4 h`."""
    minutes, rest = divmod(max(0, int(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "min"), (rest, "s")]
    first = next((place for place, (number, _) in enumerate(parts) if number), 0)
    return " ".join(f"{number} {unit}" for number, unit in parts[first : first + 2] if number) or "0 s"


def clock(seconds: float) -> str:
    """Format the remaining time: `0:09`, `1:27`, `1:02:05`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _megabytes(count: float) -> str:
    """Format bytes, without decimals from ten units on."""
    number, unit = format_size(count).split(" ")
    return f"{float(number):.0f} {unit}" if float(number) >= 10 else f"{number} {unit}"
