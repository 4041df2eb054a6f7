"""Toy models for tests without torch: manifests, payloads for their chunks, and a source for them."""

import asyncio
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from math import prod

from surfw.codec.lossless import FRAME_BYTES, encode_frame, item_bytes_of
from surfw.config import BLOCK_BYTES
from surfw.errors import IntegrityError, NotFoundError, UnknownModelError
from surfw.manifest import Chunk, Form, Manifest, TensorInfo, Use, digest_blocks, nbytes, payload_digest
from surfw.runtime.buffers import buffer_capacity, plan_layout
from surfw.runtime.plan import Needs, describe_needs
from surfw.source import ChunkSource, Read, describe_damage, find_damage

Shapes = Sequence[tuple[str, tuple[int, ...]]]
"""The tensors of a chunk: safetensors dtype and shape of each."""


def toy_chunk(name: str, shapes: Shapes, *, kind: str = "layer", seed: int = 0) -> tuple[Chunk, bytes]:
    """Return a chunk of random bytes, and its payload."""
    tensors, offset = [], 0
    for index, (dtype, shape) in enumerate(shapes):
        tensors.append(TensorInfo(f"{name}.t{index}", dtype, shape, offset))
        offset += nbytes(dtype, shape)
    payload = random.Random(f"{seed} {name}").randbytes(offset)
    digest, blocks = digest_blocks([payload])
    form = Form("none", offset, digest, blocks)
    return Chunk(name, kind, payload_digest(payload), offset, tuple(tensors), (form,)), payload


def toy_manifest(chunks: Sequence[Chunk], *, order: Sequence[Use] | None = None, name: str = "toy") -> Manifest:
    """Return a manifest of these chunks, each used once, in this order."""
    return Manifest(
        name=name,
        class_name="ToyModel",
        dtype="float32",
        config={"model_type": "toy"},
        generation_config=None,
        files=(),
        ties={},
        chunks=tuple(chunks),
        order=tuple(order if order is not None else (Use(chunk.name, (chunk.name,)) for chunk in chunks)),
    )


@dataclass
class ToySource(ChunkSource):
    """Holds payloads in memory. `before_fetch` runs in the event loop before each read is answered."""

    manifests: Mapping[str, Manifest]
    payloads: Mapping[str, bytes]
    before_fetch: Callable[[Read], object] = field(default=lambda _: None)
    url: str = "toys"
    reads: list[str] = field(default_factory=list)
    closed: int = 0
    priorities: list[int] = field(default_factory=list)
    announced: list[tuple[list[str], list[str]]] = field(default_factory=list)
    gate: "Gate | None" = None

    async def models(self) -> list[str]:
        return sorted(self.manifests)

    async def manifest(self, model: str) -> Manifest:
        if model not in self.manifests:
            raise UnknownModelError(model, sorted(self.manifests), where=self.url)
        return self.manifests[model]

    async def file(self, manifest: Manifest, path: str) -> bytes:
        raise NotFoundError(path)

    async def announce(self, manifest: Manifest, cycle: Sequence[Chunk], kept: Sequence[Chunk]) -> None:
        self.announced.append(([chunk.name for chunk in cycle], [chunk.name for chunk in kept]))

    async def fetch(self, manifest: Manifest, reads: Sequence[Read], *, priority: int = 0) -> None:
        for read in reads:
            self.reads.append(read.chunk.name)
            self.priorities.append(priority)
            self.before_fetch(read)
            if self.gate is not None:
                await self.gate.passes(read.chunk.name)
            stored = self.payloads[read.chunk.id if read.form.codec == "none" else read.form.digest]
            read.destination[:] = stored[read.start : read.stop]
            for block, seen in find_damage(read.form, read.start // BLOCK_BYTES, read.destination).items():
                raise IntegrityError(describe_damage(read.chunk, read.form, block, seen, where=self.url))

    async def close(self) -> None:
        self.closed += 1


class Gate:
    """Releases fetches one by one from another thread, so that the test determines their order.

    A `stubborn` gate ends no fetch before it is opened, not even a cancelled one; `cancelled` says whether one was
    cancelled.
    """

    def __init__(self, *, stubborn: bool = False) -> None:
        self._stubborn = stubborn
        self.cancelled = threading.Event()
        self._arrived: dict[str, Future[None]] = {}
        self._opened: dict[str, Future[None]] = {}
        self._lock = threading.Lock()

    def _happening(self, known: dict[str, "Future[None]"], name: str) -> "Future[None]":
        with self._lock:
            if name not in known:
                known[name] = Future()
                known[name].set_running_or_notify_cancel()  # a caller that stops waiting does not cancel it
            return known[name]

    async def passes(self, name: str) -> None:
        _set(self._happening(self._arrived, name))
        opened = self._happening(self._opened, name)
        try:
            await asyncio.wrap_future(opened)
        except asyncio.CancelledError:
            self.cancelled.set()
            if self._stubborn:
                await asyncio.wrap_future(opened)
            raise

    def wait_for(self, name: str) -> None:
        """Wait until a fetch of this chunk has started."""
        self._happening(self._arrived, name).result(60)

    def open(self, name: str) -> None:
        """Release fetches of this chunk from now on."""
        _set(self._happening(self._opened, name))


class Pause:
    """A call that blocks its thread until the test releases it."""

    def __init__(self) -> None:
        self.reached, self.go_on = threading.Event(), threading.Event()

    def __call__(self, *_: object) -> bool:
        self.reached.set()
        assert self.go_on.wait(60)
        return True


def _set(happening: "Future[None]") -> None:
    if not happening.done():
        happening.set_result(None)


def toy_model(sizes: Sequence[int], *, kind: str = "layer") -> tuple[Manifest, ToySource]:
    """Return a model with one chunk of one `U8` tensor per size, named `c0`, `c1`, …"""
    return toy_model_of(
        [toy_chunk(f"c{index}", [("U8", (size,))], kind=kind, seed=index) for index, size in enumerate(sizes)]
    )


def toy_model_of(
    made: Sequence[tuple[Chunk, bytes]], *, order: Sequence[Use] | None = None
) -> tuple[Manifest, ToySource]:
    """Return a model of these chunks, and a source with their payloads."""
    manifest = toy_manifest([chunk for chunk, _ in made], order=order)
    return manifest, ToySource({manifest.name: manifest}, {chunk.id: payload for chunk, payload in made})


def toy_needs(manifest: Manifest) -> Needs:
    """Return the memory that a model needs."""
    sizes = {
        chunk.name: buffer_capacity(plan_layout([tensor.nbytes for tensor in chunk.tensors])[1])
        for chunk in manifest.chunks
    }
    kinds = {chunk.name: chunk.kind for chunk in manifest.chunks}
    return describe_needs(manifest.name, kinds, sizes, manifest.order)


def coded_model(made: Sequence[tuple[Chunk, bytes]], *, plain: bool = True) -> tuple[Manifest, ToySource]:
    """Return a model of these chunks in the form `lossless`, with or without the plain form."""
    chunks, stored = [], {chunk.id: payload for chunk, payload in made}
    for chunk, payload in made:
        form, coded = code(chunk, payload)
        stored[form.digest] = coded
        chunks.append(replace(chunk, forms=(*chunk.forms, form) if plain else (form,)))
    manifest = toy_manifest(chunks)
    return manifest, ToySource({manifest.name: manifest}, stored)


def code(chunk: Chunk, payload: bytes) -> tuple[Form, bytes]:
    """Return the form `lossless` of a chunk, and its stored bytes."""
    starts = range(0, len(payload), FRAME_BYTES)
    frames = [
        bytes(
            encode_frame(
                memoryview(payload)[start : start + FRAME_BYTES],
                item_bytes_of(chunk.tensors, start, start + FRAME_BYTES),
            )
        )
        for start in starts
    ]
    stored = b"".join(frames)
    return Form("lossless", len(stored), *digest_blocks([stored]), (), tuple(map(len, frames))), stored


def damage(chunk: Chunk) -> Chunk:
    """Return the same chunk with a wrong digest."""
    (form,) = chunk.forms
    return replace(chunk, forms=(replace(form, blocks=bytes(len(form.blocks))),))


def elements(shape: Sequence[int]) -> int:
    """Return how many elements a tensor of this shape has."""
    return prod(shape)
