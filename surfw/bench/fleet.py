"""A fleet before it is there: many clients, servers and a Redis, simulated with the policies that they really have.

A discrete-event simulation (SimPy) in which time and bytes are made up, and nothing else. Each server has surfw's own
cache and policy (`surfw.server.policies`), which hear what clients announce (`surfw.server.futures`); what a client
keeps is the plan of its budget (`surfw.runtime.plan`). Links are queues that move bytes at a rate. The same seed gives
the same fleet and the same figures.

Bytes move in pages as in the server; where clients are so many that this would be millions of them, in larger parts.
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
"""About so many uses of pages are simulated; where there would be more, parts of a chunk are larger than pages."""

_MOST_HEARD, _FEWEST_HEARD, _MOST_LOOKUPS = 64, 8, 4_000_000
"""Of so many clients each server hears what they will read, as about so many looks at that are simulated."""

AHEAD_CHUNKS, _AHEAD_PARTS = 2, 3
"""How many chunks a client has under way, and how many parts of them a server reads ahead."""

_HOUR = 3600.0

Process = Generator["simpy.Event", Any, None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Fleet:
    """What is simulated. Rates are in bytes per second.

    Attributes:
        clients, servers: how many; clients are spread evenly over servers.
        model_bytes: of the model, which all of them run.
        chunks: how many it has, all of the same size.
        passes: how often each client goes through it; the first ends with the first token.
        arrivals: the seconds within which clients start, at random.
        budget_bytes: what each client's weights may take; None for just what is under way.
        cache_bytes: of each server.
        policy: of their caches.
        redis_bytes: what a Redis that all servers share holds; 0 for none.
        link: of each server to its clients.
        client_link: of each client.
        storage_link: of each server to the storage.
        redis_link: of the Redis to all servers.
        storage_seconds: until the first byte of a read of the storage comes.
        reads: how many reads of the storage a server has under way.
        compute_seconds: of each chunk, for a client.
        seed: of all that is random.
        storage_price, server_price, redis_price: for a GB read of the storage; for an hour of a server; for an hour of
            a GB of Redis.
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
        """Check the numbers.

        Raises:
            ConfigurationError: one makes no sense, or the budget is too small for the model.
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
        """Of the chunks, in the order in which they are used."""
        return [f"layers.{index}" for index in range(self.chunks)]

    @property
    def chunk_bytes(self) -> int:
        """Of each chunk; what is left over goes."""
        return self.model_bytes // self.chunks

    @property
    def starts(self) -> list[float]:
        """When each client starts."""
        source = random.Random(self.seed)  # noqa: S311 - the same each time
        return [source.uniform(0, self.arrivals) for _ in range(self.clients)]

    def kept(self) -> frozenset[str]:
        """The chunks that each client keeps, by the plan of its budget.

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
        """In how many parts a chunk moves."""
        pages = -(-self.chunk_bytes // PAGE_BYTES)
        return max(1, min(pages, _MOST_USES // (self.clients * self.chunks * self.passes)))

    @property
    def heard(self) -> int:
        """Of how many clients each server hears what they will read."""
        uses = self.clients * self.chunks * self.passes * self.parts
        return max(_FEWEST_HEARD, min(_MOST_HEARD, _MOST_LOOKUPS // uses))


@dataclass(slots=True)
class Outcome:
    """What came of a fleet, simulated or measured.

    Attributes:
        hits, coalesced, misses: uses of pages: cached; being read already; read for this use.
        sent_bytes: to clients.
        storage_bytes: read of the storage.
        redis_bytes: read of Redis.
        first: the seconds from each client's start to its first token.
        later: the seconds of each client's passes after that, on average.
        seconds: from the start of the first client to the end of the last one.
        by_server: the hit rate of each server.
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
        """The share of uses that found their page in the server's cache."""
        uses = self.hits + self.coalesced + self.misses
        return self.hits / uses if uses else 0.0


def bench_fleet(fleet: Fleet) -> Result:
    """Simulate a fleet.

    Raises:
        ConfigurationError: SimPy is not installed, or the budget is too small for the model.
    """
    return Result(benchmark="fleet", machine=describe_machine("simpy"), rows=rows_of(fleet, simulate(fleet)))


def rows_of(fleet: Fleet, found: Outcome) -> tuple[Row, ...]:
    """What a fleet does and costs; the baselines are of one without servers."""
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
    """Let the clients of a fleet go through their passes.

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
    """Moves bytes at a rate, one request after the other.

    Attributes:
        moved_bytes: what it was asked to move so far.
    """

    def __init__(self, env: "simpy.Environment", rate: float) -> None:
        self.moved_bytes = 0
        self._env = env
        self._rate = rate
        self._free_at = 0.0

    def wait(self, size: int) -> float:
        """The seconds until it has moved so many bytes more."""
        self.moved_bytes += size
        self._free_at = max(self._env.now, self._free_at) + size / self._rate
        return self._free_at - self._env.now


class _Redis:
    """What servers share: parts that it holds, and those that are being read to be written to it."""

    def __init__(self, env: "simpy.Environment", fleet: Fleet) -> None:
        self.link = _Link(env, fleet.redis_link)
        self.parts: LruCache[Part, int] = LruCache(fleet.redis_bytes, lambda size: size)
        self.coming: dict[Part, simpy.Event] = {}


class _Server:
    """A server: its cache, what it reads just now, and its links."""

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
        """Count the use of a part, and begin to read it if need be; what to wait for, if it is not cached."""
        if self.cache.get(part) is not None:
            self.hits += 1
            return None
        if part in self._reads:
            self.coalesced += 1
        else:
            self.misses += 1
        return self.join(part, size)

    def join(self, part: Part, size: int) -> "simpy.Event":
        """Read a part, together with everyone else who wants it."""
        if part not in self._reads:
            self._reads[part] = self._env.event()
            self._env.process(self._read(part, size))
        return self._reads[part]

    def view(self, part: Part, size: int, *, foreseen: bool) -> None:
        """Count what of the cache is used."""
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
        """Read a part of Redis or, where that lacks it, of the storage; one server does, the others wait for it."""
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
    """A client: goes through its passes, with some chunks under way."""

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
        self._computed = 0.0  # when it has computed with what it received

    def run(self, start: float) -> Process:
        """Start, and go through all passes."""
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
        """Receive one chunk after the other into the same memory, and compute with each."""
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
        """Receive a chunk part by part; as many as are allowed are read ahead (as `surfw.server.pages.use_ahead`)."""
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
            ahead.free += bool(coming)  # of the one that is the first now
            if was_read is None and server.cache.get(part) is None:  # it was evicted meanwhile
                yield server.join(part, size)
            if asked is not None:
                asked.start = part.stop  # from now on, it was used
            server.view(part, size, foreseen=asked is not None)
            yield self._env.timeout(max(server.link.wait(size), self._link.wait(size)))

    def _parts(self, name: str) -> Iterator[tuple[Part, int]]:
        """The parts of a chunk, and how large they are."""
        count, size = self._fleet.parts, self._fleet.chunk_bytes
        for index in range(count):
            part = Part(name, index / count, (index + 1) / count)
            yield part, size * (index + 1) // count - size * index // count
