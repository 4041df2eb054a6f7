"""A small real fleet, compared with its simulation: servers in their own processes, and clients that only read.

The store is generated in a temporary folder. Clients do not use torch: each announces its cycle as a model run does,
and reads with two chunks in flight, no faster than it would compute with them. The servers limit the link rates.
Clients start at the same times as the simulated ones, and keep the same chunks.
"""

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from surfw.bench.fleet import AHEAD_CHUNKS, Fleet, Outcome, simulate
from surfw.bench.result import Result, Row, describe_machine
from surfw.bench.wire import as_failure, hear, peer, spawned, write_store
from surfw.client import open_wire_source, read_stats
from surfw.config import GB, MB
from surfw.errors import SurfwError
from surfw.manifest import Chunk, Manifest
from surfw.server import WeightServer
from surfw.source import ChunkSource, Read
from surfw.threads import together

SMALL = Fleet(
    clients=16,
    servers=2,
    model_bytes=16 * 8 * 10**6,
    chunks=16,
    passes=2,
    arrivals=14.0,
    cache_bytes=64 * 10**6,
    link=120e6,
    client_link=40e6,
    budget_bytes=40 * 10**6,
    compute_seconds=1.25,
    storage_seconds=0.002,
    reads=2,
)
"""Each client uses 6.4 MB/s, and all together 102 MB/s, which two cores can move and verify."""

_SPARE_CLIENTS = 8


class _Lap(NamedTuple):
    """Seconds from a client's start to the end of its first pass, and mean seconds of each later pass."""

    first: float
    later: float


@dataclass(frozen=True, slots=True)
class _Reader:
    """The work of one process of clients, with one client per start time."""

    url: str
    fleet: Fleet
    starts: tuple[float, ...]


def bench_measured(fleet: Fleet = SMALL) -> Result:
    """Measure a fleet, and simulate it with the measured rate of the storage.

    Raises:
        ConfigurationError: SimPy is not installed, or the budget is too small for the model.
        SurfwError: a client failed.
    """
    measured, storage_link = measure(fleet)
    simulated = simulate(replace(fleet, storage_link=storage_link))
    return Result(benchmark="fleet", machine=describe_machine("simpy"), rows=tuple(compare(simulated, measured)))


def compare(simulated: Outcome, measured: Outcome) -> Iterator[Row]:
    """One row per figure: the simulated value, with the measured one as its baseline."""
    pairs = [
        ("hits of the servers' caches", "%", 100 * simulated.hit_rate, 100 * measured.hit_rate),
        ("read of the storage", "GB", simulated.storage_bytes / GB, measured.storage_bytes / GB),
        ("time to first token", "s", _mean(simulated.first), _mean(measured.first)),
        ("each pass after it", "s", _mean(simulated.later), _mean(measured.later)),
        ("sent to clients", "GB", simulated.sent_bytes / GB, measured.sent_bytes / GB),
        ("all clients are done after", "s", simulated.seconds, measured.seconds),
    ]
    for name, unit, value, baseline in pairs:
        ratio = value / baseline if baseline else None
        yield Row(name=name, value=value, unit=unit, baseline=baseline, ratio=ratio, note="the baseline was measured")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def measure(fleet: Fleet) -> tuple[Outcome, float]:
    """Run a fleet on this machine.

    Returns:
        The result, and the read rate of its storage without other load, in bytes per second.

    Raises:
        SurfwError: a client failed.
    """
    with ExitStack() as stack:
        place = stack.enter_context(TemporaryDirectory(prefix="surfw-bench-"))
        asyncio.run(write_store(Path(place), [fleet.chunk_bytes] * fleet.chunks))
        storage_link = _read_rate(Path(place))
        servers = [stack.enter_context(peer(_serve, place, fleet)) for _ in range(fleet.servers)]
        urls = [f"ws://127.0.0.1:{server.port}" for server in servers]
        ends = [
            _start(stack, url, fleet, tuple(fleet.starts[index :: fleet.servers])) for index, url in enumerate(urls)
        ]
        for end in ends:
            hear(end)  # all are ready
        began = time.monotonic()
        for end in ends:
            end.send(began)
        laps: list[_Lap] = [lap for end in ends for lap in hear(end)]
        seconds = time.monotonic() - began - min(fleet.starts)
        found = Outcome(first=[lap.first for lap in laps], seconds=seconds)
        found.later = [lap.later for lap in laps] if fleet.passes > 1 else []
        for url in urls:
            stats = read_stats(url)
            cache = stats["cache"]
            found.hits += cache["hits"]
            found.coalesced += cache["coalesced"]
            found.misses += cache["misses"]
            found.sent_bytes += stats["bytes_sent"]
            found.storage_bytes += stats["bytes_read"]
            found.by_server.append(cache["hits"] / max(1, cache["hits"] + cache["coalesced"] + cache["misses"]))
    return found, storage_link


def _read_rate(place: Path) -> float:
    """The rate at which the files of a folder are read, in bytes per second."""
    files = [file for file in place.rglob("*.safetensors") if file.is_file()]
    started = time.perf_counter()
    read = sum(len(file.read_bytes()) for file in files)
    return read / (time.perf_counter() - started)


def _start(stack: ExitStack, url: str, fleet: Fleet, starts: tuple[float, ...]) -> Connection:
    """Start a process that runs the clients of one server."""
    here, there = Pipe()
    stack.enter_context(here)
    stack.enter_context(spawned(_run_clients, _Reader(url, fleet, starts), there))
    there.close()
    return here


# These functions run in their own processes.


def _serve(place: str, fleet: Fleet, ready: Connection) -> None:
    async def serve() -> None:
        async with WeightServer(
            model_path=place,
            port=0,
            cache_size_mb=fleet.cache_bytes / MB,
            cache_policy=fleet.policy,
            clients=fleet.clients + _SPARE_CLIENTS,
            max_bytes_per_second=fleet.link,
            max_client_bytes_per_second=fleet.client_link,
        ) as server:
            ready.send(server.port)
            await server.serve_forever()

    asyncio.run(serve())


def _run_clients(reader: _Reader, end: Connection) -> None:
    try:
        end.send(asyncio.run(_read_all(reader, end)))
    except (SurfwError, OSError) as exc:
        end.send(as_failure(exc))


async def _read_all(reader: _Reader, end: Connection) -> list[_Lap]:
    """Connect all clients, report that they are ready, and start each one at its time."""
    async with AsyncExitStack() as stack:
        sources = [await stack.enter_async_context(await open_wire_source(reader.url)) for _ in reader.starts]
        manifests = [await source.manifest((await source.models())[0]) for source in sources]
        end.send([])
        began = await asyncio.to_thread(end.recv)
        return await asyncio.gather(
            *(
                _read(source, manifest, reader.fleet, began + start)
                for source, manifest, start in zip(sources, manifests, reader.starts, strict=True)
            )
        )


async def _read(source: ChunkSource, manifest: Manifest, fleet: Fleet, at: float) -> _Lap:
    """Run one client's passes, starting at `at` on the machine's monotonic clock."""
    kept = fleet.kept()
    await asyncio.sleep(at - time.monotonic())
    of_name = dict(zip(fleet.names, manifest.chunks, strict=True))
    await source.announce(manifest, manifest.chunks, [of_name[name] for name in kept])
    memory = [memoryview(bytearray(fleet.chunk_bytes)) for _ in range(AHEAD_CHUNKS)]
    pace, ends = _Compute(fleet.compute_seconds), list[float]()
    for number in range(fleet.passes):
        names = [name for name in fleet.names if not number or name not in kept]
        left = iter([of_name[name] for name in names])
        await together(_go_on(source, manifest, left, pace, one) for one in memory)
        await pace.compute(fleet.chunks - len(names))
        ends.append(time.monotonic())
    return _Lap(ends[0] - at, (ends[-1] - ends[0]) / max(1, fleet.passes - 1))


class _Compute:
    """Simulates computing with one chunk after another by sleeping."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._until = 0.0

    async def compute(self, chunks: int) -> None:
        """Wait until these chunks, and all before them, would be computed."""
        self._until = max(self._until, time.monotonic()) + chunks * self._seconds
        await asyncio.sleep(self._until - time.monotonic())


async def _go_on(
    source: ChunkSource, manifest: Manifest, left: Iterator[Chunk], pace: _Compute, memory: memoryview
) -> None:
    for chunk in left:
        await source.fetch(manifest, [Read(chunk, chunk.forms[0], 0, chunk.forms[0].stored_bytes, memory)])
        await pace.compute(1)
