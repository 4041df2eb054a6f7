"""Hit rates of a server's cache policies, and of the offline optimum, for the reads of many clients.

No server runs and nothing is read: the policies decide about pages that have no bytes. All pages count as equally
large, since the offline optimum is known only for that case (L. A. Belady, 1966: keep the pages needed soonest, even in
preference to the one just read). The optimum knows the whole future; a policy knows only what clients announced and
have done so far.
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
"""Pages per layer."""
_MOST_BYTES = 1 << 36
"""No chunk is larger."""


class Announcement(NamedTuple):
    """A client announces the cycle of chunks that it reads, and those it keeps; both are empty when it leaves."""

    client: Hashable
    cycle: Sequence[str]
    kept: Sequence[str]


class Use(NamedTuple):
    """A client reads a page: a part of a chunk in one form."""

    client: Hashable
    form: str
    part: Part


Trace = Sequence[Announcement | Use]


@dataclass(frozen=True, kw_only=True, slots=True)
class Arrangement:
    """The timing of a group of clients.

    Attributes:
        name: the name shown in the result.
        places: each client's start time, as a fraction of a pass from 0 to 1.
        speeds: each client's relative reading speed.
        kept: the layers that each client keeps.
        varies: whether the time between a client's reads varies at random.
    """

    name: str
    places: Sequence[float]
    speeds: Sequence[float]
    kept: Sequence[Collection[int]]
    varies: bool = False


def bench_cache(*, clients: int = 10, layers: int = 22, passes: int = 6, cache_share: float = 0.5) -> Result:
    """Compare the policies on generated traces, which are the same each time.

    Args:
        clients: number of clients, all reading the same model.
        layers: number of its layers, each a chunk of the same size.
        passes: average number of passes per client.
        cache_share: fraction of the model that the cache holds, from 0 to 1; at least one page.
    """
    capacity = max(1, round(cache_share * layers * _PAGES))
    rows = [
        _row(one.name, generate(one, layers=layers, passes=passes), capacity) for one in _arrangements(clients, layers)
    ]
    return Result(benchmark="cache", machine=describe_machine(), rows=tuple(rows))


def bench_recorded(path: Path, *, cache_share: float = 0.5) -> Result:
    """Compare the policies on a trace written by `surfw serve --record`; of time, only the order of requests counts.

    Args:
        path: the trace file.
        cache_share: fraction of the pages in the trace that the cache holds, from 0 to 1; at least one page.

    Raises:
        ConfigurationError: the file cannot be read, or is not a recording.
    """
    trace = read_trace(path)
    pages = {(event.form, event.part) for event in trace if isinstance(event, Use)}
    row = _row(path.name, trace, max(1, round(cache_share * len(pages))))
    return Result(benchmark="cache", machine=describe_machine(), rows=(row,))


def read_trace(path: Path) -> list[Announcement | Use]:
    """Read a recording of a server.

    Raises:
        ConfigurationError: the file cannot be read, or is not a recording.
    """
    trace: list[Announcement | Use] = []
    known: defaultdict[int, set[str]] = defaultdict(set)  # the models each client announced
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
    """The events of one line; a request becomes a use of each page that it touches."""
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
    """The default policy's hit rate, against LRU and the optimum."""
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
    """Make the trace of an arrangement; all clients read until it ends."""
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
    """A client's endless reads as (layer, page): all layers in the first pass, then those it does not keep."""
    order = chain(range(layers), cycle([layer for layer in range(layers) if layer not in kept]))
    return ((layer, page) for layer in order for page in range(_PAGES))


def simulate(trace: Trace, capacity: int, policy: CachePolicy) -> float:
    """The hit rate of a policy on a trace, with a cache of `capacity` pages."""
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
    """The best possible hit rate on a trace, with a cache of `capacity` pages and full knowledge of the future."""
    keys = [(event.form, event.part) for event in trace if isinstance(event, Use)]
    following, later = [math.inf] * len(keys), dict[tuple[str, Part], int]()
    for index in range(len(keys) - 1, -1, -1):
        following[index] = later.get(keys[index], math.inf)
        later[keys[index]] = index
    kept: dict[tuple[str, Part], float] = {}  # the next use of each cached page
    latest: list[tuple[float, tuple[str, Part]]] = []  # a heap of (-next use, page)
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
