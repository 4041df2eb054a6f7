"""A server's counters and state as Prometheus metrics, for `/metrics`.

Names and labels are stable. Every label has a small set of values that no client can extend: no addresses, no names of
models. `_COUNTERS` and `_GAUGES` come from the statistics; other metrics come from where they are counted.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from typing import Any, get_args

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from surfw.config import CachePolicy
from surfw.server.journal import Journal
from surfw.server.operations import Reloads
from surfw.server.redis_tier import RedisTier
from surfw.server.served import ServedStore

_COUNTERS = {
    "cache_hits": ("Uses of cached pages", "cache", "hits"),
    "cache_misses": ("Uses of pages that had to be read", "cache", "misses"),
    "cache_coalesced": ("Uses that joined another use's read", "cache", "coalesced"),
    "cache_evictions": ("Pages that had to make room", "cache", "evictions"),
    "requests": ("Requests received", "requests", "total"),
    "sent_bytes": ("Bytes of models sent", "bytes_sent"),
    "read_bytes": ("Bytes read from the storage", "bytes_read"),
}
"""By name: the help text, and the path in the statistics."""
_REDIS_COUNTERS = {
    "redis_hits": ("Segments that Redis had", "redis", "hits"),
    "redis_misses": ("Segments that Redis lacked", "redis", "misses"),
    "redis_read_bytes": ("Bytes read from Redis", "redis", "bytes_read"),
    "redis_written_bytes": ("Bytes written to Redis", "redis", "bytes_written"),
    "redis_poisoned": ("Segments that had wrong bytes in Redis", "redis", "poisoned"),
}
_GAUGES = {
    "cache_bytes": ("Bytes in the cache", "cache", "bytes"),
    "cache_capacity_bytes": ("Budget of the cache", "cache", "capacity_bytes"),
    "requests_in_flight": ("Requests being answered", "requests", "in_flight"),
    "clients": ("Open connections", "clients"),
    "models": ("Models in the store", "models"),
    "storage_healthy": ("1 if the storage answered when last asked", "storage", "healthy"),
    "resident_bytes": ("Memory of the process", "resources", "rss_bytes"),
    "cpu_percent": ("CPU of the process since the last look", "resources", "cpu_percent"),
    "uptime_seconds": ("Time since the start", "server", "uptime_seconds"),
}
_KINDS = (
    "joined",
    "left",
    "closed",
    "refused",
    "failed",
    "storage",
    "redis",
    "models",
    "cache",
    "access",
    "reload",
    "stopping",
)
"""Kinds of events that are present from the start, at 0, so that their first occurrence is an increase."""


@dataclass(frozen=True, kw_only=True)
class Exposition(Collector):
    """The sources of a server's metrics.

    Attributes:
        stats: its statistics.
        served: the store that it serves.
        journal: counts its events.
        reloads: counts its reloads.
        newcomers: the number of connections that are not open yet.
        accepted: the number of connections ever opened.
        most_clients: the maximum number of connections at a time.
        draining: whether it accepts nothing new.
    """

    stats: Any
    served: ServedStore
    journal: Journal
    reloads: Reloads
    newcomers: int
    accepted: int
    most_clients: int
    draining: bool

    def text(self) -> bytes:
        """Return the metrics in the format of `CONTENT_TYPE_LATEST`."""
        return generate_latest(self)

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics."""
        yield InfoMetricFamily("surfw_build", "The version", {"version": self.stats["server"]["version"]})
        yield from self._of_statistics()
        yield from self._of_clients()
        yield from self._of_cache()
        yield from self._of_operation()
        if (redis := self.served.pages.redis) is not None:
            yield from _of_redis(redis)

    def _of_statistics(self) -> Iterator[Metric]:
        counters = _COUNTERS | _REDIS_COUNTERS if "redis" in self.stats else _COUNTERS
        for kind, table in ((CounterMetricFamily, counters), (GaugeMetricFamily, _GAUGES)):
            for name, (text, *path) in table.items():
                value = reduce(getitem, path, self.stats)
                yield kind(f"surfw_{name}", text, value=len(value) if isinstance(value, list) else float(value))
        latency = GaugeMetricFamily("surfw_request_latency_seconds", "Latency of recent requests", labels=["quantile"])
        for rank, seconds in self.stats["requests"]["latency_seconds"].items():
            latency.add_metric([f"0.{rank.removeprefix('p')}"], seconds)
        yield latency
        took = self.served.metrics.latency("requests")
        yield SummaryMetricFamily("surfw_request_seconds", "What answers took", took.count, took.total_seconds)

    def _of_clients(self) -> Iterator[Metric]:
        yield CounterMetricFamily("surfw_connections", "Connections that clients made", self.accepted)
        yield GaugeMetricFamily("surfw_newcomers", "Connections that are not open yet", self.newcomers)
        yield GaugeMetricFamily("surfw_clients_limit", "The most connections at a time", self.most_clients)
        events = CounterMetricFamily(
            "surfw_events", "What the log tells, also where it only counts", labels=["kind", "code"]
        )
        for (kind, code), seen in (dict.fromkeys(((kind, "") for kind in _KINDS), 0) | self.journal.counts).items():
            events.add_metric([kind, code], seen)
        yield events

    def _of_cache(self) -> Iterator[Metric]:
        pages = self.served.pages
        policy = GaugeMetricFamily("surfw_cache_policy", "1 for the policy of the cache", labels=["policy"])
        for name in get_args(CachePolicy):
            policy.add_metric([name], float(name == pages.cache.policy))
        yield policy
        yield GaugeMetricFamily("surfw_schedules", "Schedules of clients that the cache goes by", len(pages.futures))
        running = sum(1 for _ in pages.reads.running())
        yield GaugeMetricFamily("surfw_reads_running", "Pages being read", running)
        yield GaugeMetricFamily("surfw_reads_queued", "Pages waiting to be read", len(pages.reads) - running)
        sources = CounterMetricFamily(
            "surfw_source_bytes", "What answers took from the cache, and pages from elsewhere", labels=["source"]
        )
        sources.add_metric(["cache"], self.served.metrics.count("bytes_hit"))
        sources.add_metric(["storage"], self.stats["bytes_read"])
        sources.add_metric(["redis"], self.stats.get("redis", {}).get("bytes_read", 0))
        yield sources
        short = self.stats.get("cache_shortage", {}).get("cache_mb", 0)
        yield GaugeMetricFamily("surfw_cache_shortage_mb", "A --cache-mb that would hold one pass; 0 if it does", short)

    def _of_operation(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("surfw_draining", "1 while it stops, and takes nothing new", float(self.draining))
        reloads = CounterMetricFamily(
            "surfw_reloads", "Reloads, and things that one could not read", labels=["outcome"]
        )
        reloads.add_metric(["done"], self.reloads.done)
        reloads.add_metric(["failed"], self.reloads.failed)
        yield reloads


def _of_redis(redis: RedisTier) -> Iterator[Metric]:
    state = redis.state
    seconds = state.get("bypassed_seconds", 0.0)
    yield GaugeMetricFamily("surfw_redis_bypassed_seconds", "For how long Redis is not used; else 0", seconds)
    yield GaugeMetricFamily("surfw_redis_bypassed", "1 while Redis is not used", float("bypassed" in state))
    yield GaugeMetricFamily("surfw_redis_reachable", "1 if Redis answered when last asked", float(state["reachable"]))
    yield CounterMetricFamily(
        "surfw_redis_bypasses", "Times that Redis was used, and then not any more", redis.bypasses
    )
    waits = GaugeMetricFamily("surfw_page_wait_seconds", "Recent waits for a page, where Redis is", labels=["source"])
    for source, seconds in redis.waits.items():
        waits.add_metric([source], seconds)
    yield waits
