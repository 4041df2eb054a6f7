"""Turns stored bytes into tensors: fetch and verify, decode, lay out, view. There is no other way.

If the model runs in the dtype it is stored in, the bytes arrive directly in the buffer that the tensors are views of.
If it runs in another dtype, they arrive in a scratch buffer and are cast from there, as `from_pretrained(dtype=…)`
casts them. Coded bytes arrive at the end of the buffer and are decoded into its beginning while the rest arrives; the
decoded payload is compared with the chunk's id the first time. Packed forms stay packed: their matrices become packed
parameters, and cast copies of their other tensors lie behind them in the buffer.
"""

import asyncio
from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from contextlib import nullcontext

import torch
from blake3 import blake3

from surfw import tracing
from surfw.codec.lossless import DECODERS, CodedRange, FrameDecoder, decoders
from surfw.config import ALIGNMENT, BLOCK_BYTES, MIB, aligned
from surfw.errors import IntegrityError, ModelClosedError
from surfw.manifest import Chunk, Form, Manifest, Part, parts_of, payload_digest
from surfw.runtime import matrices, shared
from surfw.runtime.buffers import Buffer, buffer_capacity, plan_layout, spread
from surfw.runtime.forms import FormChoice
from surfw.runtime.packed import PackedParameter, packed_parameter
from surfw.skeleton.dtypes import torch_dtype
from surfw.source import ChunkSource, Read, View
from surfw.threads import cancel_all, in_thread, to_its_end

_SEGMENT_BYTES = 4 * MIB
"""Coded bytes are fetched in segments of this size, several at a time; each is decoded once it has arrived."""

_SEGMENTS_AHEAD = 4


class Loader:
    """Loads chunks of one model from one source.

    Attributes:
        dtypes: the dtypes of tensors whose dtype in the model is not the stored one.
    """

    def __init__(
        self,
        source: ChunkSource,
        manifest: Manifest,
        dtypes: Mapping[str, torch.dtype] | None = None,
        forms: FormChoice | None = None,
        *,
        keeps_operands: bool = False,
        is_pinned: bool = False,
    ) -> None:
        """Load nothing yet.

        Args:
            source: has the chunks.
            manifest: the model.
            dtypes: the dtypes of tensors that do not keep the stored one.
            forms: chooses the form of a chunk.
            keeps_operands: whether quantised matrices keep their operands instead of making them for each use
                (`matrices.operand_bytes`); buffers are then as large as `buffer_bytes` says with this option.
            is_pinned: whether only the manifest's identity is trusted, which covers payloads but not block digests:
                then each payload is compared with its chunk's id once, before any of it is used.
        """
        self._is_pinned = is_pinned
        self._prove_turn = asyncio.Lock()
        self._keeps_operands = keeps_operands
        self.source = source
        self.manifest = manifest
        self.dtypes = dtypes or {}
        self.forms = forms or FormChoice()
        self._scratch_turn = asyncio.Semaphore(1)
        self._piece_turn = asyncio.Semaphore(1)
        self._decode_turn = asyncio.Semaphore(1)
        self._decoders = decoders()  # no thread runs before there is something to decode
        self._proven: set[tuple[str, str]] = set()  # ids of chunks, and digests of forms that decode to them

    def close(self) -> None:
        """End the decoder threads, after their current work."""
        self._decoders.shutdown()

    async def load(
        self, chunk: Chunk, buffer: Buffer, *, priority: int, in_pieces: bool = False, may_map: bool = False
    ) -> Form:
        """Fill the buffer with the chunk's tensors.

        Args:
            chunk: one of the model's.
            buffer: at least `buffer_bytes` large.
            priority: for the source; lower values go first.
            in_pieces: request at most one block at a time over all chunks, so that the source never holds much; slower.
            may_map: whether coded bytes may be mapped, if the source can do that.

        Returns:
            The form that was fetched; the next load may choose another one.

        Raises:
            IntegrityError: the bytes do not match the manifest; the buffer holds nothing usable.
            StorageError, WireError: they could not be read.
        """
        form = self.forms.form(chunk)
        if form.is_packed:
            await self._read_as_it_is(chunk, form, buffer.view[: form.stored_bytes], priority, in_pieces=in_pieces)
            if _plan_casts(chunk, form, self.dtypes)[0]:
                await in_thread(_cast_raw_parts, chunk, form, buffer, self.dtypes)
        elif not _casts(chunk, self.dtypes):
            await self._read(chunk, form, buffer, priority, in_pieces=in_pieces, may_map=may_map)
        else:
            async with self._scratch_turn:
                scratch = Buffer(buffer_bytes(chunk, {}))
                await self._read(chunk, form, scratch, priority, in_pieces=in_pieces, may_map=may_map)
                await in_thread(self._cast, chunk, scratch, buffer)
        self.forms.loaded(chunk.payload_bytes)
        return form

    def find_shared(self, chunk: Chunk, capacity_bytes: int) -> Buffer | View | None:
        """Memory in which another model holds an equal chunk: a buffer of this capacity, or a view."""
        forms = [form for form in chunk.forms if not self._is_pinned or (chunk.id, form.digest) in self._proven]
        keys = (self._identity(chunk, form, capacity) for form in forms for capacity in (capacity_bytes, None))
        return next((memory for key in keys if (memory := shared.find(key)) is not None), None)

    def shared_bytes(self, sizes: Mapping[str, int]) -> int:
        """How much memory of these chunks, given by name and size, other models already hold."""
        buffers = {name: buffer_capacity(size) for name, size in sizes.items()}
        return sum(buffers[name] for name in buffers if self.find_shared(self.manifest.by_name[name], buffers[name]))

    def share(self, chunk: Chunk, form: Form, memory: Buffer | View) -> None:
        """Share memory that holds a chunk, as read in this form, with other models; it must not be written again."""
        capacity_bytes = memory.capacity_bytes if isinstance(memory, Buffer) else None
        shared.share(self._identity(chunk, form, capacity_bytes), memory)

    def _identity(self, chunk: Chunk, form: Form, capacity_bytes: int | None) -> Hashable | None:
        if self._keeps_operands and capacity_bytes is not None:  # operands are written to the buffer
            return None
        return shared.identity(chunk, form, self.dtypes, capacity_bytes=capacity_bytes)

    async def map(self, chunk: Chunk) -> View | None:
        """A view of the chunk's stored bytes, if its tensors can be used there as they are; else None.

        Raises:
            IntegrityError: the bytes do not match the manifest.
            StorageError: they could not be read.
        """
        form = self.forms.form(chunk)
        if form.is_packed:
            is_usable = not _plan_casts(chunk, form, self.dtypes)[0]
        else:
            is_usable = form.codec == "none" and not _casts(chunk, self.dtypes)
        if not is_usable:
            return None
        view = await self.source.view(self.manifest, chunk, form)
        if view is not None and self._is_pinned:
            await self._prove(chunk, form, view.memory)
        return view

    async def prove(self, chunk: Chunk, form: Form) -> None:
        """Verify a whole chunk, once, before parts of it are used, unless its block digests vouch for the payload.

        Those of a coded form vouch for the coded bytes only; those of a pinned model are not trusted.

        Raises:
            IntegrityError: the payload does not match the chunk's id.
            StorageError, WireError: it could not be read.
        """
        if form.is_packed or (form.codec == "none" and not self._is_pinned):
            return
        async with self._prove_turn:
            if (chunk.id, form.digest) in self._proven:
                return
            digest, piece = blake3(), memoryview(bytearray(min(BLOCK_BYTES, chunk.payload_bytes)))
            for start in range(0, chunk.payload_bytes, BLOCK_BYTES):
                stop = min(start + BLOCK_BYTES, chunk.payload_bytes)
                into = piece[: stop - start]
                if form.frames:
                    await self.read_frame(chunk, form, start // BLOCK_BYTES, into)
                else:
                    await self.source.fetch(self.manifest, [Read(chunk, form, start, stop, into)])
                await in_thread(digest.update, into)
            self._expect_id(chunk, form, digest.hexdigest())

    async def read_frame(self, chunk: Chunk, form: Form, index: int, into: memoryview) -> int:
        """Read one frame of a coded form and decode it; return the bytes that were fetched.

        Sources deliver whole blocks of 1 MiB, so up to two of them are read.

        Args:
            chunk: one of the model's.
            form: its coded form.
            index: of the frame, which encodes 1 MiB of the payload from `index` MiB on.
            into: memory for these payload bytes.

        Raises:
            IntegrityError: the bytes do not match the manifest, or do not decode.
            StorageError, WireError: they could not be read.
        """
        place = CodedRange(form.frames, index, index + 1)
        coded = memoryview(bytearray(place.high - place.low))
        await self.source.fetch(self.manifest, [Read(chunk, form, place.low, place.high, coded)])
        try:
            decoding = asyncio.get_running_loop().run_in_executor(self._decoders, place.decode, coded, into)
        except RuntimeError as exc:
            raise ModelClosedError(f"{self.manifest.name} was closed while it was read") from exc
        try:
            await to_its_end(decoding)
        except IntegrityError as exc:
            where = f"chunk {chunk.name} from {self.source.url}"
            raise IntegrityError(f"{where}: {exc}; chunk the model again") from exc
        return len(coded)

    def tensors(self, chunk: Chunk, memory: Buffer | View) -> dict[str, torch.Tensor]:
        """Tensors over filled memory, by name; they keep it alive. Quantised ones are packed parameters.

        In mapped memory, the few tensors that do not begin at a multiple of 64 bytes are copied.
        """
        if isinstance(memory, View):
            flat = torch.frombuffer(memory.memory, dtype=torch.uint8)
            if form := packed_form(chunk):
                return _packed_views(chunk, form, flat, self.dtypes, keeps_operands=self._keeps_operands)
            return _views(chunk, flat, [tensor.offset for tensor in chunk.tensors], {})
        return self.tensors_in(chunk, flat_view(memory))

    def expert_tensors(self, chunk: Chunk, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """As `tensors_in`, but quantised matrices keep no operands: experts have no memory for them."""
        form = packed_form(chunk)
        return _packed_views(chunk, form, flat, self.dtypes) if form else self.tensors_in(chunk, flat)

    def tensors_in(self, chunk: Chunk, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """Views over a copy of a filled buffer, on any device: uint8, of shape (`held_bytes`, or more)."""
        if form := packed_form(chunk):
            return _packed_views(chunk, form, flat, self.dtypes, keeps_operands=self._keeps_operands)
        return _views(chunk, flat, plan_layout(tensor_bytes(chunk, self.dtypes))[0], self.dtypes)

    async def _read(
        self, chunk: Chunk, form: Form, buffer: Buffer, priority: int, *, in_pieces: bool, may_map: bool
    ) -> None:
        """Read the chunk's stored tensors into a buffer, each to its place."""
        place = buffer.view[: chunk.payload_bytes]
        if form.codec != "none":
            await self._read_coded(chunk, form, buffer, priority, in_pieces=in_pieces, may_map=may_map)
        else:
            await self._read_as_it_is(chunk, form, place, priority, in_pieces=in_pieces)
            if self._is_pinned:
                await self._prove(chunk, form, place)
        spread(buffer.view, tensor_bytes(chunk, {}))

    async def _read_as_it_is(
        self, chunk: Chunk, form: Form, into: memoryview, priority: int, *, in_pieces: bool
    ) -> None:
        step = BLOCK_BYTES if in_pieces else max(1, form.stored_bytes)
        for start in range(0, form.stored_bytes, step):
            await self._fetch(_part(chunk, form, into, start, step), priority, in_pieces=in_pieces)

    async def _fetch(self, read: Read, priority: int, *, in_pieces: bool) -> None:
        """Fetch one part of a chunk; if chunks are read in pieces, only one at a time."""
        async with self._piece_turn if in_pieces else nullcontext():
            size_bytes = read.stop - read.start
            about = {"layer": read.chunk.name, "bytes": size_bytes, "form": read.form.codec, "tier": "host"}
            with self.forms.reading.transfer(size_bytes), tracing.span("fetch", f"fetch {read.chunk.name}", **about):
                await self.source.fetch(self.manifest, [read], priority=priority)

    async def _read_coded(
        self, chunk: Chunk, form: Form, buffer: Buffer, priority: int, *, in_pieces: bool, may_map: bool
    ) -> None:
        """Read the coded form of a chunk and decode its payload; segments are decoded while others are in flight.

        Raises:
            IntegrityError: it does not decode, or not to the chunk's payload.
        """
        place = buffer.view[: chunk.payload_bytes]
        view = await self.source.view(self.manifest, chunk, form) if may_map else None
        lead = _lead(chunk, form)
        coded = buffer.view[lead : lead + form.stored_bytes] if view is None else view.memory
        decoder = FrameDecoder(coded, place, form.frames, lead=lead if view is None else None)
        step = BLOCK_BYTES if in_pieces else _SEGMENT_BYTES
        starts = deque(range(0, form.stored_bytes, step) if view is None else ())
        fetching: deque[asyncio.Task[None]] = deque()
        decoding = asyncio.create_task(self._decode(chunk, decoder, 0 if view is None else form.stored_bytes))
        arrived = 0
        try:
            while starts or fetching:
                while starts and len(fetching) < (1 if in_pieces else _SEGMENTS_AHEAD):
                    start = starts.popleft()
                    part = _part(chunk, form, coded, start, step)
                    fetching.append(asyncio.create_task(self._fetch(part, priority, in_pieces=in_pieces)))
                await fetching[0]
                fetching.popleft()
                arrived = min(arrived + step, form.stored_bytes)
                await decoding
                decoding = asyncio.create_task(self._decode(chunk, decoder, arrived))
            await decoding
        finally:
            await cancel_all([*fetching, decoding])
        await self._prove(chunk, form, place)

    async def _decode(self, chunk: Chunk, decoder: FrameDecoder, arrived: int) -> None:
        """Decode the bytes that have arrived since the last call, in several threads; one chunk at a time."""
        if not (size_bytes := decoder.payload_bytes(arrived)):
            return
        loop = asyncio.get_running_loop()
        async with self._decode_turn:
            if not self.forms.decoding.bytes:  # start the threads before the first measurement
                await to_its_end(asyncio.gather(*(loop.run_in_executor(self._decoders, int) for _ in range(DECODERS))))
            about = {"layer": chunk.name, "bytes": size_bytes, "tier": "host"}
            with self.forms.decode(size_bytes), tracing.span("decode", f"decode {chunk.name}", **about):
                works = [loop.run_in_executor(self._decoders, decoder.decode, arrived) for _ in range(DECODERS)]
                try:
                    await to_its_end(_all(works))
                except IntegrityError as exc:
                    where = f"chunk {chunk.name} from {self.source.url}"
                    raise IntegrityError(f"{where}: {exc}; chunk the model again") from exc

    async def _prove(self, chunk: Chunk, form: Form, payload: memoryview) -> None:
        """Compare a payload with the chunk's id, once: from then on the form's digests vouch for it.

        Raises:
            IntegrityError: the payload does not match the chunk's id.
        """
        if (chunk.id, form.digest) not in self._proven:
            self._expect_id(chunk, form, await in_thread(payload_digest, payload))

    def _expect_id(self, chunk: Chunk, form: Form, digest: str) -> None:
        seen = self.source.identify(self.manifest, digest)
        if seen != chunk.id:
            what = "is" if form.codec == "none" else f"decodes from its form {form.codec!r} to"
            raise IntegrityError(
                f"chunk {chunk.name} from {self.source.url} {what} a payload with BLAKE3 {seen[:16]}…, "
                f"the manifest promises {chunk.id[:16]}…; chunk the model again"
            )
        self._proven.add((chunk.id, form.digest))

    def _cast(self, chunk: Chunk, stored: Buffer, buffer: Buffer) -> None:
        cast = self.tensors(chunk, buffer)
        for name, tensor in _views(chunk, flat_view(stored), plan_layout(tensor_bytes(chunk, {}))[0], {}).items():
            cast[name].copy_(tensor)


def flat_view(buffer: Buffer) -> torch.Tensor:
    """All of a buffer's memory, as uint8 of shape (capacity,)."""
    return torch.frombuffer(buffer.view, dtype=torch.uint8)


async def _all(works: Sequence["asyncio.Future[None]"]) -> None:
    """Wait until all have ended, then raise the first failure."""
    for outcome in await asyncio.gather(*works, return_exceptions=True):
        if outcome is not None:
            raise outcome


def _lead(chunk: Chunk, form: Form) -> int:
    """Where coded bytes begin in a chunk's buffer: at a page boundary, so that direct I/O can write there."""
    return buffer_capacity(chunk.payload_bytes - form.stored_bytes) if chunk.payload_bytes > form.stored_bytes else 0


def _part(chunk: Chunk, form: Form, into: memoryview, start: int, length: int) -> Read:
    """A read of some of a chunk's stored bytes into their place in `into`, which has memory for all of them."""
    stop = min(start + length, form.stored_bytes)
    return Read(chunk, form, start, stop, into[start:stop])


def buffer_bytes(chunk: Chunk, dtypes: Mapping[str, torch.dtype], *, keeps_operands: bool = False) -> int:
    """How large a buffer the chunk needs: for its tensors in these dtypes, and for its coded bytes."""
    if form := packed_form(chunk):
        return (_plan_operands if keeps_operands else _plan_casts)(chunk, form, dtypes)[1]
    needed = held_bytes(chunk, dtypes)
    if _casts(chunk, dtypes):
        return needed  # all stored bytes, coded or not, arrive in scratch memory
    return max([needed, *(_lead(chunk, form) + form.stored_bytes for form in chunk.forms if form.codec != "none")])


def held_bytes(chunk: Chunk, dtypes: Mapping[str, torch.dtype]) -> int:
    """How many bytes of its buffer a chunk takes on a device: its tensors in these dtypes."""
    if form := packed_form(chunk):
        return _plan_casts(chunk, form, dtypes)[1]
    return plan_layout(tensor_bytes(chunk, dtypes))[1]


def scratch_bytes(chunk: Chunk, dtypes: Mapping[str, torch.dtype]) -> int:
    """Memory that a chunk takes besides its buffer, to cast from or to unpack matrices into.

    One chunk uses it at a time.
    """
    if form := packed_form(chunk):
        return max(matrices.scratch_bytes(part.shape[1], dtype) for part, dtype in _quantised(chunk, form, dtypes))
    return buffer_capacity(buffer_bytes(chunk, {})) if _casts(chunk, dtypes) else 0


def device_scratch_bytes(chunk: Chunk, dtypes: Mapping[str, torch.dtype]) -> int:
    """As `scratch_bytes`, on a device, where nothing is cast."""
    form = packed_form(chunk)
    if form is None:
        return 0
    return max(
        matrices.scratch_bytes(
            part.shape[1],
            dtype,
            min(matrices.DEVICE_SCRATCH_BYTES, part.shape[0] * part.shape[1] * max(4, dtype.itemsize)),
        )
        for part, dtype in _quantised(chunk, form, dtypes)
    )


def packed_form(chunk: Chunk) -> Form | None:
    """The packed form of a chunk, if it has one; a run then reads no other form of it (`codec.for_run`)."""
    return next((form for form in chunk.forms if form.is_packed), None)


def tensor_places(chunk: Chunk, dtypes: Mapping[str, torch.dtype]) -> dict[str, int | None]:
    """The offset of each tensor in the memory of a chunk; None for quantised ones, which are not views."""
    form = packed_form(chunk)
    if form is None:
        return dict(zip((one.name for one in chunk.tensors), plan_layout(tensor_bytes(chunk, dtypes))[0], strict=True))
    behind, _ = _plan_casts(chunk, form, dtypes)
    return {
        part.name: behind.get(part.name, part.start) if part.kind == "raw" else None for part in parts_of(chunk, form)
    }


def as_parameter(values: torch.Tensor) -> torch.nn.Parameter:
    """A parameter over these values, with `requires_grad` set as by `from_pretrained`, although no gradients are taken.

    Torch chooses its path by that flag: for inputs with unusual strides, `matmul` with a weight that does not require
    gradients took 60 times as long for a head of 32000 rows, and need not give the same bits.

    A packed parameter is returned as it is.
    """
    if isinstance(values, PackedParameter):
        return values
    return torch.nn.Parameter(values, requires_grad=values.is_floating_point() or values.is_complex())


def _casts(chunk: Chunk, dtypes: Mapping[str, torch.dtype]) -> bool:
    return any(tensor.name in dtypes for tensor in chunk.tensors)


def _plan_casts(chunk: Chunk, form: Form, dtypes: Mapping[str, torch.dtype]) -> tuple[dict[str, int], int]:
    """The offsets of cast copies of a packed form's raw tensors, behind its stored bytes, and the end of them all."""
    places, end = {}, form.stored_bytes
    for part in parts_of(chunk, form):
        if part.kind == "raw" and part.name in dtypes:
            places[part.name] = start = aligned(end)
            end = start + (part.stop - part.start) // torch_dtype(part.dtype).itemsize * dtypes[part.name].itemsize
    return places, end


def _plan_operands(chunk: Chunk, form: Form, dtypes: Mapping[str, torch.dtype]) -> tuple[dict[str, int], int]:
    """The offsets of the operands of a packed form's matrices, behind everything else, and the end of them all."""
    places, end = {}, _plan_casts(chunk, form, dtypes)[1]
    for part in parts_of(chunk, form):
        if size := matrices.operand_bytes(part):
            places[part.name] = start = aligned(end)
            end = start + size
    return places, end


def _quantised(chunk: Chunk, form: Form, dtypes: Mapping[str, torch.dtype]) -> list[tuple[Part, torch.dtype]]:
    """The quantised matrices of a packed form, each with the dtype that the model computes in."""
    return [
        (part, dtypes.get(part.name, torch_dtype(part.dtype))) for part in parts_of(chunk, form) if part.kind != "raw"
    ]


def _cast_raw_parts(chunk: Chunk, form: Form, buffer: Buffer, dtypes: Mapping[str, torch.dtype]) -> None:
    stored, cast = (_packed_views(chunk, form, flat_view(buffer), given) for given in ({}, dtypes))
    for name in _plan_casts(chunk, form, dtypes)[0]:
        cast[name].copy_(stored[name])


def _packed_views(
    chunk: Chunk, form: Form, flat: torch.Tensor, dtypes: Mapping[str, torch.dtype], *, keeps_operands: bool = False
) -> dict[str, torch.Tensor]:
    """Packed parameters and views of raw tensors, over a packed form and the cast copies behind it."""
    behind, _ = _plan_casts(chunk, form, dtypes)
    operands, end = _plan_operands(chunk, form, dtypes) if keeps_operands else ({}, 0)
    with torch.inference_mode(mode=False):  # or it could not be used outside of that mode
        room = flat if len(flat) >= end else torch.empty(end, dtype=torch.uint8)  # a mapped file has no memory for them
    found: dict[str, torch.Tensor] = {}
    for part in parts_of(chunk, form):
        stored = torch_dtype(part.dtype)
        dtype = dtypes.get(part.name, stored)
        if part.kind != "raw":
            place = operands.get(part.name)
            operand = None if place is None else room[place : place + matrices.operand_bytes(part)]
            found[part.name] = packed_parameter(part, flat, dtype, operand)
            continue
        size = (part.stop - part.start) // stored.itemsize * dtype.itemsize
        start = behind.get(part.name, part.start)
        found[part.name] = flat[start : start + size].view(dtype).view(part.shape)
    return found


def tensor_bytes(chunk: Chunk, dtypes: Mapping[str, torch.dtype]) -> list[int]:
    """The size in bytes of each tensor in these dtypes; tensors that are not named keep the stored dtype."""
    return [
        tensor.nbytes // (stored := torch_dtype(tensor.dtype)).itemsize * dtypes.get(tensor.name, stored).itemsize
        for tensor in chunk.tensors
    ]


def _views(
    chunk: Chunk, flat: torch.Tensor, places: Sequence[int], dtypes: Mapping[str, torch.dtype]
) -> dict[str, torch.Tensor]:
    """Tensors at these offsets: views, or copies where the offset is not a multiple of 64."""
    found = {}
    for info, size, place in zip(chunk.tensors, tensor_bytes(chunk, dtypes), places, strict=True):
        values = flat[place : place + size]
        placed = values.clone() if place % ALIGNMENT else values
        found[info.name] = placed.view(dtypes.get(info.name, torch_dtype(info.dtype))).view(info.shape)
    return found
