"""What `infer` shows people: a live table in a terminal, plain text and a summary line elsewhere."""

from __future__ import annotations  # what comes from torch's rooms is named in types only

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from surfw.cli import explain_view, render
from surfw.config import count, format_size, is_server_url

if TYPE_CHECKING:
    from surfw.models.explain import Explanation
    from surfw.models.inference import InferenceResult
    from surfw.models.statistics import PlanFacts, RunTimes, Statistics
    from surfw.models.streaming import StreamingModel
    from surfw.settings import SettingOrigin

_SHOWN_VALUES = 8
_MOSTLY = 0.5


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a run came to.

    Attributes:
        model: the model's name.
        source: where its weights came from, without credentials.
        result: the text, or what an encoder gives.
        load_seconds: from the first import to the open model.
        statistics: of the model.
        peak_rss_bytes: the most memory that the process used.
    """

    model: str
    source: str
    result: InferenceResult
    load_seconds: float
    statistics: Statistics
    peak_rss_bytes: int

    def facts(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        result, statistics = self.result, self.statistics
        facts = {
            "model": self.model,
            "source": self.source,
            "text": result.text,
            "token_ids": result.token_ids,
            "prompt_tokens": result.prompt_tokens,
            "new_tokens": len(result.token_ids),
            "load_seconds": self.load_seconds,
            "ttft_seconds": result.ttft_seconds,
            "tpot_seconds": result.tpot_seconds,
            "tokens_per_second": result.tokens_per_second,
            "cache": statistics["cache"],
            "time": statistics["time"],
            "plan": statistics["plan"],
            "peak_rss_bytes": self.peak_rss_bytes,
        }
        encoder = {"embedding": result.embedding, "predictions": result.predictions}
        return facts | {name: value for name, value in encoder.items() if value is not None}


class PlainView:
    """Text on stdout as it comes, a summary line on stderr."""

    def __init__(self, *, quiet: bool, text: bool) -> None:
        """Choose what is shown.

        Args:
            quiet: nothing on stderr.
            text: the answer as text, as it comes; else token ids at the end.
        """
        self._quiet = quiet
        self._shows_text = text

    def note(self, text: str) -> None:
        """Say what is going on, in a line."""
        if not self._quiet:
            print(f"surfw: {text}", file=sys.stderr, flush=True)

    def explain(self, explanation: Explanation, origins: Mapping[str, SettingOrigin]) -> None:
        """Show what limits the run that comes now."""
        explain_view.show(explanation, origins, render.err)

    @contextmanager
    def running(self, streaming: StreamingModel) -> Iterator[None]:
        """Follow nothing; the text says it all."""
        yield

    def on_text(self, text: str) -> None:
        """Print a piece of the answer."""
        if self._shows_text:
            sys.stdout.write(text)
            sys.stdout.flush()

    def on_token(self, token: int, seconds: float) -> None:
        """Print nothing; the text says it all."""

    def done(self, report: Report) -> None:
        """End the text, or print what there is instead, and a summary."""
        text = encoder_text(report.result)
        if text is None:
            text = "" if self._shows_text else _ids(report.result)
        print(text, flush=True)
        self.note(summary(report))


class LiveView:
    """The text as it comes, and a table below it that follows the cache, the link and the tokens."""

    def __init__(self) -> None:
        """Nothing is shown yet."""
        self._text = ""
        self._times: list[float] = []

    def note(self, text: str) -> None:
        """Say what is going on, in a line."""
        render.err.print(f"surfw: {text}", style="dim", soft_wrap=True)

    def explain(self, explanation: Explanation, origins: Mapping[str, SettingOrigin]) -> None:
        """Show what limits the run that comes now."""
        explain_view.show(explanation, origins, render.err)
        render.err.print()

    @contextmanager
    def running(self, streaming: StreamingModel) -> Iterator[None]:
        """Follow the model while it runs; the live part is gone afterwards."""

        def view() -> Group:
            table = weights_table(streaming.statistics())
            if times := list(self._times):
                tpot = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None
                _add_token_rows(table, times[0], tpot, len(times) / times[-1])
            return Group(Text(self._text), Text(), table)

        with Live(get_renderable=view, console=render.out, refresh_per_second=8, transient=True):
            yield

    def on_text(self, text: str) -> None:
        """Take a piece of the answer; whole lines leave the live part and stay."""
        *lines, self._text = (self._text + text).split("\n")
        for line in lines:
            render.out.print(Text(line))

    def on_token(self, token: int, seconds: float) -> None:
        """Take a new token."""
        self._times.append(seconds)

    def done(self, report: Report) -> None:
        """Show what is left of the text, and the final figures."""
        result = report.result
        text = encoder_text(result)
        if text is None:
            text = self._text if result.text else _ids(result)
        render.out.print(Text(text))
        table = weights_table(report.statistics)
        _add_token_rows(table, result.ttft_seconds, result.tpot_seconds, result.tokens_per_second)
        table.add_row(
            "loading, peak memory", f"{render.seconds(report.load_seconds)}, {format_size(report.peak_rss_bytes)}"
        )
        render.err.print(table)
        render.err.print(Text(f"surfw: {summary(report)}"), style="dim", soft_wrap=True)


def weights_table(statistics: Statistics) -> Table:
    """Make the table of the weights' counters."""
    cache, time, latency = statistics["cache"], statistics["time"], statistics["fetch_latency_seconds"]
    return render.pair_table(
        "",
        [
            ("hits / prefetched / stalls", f"{cache['hits']} / {cache['prefetched']} / {cache['stalls']}"),
            ("fetched", format_size(cache["fetched_bytes"])),
            ("weights in memory", _memory_used(statistics)),
            ("KV cache", format_size(cache["kv_cache_bytes"])),
            ("fetch latency p50 / p95", render.latencies(latency)),
            (
                "stalled, computing",
                f"{render.seconds(time['stall_seconds'])}, {render.seconds(time['compute_seconds'])}",
            ),
        ],
    )


def _memory_used(statistics: Statistics) -> str:
    """Format the memory that weights take, and their budget."""
    used, plan = format_size(statistics["cache"]["resident_bytes"]), statistics["plan"]
    if plan is None or plan["budget_bytes"] is None:
        return used
    return f"{used} of a budget of {format_size(plan['budget_bytes'])}"


def _add_token_rows(table: Table, ttft: float | None, tpot: float | None, rate: float | None) -> None:
    if ttft is not None:
        table.add_row("time to first token (TTFT)", render.seconds(ttft))
    if tpot is not None:
        table.add_row("time per output token (TPOT)", render.seconds(tpot))
    if rate is not None:
        table.add_row("tokens/s", f"{rate:.2f}")


def summary(report: Report) -> str:
    """Say in a line what the run took, and why it was not faster."""
    result, cache, time = report.result, report.statistics["cache"], report.statistics["time"]
    if result.tokens_per_second is not None and result.ttft_seconds is not None:
        parts = [f"{count(len(result.token_ids), 'token')} at {result.tokens_per_second:.2f} tokens/s"]
        parts.append(f"TTFT {render.seconds(result.ttft_seconds)}")
    else:
        spent = time["stall_seconds"] + time["compute_seconds"]
        parts = [f"{count(result.prompt_tokens, 'token')} in {render.seconds(spent)}"]
    parts.append(f"{count(cache['hits'], 'hit')}, {cache['prefetched']} prefetched, {count(cache['stalls'], 'stall')}")
    parts.append(f"{format_size(cache['fetched_bytes'])} fetched")
    if cache["refetched_blocks"]:
        parts.append(f"{count(cache['refetched_blocks'], 'damaged block')} fetched again")
    parts.append(bottleneck(report.source, time, report.statistics["plan"]))
    return "; ".join(parts)


def bottleneck(source: str, time: RunTimes, plan: PlanFacts | None) -> str:
    """Say why the run was not faster, and what to do about it."""
    from surfw.models.statistics import stall_share

    share = stall_share(time)
    stalled = f"stalled {share:.0%} on {'the link' if is_server_url(source) else 'storage'}"
    if share < _MOSTLY:
        return f"{stalled}, computing the rest of the time"
    if plan is None or not plan["streamed"]:
        return f"{stalled}, until all weights were there"
    more = "more memory" if plan["limited_by"] == "default" else "more memory (--memory-budget)"
    return f"{stalled}: {more} keeps more layers, or bring the weights closer"


def encoder_text(result: InferenceResult) -> str | None:
    """An encoder's result in a form that suits a person; None for a model that generates."""
    if result.predictions is not None:
        lines = []
        for one in result.predictions:
            place = f"token {one['position']}: " if "position" in one else ""
            lines.append(place + ", ".join(f"{c['text']} ({c['probability']:.1%})" for c in one["candidates"]))
        return "\n".join(lines)
    values = result.embedding
    if values is None:
        return None
    length = sum(value * value for value in values) ** 0.5
    shown = ", ".join(f"{value:.4f}" for value in values[:_SHOWN_VALUES])
    more = ", …" if len(values) > _SHOWN_VALUES else ""
    return (
        f"embedding of {len(values)} values, length {length:.4f}: [{shown}{more}]  (mean over tokens; all with --json)"
    )


def _ids(result: InferenceResult) -> str:
    return " ".join(map(str, result.token_ids))
