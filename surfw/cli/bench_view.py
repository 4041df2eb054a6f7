"""The output of `bench` for people."""

from surfw.bench.compare import Comparison
from surfw.bench.infer_result import InferResult
from surfw.bench.quality import QualityResult
from surfw.bench.report import interval_of, percent_of
from surfw.bench.result import Result
from surfw.cli import render
from surfw.cli.status import percent
from surfw.config import count, format_size


def show_rows(result: Result) -> None:
    """Print rows against their baselines."""
    _show_table(
        ("what", "value", "spread", "baseline", "ratio", "ceiling", "share", "verified"),
        [
            (
                row.name,
                f"{row.value:.3g} {row.unit}",
                _range(row.low, row.high),
                *(_number(value) for value in (row.baseline, row.ratio, row.ceiling, row.share)),
                "" if row.verified is None else ("yes" if row.verified else "no"),
            )
            for row in result.rows
        ],
    )
    for row in result.rows:
        if row.note:
            render.out.print(f"- {row.name}: {row.note}", soft_wrap=True)
    _show_machine(result)


def show_changes(comparison: Comparison) -> None:
    """Print how ratios changed since an earlier run."""
    render.out.print()
    _show_table(
        (f"ratios since {comparison.file}", "before", "now", "change", "95 % interval", "verdict"),
        [
            (one.name, _number(one.before), _number(one.now), percent_of(one.change), interval_of(one), one.verdict)
            for one in comparison.changes
        ],
    )
    render.out.print(f"- {comparison.verdict_from}", soft_wrap=True)
    if comparison.other_machine:
        machine = ", ".join(f"{name} {value}" for name, value in comparison.other_machine.items())
        render.out.print(f"- it was measured on another machine: {machine}", soft_wrap=True)


def show_comparison(result: InferResult) -> None:
    """Print the speed of each peer, its ceiling, and notes on the comparison."""
    _show_table(
        ("", "tok/s", "spread", "surfw is", "TTFT", "memory", "and cache"),
        [
            (
                row.name,
                "failed" if row.failed else _number(row.value),
                _range(row.low, row.high),
                "" if row.surfw_ratio is None else f"{row.surfw_ratio:.3g} ×",
                "" if row.ttft_seconds is None else render.seconds(row.ttft_seconds),
                "" if row.peak_rss_bytes is None else format_size(row.peak_rss_bytes),
                "" if row.peak_group_bytes is None else format_size(row.peak_group_bytes),
            )
            for row in result.rows
        ],
    )
    ceilings = [row for row in result.rows if row.ceiling]
    if ceilings:
        render.out.print()
        _show_table(
            ("after the first token", "tok/s", "ceiling", "share", "streamed per token"),
            [
                (
                    row.name,
                    _number(row.decode_value),
                    _number(row.ceiling),
                    percent(row.share or 0),
                    format_size(row.streamed_bytes_per_token or 0),
                )
                for row in ceilings
            ],
        )
    work = result.work
    what = f"{work['model']}: {count(work['prompt_tokens'], 'token')} of prompt, {work['new_tokens']} generated, greedy"
    rounds = f"; medians of {work['rounds']} rounds" if work["rounds"] > 1 else ""
    render.out.print(f"\n{what}{rounds}; memory is the peak of the process", soft_wrap=True)
    for note in result.notes:
        render.out.print(f"- {note}", soft_wrap=True)
    _show_machine(result)


def show_quality(result: QualityResult) -> None:
    """Print how far each form is from the unquantised model."""
    _show_table(
        ("", "size", "perplexity", "KL, nats", "same next token", "cosine", "relative error"),
        [
            (
                row.name,
                "failed" if row.stored_bytes is None else format_size(row.stored_bytes),
                _number(row.perplexity, 4),
                _number(row.kl, 2),
                _percent(row.agreement),
                "" if row.cosine is None else f"{row.cosine:.5f}",
                _percent(row.relative_error),
            )
            for row in result.rows
        ],
    )
    work = result.work
    text = "the text that comes with surfw" if work["text"] is None else work["text"]
    render.out.print(
        f"\n{work['model']}: {work['tokens']:,} tokens of {text}, in {count(work['passages'], 'passage')}",
        soft_wrap=True,
    )
    for note in result.notes:
        render.out.print(f"- {note}", soft_wrap=True)
    _show_machine(result)


def _show_table(headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Print a table without its empty columns."""
    shown = [index for index in range(len(headings)) if any(row[index] for row in rows)]
    names = [headings[index] for index in shown]
    render.print_table(names, [[row[index] for index in shown] for row in rows], numbers=names[1:])


def _show_machine(result: Result | InferResult | QualityResult) -> None:
    machine = ", ".join(f"{name} {value}" for name, value in result.machine.items())
    render.out.print(f"on {machine}", style="dim", soft_wrap=True)


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}g}"


def _percent(value: float | None) -> str:
    return "" if value is None else percent(value, 1)


def _range(low: float | None, high: float | None) -> str:
    """Format the lowest and highest value of several rounds; empty if they do not differ."""
    return "" if low is None or high is None or low == high else f"{low:.3g}–{high:.3g}"
