"""The one way from stored bytes to tensors: fetch (verified), decode, put in place, view.

Where the model runs in the dtype it is stored in, the bytes arrive in the very buffer that the tensors are views of.
Where it runs in another one, they arrive in a scratch buffer and are cast from there, as `from_pretrained(dtype=…)`
casts them.
"""

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch

from surfw.codec import choose_form
from surfw.config import BLOCK_BYTES
from surfw.manifest import Chunk, Manifest
from surfw.runtime.buffers import ALIGNMENT, Buffer, MappedBuffer, buffer_capacity, plan_layout, spread
from surfw.skeleton.dtypes import torch_dtype
from surfw.source import ChunkSource, Read
from surfw.threads import in_thread


class Loader:
    """Loads chunks of one model from one source.

    Attributes:
        dtypes: the dtypes of the tensors that do not have the stored one in the model.
        in_pieces: whether no more than a block is asked of the source at a time, so that it never holds much; slower.
    """

    def __init__(
        self, source: ChunkSource, manifest: Manifest, dtypes: Mapping[str, torch.dtype] | None = None
    ) -> None:
        """Name the source, the model, and the dtypes of the tensors that do not get the stored one."""
        self.source = source
        self.manifest = manifest
        self.dtypes = dtypes or {}
        self.in_pieces = False
        self._scratch_turn = asyncio.Semaphore(1)
        self._piece_turn = asyncio.Semaphore(1)

    async def load(self, chunk: Chunk, buffer: Buffer, *, priority: int) -> int:
        """Fill the buffer with the chunk's tensors.

        Returns:
            How many stored bytes were fetched for it.

        Raises:
            IntegrityError: bytes are not what the manifest promises; the buffer holds nothing usable.
            StorageError, WireError: they could not be read.
        """
        if not _casts(chunk, self.dtypes):
            return await self._read(chunk, buffer, priority)
        async with self._scratch_turn:
            scratch = Buffer(_stored_bytes(chunk))
            count = await self._read(chunk, scratch, priority)
            await in_thread(self._cast, chunk, scratch, buffer)
        return count

    async def map(self, chunk: Chunk) -> MappedBuffer | None:
        """The chunk's tensors where they are stored, if they can be used there as they are.

        Raises:
            IntegrityError: bytes are not what the manifest promises.
            StorageError: they could not be read.
        """
        if _casts(chunk, self.dtypes) or choose_form(chunk).codec != "none":
            return None
        view = await self.source.view(self.manifest, chunk, choose_form(chunk))
        return MappedBuffer(view.memory, view.expect_unchanged) if view is not None else None

    async def _read(self, chunk: Chunk, buffer: Buffer, priority: int) -> int:
        """The chunk's stored tensors into a buffer, each at its place there."""
        form = choose_form(chunk)
        step = BLOCK_BYTES if self.in_pieces else max(1, form.stored_bytes)
        for start in range(0, form.stored_bytes, step):
            stop = min(start + step, form.stored_bytes)
            async with self._piece_turn if self.in_pieces else nullcontext():
                read = Read(chunk, form, start, stop, buffer.view[start:stop])
                await self.source.fetch(self.manifest, [read], priority=priority)
        spread(buffer.view, [tensor.nbytes for tensor in chunk.tensors])
        return form.stored_bytes

    def tensors(self, chunk: Chunk, buffer: Buffer | MappedBuffer) -> dict[str, torch.Tensor]:
        """Views over a filled buffer, by tensor name; they keep its memory alive.

        Of a mapped one, the few tensors that do not lie at multiples of 64 bytes are copied.
        """
        if isinstance(buffer, MappedBuffer):
            return _mapped_views(chunk, buffer)
        return _views(chunk, buffer, _targets(chunk, self.dtypes))

    def _cast(self, chunk: Chunk, stored: Buffer, buffer: Buffer) -> None:
        stored_dtypes = [torch_dtype(tensor.dtype) for tensor in chunk.tensors]
        cast = _views(chunk, buffer, _targets(chunk, self.dtypes))
        for name, tensor in _views(chunk, stored, stored_dtypes).items():
            cast[name].copy_(tensor)


def buffer_bytes(chunk: Chunk, dtypes: Mapping[str, torch.dtype]) -> int:
    """How large a buffer the chunk's tensors need, with these dtypes instead of the stored ones."""
    stored = (torch_dtype(tensor.dtype).itemsize for tensor in chunk.tensors)
    triples = zip(chunk.tensors, stored, _targets(chunk, dtypes), strict=True)
    return plan_layout([tensor.nbytes // size * target.itemsize for tensor, size, target in triples])[1]


def scratch_bytes(chunk: Chunk, dtypes: Mapping[str, torch.dtype]) -> int:
    """Memory that loading the chunk takes besides its buffer: what it is cast from. One chunk is cast at a time."""
    return buffer_capacity(_stored_bytes(chunk)) if _casts(chunk, dtypes) else 0


def _stored_bytes(chunk: Chunk) -> int:
    return plan_layout([tensor.nbytes for tensor in chunk.tensors])[1]


def _targets(chunk: Chunk, dtypes: Mapping[str, torch.dtype]) -> list[torch.dtype]:
    return [dtypes.get(tensor.name, torch_dtype(tensor.dtype)) for tensor in chunk.tensors]


def _casts(chunk: Chunk, dtypes: Mapping[str, torch.dtype]) -> bool:
    return any(tensor.name in dtypes for tensor in chunk.tensors)


def as_parameter(values: torch.Tensor) -> torch.nn.Parameter:
    """A parameter over these values that wants gradients as those of `from_pretrained` do, although there are none.

    Torch chooses by that: where the input's strides are unusual, `matmul` with a weight that wants none goes another
    way, which took 60 times as long for a head of 32000 rows, and need not give the same bits.
    """
    return torch.nn.Parameter(values, requires_grad=values.is_floating_point() or values.is_complex())


def _views(chunk: Chunk, buffer: Buffer, dtypes: Sequence[torch.dtype]) -> dict[str, torch.Tensor]:
    shapes = [tensor.shape for tensor in chunk.tensors]
    sizes = [torch.Size(shape).numel() * dtype.itemsize for shape, dtype in zip(shapes, dtypes, strict=True)]
    flat = torch.frombuffer(buffer.view, dtype=torch.uint8)
    places = zip(chunk.tensors, dtypes, sizes, plan_layout(sizes)[0], strict=True)
    return {
        info.name: flat[at : at + size].view(dtype).view(info.shape) if size else torch.empty(info.shape, dtype=dtype)
        for info, dtype, size, at in places
    }


def _mapped_views(chunk: Chunk, buffer: MappedBuffer) -> dict[str, torch.Tensor]:
    flat = torch.frombuffer(buffer.view, dtype=torch.uint8)
    found = {}
    for info in chunk.tensors:
        stored = flat[info.offset : info.offset + info.nbytes]
        placed = stored.clone() if info.offset % ALIGNMENT else stored
        found[info.name] = placed.view(torch_dtype(info.dtype)).view(info.shape)
    return found
