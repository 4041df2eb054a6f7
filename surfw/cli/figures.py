"""Tables of an open model's figures: for a run (`infer --live full`), and for a session (`chat`)."""

from __future__ import annotations  # modules that import torch are named in type hints only

from typing import TYPE_CHECKING

from surfw.cli import render
from surfw.cli.status import percent
from surfw.config import count, format_size

if TYPE_CHECKING:
    from rich.table import Table

    from surfw.models.conversation import ConversationFacts
    from surfw.models.statistics import Statistics


def run_table(
    statistics: Statistics, first_seconds: float | None, token_seconds: float | None, *, generates: bool
) -> Table:
    """Make the table of a run, with the most wanted figures first.

    Args:
        statistics: the model's statistics.
        first_seconds: the time to the first token; None if no token was generated.
        token_seconds: the mean time of each later token; None if no later token was generated.
        generates: whether the model generates; others have no KV cache.
    """
    rows = []
    if first_seconds is not None and generates:
        rows.append(("time to first token (TTFT)", render.seconds(first_seconds)))
    if token_seconds is not None:
        rows.append(("time per output token (TPOT)", render.seconds(token_seconds)))
    rows += _rows(statistics)
    if generates:
        rows.append(("KV cache", format_size(statistics["cache"]["kv_cache_bytes"])))
    return render.pair_table("", rows)


def session_table(conversation: ConversationFacts, statistics: Statistics) -> Table:
    """Make the table of a session: the length of the conversation, and the totals of its turns."""
    bound = "" if conversation.positions is None else f" of {conversation.positions:,}"
    cached = conversation.cached_tokens
    if cached or not conversation.tokens:
        kept = f"{format_size(conversation.kv_cache_bytes)} for {count(cached, 'token')}"
    else:
        kept = "empty; the next turn reads the whole conversation again"
    rows = [
        ("conversation", f"{count(conversation.turns, 'turn')}, {conversation.tokens:,}{bound} tokens"),
        ("KV cache", kept),
        *_rows(statistics),
    ]
    return render.pair_table("", rows)


def _rows(statistics: Statistics) -> list[tuple[str, str]]:
    """Make the rows on cache hits, waiting, and memory."""
    cache, spent, latency = statistics["cache"], statistics["time"], statistics["fetch_latency_seconds"]
    experts = statistics.get("experts")
    chosen = [("experts in memory when chosen", percent(experts["hit_rate"]))] if experts else []
    return [
        ("hits / prefetched / stalls", f"{cache['hits']:,} / {cache['prefetched']:,} / {cache['stalls']:,}"),
        ("hit rate", percent(cache["hit_rate"])),
        *chosen,
        ("stalled, computing", f"{render.seconds(spent['stall_seconds'])}, {render.seconds(spent['compute_seconds'])}"),
        ("fetch latency p50 / p95", render.latencies(latency)),
        ("fetched", format_size(cache["fetched_bytes"])),
        ("weights in memory", _memory_used(statistics)),
    ]


def _memory_used(statistics: Statistics) -> str:
    """Format the memory that weights take, and their budget."""
    used, plan = format_size(statistics["cache"]["resident_bytes"]), statistics["plan"]
    if plan is None or plan["budget_bytes"] is None:
        return used
    return f"{used} of a budget of {format_size(plan['budget_bytes'])}"
