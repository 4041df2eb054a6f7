"""The outcome of a run of `infer`: facts for scripts, and a summary in words."""

from __future__ import annotations  # modules that import torch are named in type hints only

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surfw.cli.addresses import is_on_this_machine
from surfw.cli.guessing import guessed
from surfw.cli.status import duration, percent, rate
from surfw.codec import PACKED_CODECS
from surfw.config import MB, count, format_size, is_server_url

if TYPE_CHECKING:
    from collections.abc import Callable

    from surfw.models.explain import Advice
    from surfw.models.inference import InferenceResult
    from surfw.models.statistics import PlanFacts, RunTimes, Statistics
    from surfw.wire import ServerStats

_SHOWN_VALUES = 8
_POOLINGS = {
    "mean": "mean over tokens",
    "cls": "first token",
    "max": "maximum over tokens",
    "mean_sqrt_len_tokens": "sum over tokens by the root of their number",
    "weightedmean": "mean over tokens, the later the heavier",
    "lasttoken": "last token",
    "projection": "projection",
    "pooler": "pooler",
}
"""How each pooling is described."""
_MOSTLY = 0.5
_BUSY = 0.5
"""If threads wait for a processor for this share of a run or more, other work competes with it."""
_BRIEF_SECONDS = 1.0
"""Competing work is not reported for a shorter run."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """The outcome of a run.

    Attributes:
        model: the model's name.
        source: where its weights came from, without credentials.
        result: the text and tokens, or an encoder's output.
        load_seconds: from the first import to the open model.
        statistics: of the model.
        peak_rss_bytes: the peak memory of the process.
        advice: what more memory would gain, if known.
        is_whole: False for a run that was interrupted or failed.
        queued_seconds: the total time its threads waited for a processor; see `queued_seconds`.
        ask_server: returns the statistics of the server that the weights came from; None without a server.
        adapter: the name of the applied adapter, if any.
    """

    model: str
    source: str
    result: InferenceResult
    load_seconds: float
    statistics: Statistics
    peak_rss_bytes: int
    advice: Advice | None = None
    is_whole: bool = True
    queued_seconds: float = 0.0
    ask_server: Callable[[], ServerStats | None] = lambda: None
    adapter: str | None = None

    def facts(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        result, statistics = self.result, self.statistics
        facts = {
            "model": self.model,
            "source": self.source,
            "codec": statistics["plan"]["codec"] if statistics["plan"] else None,
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
        some = {
            "adapter": self.adapter, "embedding": result.embedding, "pooling": result.pooling,
            "predictions": result.predictions, "experts": statistics.get("experts"),
            "speculation": statistics.get("speculation"),
        }  # fmt: skip
        return facts | {name: value for name, value in some.items() if value is not None}


def place_of(source: str) -> str:
    """Return what a run waits for: `link`, `server` (on this machine), `disk`, or `storage` (remote)."""
    if is_server_url(source):
        return "server" if is_on_this_machine(source) else "link"
    return "storage" if "://" in source and not source.startswith("file://") else "disk"


def summary(report: Report) -> str:
    """Say what a run took, why it was not faster, and what would help most."""
    result, statistics = report.result, report.statistics
    parts = [("" if report.is_whole else "stopped after ") + _took(result, statistics["time"])]
    if (plan := statistics["plan"]) and plan["codec"] in PACKED_CODECS:
        parts.append(f"weights are {plan['codec']}, not exact")
    if damaged := statistics["cache"]["refetched_blocks"]:
        parts.append(f"{count(damaged, 'damaged block')} fetched again")
    if experts := statistics.get("experts"):
        parts.append(f"{percent(experts['hit_rate'])} of the experts that were chosen were in memory")
    parts += guessed(statistics.get("speculation"))
    parts.append(limits(report.source, statistics["time"], statistics["plan"], report.advice))
    parts += _busy(report)
    if report.is_whole:
        parts += _server_cache(statistics, report.ask_server)
    return "; ".join(parts)


def queued_seconds() -> float:
    """Return the total time this process's threads have waited for a processor; 0 if the system does not report it."""
    waited = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        with suppress(OSError, ValueError, IndexError):  # the thread has ended, or the system has no schedstat
            waited += int(path.read_text().split()[1])
    return waited / 1e9


def _busy(report: Report) -> list[str]:
    """Warn if other work kept the threads of a compute-bound run waiting for processors."""
    from surfw.models.statistics import stall_share

    time = report.statistics["time"]
    spent = time["stall_seconds"] + time["compute_seconds"]
    is_alone = report.queued_seconds < _BUSY * spent or os.environ.get("OMP_NUM_THREADS") == "1"
    if spent < _BRIEF_SECONDS or is_alone or stall_share(time) >= _MOSTLY:
        return []
    return ["other work kept its threads waiting for a processor; OMP_NUM_THREADS=1 may be faster then"]


def _server_cache(statistics: Statistics, ask_server: Callable[[], ServerStats | None]) -> list[str]:
    """Warn if a run mostly waited and its server's cache is smaller than one pass, so that nothing is ever hit."""
    from surfw.models.statistics import stall_share
    from surfw.wire import find_shortage

    plan = statistics["plan"]
    if plan is None or not plan["bytes_per_pass"] or stall_share(statistics["time"]) < _MOSTLY:
        return []
    stats = ask_server()
    if stats is None or (shortage := find_shortage(stats, plan["bytes_per_pass"])) is None:
        return []
    cache, one = format_size(stats["cache"]["capacity_bytes"]), format_size(plan["bytes_per_pass"])
    small = f"the server's cache of {cache} is smaller than one pass ({one}), so it reads its storage each time"
    return [small, f"--cache-mb {shortage['cache_mb']} there would help"]


def _took(result: InferenceResult, time: RunTimes) -> str:
    """Say how many tokens took how long."""
    tokens, first, each = len(result.token_ids), result.ttft_seconds, result.tpot_seconds
    if not tokens or first is None:
        spent = time["stall_seconds"] + time["compute_seconds"]
        return f"{count(result.prompt_tokens, 'token')} in {duration(spent)}"
    if not each:
        return f"{count(tokens, 'token')} in {duration(first)}"
    total = first + each * (tokens - 1)
    return (
        f"{count(tokens, 'token')} in {duration(total)}, the first after {duration(first)}, then {rate(1 / each)} tok/s"
    )


def limits(source: str, time: RunTimes, plan: PlanFacts | None, advice: Advice | None = None) -> str:
    """Say why a run was not faster, and what to do about it."""
    from surfw.models.statistics import copy_share, stall_share

    share = stall_share(time)
    waited = f"waited for the {place_of(source)} {percent(share)} of the time"
    if (copied := copy_share(time)) >= _MOSTLY > share:
        return f"copying to the device limited it, {percent(copied)} of the time; {waited}"
    if share < _MOSTLY:
        return f"computing limited it; {waited}"
    if plan is None or not plan["bytes_per_pass"]:
        return f"{waited}, until all weights were there"
    if advice is None:
        more = "more memory" if plan["limited_by"] == "default" else "more memory (--memory-budget)"
        return f"{waited}; {more} would keep more layers"
    how = "" if plan["limited_by"] == "default" else f" (--memory-budget {-(-advice.budget_bytes // MB)}MB)"
    speed = rate(advice.tokens_per_second)
    return f"{waited}; {format_size(advice.more_bytes)} more memory{how} would allow up to {speed} tok/s"


def encoder_text(result: InferenceResult) -> str | None:
    """Format an encoder's output for people; None for a model that generates."""
    if result.predictions is not None:
        return "\n".join(map(_prediction, result.predictions))
    values = result.embedding
    if values is None:
        return None
    length = sum(value * value for value in values) ** 0.5
    shown = ", ".join(f"{value:.4f}" for value in values[:_SHOWN_VALUES])
    more = ", …" if len(values) > _SHOWN_VALUES else ""
    return (
        f"embedding of {len(values)} values, length {length:.4f}: [{shown}{more}]  ({_pooling(result)}all with --json)"
    )


def _prediction(one: dict[str, Any]) -> str:
    place = f"pair {one['pair'] + 1}: " if "pair" in one else ""
    if "position" in one:
        place = f"token {one['position']}" + (f" {one['token']!r}" if one.get("token") else "") + ": "
    return place + ", ".join(map(_candidate, one["candidates"]))


def _candidate(one: dict[str, Any]) -> str:
    return (
        f"{one['text']} ({percent(one['probability'], 1)})"
        if "probability" in one
        else f"{one['text']} {one['score']:.4f}"
    )


def _pooling(result: InferenceResult) -> str:
    """Say how an embedding was pooled from the hidden states, and what determined that."""
    if (how := result.pooling) is None:
        return ""
    modes = " and ".join(_POOLINGS.get(mode, mode) for mode in how["modes"])
    normalised = ", length 1" if how["normalised"] else ""
    return (
        f"{modes}{normalised}, since {how['from']}; "
        if " " in how["from"]
        else f"{modes}{normalised}, by {how['from']}; "
    )
