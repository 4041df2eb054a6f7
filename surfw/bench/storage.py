"""Reading a model from a storage with surfw, against other ways to read the same bytes, in alternation.

The other ways are parallel ranged GETs with the same client library and, if it is installed, Run:ai Model Streamer.
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any

from fsspec.asyn import get_loop

from surfw.bench.peers.runai import find_streamer, stream_objects
from surfw.bench.result import Result, Row, Spread, describe_machine, rate_row, summarise_rates
from surfw.config import MB, MIB
from surfw.errors import ConfigurationError
from surfw.manifest import Manifest
from surfw.runtime.buffers import Buffer
from surfw.source import Read
from surfw.storage import FsspecBackend, S3Backend, StorageBackend, open_backend
from surfw.storage.origins import Objects
from surfw.storage.store import segments
from surfw.storage.store_source import StorageSource, open_storage_source
from surfw.threads import together

_AHEAD = 2
"""Chunks that surfw reads at once, as in a model run: the current one and the next."""

_PLAIN_WAYS = ((16 * MIB, 4), (16 * MIB, 8), (8 * MIB, 8), (8 * MIB, 16), (32 * MIB, 4))
"""Size and concurrency of the plain ranged reads; the fastest combination is the baseline."""

_SURFW, _STREAMER = "surfw", "Run:ai Model Streamer"


def bench_storage(
    url: str, *, model: str | None = None, options: Mapping[str, Any] | None = None, rounds: int = 5
) -> Result:
    """Run the benchmark, after reading everything once untimed.

    Args:
        url: a store in S3 or another network storage.
        model: the model's name in the store; None for its only model.
        options: storage options.
        rounds: alternations with the baselines; medians are reported.

    Raises:
        ConfigurationError: the storage is not read in parallel ranges over a network; a folder is not.
        SurfwError: the store or model does not exist or cannot be read.
    """
    backend = open_backend(url, options)
    return asyncio.run(_bench(backend, model, rounds))


async def _bench(backend: StorageBackend, model: str | None, rounds: int) -> Result:
    async with await open_storage_source(backend) as source:
        manifest = await source.manifest(await source.resolve(model))
        size = sum(chunk.forms[0].stored_bytes for chunk in manifest.chunks)
        largest = max((chunk.forms[0].stored_bytes for chunk in manifest.chunks), default=0)
        buffers = [Buffer(largest) for _ in range(_AHEAD)]
        read_ours = partial(_read_chunks, source, manifest, buffers)
        plain = {
            f"plain ranges of {range_bytes // MIB} MiB, {at_once} at a time": partial(
                _time, partial(_read_plain, _plain_ranges(source.store.objects, manifest, range_bytes), at_once)
            )
            for range_bytes, at_once in _PLAIN_WAYS
        }
        ways: dict[str, Callable[[], Awaitable[float]]] = {_SURFW: partial(_time, read_ours), **plain}
        if streamer := _streamer(source.store.objects, manifest):
            ways[_STREAMER] = streamer
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        await read_ours()
        for index in range(rounds):
            order = deque(ways)
            order.rotate(-index)  # no way always follows the same other one, whose effects on a server may linger
            for name in order:
                seconds[name].append(await ways[name]())
    rates = {name: summarise_rates(size, taken) for name, taken in seconds.items()}
    machine = describe_machine("s3fs", "aiohttp", "runai-model-streamer")
    return Result(benchmark="storage", machine=machine, rows=_rows(size, rates, list(plain)))


async def _time(read: Callable[[], Awaitable[None]]) -> float:
    start = time.perf_counter()
    await read()
    return time.perf_counter() - start


async def _read_chunks(source: StorageSource, manifest: Manifest, buffers: Sequence[Buffer]) -> None:
    """Read all chunks once with surfw, verified, each into one of the buffers."""
    left = iter(manifest.chunks)

    async def take(buffer: Buffer) -> None:
        for chunk in left:
            form = chunk.forms[0]
            read = Read(chunk, form, 0, form.stored_bytes, buffer.view[: form.stored_bytes])
            await source.fetch(manifest, [read])

    await together(take(buffer) for buffer in buffers)


def _plain_ranges(objects: Objects, manifest: Manifest, range_bytes: int) -> list[tuple[FsspecBackend, str, int, int]]:
    """The chunks' bytes as ranges of at most `range_bytes`: storage, path, start and stop."""
    return [
        (*_place(objects, key), at, min(at + range_bytes, start + length))
        for chunk in manifest.chunks
        for key, start, length in segments(chunk.forms[0].locations, 0, chunk.forms[0].stored_bytes)
        for at in range(start, start + length, range_bytes)
    ]


async def _read_plain(ranges: Sequence[tuple[FsspecBackend, str, int, int]], at_once: int) -> None:
    """Read all ranges once with the file systems' own `_cat_file` on fsspec's event loop, and discard the data."""
    left = iter(ranges)

    async def take() -> None:
        for backend, path, start, stop in left:
            data = await backend.fs._cat_file(path, start=start, end=stop)  # noqa: SLF001 - the plainest way to read
            if len(data) != stop - start:
                raise ConfigurationError(f"{path} changes while it is measured; leave it alone meanwhile")

    async def read() -> None:
        await together(take() for _ in range(at_once))

    await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(read(), get_loop()))


def _place(objects: Objects, key: str) -> tuple[FsspecBackend, str]:
    """The storage of an object, and its path there.

    Raises:
        ConfigurationError: the storage is not read over a network.
    """
    found = objects.find(key)
    if not isinstance(found.backend, FsspecBackend) or found.backend.parallel_reads == 1:
        raise ConfigurationError(
            f"{found.backend.url} is not read over a network, expected a URL such as s3://bucket/prefix"
        )
    return found.backend, found.backend.path(found.key)


def _streamer(objects: Objects, manifest: Manifest) -> Callable[[], Awaitable[float]] | None:
    """A function that reads the same objects once with Run:ai Model Streamer; None if that is not available."""
    keys = dict.fromkeys(place.object for chunk in manifest.chunks for place in chunk.forms[0].locations)
    places = [_place(objects, key) for key in keys]
    backend = places[0][0] if places else None
    if not isinstance(backend, S3Backend) or not find_streamer():
        return None
    return lambda: asyncio.to_thread(stream_objects, [f"s3://{path}" for _, path in places], backend)


def _rows(size: int, rates: Mapping[str, Spread], plain: Sequence[str]) -> tuple[Row, ...]:
    """The rows of the other ways, then surfw against the baselines."""
    rows = [rate_row(name, rate) for name, rate in rates.items() if name != _SURFW]
    baselines = {"the best plain ranges": max((rates[name] for name in plain), key=lambda rate: rate.value)}
    if _STREAMER in rates:
        baselines[_STREAMER] = rates[_STREAMER]
    rows += [rate_row(f"surfw, against {name}", rates[_SURFW], base, verified=True) for name, base in baselines.items()]
    return (*rows, Row(name="bytes of the model", value=size / MB, unit="MB"))
