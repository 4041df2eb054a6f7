"""What a server did between two of its reports."""

from collections.abc import Mapping
from dataclasses import dataclass

from surfw.metrics import hit_rate
from surfw.wire.reports import ServerStats


@dataclass(frozen=True, slots=True)
class Rates:
    """Activity in an interval, per second unless the name says otherwise.

    Attributes:
        seconds: the length of the interval.
        sent_bytes: bytes of models sent.
        read_bytes: bytes read from the storage; None if the server is too old to report them.
        requests: requests received.
        hit_rate: the cache's hit rate in the interval; None if the cache was not used.
        sent_to: bytes sent to each connection that both reports list, by its number.
    """

    seconds: float
    sent_bytes: float
    read_bytes: float | None
    requests: float
    hit_rate: float | None
    sent_to: Mapping[int, float]


def rates_between(before: ServerStats, after: ServerStats) -> Rates | None:
    """Return a server's activity between two reports, by its own clock; None if it was restarted in between."""
    seconds = after["server"]["uptime_seconds"] - before["server"]["uptime_seconds"]
    sent = after["bytes_sent"] - before["bytes_sent"]
    requests = after["requests"]["total"] - before["requests"]["total"]
    hits, misses = (after["cache"][kind] - before["cache"][kind] for kind in ("hits", "misses"))
    if seconds <= 0 or min(sent, requests, hits, misses) < 0:
        return None
    read = None
    if "bytes_read" in before and "bytes_read" in after:
        read = (after["bytes_read"] - before["bytes_read"]) / seconds
    sent_before = {one["number"]: one["bytes_sent"] for one in before.get("connections", [])}
    return Rates(
        seconds=seconds,
        sent_bytes=sent / seconds,
        read_bytes=read,
        requests=requests / seconds,
        hit_rate=hit_rate(hits, misses) if hits + misses else None,
        sent_to={
            one["number"]: (one["bytes_sent"] - sent_before[one["number"]]) / seconds
            for one in after.get("connections", [])
            if one["number"] in sent_before
        },
    )
