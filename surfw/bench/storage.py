"""Reading a model from a storage as surfw does, against other ways to have the same bytes, in alternation.

The others are parallel ranged GETs of the same client library, and Run:ai Model Streamer where it is installed.
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any

from fsspec.asyn import get_loop

from surfw.bench.result import Result, Row, describe_machine, summarise_rates
from surfw.bench.storage_peer import find_streamer, stream_objects
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
"""Chunks that surfw reads at a time, as a model does: one for now, and one ahead."""

_SURFW, _STREAMER = "surfw", "streamer"
_WAYS = ((16 * MIB, 4), (16 * MIB, 8), (8 * MIB, 8), (8 * MIB, 16), (32 * MIB, 4))
"""Range sizes and how many are under way, of the plain reads; the best one is the baseline."""


def bench_storage(
    url: str, *, model: str | None = None, options: Mapping[str, Any] | None = None, rounds: int = 5
) -> Result:
    """Measure, after one read of everything that does not count.

    Args:
        url: a store in S3, or in another storage that is read over a network.
        model: its name there; None for the only one.
        options: storage options.
        rounds: alternations with the baselines; medians are reported.

    Raises:
        ConfigurationError: the storage is not read in ranges, as a folder.
        SurfwError: there is no such store or model, or it cannot be read.
    """
    backend = open_backend(url, options)
    return asyncio.run(_bench(backend, model, rounds))


async def _bench(backend: StorageBackend, model: str | None, rounds: int) -> Result:
    async with await open_storage_source(backend) as source:
        manifest = await source.manifest(await source.resolve(model))
        ours = _Ours(source, manifest)
        size = sum(chunk.forms[0].stored_bytes for chunk in manifest.chunks)
        plain = {way: _Plain(source.store.objects, manifest, *way) for way in _WAYS}
        streamer = _streamer(source.store.objects, manifest)
        contenders: dict[Any, Callable[[], Awaitable[float]]] = {_SURFW: partial(_time, ours.read)}
        contenders |= {way: partial(_time, one.read) for way, one in plain.items()}
        if streamer:
            contenders[_STREAMER] = streamer
        seconds: dict[Any, list[float]] = {key: [] for key in contenders}
        await ours.read()
        for index in range(rounds):
            order = deque(contenders)
            order.rotate(-index)  # nobody always follows the same other one, whose traces a server may bear for a while
            for key in order:
                seconds[key].append(await contenders[key]())
    return Result(
        benchmark="storage",
        machine=describe_machine("s3fs", "aiohttp", "runai-model-streamer"),
        rows=_rows(size, seconds),
    )


async def _time(work: Callable[[], Awaitable[None]]) -> float:
    start = time.perf_counter()
    await work()
    return time.perf_counter() - start


class _Ours:
    """Every chunk into one of a few buffers, verified."""

    def __init__(self, source: StorageSource, manifest: Manifest) -> None:
        self._source = source
        self._manifest = manifest
        largest = max((chunk.forms[0].stored_bytes for chunk in manifest.chunks), default=0)
        self._buffers = [Buffer(largest) for _ in range(_AHEAD)]

    async def read(self) -> None:
        """Read all chunks once."""
        left = iter(self._manifest.chunks)

        async def take(buffer: Buffer) -> None:
            for chunk in left:
                form = chunk.forms[0]
                read = Read(chunk, form, 0, form.stored_bytes, buffer.view[: form.stored_bytes])
                await self._source.fetch(self._manifest, [read])

        await together(take(buffer) for buffer in self._buffers)


class _Plain:
    """The same bytes as ranges of the file systems' own `_cat_file`; what arrives is dropped."""

    def __init__(self, objects: Objects, manifest: Manifest, range_bytes: int, at_once: int) -> None:
        self._at_once = at_once
        self._ranges = [
            (*_place(objects, key), at, min(at + range_bytes, start + length))
            for chunk in manifest.chunks
            for key, start, length in segments(chunk.forms[0].locations, 0, chunk.forms[0].stored_bytes)
            for at in range(start, start + length, range_bytes)
        ]

    async def read(self) -> None:
        """Read everything once, on fsspec's own event loop."""
        await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._read(), get_loop()))

    async def _read(self) -> None:
        left = iter(self._ranges)

        async def take() -> None:
            for backend, path, start, stop in left:
                data = await backend.fs._cat_file(path, start=start, end=stop)  # noqa: SLF001 - the plain way there is
                if len(data) != stop - start:
                    raise ConfigurationError(f"{path} changes while it is measured; leave it alone meanwhile")

        await together(take() for _ in range(self._at_once))


def _place(objects: Objects, key: str) -> tuple[FsspecBackend, str]:
    """Where an object lies: the storage, and its path there.

    Raises:
        ConfigurationError: it is not read over a network.
    """
    found = objects.find(key)
    if not isinstance(found.backend, FsspecBackend) or found.backend.parallel_reads == 1:
        raise ConfigurationError(
            f"{found.backend.url} is not read over a network, expected a URL such as s3://bucket/prefix"
        )
    return found.backend, found.backend.path(found.key)


def _streamer(objects: Objects, manifest: Manifest) -> Callable[[], Awaitable[float]] | None:
    """One read of the same objects by Run:ai Model Streamer; None if it cannot be had here."""
    keys = dict.fromkeys(place.object for chunk in manifest.chunks for place in chunk.forms[0].locations)
    places = [_place(objects, key) for key in keys]
    backend = places[0][0] if places else None
    if not isinstance(backend, S3Backend) or not find_streamer():
        return None
    return lambda: asyncio.to_thread(stream_objects, [f"s3://{path}" for _, path in places], backend)


def _rows(size: int, seconds: Mapping[Any, Sequence[float]]) -> tuple[Row, ...]:
    rates = {key: summarise_rates(size, found) for key, found in seconds.items()}
    best = max(_WAYS, key=lambda way: rates[way].value)
    rows = [
        Row(name=f"plain ranges of {way[0] // MIB} MiB, {way[1]} at a time", unit="GB/s", **rates[way]._asdict())
        for way in _WAYS
    ]
    baselines = [("the best plain ranges", rates[best])]
    if _STREAMER in rates:
        rows.append(Row(name="Run:ai Model Streamer", unit="GB/s", **rates[_STREAMER]._asdict()))
        baselines.append(("Run:ai Model Streamer", rates[_STREAMER]))
    ours = rates[_SURFW]
    rows += [
        Row(
            name=f"surfw, against {name}",
            unit="GB/s",
            **ours._asdict(),
            baseline=base.value,
            ratio=ours.value / base.value,
            verified=True,
        )
        for name, base in baselines
    ]
    return (*rows, Row(name="bytes of the model", value=size / MB, unit="MB"))
