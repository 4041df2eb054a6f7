"""From a server's cache into a client's memory, against a raw TCP socket that moves the same bytes.

Both use two processes over loopback, and move the same chunks one after another into the same memory. Each round
measures the raw socket, surfw without verification (for this comparison only) and surfw as users run it, five times
each in alternation, so that other load on the machine affects all of them alike, and keeps the median of each. Each
round starts new client and server processes, because the placement of its memory makes a process faster or slower for
its whole life: rounds in one process agree more closely than separate runs do.
"""

import asyncio
import multiprocessing
import os
import signal
import socket
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil

from surfw.bench.result import Result, Row, describe_machine, rate_row, summarise_rates
from surfw.client import WireSource, open_wire_source, read_stats
from surfw.config import GB, MB
from surfw.errors import SurfwError
from surfw.manifest import Chunk, Form, Location, Manifest, TensorInfo, digest_blocks
from surfw.server import WeightServer
from surfw.source import Read
from surfw.storage import FilesystemBackend, Store

SIZES = tuple(range(8 * MB, 89 * MB, 16 * MB // 3))
"""16 chunks of 8 to 88 MB."""

BENCH_MODEL = "bench"
_SPARE_BYTES = 64 * MB
_TURNS = 5


@dataclass(frozen=True, slots=True)
class _Peer:
    """A server process and the port it listens on."""

    pid: int
    port: int

    @property
    def process(self) -> psutil.Process:
        return psutil.Process(self.pid)

    def cpu_seconds(self) -> float:
        """CPU seconds used so far."""
        return float(sum(self.process.cpu_times()[:2]))  # user and system

    def cache_misses(self) -> int:
        """Cache misses of a surfw server so far, in pages."""
        return read_stats(f"ws://127.0.0.1:{self.port}")["cache"]["misses"]


@dataclass(slots=True)
class _Series:
    """Measurements of one way to move the bytes: wall-clock time, and CPU time of both processes.

    Attributes:
        rounds: per round, the seconds of each of its turns.
        client_cpu, server_cpu: CPU seconds over all rounds.
    """

    rounds: list[list[float]] = field(default_factory=list)
    client_cpu: float = 0.0
    server_cpu: float = 0.0

    @contextmanager
    def measure(self, server: _Peer) -> Iterator[None]:
        """Time the body."""
        client_cpu, server_cpu, start = time.process_time(), server.cpu_seconds(), time.perf_counter()
        yield
        self.rounds[-1].append(time.perf_counter() - start)
        self.client_cpu += time.process_time() - client_cpu
        self.server_cpu += server.cpu_seconds() - server_cpu

    def add(self, other: "_Series") -> None:
        """Add the rounds of another process."""
        self.rounds += other.rounds
        self.client_cpu += other.client_cpu
        self.server_cpu += other.server_cpu

    @property
    def turns(self) -> list[float]:
        """The seconds of all turns."""
        return list(chain.from_iterable(self.rounds))

    @property
    def medians(self) -> list[float]:
        """The seconds of the median turn of each round."""
        return [statistics.median(turns) for turns in self.rounds]


def bench_wire(*, rounds: int = 9, sizes: Sequence[int] = SIZES, fetch: "Fetch | None" = None) -> Result:
    """Run the benchmark.

    Args:
        rounds: number of rounds, each with new processes; medians are reported.
        sizes: chunk sizes in bytes; each server and the client hold all chunks in memory.
        fetch: replaces `fetch_chunk` in surfw's client; a function that other processes can import.
    """
    all_series = [_Series(), _Series(), _Series()]
    with tempfile.TemporaryDirectory(prefix="surfw-bench-") as place:
        manifest = asyncio.run(write_store(Path(place), sizes))
        for _ in range(rounds):
            with (
                peer(serve_store, place, (sum(sizes) + _SPARE_BYTES) / MB) as server,
                peer(_serve_raw, place, manifest) as raw_server,
            ):
                here, there = multiprocessing.Pipe(duplex=False)
                with here, spawned(_run_client, sizes, server, raw_server, fetch or fetch_chunk, there):
                    there.close()
                    for series, found in zip(all_series, hear(here), strict=True):
                        series.add(found)
    return Result(benchmark="wire", machine=describe_machine(), rows=_rows(sum(sizes), *all_series))


def _run_client(sizes: Sequence[int], server: _Peer, raw_server: _Peer, fetch: "Fetch", to: Connection) -> None:
    """Measure a round, and send the results or an error message; runs in its own process."""
    try:
        to.send(asyncio.run(_measure(sizes, server, raw_server, fetch)))
    except (OSError, RuntimeError, SurfwError) as exc:
        to.send(as_failure(exc))


async def _measure(
    sizes: Sequence[int], server: _Peer, raw_server: _Peer, fetch: "Fetch"
) -> tuple[_Series, _Series, _Series]:
    """Measure a round: the raw socket, surfw unverified, and surfw verified."""
    raw, unverified, verified = _Series([[]]), _Series([[]]), _Series([[]])
    url = f"ws://127.0.0.1:{server.port}"
    with socket.create_connection(("127.0.0.1", raw_server.port)) as connection:
        async with await open_wire_source(url) as source, await open_wire_source(url) as blind:
            blind.unverified_for_measurement_only = True
            manifest = await source.manifest(BENCH_MODEL)
            memory = [memoryview(bytearray(b"\1") * size) for size in sizes]
            await fetch_chunks(source, manifest, memory, fetch)
            _receive_raw(connection, memory)
            misses = await asyncio.to_thread(server.cache_misses)
            for _ in range(_TURNS):
                with raw.measure(raw_server):
                    _receive_raw(connection, memory)
                with unverified.measure(server):
                    await fetch_chunks(blind, manifest, memory, fetch)
                with verified.measure(server):
                    await fetch_chunks(source, manifest, memory, fetch)
            if await asyncio.to_thread(server.cache_misses) != misses:
                raise RuntimeError("the server's cache did not hold the chunks")
    return raw, unverified, verified


async def fetch_chunk(source: WireSource, manifest: Manifest, index: int, destination: memoryview) -> None:
    """Fetch a whole chunk."""
    chunk = manifest.chunks[index]
    form = chunk.forms[0]
    await source.fetch(manifest, [Read(chunk, form, 0, form.stored_bytes, destination)])


Fetch = Callable[[WireSource, Manifest, int, memoryview], Awaitable[None]]
"""Fetches the chunk with this index into memory."""


async def fetch_chunks(
    source: WireSource, manifest: Manifest, memory: Sequence[memoryview], fetch: Fetch = fetch_chunk
) -> None:
    """Fetch the first chunks one after another, each into its own buffer."""
    for index, destination in enumerate(memory):
        await fetch(source, manifest, index, destination)


def _receive_raw(connection: socket.socket, memory: Sequence[memoryview]) -> None:
    for index, destination in enumerate(memory):
        connection.sendall(bytes([index]))
        received = 0
        while received < len(destination):
            if not (count := connection.recv_into(destination[received:])):
                raise ConnectionError("the raw socket was closed")
            received += count


def _rows(size: int, raw: _Series, unverified: _Series, verified: _Series) -> tuple[Row, ...]:
    """The rows. surfw is CPU-bound, so its ceiling is the rate at which every core would be busy."""
    base = summarise_rates(size, raw.medians)
    cores = psutil.cpu_count() or 1
    rows = [rate_row("raw TCP socket", base)]
    for name, series, checked in (("unverified", unverified, False), ("verified", verified, True)):
        rate = summarise_rates(size, series.medians)
        busy = (series.client_cpu + series.server_cpu) / sum(series.turns)
        ceiling = size * len(series.turns) * cores / (series.client_cpu + series.server_cpu) / GB
        note = f"both sides keep {busy:.1f} of {cores} cores busy"
        rows.append(rate_row(name, rate, base, ceiling=ceiling, verified=checked, note=note))
    return tuple(rows)


async def write_store(place: Path, sizes: Sequence[int]) -> Manifest:
    """Write a store with one model of random bytes, one chunk per size."""
    store = Store(FilesystemBackend(place))
    await store.create()
    chunks = []
    for index, size in enumerate(sizes):
        payload, key = os.urandom(size), f"blobs/{index}.safetensors"
        await store.backend.save(key, payload)
        digest, blocks = digest_blocks([payload])
        form = Form("none", size, digest, blocks, (Location(key, 0, size),))
        chunks.append(Chunk(str(index), "layer", digest, size, (TensorInfo(f"{index}.w", "U8", (size,), 0),), (form,)))
    manifest = Manifest(BENCH_MODEL, "Bench", "uint8", {}, None, (), {}, tuple(chunks), ())
    await store.publish(manifest)
    return manifest


@contextmanager
def peer(function: Callable[..., None], *arguments: Any) -> Iterator[_Peer]:
    """Run a server function in its own process during the body."""
    port, ready = multiprocessing.Pipe(duplex=False)
    with port, spawned(function, *arguments, ready) as process:
        ready.close()
        assert process.pid is not None, "it was started"
        yield _Peer(process.pid, port.recv())


@contextmanager
def spawned(function: Callable[..., None], *arguments: Any) -> Iterator[BaseProcess]:
    """Run a function in its own process, which ignores Ctrl-C, and kill it after the body."""
    process = multiprocessing.get_context("spawn").Process(
        target=_run_uninterrupted, args=(function, *arguments), daemon=True
    )
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def hear(end: Connection) -> Any:
    """Return what a client's process sent.

    Raises:
        SurfwError: its process ended, or it sent a failure (see `as_failure`).
    """
    try:
        heard = end.recv()
    except EOFError:
        raise SurfwError(
            "a client's process ended, so nothing was measured; what it wrote to stderr says why"
        ) from None
    if isinstance(heard, SurfwError):
        raise SurfwError(f"a client failed, so nothing was measured: {heard}") from heard
    return heard


def as_failure(exc: Exception) -> SurfwError:
    """Return a client's failure as an exception that can be sent to another process."""
    return SurfwError(str(exc) or type(exc).__name__)


def _run_uninterrupted(function: Callable[..., None], *arguments: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    function(*arguments)


def serve_store(place: str, cache_mb: float, ready: Connection) -> None:
    """Run a server with a cache of this size; to be called in its own process."""

    async def serve() -> None:
        async with WeightServer(model_path=place, port=0, cache_size_mb=cache_mb) as server:
            ready.send(server.port)
            await server.serve_forever()

    asyncio.run(serve())


def _serve_raw(place: str, manifest: Manifest, ready: Connection) -> None:
    """Run a TCP server that sends the chunk whose index it receives; to be called in its own process."""
    payloads = [(Path(place) / chunk.forms[0].locations[0].object).read_bytes() for chunk in manifest.chunks]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ready.send(listener.getsockname()[1])
        connection, _ = listener.accept()
        with connection:
            while number := connection.recv(1):
                connection.sendall(payloads[number[0]])
