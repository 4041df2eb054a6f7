"""Hit rates of a server's cache: its policies, and the best that any could do, on what many clients read.

No server runs, and nothing is read: the policies themselves decide about pages that have no bytes. All pages count as
equally large, since only for those the offline optimum is known (L. A. Belady, 1966: keep what is needed soonest, also
before what was just read). It knows all of the future; a policy knows what clients announced, and what they did so far.
"""

import heapq
import json
import math
import random
from collections import defaultdict
from collections.abc import Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, cycle
from pathlib import Path
from typing import Any, NamedTuple

from surfw.bench.result import Result, Row, describe_machine
from surfw.config import PAGE_BYTES, CachePolicy
from surfw.errors import ConfigurationError
from surfw.server.cache import ProvingCache
from surfw.server.futures import Future, Futures, Part
from surfw.server.policies import make_cache

_PAGES = 8
_MOST_BYTES = 1 << 36
"""More than any chunk has."""
"""Of one layer."""


class Announcement(NamedTuple):
    """A client announces what it reads again and again, and what of it it keeps; nothing when it leaves."""

    client: Hashable
    cycle: Sequence[str]
    kept: Sequence[str]


class Use(NamedTuple):
    """A client reads a page, which is a part of a chunk in one of its forms."""

    client: Hashable
    form: str
    part: Part


Trace = Sequence[Announcement | Use]


@dataclass(frozen=True, kw_only=True, slots=True)
class Arrangement:
    """How clients are to each other.

    Attributes:
        name: for people.
        places: by how much of a pass each client begins later than the first, from 0 to 1.
        speeds: how many pages each client reads in the same time; with a spread, times vary at random.
        kept: the layers that each client keeps.
    """

    name: str
    places: Sequence[float]
    speeds: Sequence[float]
    kept: Sequence[Collection[int]]
    varies: bool = False


def bench_cache(*, clients: int = 10, layers: int = 22, passes: int = 6, cache_share: float = 0.5) -> Result:
    """Compare the policies on generated traces, which are the same each time.

    Args:
        clients: how many read the same model.
        layers: how many chunks it has, all of the same size.
        passes: how often all of it is read for each client, on average.
        cache_share: how much of the model the cache holds, from 0 to 1; one page at least.
    """
    capacity = max(1, round(cache_share * layers * _PAGES))
    rows = [
        _row(one.name, generate(one, layers=layers, passes=passes), capacity) for one in _arrangements(clients, layers)
    ]
    return Result(benchmark="cache", machine=describe_machine(), rows=tuple(rows))


def bench_recorded(path: Path, *, cache_share: float = 0.5) -> Result:
    """Compare the policies on a trace that `surfw serve --record` wrote; its requests count in their order.

    Args:
        path: the file.
        cache_share: how much of all that is read in it the cache holds, from 0 to 1; one page at least.

    Raises:
        ConfigurationError: it cannot be read, or is something else.
    """
    trace = read_trace(path)
    pages = {(event.form, event.part) for event in trace if isinstance(event, Use)}
    row = _row(path.name, trace, max(1, round(cache_share * len(pages))))
    return Result(benchmark="cache", machine=describe_machine(), rows=(row,))


def read_trace(path: Path) -> list[Announcement | Use]:
    """Read a recording of a server.

    Raises:
        ConfigurationError: it cannot be read, or is something else.
    """
    trace: list[Announcement | Use] = []
    known: defaultdict[int, set[str]] = defaultdict(set)  # the models of each client
    number = 0
    try:
        with path.open(encoding="ascii", errors="replace") as lines:
            for line in lines:
                number += 1
                trace += _events(json.loads(line), known)
    except OSError as exc:
        raise ConfigurationError(f"{path} cannot be read: {exc.strerror or type(exc).__name__}") from exc
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError) as exc:
        raise ConfigurationError(
            f"{path} has no event of a recording in line {number}; expected a file that surfw serve --record wrote"
        ) from exc
    return trace


def _events(line: dict[str, Any], known: dict[int, set[str]]) -> Iterator[Announcement | Use]:
    """What a line says; requests as the pages that they touch."""
    client = line["client"]
    if "model" not in line:
        yield from (Announcement((client, model), (), ()) for model in known.pop(client, ()))
    elif "cycle" in line:
        known[client].add(line["model"])
        yield Announcement((client, line["model"]), line["cycle"], line["kept"])
    else:
        size = line["size"]
        if not 0 <= line["start"] <= line["stop"] <= size <= _MOST_BYTES:
            raise ValueError("no chunk has so many bytes, or none there")
        for first in range(line["start"] // PAGE_BYTES * PAGE_BYTES, line["stop"], PAGE_BYTES):
            part = Part(line["chunk"], first / size, min(first + PAGE_BYTES, size) / size)
            yield Use((client, line["model"]), line["form"], part)


def _row(name: str, trace: Trace, capacity: int) -> Row:
    """The hit rate of the default policy, against LRU and the optimum."""
    rate, lru = (100 * simulate(trace, capacity, policy) for policy in ("schedule", "lru"))
    best = 100 * find_optimum(trace, capacity)
    return Row(
        name=name,
        value=rate,
        unit="%",
        baseline=lru,
        ratio=rate / lru if lru else None,
        ceiling=best,
        share=rate / best if best else None,
        note=f"{best - rate:.1f} points below the optimum",
    )


def _arrangements(clients: int, layers: int) -> Iterator[Arrangement]:
    source = random.Random(clients)  # noqa: S311 - the same each time
    nothing: list[Collection[int]] = [()] * clients
    alike = [1.0] * clients
    evenly = [index / clients for index in range(clients)]
    anywhere = [source.random() for _ in range(clients)]
    unlike = [source.uniform(0.3, 1) for _ in range(clients)]
    kept = [source.sample(range(layers), source.randrange(layers // 2 + 1)) for _ in range(clients)]
    yield Arrangement(name="all in step", places=[0.0] * clients, speeds=alike, kept=nothing)
    yield Arrangement(name="spread evenly over the cycle", places=evenly, speeds=alike, kept=nothing)
    yield Arrangement(name="anywhere, each at its own speed", places=anywhere, speeds=unlike, kept=nothing, varies=True)
    yield Arrangement(name="so, and each keeps other layers", places=anywhere, speeds=unlike, kept=kept, varies=True)


def generate(arrangement: Arrangement, *, layers: int, passes: int) -> list[Announcement | Use]:
    """Make the trace of an arrangement: all clients read until it ends."""
    source = random.Random(layers)  # noqa: S311 - the same each time
    names = [str(layer) for layer in range(layers)]
    trace: list[Announcement | Use] = []
    reads: list[Iterator[tuple[int, int]] | None] = [None for _ in arrangement.places]
    turns = [(place * layers * _PAGES, client) for client, place in enumerate(arrangement.places)]
    heapq.heapify(turns)
    for _ in range(len(turns) * layers * _PAGES * passes):
        now, client = turns[0]
        kept = arrangement.kept[client]
        if (mine := reads[client]) is None:
            trace.append(Announcement(client, names, [names[layer] for layer in kept]))
            mine = reads[client] = _reads(layers, kept)
        layer, page = next(mine)
        trace.append(Use(client, "none", Part(names[layer], page / _PAGES, (page + 1) / _PAGES)))
        pause = source.expovariate(1) if arrangement.varies else 1.0
        heapq.heapreplace(turns, (now + pause / arrangement.speeds[client], client))
    return trace


def _reads(layers: int, kept: Collection[int]) -> Iterator[tuple[int, int]]:
    """The layers and pages that a client reads, forever: at first all, then those that it does not keep."""
    order = chain(range(layers), cycle([layer for layer in range(layers) if layer not in kept]))
    return ((layer, page) for layer in order for page in range(_PAGES))


def simulate(trace: Trace, capacity: int, policy: CachePolicy) -> float:
    """The share of uses that find their page in a cache of so many pages."""
    futures, mine = Futures(), dict[Hashable, Future]()
    cache: ProvingCache[tuple[str, Part], int] = make_cache(
        policy, capacity, lambda size: size, lambda key: futures.next_use(key[1]), lambda: futures.now
    )
    hits = uses = 0
    for event in trace:
        if isinstance(event, Announcement):
            if before := mine.pop(event.client, None):
                futures.remove(before)
            if event.cycle:
                mine[event.client] = futures.add(event.cycle, event.kept)
            continue
        future = mine.get(event.client)
        uses += 1
        key = event.form, event.part
        foreseen = future is not None and future.knows(event.part.chunk)
        if future is not None and foreseen:
            with future.reading(event.part, futures.now):
                pass
        if cache.get(key):
            hits += 1
        else:
            cache[key] = 1
        futures.now += 1
        cache.note_use(key, 1, foreseen=foreseen)
    return hits / uses if uses else 0.0


def find_optimum(trace: Trace, capacity: int) -> float:
    """The share of uses that could find their page in a cache of so many pages, if all of the future were known."""
    keys = [(event.form, event.part) for event in trace if isinstance(event, Use)]
    following, later = [math.inf] * len(keys), dict[tuple[str, Part], int]()
    for index in range(len(keys) - 1, -1, -1):
        following[index] = later.get(keys[index], math.inf)
        later[keys[index]] = index
    kept: dict[tuple[str, Part], float] = {}  # pages, and when each is used next
    latest: list[tuple[float, tuple[str, Part]]] = []  # a heap: minus that time, the page
    hits = 0
    for key, when in zip(keys, following, strict=True):
        hits += key in kept
        kept[key] = when
        heapq.heappush(latest, (-when, key))
        while len(kept) > capacity:
            minus_when, last = heapq.heappop(latest)
            if kept.get(last) == -minus_when:
                del kept[last]
    return hits / len(keys) if keys else 0.0
