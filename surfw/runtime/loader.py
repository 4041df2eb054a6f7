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
from surfw.config import ALIGNMENT, BLOCK_BYTES
from surfw.manifest import Chunk, Manifest
from surfw.runtime.buffers import Buffer, buffer_capacity, plan_layout, spread
from surfw.skeleton.dtypes import torch_dtype
from surfw.source import ChunkSource, Read, View
from surfw.threads import in_thread


class Loader:
    """Loads chunks of one model from one source.

    Attributes:
        dtypes: the dtypes of the tensors that do not have the stored one in the model.
    """

    def __init__(
        self, source: ChunkSource, manifest: Manifest, dtypes: Mapping[str, torch.dtype] | None = None
    ) -> None:
        """Name the source, the model, and the dtypes of the tensors that do not get the stored one."""
        self.source = source
        self.manifest = manifest
        self.dtypes = dtypes or {}
        self._scratch_turn = asyncio.Semaphore(1)
        self._piece_turn = asyncio.Semaphore(1)

    async def load(self, chunk: Chunk, buffer: Buffer, *, priority: int, in_pieces: bool = False) -> int:
        """Fill the buffer with the chunk's tensors.

        Args:
            chunk: one of the model's.
            buffer: at least `buffer_bytes` large.
            priority: the source's; lower ones go first.
            in_pieces: ask for no more than a block of any chunk at a time, so that the source never holds much; slower.

        Returns:
            How many stored bytes were fetched for it.

        Raises:
            IntegrityError: bytes are not what the manifest promises; the buffer holds nothing usable.
            StorageError, WireError: they could not be read.
        """
        if not _casts(chunk, self.dtypes):
            return await self._read(chunk, buffer, priority, in_pieces=in_pieces)
        async with self._scratch_turn:
            scratch = Buffer(buffer_bytes(chunk, {}))
            count = await self._read(chunk, scratch, priority, in_pieces=in_pieces)
            await in_thread(self._cast, chunk, scratch, buffer)
        return count

    async def map(self, chunk: Chunk) -> View | None:
        """The chunk's tensors where they are stored, if they can be used there as they are.

        Raises:
            IntegrityError: bytes are not what the manifest promises.
            StorageError: they could not be read.
        """
        if _casts(chunk, self.dtypes) or choose_form(chunk).codec != "none":
            return None
        return await self.source.view(self.manifest, chunk, choose_form(chunk))

    def tensors(self, chunk: Chunk, memory: Buffer | View) -> dict[str, torch.Tensor]:
        """Views over filled memory, by tensor name; they keep it alive.

        Of mapped memory, the few tensors that do not lie at multiples of 64 bytes are copied.
        """
        if isinstance(memory, View):
            return _views(chunk, memory.memory, [tensor.offset for tensor in chunk.tensors], {})
        return _views(chunk, memory.view, plan_layout(_sizes(chunk, self.dtypes))[0], self.dtypes)

    async def _read(self, chunk: Chunk, buffer: Buffer, priority: int, *, in_pieces: bool) -> int:
        """The chunk's stored tensors into a buffer, each at its place there."""
        form = choose_form(chunk)
        step = BLOCK_BYTES if in_pieces else max(1, form.stored_bytes)
        for start in range(0, form.stored_bytes, step):
            stop = min(start + step, form.stored_bytes)
            async with self._piece_turn if in_pieces else nullcontext():
                read = Read(chunk, form, start, stop, buffer.view[start:stop])
                await self.source.fetch(self.manifest, [read], priority=priority)
        spread(buffer.view, _sizes(chunk, {}))
        return form.stored_bytes

    def _cast(self, chunk: Chunk, stored: Buffer, buffer: Buffer) -> None:
        cast = self.tensors(chunk, buffer)
        for name, tensor in _views(chunk, stored.view, plan_layout(_sizes(chunk, {}))[0], {}).items():
            cast[name].copy_(tensor)


def buffer_bytes(chunk: Chunk, dtypes: Mapping[str, torch.dtype]) -> int:
    """How large a buffer the chunk's tensors need, with these dtypes instead of the stored ones."""
    return plan_layout(_sizes(chunk, dtypes))[1]


def scratch_bytes(chunk: Chunk, dtypes: Mapping[str, torch.dtype]) -> int:
    """Memory that loading the chunk takes besides its buffer: what it is cast from. One chunk is cast at a time."""
    return buffer_capacity(buffer_bytes(chunk, {})) if _casts(chunk, dtypes) else 0


def as_parameter(values: torch.Tensor) -> torch.nn.Parameter:
    """A parameter over these values that wants gradients as those of `from_pretrained` do, although there are none.

    Torch chooses by that: where the input's strides are unusual, `matmul` with a weight that wants none goes another
    way, which took 60 times as long for a head of 32000 rows, and need not give the same bits.
    """
    return torch.nn.Parameter(values, requires_grad=values.is_floating_point() or values.is_complex())


def _casts(chunk: Chunk, dtypes: Mapping[str, torch.dtype]) -> bool:
    return any(tensor.name in dtypes for tensor in chunk.tensors)


def _sizes(chunk: Chunk, dtypes: Mapping[str, torch.dtype]) -> list[int]:
    """The bytes of each tensor, with these dtypes instead of the stored ones."""
    return [
        tensor.nbytes // (stored := torch_dtype(tensor.dtype)).itemsize * dtypes.get(tensor.name, stored).itemsize
        for tensor in chunk.tensors
    ]


def _views(
    chunk: Chunk, memory: memoryview, places: Sequence[int], dtypes: Mapping[str, torch.dtype]
) -> dict[str, torch.Tensor]:
    """Tensors that begin at these places, as views, or as copies where a place is no multiple of 64."""
    flat = torch.frombuffer(memory, dtype=torch.uint8)
    found = {}
    for info, size, place in zip(chunk.tensors, _sizes(chunk, dtypes), places, strict=True):
        values = flat[place : place + size]
        placed = values.clone() if place % ALIGNMENT else values
        found[info.name] = placed.view(dtypes.get(info.name, torch_dtype(info.dtype))).view(info.shape)
    return found
