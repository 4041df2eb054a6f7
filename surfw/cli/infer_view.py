"""What `infer` shows: a live table in a terminal, plain text and a summary line elsewhere, one object with --json."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from surfw.cli import explain_view, render
from surfw.config import count, format_size, is_server_url

_SHOWN_VALUES = 8
_MOSTLY = 0.5


class PlainView:
    """Text on stdout as it comes, a summary line on stderr; or one JSON object."""

    def __init__(self, *, json: bool, quiet: bool, ids: bool) -> None:
        """Choose what is shown."""
        self._json = json
        self._quiet = quiet
        self._ids = ids

    def note(self, text: str) -> None:
        """A line about what is going on."""
        if not self._quiet:
            print(f"surfw: {text}", file=sys.stderr, flush=True)

    def explain(self, explanation: Any, origins: Any) -> None:
        """What limits the run that comes now."""
        if not self._json:
            explain_view.show(explanation, origins, render.err)

    @contextmanager
    def running(self, streaming: Any) -> Iterator[None]:
        """While the model runs."""
        yield

    def on_text(self, text: str) -> None:
        """A piece of the answer."""
        if not self._json and not self._ids:
            sys.stdout.write(text)
            sys.stdout.flush()

    def on_token(self, token: int, seconds: float) -> None:
        """A new token; the text says it all."""

    def done(self, facts: dict[str, Any]) -> None:
        """The end."""
        if self._json:
            render.print_json(facts)
            return
        if "embedding" in facts or "predictions" in facts:
            print(encoder_text(facts), flush=True)
        else:
            print(" ".join(map(str, facts["token_ids"])) if self._ids else "", flush=True)
        self.note(summary(facts))


class LiveView:
    """The text as it comes, and a table below it that follows the cache, the link and the tokens."""

    def __init__(self) -> None:
        """Nothing is shown yet."""
        self._text = ""
        self._times: list[float] = []
        self._streaming: Any = None
        self._statistics: dict[str, Any] = {}

    def note(self, text: str) -> None:
        """A line about what is going on."""
        render.err.print(f"surfw: {text}", style="dim", soft_wrap=True)

    def explain(self, explanation: Any, origins: Any) -> None:
        """What limits the run that comes now."""
        explain_view.show(explanation, origins, render.err)
        render.err.print()

    @contextmanager
    def running(self, streaming: Any) -> Iterator[None]:
        """While the model runs; the live part is gone afterwards."""
        self._streaming = streaming
        with Live(get_renderable=self._view, console=render.out, refresh_per_second=8, transient=True):
            yield
        self._statistics = streaming.statistics()

    def on_text(self, text: str) -> None:
        """A piece of the answer; whole lines leave the live part and stay."""
        *lines, self._text = (self._text + text).split("\n")
        for line in lines:
            render.out.print(Text(line))

    def on_token(self, token: int, seconds: float) -> None:
        """A new token."""
        self._times.append(seconds)

    def done(self, facts: dict[str, Any]) -> None:
        """The end: what is left of the text, and the final figures."""
        if "embedding" in facts or "predictions" in facts:
            render.out.print(Text(encoder_text(facts)))
        else:
            render.out.print(Text(self._text if facts["text"] else " ".join(map(str, facts["token_ids"]))))
        table = weights_table(self._statistics)
        _add_token_rows(table, facts["ttft_seconds"], facts["tpot_seconds"], facts["tokens_per_second"])
        table.add_row(
            "loading, peak memory", f"{render.seconds(facts['load_seconds'])}, {format_size(facts['peak_rss_bytes'])}"
        )
        render.err.print(table)
        render.err.print(Text(f"surfw: {summary(facts)}"), style="dim", soft_wrap=True)

    def _view(self) -> Group:
        table = weights_table(self._streaming.statistics())
        if times := list(self._times):
            tpot = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None
            _add_token_rows(table, times[0], tpot, len(times) / times[-1])
        return Group(Text(self._text), Text(), table)


def weights_table(statistics: dict[str, Any]) -> Table:
    """Counters of the weights on their way."""
    cache, time, latency = (statistics[part] for part in ("cache", "time", "fetch_latency_seconds"))
    return render.facts(
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


def _memory_used(statistics: dict[str, Any]) -> str:
    """What weights take now, and of what."""
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


def summary(facts: dict[str, Any]) -> str:
    """One line: what it took, and why it was not faster."""
    cache, time = facts["cache"], facts["time"]
    spent = time["stall_seconds"] + time["compute_seconds"]
    parts = []
    if facts["tokens_per_second"] is not None:
        parts.append(f"{count(facts['new_tokens'], 'token')} at {facts['tokens_per_second']:.2f} tokens/s")
        parts.append(f"TTFT {render.seconds(facts['ttft_seconds'])}")
    else:
        parts.append(f"{count(facts['prompt_tokens'], 'token')} in {render.seconds(spent)}")
    parts.append(f"{count(cache['hits'], 'hit')}, {cache['prefetched']} prefetched, {count(cache['stalls'], 'stall')}")
    parts.append(f"{format_size(cache['fetched_bytes'])} fetched")
    if cache["refetched_blocks"]:
        parts.append(f"{count(cache['refetched_blocks'], 'damaged block')} fetched again")
    parts.append(bottleneck(facts["source"], time["stall_seconds"], spent, facts["plan"]))
    return "; ".join(parts)


def bottleneck(source: str, stall_seconds: float, spent_seconds: float, plan: dict[str, Any]) -> str:
    """Why it was not faster, and what to do about it."""
    share = stall_seconds / spent_seconds if spent_seconds else 0.0
    on = "the link" if is_server_url(source) else "storage"
    if share < _MOSTLY:
        return f"stalled {share:.0%} on {on}, computing the rest of the time"
    if not plan["streamed"]:
        return f"stalled {share:.0%} on {on}, until all weights were there"
    more = "more memory" if plan["limited_by"] == "default" else "more memory (--memory-budget)"
    return f"stalled {share:.0%} on {on}: {more} keeps more layers, or bring the weights closer"


def encoder_text(facts: dict[str, Any]) -> str:
    """An encoder's result in a form that suits a person."""
    if "predictions" in facts:
        lines = []
        for one in facts["predictions"]:
            place = f"token {one['position']}: " if "position" in one else ""
            lines.append(place + ", ".join(f"{c['text']} ({c['probability']:.1%})" for c in one["candidates"]))
        return "\n".join(lines)
    values = facts["embedding"]
    length = sum(value * value for value in values) ** 0.5
    shown = ", ".join(f"{value:.4f}" for value in values[:_SHOWN_VALUES])
    more = ", …" if len(values) > _SHOWN_VALUES else ""
    return (
        f"embedding of {len(values)} values, length {length:.4f}: [{shown}{more}]  (mean over tokens; all with --json)"
    )
