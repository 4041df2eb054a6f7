"""What a server reports over plain HTTP: the structure of `/stats` and of its health.

A client does not trust the report: `parse_stats` accepts only this structure.
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
    """The resources used by the server's process; CPU since the last report."""

    rss_bytes: int
    cpu_percent: float


class RedisState(TypedDict):
    """The URL of the Redis tier, without credentials, whether it answered last time, and its counters.

    `hits` and `misses` count segments, `poisoned` those with wrong bytes. `bypassed` is the reason why the tier is not
    used at the moment, `bypassed_seconds` for how long; both are present only while it is bypassed.
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
    """The rate limits in bytes per second, for all clients and for each, if there are any.

    `slow_clients` counts clients that were closed because they took none of the data they requested.
    """

    slow_clients: int
    max_bytes_per_second: NotRequired[int]
    max_client_bytes_per_second: NotRequired[int]


class ClientFacts(TypedDict):
    """An open connection.

    `number` identifies a connection between two starts of the server. `name` is the name in the client's hello, and ""
    before it; `model` is the model that it read last, and "" before the first.
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
    request, because of the storage), `storage` (slow, unreachable, or reachable again), `redis` (unreachable or
    reachable, slow, full, or with wrong bytes), `models` (added or removed), `cache`, `access` (tokens or certificates
    were reread), `reload` (what was reloaded, or could not be) and `stopping`. Later versions may have more.
    """

    time: float
    kind: str
    text: str


class ModelHeat(TypedDict):
    """How much of a model is cached: values for each of its first 256 `chunks`, in order.

    `resident` is the cached share of a chunk; `hits` counts hits of its pages since the start, or since the counters
    were cleared because there were too many.
    """

    model: str
    chunks: int
    resident: list[float]
    hits: list[int]


class CacheShortage(TypedDict):
    """A cache that is smaller than one pass over a model that was read, and a size that would suffice.

    Every pass evicts what the next one reads first.
    """

    model: str
    pass_bytes: int
    cache_mb: int


class ServerStats(TypedDict):
    """A server's counters since its start, and its current state.

    `connections` are the busiest `MOST_CONNECTIONS`, `events` the latest in chronological order, and `heat` covers the
    most recently read models. Older servers report none of these, nor `bytes_read` (from the storage) and `sending`.
    `cache_shortage` is present only if the cache is too small, and `redis` only with a Redis tier.
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
    """Whether a server listens (`live`), whether its storage answers too (`ready`), and its models.

    `redis` is present only while a server bypasses its Redis, as `"bypassed"`.
    """

    live: bool
    ready: bool
    storage: str
    models: list[str]
    redis: NotRequired[str]


def find_shortage(stats: ServerStats, pass_bytes: int) -> CacheShortage | None:
    """Return a server's cache shortage if a pass of `pass_bytes` exceeds its cache, else None."""
    shortage = stats.get("cache_shortage")
    return shortage if pass_bytes > stats["cache"]["capacity_bytes"] else None


def parse_stats(data: bytes) -> ServerStats:
    """Parse the JSON of `/stats`.

    Raises:
        RemoteProtocolError: it is not the statistics of a surfw server.
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
    """Whether a value has a type: a `TypedDict` (extra keys are allowed), a list, a dictionary or a plain type.

    Sizes of texts, dictionaries and numbers are bounded too.
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
    return isinstance(value, int | float if shape is float else shape) and abs(value) <= MAX_SIZE  # False for NaN
