"""Measures how fast the files of a model in a local store can be read, bypassing the page cache if possible."""

import asyncio
import mmap
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import cycle
from pathlib import Path

from surfw.bench.comparison import Bandwidth, Comparison
from surfw.config import PIECE_BYTES
from surfw.errors import ConfigurationError
from surfw.runtime.buffers import Buffer
from surfw.storage import open_backend
from surfw.storage.store_source import open_storage_source

_READERS = 2
_SECONDS = 3.0


def run(work: Comparison) -> Bandwidth:
    """Measure reads of the comparison's model."""
    assert work.source is not None, "bench_infer names it"
    assert work.model is not None, "and the model"
    return measure_reads(work.source, work.model)


def measure_reads(store: str, model: str, *, seconds: float = _SECONDS) -> Bandwidth:
    """Read the model's files for some seconds, two pieces of 8 MiB at a time, alternating between huge-page buffers.

    Each buffer is as large as the largest file, so that the bytes must reach memory, not only the processor's cache.

    Args:
        store: the store's folder.
        model: the model's name in the store.
        seconds: the least duration; files are read again if necessary.

    Raises:
        ConfigurationError: the store's objects are not local files, or the model has no chunks.
        SurfwError: the model does not exist.
    """
    files = asyncio.run(_files(store, model))
    if not files:
        raise ConfigurationError(f"{model} in {store} has no chunks, so there is nothing to read; chunk it again")
    return read_files(files, seconds=seconds)


def read_files(files: Sequence[Path], *, seconds: float = _SECONDS) -> Bandwidth:
    """Read these files as `measure_reads` does."""
    buffers = [Buffer(max(path.stat().st_size for path in files)).view for _ in range(2)]
    for view in buffers:
        for at in range(0, len(view), mmap.PAGESIZE):
            view[at] = 0  # touch every page once, so that it is allocated
    direct = all(_takes_direct_reads(path) for path in files)
    done, start = 0, time.perf_counter()
    with ThreadPoolExecutor(_READERS) as readers:
        for path, view in zip(cycle(files), cycle(buffers), strict=False):
            done += _read(path, view, readers, direct=direct)
            took = time.perf_counter() - start
            if took >= seconds:
                break
    return Bandwidth(bytes_per_second=done / took, direct=direct)


async def _files(store: str, model: str) -> list[Path]:
    """The files that hold the model's chunks."""
    async with await open_storage_source(open_backend(store)) as source:
        manifest = await source.manifest(await source.resolve(model))
        objects = dict.fromkeys(place.object for chunk in manifest.chunks for place in chunk.forms[0].locations)
        paths = [source.store.backend.local_path(key) for key in objects]
    if None in paths:
        raise ConfigurationError(
            f"{store} is not a local folder, so its reads cannot be measured; give the bandwidth yourself"
        )
    return [path for path in paths if path is not None]


def _takes_direct_reads(path: Path) -> bool:
    with suppress(OSError):
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
        return True
    return False


def _read(path: Path, view: memoryview, readers: ThreadPoolExecutor, *, direct: bool) -> int:
    """Read a whole file, and return its size."""
    fd = os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0))
    try:
        if not direct:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        starts = range(0, os.fstat(fd).st_size, PIECE_BYTES)
        return sum(readers.map(lambda at: os.preadv(fd, [view[at : at + PIECE_BYTES]], at), starts))
    finally:
        os.close(fd)
