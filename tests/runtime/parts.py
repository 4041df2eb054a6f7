"""Tensors in a chunk of a source in memory, and readers of their parts."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from surfw.config import BLOCK_BYTES
from surfw.manifest import Chunk, Manifest
from surfw.metrics import Metrics
from surfw.runtime.rows import RowReader
from surfw.runtime.run import IoThread, Run
from tests.runtime.nets import chunk_of
from tests.toys import ToySource, toy_manifest, toy_model_of


@dataclass
class Parts:
    """A chunk `c` with tensors `t0`, `t1`, …, readers for its blocks, and a record of the reads."""

    chunk: Chunk
    tensors: list[torch.Tensor]
    source: ToySource
    io: IoThread
    metrics: Metrics
    run: Run
    reads: list[tuple[int, int]] = field(default_factory=list)

    def reader(self, manifest: Manifest | None = None, **options: Any) -> RowReader:
        """A row reader, optionally with another manifest."""
        return RowReader(
            self.source, manifest or toy_manifest([self.chunk]), self.io, self.metrics, run=lambda: self.run, **options
        )

    def blocks_read(self) -> list[list[int]]:
        """Return the blocks of every read so far, and clear the record."""
        found = [list(range(start // BLOCK_BYTES, -(-stop // BLOCK_BYTES))) for start, stop in self.reads]
        self.reads.clear()
        return found


@contextmanager
def parts_of(*tensors: torch.Tensor, codec: str = "none") -> Iterator[Parts]:
    """A chunk with these tensors."""
    made = chunk, _ = chunk_of("c", "part", {f"t{index}": one for index, one in enumerate(tensors)}, codec=codec)
    _, source = toy_model_of([made])
    io, metrics, run = IoThread(), Metrics(), Run()
    parts = Parts(chunk, list(tensors), source, io, metrics, run)
    source.before_fetch = lambda read: parts.reads.append((read.start, read.stop))
    try:
        yield parts
    finally:
        io.close()
