"""Tensors in a chunk of a source in memory, and what reads parts of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from surfw.config import BLOCK_BYTES
from surfw.manifest import Chunk, Form, TensorInfo, digest_blocks
from surfw.metrics import Metrics
from surfw.runtime.rows import BlockReader
from surfw.runtime.run import IoThread, Run
from surfw.skeleton.dtypes import safetensors_dtype
from tests.runtime.nets import raw
from tests.toys import ToySource, toy_manifest


@dataclass
class Parts:
    """One chunk `c` with tensors `t0`, `t1`, …, what reads its blocks, and what was read so far."""

    chunk: Chunk
    tensors: list[torch.Tensor]
    source: ToySource
    blocks: BlockReader
    io: IoThread
    metrics: Metrics
    run: Run
    reads: list[tuple[int, int]] = field(default_factory=list)

    def blocks_read(self) -> list[list[int]]:
        """The blocks of every read so far, and forget them."""
        found = [list(range(start // BLOCK_BYTES, -(-stop // BLOCK_BYTES))) for start, stop in self.reads]
        self.reads.clear()
        return found


@contextmanager
def parts_of(*tensors: torch.Tensor, codec: str = "none") -> Iterator[Parts]:
    """A chunk with these tensors."""
    infos, payload = [], b""
    for index, tensor in enumerate(tensors):
        infos.append(TensorInfo(f"t{index}", safetensors_dtype(tensor.dtype), tuple(tensor.shape), len(payload)))
        payload += raw(tensor)
    digest, digests = digest_blocks(iter([payload]))
    form = Form(codec, len(payload), digest, digests)
    chunk = Chunk("c", "part", digest, len(payload), tuple(infos), (form,))
    manifest = toy_manifest([chunk])
    source = ToySource({"toy": manifest}, {chunk.id: payload})
    io, metrics, run = IoThread(), Metrics(), Run()
    blocks = BlockReader(source, manifest, io, metrics, lambda: run)
    parts = Parts(chunk, list(tensors), source, blocks, io, metrics, run)
    source.before_fetch = lambda read: parts.reads.append((read.start, read.stop))
    try:
        yield parts
    finally:
        io.close()
