"""A simulated fleet: many clients, servers and a Redis, with surfw's own cache policies.

A discrete-event simulation (SimPy). Only time and bytes are simulated: each server runs surfw's own cache and policy
(`surfw.server.policies`), which use the cycles that clients announce (`surfw.server.futures`); what a client keeps
follows from the residency plan of its budget (`surfw.runtime.plan`). Links are queues that move bytes at a fixed rate.
The same seed gives the same fleet and the same figures.

Bytes move in pages, as in the server. With very many clients they move in larger parts, to limit the number of events.
"""

import math
import random
import statistics
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from surfw.bench.result import Result, Row, describe_machine
from surfw.config import GB, PAGE_BYTES, CachePolicy, format_size
from surfw.errors import ConfigurationError
from surfw.manifest import Use
from surfw.runtime.plan import Limit, describe_needs, plan_residency
from surfw.runtime.schedule import Schedule
from surfw.server.cache import LruCache, ProvingCache
from surfw.server.futures import Asked, Future, Futures, Part
from surfw.server.pages import MIN_CACHE_BYTES, Permits
from surfw.server.policies import make_cache

if TYPE_CHECKING:
    import simpy

_MOST_USES = 250_000
"""The approximate limit on simulated page uses; above it, the parts of a chunk are larger than pages."""

_MOST_HEARD, _FEWEST_HEARD, _MOST_LOOKUPS = 64, 8, 4_000_000
"""The most and fewest announcements that each server takes, and about how many lookups in them are simulated."""

AHEAD_CHUNKS, _AHEAD_PARTS = 2, 3
"""Chunks that a client has in flight, and parts of each of them that a server has in flight."""

_HOUR = 3600.0

Process = Generator["simpy.Event", Any, None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Fleet:
    """The fleet to simulate. Rates are in bytes per second.

    Attributes:
        clients, servers: how many; clients are spread evenly over servers.
        model_bytes: size of the model; all clients run the same one.
        chunks: number of chunks in the model, all of the same size.
        passes: forward passes per client; the first one ends with the first token.
        arrivals: clients start at random times within this many seconds.
        budget_bytes: each client's memory budget for weights; None to keep nothing but the chunks in flight.
        cache_bytes: cache size of each server.
        policy: cache policy of the servers.
        redis_bytes: capacity of a Redis that all servers share; 0 for no Redis.
        link: rate of each server to its clients.
        client_link: rate of each client's own link.
        storage_link: rate of each server from the storage.
        redis_link: rate of Redis to all servers together.
        storage_seconds: time to the first byte of a storage read.
        reads: the most reads that a server has in flight.
        compute_seconds: time that a client computes with each chunk.
        seed: seed of the random start times.
        storage_price, server_price, redis_price: USD per GB read from the storage, per hour of a server, and per hour
            of a GB of Redis.
    """

    clients: int = 100
    servers: int = 2
    model_bytes: int = 2200 * 10**6
    chunks: int = 24
    passes: int = 2
    arrivals: float = 60.0
    budget_bytes: int | None = None
    cache_bytes: int = 1000 * 10**6
    policy: CachePolicy = "schedule"
    redis_bytes: int = 0
    link: float = 1.25e9
    client_link: float = 125e6
    storage_link: float = 0.9e9
    redis_link: float = 1.0e9
    storage_seconds: float = 0.03
    reads: int = 8
    compute_seconds: float = 0.0
    seed: int = 0
    storage_price: float = 0.09
    server_price: float = 0.40
    redis_price: float = 0.02

    def __post_init__(self) -> None:
        """Validate the numbers.

        Raises:
            ConfigurationError: a number is out of range, the cache is too small, or there are more chunks than bytes.
        """
        least = {"clients": 1, "servers": 1, "model_bytes": 1, "chunks": 1, "passes": 1, "reads": 1}
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if name in {"policy", "seed"} or value is None:
                continue
            low = least.get(name, 1.0 if name.endswith("link") else 0)
            if not low <= value < math.inf:
                raise ConfigurationError(f"{name} is {value}, expected {low:g} or more, and finite")
        if self.cache_bytes < MIN_CACHE_BYTES:
            raise ConfigurationError(
                f"a server's cache of {format_size(self.cache_bytes)} is too small; it needs "
                f"{format_size(MIN_CACHE_BYTES)} or more for its work"
            )
        if self.model_bytes < self.chunks:
            raise ConfigurationError(f"a model of {self.model_bytes} bytes has no {self.chunks} chunks")

    @property
    def names(self) -> list[str]:
        """The names of the chunks, in the order of their use."""
        return [f"layers.{index}" for index in range(self.chunks)]

    @property
    def chunk_bytes(self) -> int:
        """The size of each chunk, rounded down; the remainder is dropped."""
        return self.model_bytes // self.chunks

    @property
    def starts(self) -> list[float]:
        """The start time of each client, in seconds."""
        source = random.Random(self.seed)  # noqa: S311 - the same each time
        return [source.uniform(0, self.arrivals) for _ in range(self.clients)]

    def kept(self) -> frozenset[str]:
        """The chunks that each client keeps resident, as planned for its budget.

        Raises:
            ConfigurationError: the budget is too small for the model.
        """
        if self.budget_bytes is None:
            return frozenset()
        names = self.names
        order = [Use(name, (name,)) for name in names]
        sizes = dict.fromkeys(names, self.chunk_bytes)
        needs = describe_needs("the model", dict.fromkeys(names, "layer"), sizes, order)
        return frozenset(plan_residency(Schedule(order).apply_to(needs), Limit(budget_bytes=self.budget_bytes)).pinned)

    @property
    def parts(self) -> int:
        """The number of parts in which a chunk moves."""
        pages = -(-self.chunk_bytes // PAGE_BYTES)
        return max(1, min(pages, _MOST_USES // (self.clients * self.chunks * self.passes)))

    @property
    def heard(self) -> int:
        """The number of clients whose announcements each server takes."""
        uses = self.clients * self.chunks * self.passes * self.parts
        return max(_FEWEST_HEARD, min(_MOST_HEARD, _MOST_LOOKUPS // uses))


@dataclass(slots=True)
class Outcome:
    """The result of a fleet, simulated or measured.

    Attributes:
        hits, coalesced, misses: page uses that found the page cached, joined a read in flight, or started a read.
        sent_bytes: bytes sent to clients.
        storage_bytes: bytes read from the storage.
        redis_bytes: bytes read from Redis.
        first: seconds from a client's start to its first token, per client.
        later: mean seconds of the passes after that, per client.
        seconds: from the start of the first client to the end of the last one.
        by_server: cache hit rate of each server.
    """

    hits: int = 0
    coalesced: int = 0
    misses: int = 0
    sent_bytes: int = 0
    storage_bytes: int = 0
    redis_bytes: int = 0
    first: list[float] = field(default_factory=list)
    later: list[float] = field(default_factory=list)
    seconds: float = 0.0
    by_server: list[float] = field(default_factory=list)

    @property
    def hit_rate(self) -> float:
        """The share of page uses that were cache hits."""
        uses = self.hits + self.coalesced + self.misses
        return self.hits / uses if uses else 0.0


def bench_fleet(fleet: Fleet) -> Result:
    """Simulate a fleet.

    Raises:
        ConfigurationError: SimPy is not installed, or the budget is too small for the model.
    """
    return Result(benchmark="fleet", machine=describe_machine("simpy"), rows=rows_of(fleet, simulate(fleet)))


def rows_of(fleet: Fleet, found: Outcome) -> tuple[Row, ...]:
    """The rows of a fleet's result and cost; the baselines are for clients that read the storage without servers."""
    hits, first = [100 * one for one in found.by_server], sorted(found.first)
    kept = len(fleet.kept())
    hours = found.seconds / _HOUR
    prices = {
        "storage": (found.storage_bytes / GB * fleet.storage_price, "USD", found.sent_bytes / GB * fleet.storage_price),
        "servers": (fleet.servers * hours * fleet.server_price, "USD", None),
        "Redis": (fleet.redis_bytes / GB * hours * fleet.redis_price, "USD", None),
    }
    reading, sent, most = found.sent_bytes / GB, found.sent_bytes / found.seconds / GB, fleet.servers * fleet.link / GB
    rows = [
        Row(
            name="hits of the servers' caches", value=100 * found.hit_rate, unit="%", low=min(hits), high=max(hits),
            note=f"the policy is {fleet.policy}; {fleet.clients} clients of {fleet.servers} servers, each keeps {kept} "
            f"of {fleet.chunks} chunks, and the bytes move in parts of {format_size(fleet.chunk_bytes // fleet.parts)}",
        ),
        Row(name="read of the storage", value=found.storage_bytes / GB, unit="GB", baseline=reading,
            note="the baseline is what clients read, who would read it of the storage without servers"),
    ]  # fmt: skip
    if fleet.redis_bytes:
        rows.append(Row(name="read of Redis", value=found.redis_bytes / GB, unit="GB"))
    rows += [
        Row(name="time to first token", value=statistics.median(first), unit="s", low=first[-1], high=first[0]),
        Row(name="all clients are done after", value=found.seconds, unit="s"),
        Row(name="sent to clients", value=sent, unit="GB/s", ceiling=most, share=sent / most),
    ]  # fmt: skip
    if found.later:
        rows.insert(-2, Row(name="each pass after it", value=statistics.median(found.later), unit="s"))
    for tier, (value, unit, baseline) in prices.items():
        if tier == "Redis" and not fleet.redis_bytes:
            continue
        rows.append(Row(name=f"cost of {tier}", value=value, unit=unit, baseline=baseline))
    return tuple(rows)


def simulate(fleet: Fleet) -> Outcome:
    """Simulate all passes of a fleet's clients.

    Raises:
        ConfigurationError: SimPy is not installed, or the budget is too small for the model.
    """
    try:
        import simpy
    except ImportError as exc:
        raise ConfigurationError("the simulation needs the package simpy: pip install 'surfw[simulation]'") from exc
    env = simpy.Environment()
    redis = _Redis(env, fleet) if fleet.redis_bytes else None
    servers = [_Server(env, fleet, redis) for _ in range(fleet.servers)]
    found, kept = Outcome(), fleet.kept()
    for index, start in enumerate(fleet.starts):
        client = _Client(
            env, fleet, servers[index % fleet.servers], found, kept, is_heard=index < fleet.servers * fleet.heard
        )
        env.process(client.run(start))
    env.run()
    for server in servers:
        found.hits += server.hits
        found.coalesced += server.coalesced
        found.misses += server.misses
        found.sent_bytes += server.link.moved_bytes
        found.storage_bytes += server.storage.moved_bytes
        uses = server.hits + server.coalesced + server.misses
        found.by_server.append(server.hits / uses if uses else 0.0)
    found.redis_bytes = redis.link.moved_bytes if redis else 0
    found.seconds = env.now - min(fleet.starts)
    return found


class _Link:
    """Moves bytes at a fixed rate, one request after another.

    Attributes:
        moved_bytes: total bytes requested so far.
    """

    def __init__(self, env: "simpy.Environment", rate: float) -> None:
        self.moved_bytes = 0
        self._env = env
        self._rate = rate
        self._free_at = 0.0

    def wait(self, size: int) -> float:
        """Queue this many bytes, and return the seconds until they have moved."""
        self.moved_bytes += size
        self._free_at = max(self._env.now, self._free_at) + size / self._rate
        return self._free_at - self._env.now


class _Redis:
    """The cache that servers share: the parts it holds, and those being read from the storage to be stored in it."""

    def __init__(self, env: "simpy.Environment", fleet: Fleet) -> None:
        self.link = _Link(env, fleet.redis_link)
        self.parts: LruCache[Part, int] = LruCache(fleet.redis_bytes, lambda size: size)
        self.coming: dict[Part, simpy.Event] = {}


class _Server:
    """A server: its cache, its reads in flight, and its links."""

    def __init__(self, env: "simpy.Environment", fleet: Fleet, redis: _Redis | None) -> None:
        import simpy

        self.hits = self.coalesced = self.misses = 0
        self.futures = Futures()
        self.cache: ProvingCache[Part, int] = make_cache(
            fleet.policy, fleet.cache_bytes, lambda size: size, self.futures.next_use, lambda: self.futures.now
        )
        self.link = _Link(env, fleet.link)
        self.storage = _Link(env, fleet.storage_link)
        self.ahead = Permits(fleet.cache_bytes // (4 * max(PAGE_BYTES, fleet.chunk_bytes // fleet.parts)))
        self._env = env
        self._redis = redis
        self._latency = fleet.storage_seconds
        self._slots = simpy.Resource(env, fleet.reads)
        self._reads: dict[Part, simpy.Event] = {}
        self._reading_bytes = 0

    def use(self, part: Part, size: int) -> "simpy.Event | None":
        """Count a use of a part; return None on a hit, otherwise the event of its read, started if necessary."""
        if self.cache.get(part) is not None:
            self.hits += 1
            return None
        if part in self._reads:
            self.coalesced += 1
        else:
            self.misses += 1
        return self.join(part, size)

    def join(self, part: Part, size: int) -> "simpy.Event":
        """Start reading a part, or join the read in flight."""
        if part not in self._reads:
            self._reads[part] = self._env.event()
            self._env.process(self._read(part, size))
        return self._reads[part]

    def view(self, part: Part, size: int, *, foreseen: bool) -> None:
        """Credit a use to the cached part, and advance the time of the futures."""
        self.futures.now += size
        self.cache.note_use(part, size, foreseen=foreseen)

    def _read(self, part: Part, size: int) -> Process:
        with self._slots.request() as slot:
            yield slot
            self._reading_bytes += size
            self.cache.trim(max(0, self.cache.capacity_bytes - self._reading_bytes))
            yield from self._load(part, size)
            self._reading_bytes -= size
        self.cache[part] = size
        self._reads.pop(part).succeed()

    def _load(self, part: Part, size: int) -> Process:
        """Read a part from Redis or, on a miss, from the storage; one server reads it while the others wait."""
        redis = self._redis
        if redis is None:
            yield self._env.timeout(self._latency + self.storage.wait(size))
            return
        if part in redis.coming:
            yield redis.coming[part]
        if redis.parts.get(part) is not None:
            yield self._env.timeout(redis.link.wait(size))
            return
        coming = redis.coming.setdefault(part, self._env.event())
        yield self._env.timeout(self._latency + self.storage.wait(size))
        redis.parts[part] = size
        if redis.coming.pop(part, None) is not None:
            coming.succeed()


class _Client:
    """A client: runs its passes with several chunks in flight."""

    def __init__(
        self,
        env: "simpy.Environment",
        fleet: Fleet,
        server: _Server,
        found: Outcome,
        kept: frozenset[str],
        *,
        is_heard: bool,
    ) -> None:
        self._env = env
        self._fleet = fleet
        self._server = server
        self._found = found
        self._kept = kept
        self._is_heard = is_heard
        self._link = _Link(env, fleet.client_link)
        self._computed = 0.0  # when it is done computing with what has arrived

    def run(self, start: float) -> Process:
        """Wait for the start time, then run all passes."""
        fleet, env = self._fleet, self._env
        yield env.timeout(start)
        future = self._server.futures.add(fleet.names, list(self._kept)) if self._is_heard else None
        self._computed = began = start
        for number in range(fleet.passes):
            names = [name for name in fleet.names if not number or name not in self._kept]
            left = iter(names)
            yield env.all_of([env.process(self._go_on(left, future)) for _ in range(AHEAD_CHUNKS)])
            self._computed = max(self._computed, env.now) + (fleet.chunks - len(names)) * fleet.compute_seconds
            if self._computed > env.now:
                yield env.timeout(self._computed - env.now)
            if not number:
                self._found.first.append(env.now - start)
                began = env.now
        if fleet.passes > 1:
            self._found.later.append((env.now - began) / (fleet.passes - 1))
        if future is not None:
            self._server.futures.remove(future)

    def _go_on(self, left: Iterator[str], future: Future | None) -> Process:
        """Receive one chunk after another into the same buffer, and compute with each."""
        for name in left:
            if future is None:
                yield from self._receive(name, None)
            else:
                with future.reading(Part(name, 0.0, 1.0), self._server.futures.now) as asked:
                    yield from self._receive(name, asked)
            if self._fleet.compute_seconds:
                self._computed = max(self._computed, self._env.now) + self._fleet.compute_seconds
                yield self._env.timeout(self._computed - self._env.now)

    def _receive(self, name: str, asked: Asked | None) -> Process:
        """Receive a chunk part by part, reading ahead as permits allow; modelled on `surfw.server.pages.use_ahead`."""
        server, ahead = self._server, self._server.ahead
        parts = self._parts(name)
        coming: deque[tuple[Part, int, simpy.Event | None]] = deque()
        while True:
            while len(coming) < _AHEAD_PARTS and (not coming or ahead.take()):
                following = next(parts, None)
                if following is None:
                    ahead.free += bool(coming)
                    break
                coming.append((*following, server.use(*following)))
            if not coming:
                return
            if coming[0][2] is not None:
                yield coming[0][2]
            part, size, was_read = coming.popleft()
            ahead.free += bool(coming)  # the next part needs no permit any more
            if was_read is None and server.cache.get(part) is None:  # evicted in the meantime
                yield server.join(part, size)
            if asked is not None:
                asked.start = part.stop  # used up to here
            server.view(part, size, foreseen=asked is not None)
            yield self._env.timeout(max(server.link.wait(size), self._link.wait(size)))

    def _parts(self, name: str) -> Iterator[tuple[Part, int]]:
        """The parts of a chunk, each with its size in bytes."""
        count, size = self._fleet.parts, self._fleet.chunk_bytes
        for index in range(count):
            part = Part(name, index / count, (index + 1) / count)
            yield part, size * (index + 1) // count - size * index // count
