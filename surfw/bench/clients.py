"""Many clients of one server, each in its own process, against as many raw TCP connections that move the same bytes.

Every round starts new servers with empty caches: one for clients that skip verification (for this comparison only) and
one for clients as users run them. All clients read the whole model at the same time, one or two chunks at once, as a
model run does. No client process imports torch.
"""

import asyncio
import os
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

import psutil

from surfw.bench.result import Result, Row, Spread, describe_machine, rate_row, summarise
from surfw.bench.wire import as_failure, hear, peer, spawned, write_store
from surfw.client import open_wire_source, read_stats
from surfw.config import GB, MB, MIB, CachePolicy, WireLimits, count
from surfw.errors import ConfigurationError, SurfwError
from surfw.manifest import Chunk, Form, Manifest
from surfw.server import WeightServer
from surfw.source import ChunkSource, Read
from surfw.storage import open_backend
from surfw.storage.store_source import open_storage_source
from surfw.threads import together

_MADE_UP = (16 * MB,) * 16
"""Chunk sizes of the generated model, in bytes; used if no store is given."""

_AHEAD = 2
"""Chunks that a client has in flight, as in a model run: the current one and the next."""
_MOST_MEMORY = 0.4
"""The share of free memory that all clients together may use; if two chunks per client exceed it, each has one."""

_ALLOWED_BYTES = 128 * MB
"""Server memory allowed beyond its cache and its clients' windows."""

_SPARE_BYTES, _SPARE_CLIENTS = 64 * MB, 8
_LOOK_SECONDS = 0.1
_PATIENCE_SECONDS = 60
_WINDOW_BYTES = WireLimits().window_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientsWork:
    """What to measure.

    Attributes:
        store: the store's folder or URL; None for a generated, temporary store.
        model: the model's name; None for the store's only model.
        options: storage options.
        clients: number of clients that read.
        idle: number of additional clients that connect and do nothing.
        cache_bytes: size of the server's cache; None for one that holds the whole model.
        policy: the cache policy.
        rounds: number of rounds; medians are reported.
        seconds: how long the clients keep reading after the last round; 0 to stop at once.
        direct: whether to also measure clients that read the storage directly, without a server.
    """

    store: str | None = None
    model: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    clients: int = 8
    idle: int = 0
    cache_bytes: int | None = None
    policy: CachePolicy = "schedule"
    rounds: int = 3
    seconds: float = 0.0
    direct: bool = False

    def __post_init__(self) -> None:
        """Validate the numbers.

        Raises:
            ConfigurationError: a number is too small.
        """
        for name, least in (("clients", 1), ("idle", 0), ("rounds", 1), ("seconds", 0)):
            if not getattr(self, name) >= least:
                raise ConfigurationError(f"{name} is {getattr(self, name)}, expected {least} or more")


class _Lap(NamedTuple):
    """What one client read, with its start and end on the machine's monotonic clock."""

    started: float
    ended: float
    read_bytes: int


@dataclass(frozen=True, slots=True)
class _Way:
    """How clients read: over a raw TCP connection, from a server, or directly from the storage.

    Attributes:
        kind: which of these.
        place: the port of the raw server, otherwise a URL.
        is_verified: whether the bytes from a server are verified.
        seconds: how long to keep reading the model again; 0 to read it once.
    """

    kind: Literal["raw", "server", "storage"]
    place: str
    is_verified: bool = True
    seconds: float = 0.0


@dataclass(slots=True)
class _Series:
    """The rounds of one way to read.

    Attributes:
        rates: bytes per second of all clients together, per round.
        uneven: the fastest client's rate ÷ the slowest's, per round.
        server_cpu: CPU seconds of the server per GB sent, per round.
        read_bytes: bytes that the server read from its storage, per round.
        hits: hit rate of the server's cache at the end of each round, in percent.
        peak_bytes: peak resident memory of the server process over all rounds.
    """

    rates: list[float] = field(default_factory=list)
    uneven: list[float] = field(default_factory=list)
    server_cpu: list[float] = field(default_factory=list)
    read_bytes: list[int] = field(default_factory=list)
    hits: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    def note(self, laps: Sequence[_Lap]) -> None:
        """Add the figures of a round."""
        seconds = max(lap.ended for lap in laps) - min(lap.started for lap in laps)
        self.rates.append(sum(lap.read_bytes for lap in laps) / seconds)
        paces = [lap.read_bytes / (lap.ended - lap.started) for lap in laps]
        self.uneven.append(max(paces) / min(paces))

    @property
    def rate(self) -> Spread:
        """The rates in GB/s, summarised."""
        return summarise([one / GB for one in self.rates])


def bench_clients(work: ClientsWork, *, on_progress: Callable[[str], object] = lambda _: None) -> Result:
    """Run the benchmark.

    Raises:
        SurfwError: the store cannot be read, or a client failed.
    """
    _allow_files()
    with ExitStack() as stack:
        if work.store is None:
            place = stack.enter_context(TemporaryDirectory(prefix="surfw-bench-"))
            asyncio.run(write_store(Path(place), _MADE_UP))
            work = replace(work, store=place)
        manifest = asyncio.run(_read_manifest(work))
        work = replace(work, model=manifest.name)
        rows = _Measurement(work, manifest, on_progress).run()
    return Result(benchmark="clients", machine=describe_machine(), rows=rows)


class _Measurement:
    """One call of `bench_clients`."""

    def __init__(self, work: ClientsWork, manifest: Manifest, on_progress: Callable[[str], object]) -> None:
        self._work = work
        self._sizes = [_form(chunk).stored_bytes for chunk in manifest.chunks]
        self._size, self._largest = sum(self._sizes), max(self._sizes)
        self._cache_bytes = self._size + _SPARE_BYTES if work.cache_bytes is None else work.cache_bytes
        self._say = on_progress
        self._stayed: list[int] = []

    def run(self) -> tuple[Row, ...]:
        """Run all rounds, alternating between the ways to read."""
        work = self._work
        ways = ["raw", "unverified", "verified", *(["direct"] if work.direct else [])]
        series = {name: _Series() for name in ways}
        free = psutil.virtual_memory().available * _MOST_MEMORY
        ahead = _AHEAD if work.clients * _AHEAD * self._largest <= free else 1
        with peer(_serve_raw, self._largest) as raw, _clients(work, self._sizes, ahead) as clients:
            for number in range(work.rounds):
                for name in ways:
                    self._say(f"round {number + 1} of {work.rounds}: {name}")
                    if name == "raw":
                        series[name].note(clients.read(_Way("raw", str(raw.port))))
                    elif name == "direct":
                        series[name].note(clients.read(_Way("storage", str(work.store))))
                    else:
                        is_last = name == "verified" and number + 1 == work.rounds
                        self._serve(clients, series[name], is_verified=name == "verified", is_last=is_last)
        return self._rows(series, ahead)

    def _serve(self, clients: "_Clients", series: _Series, *, is_verified: bool, is_last: bool) -> None:
        """Run one round against a new server."""
        work = self._work
        with peer(_serve, work, self._cache_bytes) as server, _watching(server.process) as peak:
            url = f"ws://127.0.0.1:{server.port}"
            with _idle(url, work.idle):
                before = server.cpu_seconds()
                series.note(clients.read(_Way("server", url, is_verified=is_verified)))
                series.server_cpu.append((server.cpu_seconds() - before) / (self._size * work.clients / GB))
                series.read_bytes.append(read_stats(url).get("bytes_read", 0))
                if is_last and work.seconds:
                    self._say(f"going on for {work.seconds:g} seconds")
                    clients.read(_Way("server", url, seconds=work.seconds))
                after = read_stats(url)
                series.hits.append(100 * after["cache"]["hit_rate"])
                self._stayed.append(after["clients"])
        series.peak_bytes = max(series.peak_bytes, *peak)

    def _rows(self, series: Mapping[str, _Series], ahead: int) -> tuple[Row, ...]:
        work = self._work
        raw, verified = series["raw"].rate, series["verified"]
        under_way = f"each has {count(ahead, 'chunk')} under way"
        rows = [rate_row("raw TCP sockets", raw, note=f"{count(work.clients, 'connection')} at the same time")]
        for name in ("unverified", "verified"):
            one = series[name]
            rows.append(rate_row(name, one.rate, raw, verified=name == "verified", note=under_way))
        if "direct" in series:
            direct = series["direct"].rate
            rows.append(rate_row("the storage, without a server", direct, verified=True))
            rows.append(rate_row("verified, against that", verified.rate, direct, verified=True))
        served = [series["unverified"], verified]
        uneven = summarise([one for each in served for one in each.uneven])
        rows.append(Row(name="the fastest client, against the slowest", unit="x", **uneven.figures()))
        read = summarise([one / self._size for each in served for one in each.read_bytes])
        rows.append(Row(name="read of the storage, against the model", unit="x", **read.figures()))
        cpu = summarise([one for each in served for one in each.server_cpu])
        rows.append(Row(name="the server's processor time for a GB", unit="s", **cpu.figures()))
        hits = summarise([one for each in served for one in each.hits])
        rows.append(Row(name="hits of the cache", unit="%", **hits.figures(), note=f"the policy is {work.policy}"))
        peak, windows = max(one.peak_bytes for one in served), work.clients * _WINDOW_BYTES
        most = self._cache_bytes + windows + _ALLOWED_BYTES
        rows.append(
            Row(
                name="the server's memory, at most", value=peak / MB, unit="MB", ceiling=most / MB, share=peak / most,
                note=f"cache of {self._cache_bytes / MB:.0f} MB, windows of {windows / MB:.0f} MB, and 128 MB",
            )
        )  # fmt: skip
        if work.idle:
            rows.append(Row(name="idle connections that stayed", value=min(self._stayed), unit="", ceiling=work.idle))
        return tuple(rows)


async def _read_manifest(work: ClientsWork) -> Manifest:
    async with await open_storage_source(open_backend(str(work.store), work.options)) as source:
        names = [work.model] if work.model else await source.models()
        if len(names) != 1:
            raise ConfigurationError(f"the store has {count(len(names), 'model')}; name one: {', '.join(names)[:200]}")
        return await source.manifest(names[0])


def _form(chunk: Chunk) -> Form:
    """The form to read: `none` if the chunk has it, otherwise its first one."""
    return chunk.form("none") or chunk.forms[0]


def _allow_files() -> None:
    """Raise the limit on open files to the hard limit, for this process and its children."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


@contextmanager
def _watching(process: psutil.Process) -> Iterator[list[int]]:
    """Sample a process's memory during the body; the list has one item, the peak so far."""
    seen, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(_LOOK_SECONDS):
            with suppress(psutil.Error):
                seen[0] = max(seen[0], process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield seen
    finally:
        over.set()
        watcher.join()


# The servers, each in its own process.


def _serve(work: ClientsWork, cache_bytes: int, ready: Connection) -> None:
    async def serve() -> None:
        async with WeightServer(
            model_path=work.store,
            port=0,
            cache_size_mb=cache_bytes / MB,
            storage_options=work.options,
            cache_policy=work.policy,
            clients=work.clients + work.idle + _SPARE_CLIENTS,
        ) as server:
            ready.send(server.port)
            await server.serve_forever()

    asyncio.run(serve())


def _serve_raw(most_bytes: int, ready: Connection) -> None:
    """A TCP server that reads 8-byte sizes and sends that many bytes for each, with a thread per connection."""
    payload = memoryview(os.urandom(MIB) * (most_bytes // MIB + 1))

    def answer(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            while asked := connection.recv(8, socket.MSG_WAITALL):
                connection.sendall(payload[: int.from_bytes(asked)])

    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        ready.send(listener.getsockname()[1])
        while True:
            threading.Thread(target=answer, args=(listener.accept()[0],), daemon=True).start()


@contextmanager
def _idle(url: str, number: int) -> Iterator[None]:
    """Keep this many idle clients connected during the body, all in one separate process."""
    if not number:
        yield
        return
    here, there = Pipe()
    with here, spawned(_stay, url, number, there):
        there.close()
        if not here.poll(_PATIENCE_SECONDS) or here.recv() != number:
            raise SurfwError(f"{number} idle clients could not connect within {_PATIENCE_SECONDS} seconds")
        yield


def _stay(url: str, number: int, ready: Connection) -> None:
    async def stay() -> None:
        sources = [await open_wire_source(url) for _ in range(number)]
        ready.send(len(sources))
        await asyncio.Event().wait()

    _allow_files()
    asyncio.run(stay())


# The clients, forked from one process that has already imported what they need.


class _Clients:
    """The client processes, which read at the same time."""

    def __init__(self, ends: Sequence[Connection]) -> None:
        self._ends = ends

    def read(self, way: _Way) -> list[_Lap]:
        """Make all clients read, starting together once all are connected.

        Raises:
            SurfwError: a client failed.
        """
        for end in self._ends:
            end.send(way)
        for end in self._ends:
            hear(end)
        for end in self._ends:
            end.send("go")
        return [hear(end) for end in self._ends]


@contextmanager
def _clients(work: ClientsWork, sizes: Sequence[int], ahead: int) -> Iterator[_Clients]:
    pairs = [Pipe() for _ in range(work.clients)]
    with ExitStack() as stack:
        ours, theirs = [stack.enter_context(one) for one, _ in pairs], [other for _, other in pairs]
        stack.enter_context(spawned(_fork, work, sizes, ahead, theirs))
        for other in theirs:
            other.close()
        yield _Clients(ours)


def _fork(work: ClientsWork, sizes: Sequence[int], ahead: int, ends: Sequence[Connection]) -> None:
    """Fork the clients and wait for them; each exits when its connection closes."""
    children = []
    for index, end in enumerate(ends):
        child = os.fork()
        if not child:
            for other in (*ends[:index], *ends[index + 1 :]):
                other.close()
            with suppress(EOFError, OSError):
                _Client(work, sizes, ahead, end).obey()
            os._exit(0)
        children.append(child)
    for end in ends:
        end.close()
    for child in children:
        os.waitpid(child, 0)


class _Client:
    """A client: reads as instructed, one request after another."""

    def __init__(self, work: ClientsWork, sizes: Sequence[int], ahead: int, end: Connection) -> None:
        self._work = work
        self._sizes = sizes
        self._end = end
        self._memory = [memoryview(bytearray(b"\1") * max(sizes)) for _ in range(ahead)]

    def obey(self) -> None:
        """Handle requests until the connection closes."""
        while True:
            way = self._end.recv()
            try:
                lap = self._read_raw(way) if way.kind == "raw" else asyncio.run(self._read_source(way))
            except (SurfwError, OSError) as exc:
                self._end.send(as_failure(exc))
            else:
                self._end.send(lap)

    def _begin(self) -> float:
        """Report ready, wait for the start signal, and return the time."""
        self._end.send("ready")
        self._end.recv()
        return time.monotonic()

    def _read_raw(self, way: _Way) -> _Lap:
        memory = self._memory[0]
        with socket.create_connection(("127.0.0.1", int(way.place))) as connection:
            started = self._begin()
            connection.sendall(b"".join(size.to_bytes(8) for size in self._sizes))
            for size in self._sizes:
                received = 0
                while received < size:
                    count_bytes = connection.recv_into(memory[received:size])
                    if not count_bytes:
                        raise ConnectionResetError("the raw server hung up")
                    received += count_bytes
            return _Lap(started, time.monotonic(), sum(self._sizes))

    async def _read_source(self, way: _Way) -> _Lap:
        source: ChunkSource
        if way.kind == "storage":
            source = await open_storage_source(open_backend(way.place, self._work.options))
        else:
            source = wire = await open_wire_source(way.place)
            wire.unverified_for_measurement_only = not way.is_verified
        async with source:
            manifest = await source.manifest(str(self._work.model))
            await source.announce(manifest, manifest.chunks, ())
            started = self._begin()
            count_bytes = await self._read_chunks(source, manifest, started + way.seconds)
            return _Lap(started, time.monotonic(), count_bytes)

    async def _read_chunks(self, source: ChunkSource, manifest: Manifest, until: float) -> int:
        """Read all chunks, then start over until the deadline; each buffer takes a new chunk as soon as it is free."""
        left: Iterator[Chunk] = iter(manifest.chunks)
        read_bytes = 0

        async def go_on(memory: memoryview) -> None:
            nonlocal left, read_bytes
            while True:
                chunk = next(left, None)
                if chunk is None:
                    if time.monotonic() >= until:
                        return
                    left = iter(manifest.chunks)
                    continue
                size = _form(chunk).stored_bytes
                await source.fetch(manifest, [Read(chunk, _form(chunk), 0, size, memory[:size])])
                read_bytes += size

        await together(go_on(memory) for memory in self._memory)
        return read_bytes
