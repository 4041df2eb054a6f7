"""What a server reports over plain HTTP: the shapes of `/stats` and of its health.

A client does not trust the report: `parse_stats` accepts these shapes and nothing else.
"""

import json
from typing import Any, NotRequired, TypedDict, get_args, get_origin, get_type_hints, is_typeddict

from surfw.errors import RemoteProtocolError
from surfw.wire.messages import MAX_SIZE

_LONGEST_TEXT = 4096
_MOST_NAMES = 16

MOST_CONNECTIONS = 20
"""The most connections that statistics list; `clients` counts all of them."""


class ServerFacts(TypedDict):
    """The version of surfw, and how long it has been running."""

    version: str
    uptime_seconds: float


class CacheStats(TypedDict):
    """The cache of stored bytes. A use is a hit, a miss, or coalesced with another use's read."""

    hits: int
    misses: int
    coalesced: int
    hit_rate: float
    bytes: int
    capacity_bytes: int
    evictions: int
    policy: str


class RequestStats(TypedDict):
    """The requests of all clients, with `p50`, `p95` and `p99` of the latency of recent ones."""

    total: int
    in_flight: int
    latency_seconds: dict[str, float]


class StorageState(TypedDict):
    """The URL of the store, without credentials, and whether it answered last time."""

    url: str
    healthy: bool


class ResourceStats(TypedDict):
    """What the server's process uses; the CPU since the last report."""

    rss_bytes: int
    cpu_percent: float


class RedisState(TypedDict):
    """The URL of the Redis tier, without credentials, whether it answered last time, and what it was used for.

    `hits` and `misses` count segments, `poisoned` those that had wrong bytes. `bypassed` says why the tier is not used
    at the moment, and `bypassed_seconds` since when; both are there only while it is not.
    """

    url: str
    reachable: bool
    hits: NotRequired[int]
    misses: NotRequired[int]
    bytes_read: NotRequired[int]
    bytes_written: NotRequired[int]
    poisoned: NotRequired[int]
    bypassed: NotRequired[str]
    bypassed_seconds: NotRequired[float]


class SendingState(TypedDict):
    """The most that is sent per second, to all clients and to each, where that is limited.

    `slow_clients` counts those that were closed since they took nothing of what they had asked for.
    """

    slow_clients: int
    max_bytes_per_second: NotRequired[int]
    max_client_bytes_per_second: NotRequired[int]


class ClientFacts(TypedDict):
    """An open connection.

    `number` tells the connections of one start apart. `name` is what the client calls itself, and "" before its hello;
    `model` is the one that it read last, and "" before the first.
    """

    number: int
    name: str
    address: str
    connected_seconds: float
    model: str
    in_flight: int
    bytes_sent: int


class ServerEvent(TypedDict):
    """Something that happened, when (in seconds since 1970), and of which kind.

    Kinds are `joined`, `left`, `closed` (for breaking the protocol, or for being too slow), `refused`, `failed` (a
    request, because of the storage), `storage` (slow, away or back), `redis` (away or there, slow, full, or with wrong
    bytes), `models` (came or went), `cache`, `access` (tokens or certificates were read again), `reload` (what was
    looked at again, or could not be) and `stopping`. Later versions may have more.
    """

    time: float
    kind: str
    text: str


class ModelHeat(TypedDict):
    """What of a model is in the cache: for each of its first 256 `chunks`, in their order.

    `resident` is the part of a chunk that is cached, `hits` how often its pages were hit since the start, or since
    there were too many to count.
    """

    model: str
    chunks: int
    resident: list[float]
    hits: list[int]


class CacheShortage(TypedDict):
    """A cache that is smaller than one pass over a model that was read, and a size that would help.

    Every pass evicts what the next one wants first.
    """

    model: str
    pass_bytes: int
    cache_mb: int


class ServerStats(TypedDict):
    """A server's counters since its start, and how it is now.

    `connections` are the busiest `MOST_CONNECTIONS`, `events` the latest, the oldest of them first, `heat` of the
    models that were read last. Older servers have none of them, nor `bytes_read` (from the storage) and
    `sending`. Only a server whose cache is too small has `cache_shortage`, and only one with a Redis tier `redis`.
    """

    server: ServerFacts
    models: list[str]
    cache: CacheStats
    requests: RequestStats
    bytes_sent: int
    clients: int
    storage: StorageState
    resources: ResourceStats
    bytes_read: NotRequired[int]
    connections: NotRequired[list[ClientFacts]]
    events: NotRequired[list[ServerEvent]]
    heat: NotRequired[list[ModelHeat]]
    cache_shortage: NotRequired[CacheShortage]
    redis: NotRequired[RedisState]
    sending: NotRequired[SendingState]


class ServerHealth(TypedDict):
    """Whether a server listens (`live`), and whether its storage answers too (`ready`), and its models.

    `redis` is `"bypassed"`, and only there, while a server with a Redis does without it.
    """

    live: bool
    ready: bool
    storage: str
    models: list[str]
    redis: NotRequired[str]


def find_shortage(stats: ServerStats, pass_bytes: int) -> CacheShortage | None:
    """How a server's cache falls short for a client that reads so many bytes in each pass; None if it does not."""
    shortage = stats.get("cache_shortage")
    return shortage if pass_bytes > stats["cache"]["capacity_bytes"] else None


def parse_stats(data: bytes) -> ServerStats:
    """Parse the JSON of `/stats`.

    Raises:
        RemoteProtocolError: it does not have the shape of a surfw server's statistics.
    """
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as exc:
        raise RemoteProtocolError("its statistics are not JSON") from exc
    if not _has_shape(document, ServerStats):
        raise RemoteProtocolError("its statistics have another shape")
    stats: ServerStats = document
    return stats


def _has_shape(value: Any, shape: Any) -> bool:
    """Whether a value has a type: a `TypedDict` (more keys are fine), a list, a dictionary or a plain one.

    Texts, names and numbers are bounded too.
    """
    if is_typeddict(shape):
        hints = get_type_hints(shape)
        return isinstance(value, dict) and all(
            _has_shape(value[key], hints[key]) if key in value else key not in shape.__required_keys__ for key in hints
        )
    if get_origin(shape) is list:
        return isinstance(value, list) and all(_has_shape(item, get_args(shape)[0]) for item in value)
    if get_origin(shape) is dict:
        return (
            isinstance(value, dict)
            and len(value) <= _MOST_NAMES
            and all(_has_shape(key, str) and _has_shape(item, get_args(shape)[1]) for key, item in value.items())
        )
    if isinstance(value, bool) or shape is bool:
        return isinstance(value, bool) and shape is bool
    if shape is str:
        return isinstance(value, str) and len(value) <= _LONGEST_TEXT
    return isinstance(value, int | float if shape is float else shape) and abs(value) <= MAX_SIZE  # which NaN is not
