"""Small real models from a real store, whose tables are never in memory."""

import asyncio
import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from surfw.chunking import prepare_model, write_model
from surfw.client import open_wire_source
from surfw.config import BLOCK_BYTES
from surfw.manifest import Manifest
from surfw.metrics import Metrics
from surfw.models.from_manifest import cast_dtypes, open_skeleton
from surfw.runtime.buffers import buffer_capacity
from surfw.runtime.engine import Engine
from surfw.runtime.hooks import StreamingHooks
from surfw.runtime.loader import Loader, buffer_bytes
from surfw.runtime.plan import Limit
from surfw.runtime.rows import RowReader, StreamedTables, TableUnit, tables_of
from surfw.runtime.run import IoThread, Run
from surfw.source import ChunkSource, Read
from surfw.storage import StorageBackend, open_backend
from surfw.storage.store_source import StorageSource
from tests.exactness.families import Family
from tests.toys import toy_needs

LEAST_BYTES = 256 * 1024


class Recorded(StorageSource):
    """A store that records its reads."""

    def __init__(self, backend: StorageBackend) -> None:
        super().__init__(backend)
        self.fetches: list[list[Read]] = []

    async def fetch(self, manifest: Manifest, reads: Sequence[Read], *, priority: int = 0) -> None:
        self.fetches.append(list(reads))
        await super().fetch(manifest, reads, priority=priority)

    def blocks(self, chunk: str) -> list[int]:
        """Return the blocks that were read of a chunk, in order, and clear the record."""
        reads = [read for reads in self.fetches for read in reads if read.chunk.name == chunk]
        self.fetches = [[read for read in reads if read.chunk.name != chunk] for reads in self.fetches]
        return [block for read in reads for block in range(read.start // BLOCK_BYTES, -(-read.stop // BLOCK_BYTES))]


class Watched(Engine):
    """An engine that records for which units chunks were requested."""

    acquired: set[str]

    def acquire(self, module: str) -> dict[str, torch.Tensor]:
        self.acquired.add(module)
        return super().acquire(module)


@dataclass
class RowWise:
    """A streamed model whose tables are read in parts, and the resident one."""

    resident: Any
    model: Any
    manifest: Manifest
    engine: Watched
    units: dict[str, TableUnit]
    tables: StreamedTables
    hooks: StreamingHooks
    source: Any
    metrics: Metrics


def write(family: Family, path: Path, dtype: torch.dtype | None = None, codec: str = "none") -> tuple[Any, Manifest]:
    """Write a model to a store at `path`; return the resident model and the manifest."""
    torch.manual_seed(0)
    family.build().save_pretrained(path / "source")
    cls = getattr(transformers, family.class_name)
    resident = copy.deepcopy(cls.from_pretrained(path / "source", dtype=dtype or "auto").eval())
    prepared = prepare_model(str(path / "source"), name="model")
    return resident, asyncio.run(write_model(prepared, open_backend(path / "store"), codecs=(codec,)))


@contextmanager
def row_wise(
    family: Family,
    path: Path,
    *,
    dtype: torch.dtype | None = None,
    codec: str = "none",
    piece_bytes: int = BLOCK_BYTES,
    keep_bytes: int = 8 * BLOCK_BYTES,
    url: str | None = None,
) -> Iterator[RowWise]:
    """Write the model and open it, with all of its tables of at least 256 KiB outside of memory.

    It is read directly, or from a server for the store at the URL.
    """
    resident, manifest = write(family, path, dtype, codec)
    io, metrics, run = IoThread(), Metrics(), Run()
    source = io.run(open_wire_source(url)) if url else Recorded(open_backend(path / "store"))
    skeleton = open_skeleton(manifest, dtype)
    units = tables_of(skeleton, manifest, least_bytes=LEAST_BYTES)
    dtypes = cast_dtypes(manifest, skeleton)
    engine = _engine(manifest, source, dtypes, io, metrics)
    tables = StreamedTables(
        units,
        RowReader(source, manifest, io, metrics, run=lambda: run, dtypes=dtypes, keep_bytes=keep_bytes),
        units.__contains__,
    )
    hooks = StreamingHooks(skeleton, manifest, engine, tables)
    opened = RowWise(resident, skeleton.model, manifest, engine, units, tables, hooks, source, metrics)
    try:
        with torch.no_grad():
            yield opened
    finally:
        hooks.detach()
        engine.close()
        io.run(source.close())
        io.close()


def _engine(
    manifest: Manifest, source: ChunkSource, dtypes: dict[str, torch.dtype], io: IoThread, metrics: Metrics
) -> Watched:
    loader = Loader(source, manifest, dtypes)
    limit = Limit(cache_layers=1)
    sizes = {chunk.name: buffer_capacity(buffer_bytes(chunk, loader.dtypes)) for chunk in manifest.chunks}
    needs = replace(toy_needs(manifest), sizes=sizes)
    engine = Watched(manifest, needs, limit, loader, io=io, metrics=metrics, prefetch=False)
    engine.acquired = set()
    return engine
