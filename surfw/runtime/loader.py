"""The one way from stored bytes to tensors: fetch (verified), decode, move apart, view."""

from collections.abc import Mapping

import torch

from surfw.codec import choose_form
from surfw.manifest import Chunk, Manifest
from surfw.runtime.buffers import Buffer
from surfw.runtime.layout import Layout, plan_layout
from surfw.skeleton.dtypes import torch_dtype
from surfw.source import ChunkSource, Read

Tensors = Mapping[str, torch.Tensor]


class Loader:
    """Loads chunks of one model from one source."""

    def __init__(self, source: ChunkSource, manifest: Manifest) -> None:
        """Name the source and the model."""
        self.source = source
        self.manifest = manifest
        self._layouts: dict[str, Layout] = {}

    def layout(self, chunk: Chunk) -> Layout:
        """Where the chunk's tensors lie in a buffer."""
        if chunk.name not in self._layouts:
            self._layouts[chunk.name] = plan_layout(chunk)
        return self._layouts[chunk.name]

    def buffer_bytes(self, chunk: Chunk) -> int:
        """How large a buffer the chunk needs."""
        return max(self.layout(chunk).memory_bytes, choose_form(chunk).stored_bytes)

    async def load(self, chunk: Chunk, buffer: Buffer, *, priority: int) -> None:
        """Fill the buffer with the chunk's tensors.

        Raises:
            IntegrityError: bytes are not what the manifest promises; the buffer holds nothing usable.
            StorageError, WireError: they could not be had.
        """
        form = choose_form(chunk)
        if form.stored_bytes:
            read = Read(chunk, form, 0, form.stored_bytes, buffer.view[: form.stored_bytes])
            await self.source.fetch(self.manifest, [read], priority=priority)
        for start, to, length in self.layout(chunk).moves:
            buffer.view[to : to + length] = buffer.view[start : start + length]

    def tensors(self, chunk: Chunk, buffer: Buffer) -> dict[str, torch.Tensor]:
        """Views over a filled buffer, by tensor name; they keep its memory alive."""
        offsets = self.layout(chunk).offsets
        flat = torch.frombuffer(buffer.view, dtype=torch.uint8)
        tensors = {}
        for info in chunk.tensors:
            at, dtype = offsets[info.name], torch_dtype(info.dtype)
            raw = flat[at : at + info.nbytes]
            tensors[info.name] = raw.view(dtype).view(info.shape) if info.nbytes else torch.empty(info.shape, dtype=dtype)
        return tensors
