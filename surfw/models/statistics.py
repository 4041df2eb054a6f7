"""Statistics of a model's runs and its memory, as plain data."""

import time
from typing import TypedDict

from surfw.codec import packed_codec
from surfw.config import MB
from surfw.metrics import Metrics, hit_rate
from surfw.models.assembly import LimitedBy, ModelParts
from surfw.models.progress import Outage, Progress
from surfw.models.speculation import Speculation, SpeculationFacts


class CacheInfo(TypedDict):
    """The weight cache.

    A *hit* is a layer that was resident when execution reached it; a *miss* had to be fetched for that use.
    `cached_components` are the names of the chunks in memory, least recently used first; `memory_usage_mb` is the
    memory of their buffers, in millions of bytes.
    """

    hits: int
    misses: int
    hit_rate: float
    cached_components: list[str]
    cache_size: int
    memory_usage_mb: float


class InferenceStats(TypedDict):
    """Times of the runs so far, in seconds.

    `avg_inference_time` is the mean over completed runs; a generation counts as one run. `stall_seconds` were spent
    waiting for weights, `compute_seconds` are the rest of all runs; `fetch_seconds` is the sum of all fetches, most of
    which overlap with computing.
    """

    cache_hit_rate: float
    avg_inference_time: float
    total_inferences: int
    stall_seconds: float
    fetch_seconds: float
    compute_seconds: float


class CacheCounts(TypedDict):
    """Hits and misses, as in `CacheInfo`, and sizes in bytes.

    `fetched_bytes` are stored bytes; `decoded_bytes` are the payload bytes decoded from coded forms, and `copied_bytes`
    the bytes copied to a device.
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
    """How long all runs waited for weights (`stall_seconds`), and the rest of their time (`compute_seconds`).

    During `compute_seconds`, weights were decoded for `decode_seconds`, and copied to a device for `copy_seconds`.
    """

    stall_seconds: float
    compute_seconds: float
    decode_seconds: float
    copy_seconds: float


class PlanFacts(TypedDict):
    """The parts of the plan that determine the speed of a run.

    `codec` is `int8` or `int4` if weights are quantised; else `lossless` if any were decoded, or `none`.
    """

    codec: str
    limited_by: LimitedBy
    budget_bytes: int | None
    reserved_bytes: int
    pinned: int
    streamed: int
    bytes_per_pass: int


class ExpertCounts(TypedDict):
    """Cache hits and loads of the experts that routers of a mixture chose.

    Each module counts an expert once per forward, however many tokens it computes. `fetched_bytes` is the part of
    `CacheCounts`' that was read for experts. `guesses` counts predictions of the next layer's experts, `foreseen` the
    right ones.
    """

    hits: int
    loads: int
    hit_rate: float
    resident_bytes: int
    fetched_bytes: int
    guesses: int
    foreseen: int


class Statistics(TypedDict):
    """All statistics.

    `plan` is None for a model that is not open, `experts` for one that is not a mixture, and `speculation` if
    speculation is off.
    """

    cache: CacheCounts
    time: RunTimes
    fetch_latency_seconds: dict[str, float]
    plan: PlanFacts | None
    experts: ExpertCounts | None
    speculation: SpeculationFacts | None


def cache_info(metrics: Metrics, parts: ModelParts | None, cache_size: int) -> CacheInfo:
    """What the weight cache holds; nothing for a model that is not open."""
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
    """Timings of the runs so far."""
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
    """How far the current run has got."""
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
    """The source's outage, if it is down; see `Outage`."""
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
    """The fraction of the time of all runs spent waiting for weights."""
    seconds = time["stall_seconds"] + time["compute_seconds"]
    return time["stall_seconds"] / seconds if seconds else 0.0


def copy_share(time: RunTimes) -> float:
    """The fraction of the time of all runs spent copying weights to a device."""
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
