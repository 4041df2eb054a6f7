"""How long a model's runs took and what is kept in memory, as plain data."""

import time
from typing import TypedDict

from surfw.codec import packed_codec
from surfw.config import MB
from surfw.metrics import Metrics, hit_rate
from surfw.models.assembly import LimitedBy, ModelParts
from surfw.models.progress import Outage, Progress
from surfw.models.speculation import Speculation, SpeculationFacts


class CacheInfo(TypedDict):
    """What is kept in memory.

    A *hit* is a layer that was resident when execution reached it; `misses` had to be fetched for this very use.
    `cached_components` are the names of the chunks in memory, least recently used first; `memory_usage_mb` is what
    their buffers take, in millions of bytes.
    """

    hits: int
    misses: int
    hit_rate: float
    cached_components: list[str]
    cache_size: int
    memory_usage_mb: float


class InferenceStats(TypedDict):
    """What the runs so far took, in seconds.

    `avg_inference_time` is the mean over completed runs: calls of the model, and generations as a whole.
    `stall_seconds` were spent waiting for weights, `compute_seconds` are the rest of all runs; `fetch_seconds` add up
    all fetches, most of which overlap with computing.
    """

    cache_hit_rate: float
    avg_inference_time: float
    total_inferences: int
    stall_seconds: float
    fetch_seconds: float
    compute_seconds: float


class CacheCounts(TypedDict):
    """What was found in memory, as `CacheInfo` has it, and what is there, in bytes.

    `fetched_bytes` are stored bytes; `decoded_bytes` are the payload of those that came in coded forms, and
    `copied_bytes` what was copied to a device.
    """

    hits: int
    misses: int
    prefetched: int
    stalls: int
    hit_rate: float
    resident_bytes: int
    fetched_bytes: int
    decoded_bytes: int
    copied_bytes: int
    refetched_blocks: int
    kv_cache_bytes: int


class RunTimes(TypedDict):
    """How long all runs waited for weights, and the rest of their time.

    In that rest, weights were decoded for `decode_seconds`, and copied to a device for `copy_seconds`.
    """

    stall_seconds: float
    compute_seconds: float
    decode_seconds: float
    copy_seconds: float


class PlanFacts(TypedDict):
    """The facts of the plan that decide how fast a run is.

    `codec` is `int8` or `int4` where weights are not exact; else `lossless` if any were decoded, or `none`.
    """

    codec: str
    limited_by: LimitedBy
    budget_bytes: int | None
    reserved_bytes: int
    pinned: int
    streamed: int
    bytes_per_pass: int


class ExpertCounts(TypedDict):
    """What was found in memory of the experts of a mixture, when a router had chosen them.

    Each module counts an expert once in a forward, however many tokens it computes. `fetched_bytes` are those of
    `CacheCounts` that were read for experts. Of `guesses` at the experts that the next layer would use, `foreseen` were
    right.
    """

    hits: int
    loads: int
    hit_rate: float
    resident_bytes: int
    fetched_bytes: int
    guesses: int
    foreseen: int


class Statistics(TypedDict):
    """All statistics; `plan` is None for a model that is not open.

    `experts` is None for one that is no mixture, `speculation` for one that does not guess.
    """

    cache: CacheCounts
    time: RunTimes
    fetch_latency_seconds: dict[str, float]
    plan: PlanFacts | None
    experts: ExpertCounts | None
    speculation: SpeculationFacts | None


def cache_info(metrics: Metrics, parts: ModelParts | None, cache_size: int) -> CacheInfo:
    """What is kept in memory: nothing, for a model that is not open."""
    hits, misses = _counts(metrics)
    return {
        "hits": hits,
        "misses": misses,
        "hit_rate": hit_rate(hits, misses),
        "cached_components": parts.engine.resident() if parts else [],
        "cache_size": cache_size,
        "memory_usage_mb": (parts.engine.resident_bytes if parts else 0) / MB,
    }


def inference_stats(metrics: Metrics) -> InferenceStats:
    """What the runs so far took."""
    runs = metrics.latency("inference")
    return {
        "cache_hit_rate": hit_rate(*_counts(metrics)),
        "avg_inference_time": runs.total_seconds / runs.count if runs.count else 0.0,
        "total_inferences": runs.count,
        "stall_seconds": metrics.seconds("stall"),
        "fetch_seconds": metrics.latency("fetch").total_seconds,
        "compute_seconds": _compute_seconds(metrics),
    }


def full_statistics(
    metrics: Metrics, parts: ModelParts | None, refetched_blocks: int, speculation: Speculation | None = None
) -> Statistics:
    """All statistics, in the form that `surfw infer --json` prints."""
    hits, misses = _counts(metrics)
    return {
        "cache": {
            "hits": hits,
            "misses": misses,
            "prefetched": metrics.count("prefetched"),
            "stalls": metrics.count("stalls"),
            "hit_rate": hit_rate(hits, misses),
            "resident_bytes": parts.engine.resident_bytes if parts else 0,
            "fetched_bytes": metrics.count("fetched_bytes"),
            "decoded_bytes": metrics.count("decoded_bytes"),
            "copied_bytes": metrics.count("copied_bytes"),
            "refetched_blocks": refetched_blocks,
            "kv_cache_bytes": parts.kv.held_bytes if parts else 0,
        },
        "time": {
            "stall_seconds": metrics.seconds("stall"),
            "compute_seconds": _compute_seconds(metrics),
            "decode_seconds": metrics.seconds("decode"),
            "copy_seconds": metrics.seconds("copy"),
        },
        "fetch_latency_seconds": metrics.latency("fetch").percentiles(50, 95),
        "plan": _plan_facts(metrics, parts) if parts else None,
        "experts": _expert_counts(metrics, parts) if parts and parts.manifest.experts else None,
        "speculation": speculation.facts() if speculation is not None else None,
    }


def find_progress(metrics: Metrics, parts: ModelParts | None) -> Progress:
    """Where a run is just now."""
    layers: tuple[str, ...] = parts.layers if parts else ()
    reached = parts.engine.reached if parts else ()
    plan = parts.engine.plan if parts else None
    return Progress(
        layer=max((layers.index(name) + 1 for name in reached if name in layers), default=0),
        layers=len(layers),
        kept_layers=len(plan.pinned.intersection(layers)) if plan and plan.bytes_per_pass else None,
        fetched_bytes=metrics.count("fetched_bytes"),
        stall_seconds=metrics.seconds("stall"),
        run_seconds=metrics.seconds("forward"),
        outage=_find_outage(metrics, parts) if parts else None,
    )


def _find_outage(metrics: Metrics, parts: ModelParts) -> Outage | None:
    """What the source waits for, if it is away; see `Outage`."""
    waiting = parts.client.waiting
    if waiting is None:
        return None
    now, uses = time.monotonic(), sum(_counts(metrics))
    per_use = _compute_seconds(metrics) / uses if uses else 0.0
    return Outage(
        seconds=now - waiting.since,
        trying=waiting.trying,
        in_seconds=max(0.0, waiting.at - now),
        buffered_seconds=per_use * parts.engine.read_ahead,
    )


def stall_share(time: RunTimes) -> float:
    """The part of the time of all runs that they waited for weights."""
    seconds = time["stall_seconds"] + time["compute_seconds"]
    return time["stall_seconds"] / seconds if seconds else 0.0


def copy_share(time: RunTimes) -> float:
    """The part of the time of all runs in which weights were copied to a device."""
    seconds = time["stall_seconds"] + time["compute_seconds"]
    return min(1.0, time.get("copy_seconds", 0.0) / seconds) if seconds else 0.0


def _plan_facts(metrics: Metrics, parts: ModelParts) -> PlanFacts:
    plan = parts.engine.plan
    return {
        "codec": packed_codec(parts.manifest) or ("lossless" if metrics.count("decoded_bytes") else "none"),
        "limited_by": parts.limited_by,
        "budget_bytes": plan.budget_bytes,
        "reserved_bytes": plan.reserved_bytes,
        "pinned": len(plan.pinned),
        "streamed": len(plan.streamed),
        "bytes_per_pass": plan.bytes_per_pass,
    }


def _expert_counts(metrics: Metrics, parts: ModelParts) -> ExpertCounts:
    hits, loads = metrics.count("expert_hits"), metrics.count("expert_loads")
    return {
        "hits": hits,
        "loads": loads,
        "hit_rate": hit_rate(hits, loads),
        "resident_bytes": parts.engine.experts.resident_bytes,
        "fetched_bytes": metrics.count("expert_bytes"),
        "guesses": metrics.count("expert_guesses"),
        "foreseen": metrics.count("experts_foreseen"),
    }


def _counts(metrics: Metrics) -> tuple[int, int]:
    return metrics.count("hits"), metrics.count("prefetched") + metrics.count("stalls")


def _compute_seconds(metrics: Metrics) -> float:
    return max(0.0, metrics.seconds("forward") - metrics.seconds("stall"))
