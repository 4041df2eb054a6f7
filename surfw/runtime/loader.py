"""The one way from stored bytes to tensors: fetch (verified), decode, move apart, view."""

import torch

from surfw.codec import choose_form
from surfw.manifest import Chunk, Manifest
from surfw.runtime.buffers import Buffer
from surfw.runtime.layout import plan_layout, spread
from surfw.skeleton.dtypes import torch_dtype
from surfw.source import ChunkSource, Read


class Loader:
    """Loads chunks of one model from one source."""

    def __init__(self, source: ChunkSource, manifest: Manifest) -> None:
        """Name the source and the model."""
        self.source = source
        self.manifest = manifest

    def buffer_bytes(self, chunk: Chunk) -> int:
        """How large a buffer the chunk needs."""
        _, memory_bytes = plan_layout([tensor.nbytes for tensor in chunk.tensors])
        return max(memory_bytes, choose_form(chunk).stored_bytes)

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
        spread(buffer.view, [tensor.nbytes for tensor in chunk.tensors])

    def tensors(self, chunk: Chunk, buffer: Buffer) -> dict[str, torch.Tensor]:
        """Views over a filled buffer, by tensor name; they keep its memory alive."""
        offsets, _ = plan_layout([tensor.nbytes for tensor in chunk.tensors])
        flat = torch.frombuffer(buffer.view, dtype=torch.uint8)
        tensors = {}
        for info, at in zip(chunk.tensors, offsets, strict=True):
            dtype = torch_dtype(info.dtype)
            raw = flat[at : at + info.nbytes]
            tensors[info.name] = raw.view(dtype).view(info.shape) if info.nbytes else torch.empty(info.shape, dtype=dtype)
        return tensors
