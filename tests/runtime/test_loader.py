"""From stored bytes to tensors: values, alignment, and conversion to other dtypes."""

import asyncio
import mmap
import threading
from collections.abc import Mapping
from concurrent.futures import CancelledError
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surfw.errors import IntegrityError, ManifestError
from surfw.manifest import DTYPE_BITS, Chunk, Form, Manifest
from surfw.runtime.buffers import Buffer
from surfw.runtime.loader import Loader, buffer_bytes, scratch_bytes
from surfw.runtime.run import IoThread
from surfw.skeleton.dtypes import torch_dtype
from surfw.source import View
from tests.toys import ToySource, damage, toy_chunk, toy_manifest, toy_model_of


def load(chunk: Chunk, payload: bytes, dtypes: Mapping[str, torch.dtype] | None = None) -> dict[str, torch.Tensor]:
    manifest, source = toy_model_of([(chunk, payload)])
    loader = Loader(source, manifest, dtypes)
    buffer = Buffer(buffer_bytes(chunk, loader.dtypes))
    asyncio.run(loader.load(chunk, buffer, priority=0))
    return loader.tensors(chunk, buffer)


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b""


shapes = st.lists(st.integers(0, 9), max_size=3).map(tuple)
tensors = st.lists(st.tuples(st.sampled_from(sorted(DTYPE_BITS)), shapes), min_size=1, max_size=6)


@settings(deadline=None)
@given(tensors)
def test_tensors_have_their_bytes_shapes_and_dtypes_at_multiples_of_64(
    shapes: list[tuple[str, tuple[int, ...]]],
) -> None:
    chunk, payload = toy_chunk("c", shapes)
    loaded = load(chunk, payload)
    assert list(loaded) == [info.name for info in chunk.tensors]
    for info, tensor in zip(chunk.tensors, loaded.values(), strict=True):
        assert tuple(tensor.shape) == info.shape
        assert tensor.dtype == torch_dtype(info.dtype)
        assert tensor.data_ptr() % 64 == 0
        assert raw(tensor) == payload[info.offset : info.offset + info.nbytes]


def test_tensors_are_views_of_the_buffer() -> None:
    made = chunk, _ = toy_chunk("c", [("U8", (100,))])
    manifest, source = toy_model_of([made])
    loader = Loader(source, manifest)
    buffer = Buffer(buffer_bytes(chunk, loader.dtypes))
    asyncio.run(loader.load(chunk, buffer, priority=0))
    tensor = loader.tensors(chunk, buffer)["c.t0"]
    buffer.view[3] = 99
    assert tensor[3] == 99


@pytest.mark.parametrize("target", [torch.bfloat16, torch.float16, torch.float64])
def test_another_dtype_is_cast_as_torch_casts(target: torch.dtype) -> None:
    chunk, payload = toy_chunk("c", [("F32", (7, 3)), ("F32", (5,)), ("I64", (2,))])
    plain = load(chunk, payload)
    cast = load(chunk, payload, {"c.t0": target})
    assert cast["c.t0"].dtype == target
    assert raw(cast["c.t0"]) == raw(plain["c.t0"].to(target))
    assert [raw(cast[name]) for name in ("c.t1", "c.t2")] == [raw(plain[name]) for name in ("c.t1", "c.t2")]
    assert all(tensor.data_ptr() % 64 == 0 for tensor in cast.values())


def test_a_buffer_is_as_large_as_the_dtypes_in_memory_need() -> None:
    chunk, _ = toy_chunk("c", [("F32", (100,)), ("F32", (3,))])
    assert buffer_bytes(chunk, {}) == 448 + 12
    assert buffer_bytes(chunk, {"c.t0": torch.float64}) == 832 + 12
    assert buffer_bytes(chunk, {"c.t0": torch.bfloat16}) == 256 + 12


def test_a_chunk_without_bytes_is_not_asked_for() -> None:
    chunk, payload = toy_chunk("c", [("F32", (0, 4)), ("I8", (0,))])
    manifest = toy_manifest([chunk])
    source = ToySource({"toy": manifest}, {})
    loader = Loader(source, manifest)
    buffer = Buffer(buffer_bytes(chunk, loader.dtypes))
    asyncio.run(loader.load(chunk, buffer, priority=0))
    assert source.reads == []
    assert [tuple(tensor.shape) for tensor in loader.tensors(chunk, buffer).values()] == [(0, 4), (0,)]
    assert payload == b""


def test_damage_is_reported() -> None:
    chunk, payload = toy_chunk("c", [("U8", (100,))])
    with pytest.raises(IntegrityError, match="chunk c from toys is damaged"):
        load(damage(chunk), payload)


def test_a_load_that_is_cancelled_ends_only_when_its_cast_no_longer_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    made = chunk, _ = toy_chunk("c", [("F32", (100,))])
    manifest, source = toy_model_of([made])
    loader = Loader(source, manifest, {"c.t0": torch.bfloat16})
    assert cancel_within(Loader, "_cast", loader, chunk, monkeypatch) == 1


def cancel_within(owner: type, method: str, loader: Loader, chunk: Chunk, monkeypatch: pytest.MonkeyPatch) -> int:
    """Cancel a load during a method, which must complete first; return how often the method ran."""
    began, may_end, ended = threading.Event(), threading.Event(), []
    original = getattr(owner, method)

    def slow(*arguments: Any) -> None:
        began.set()
        assert may_end.wait(60)
        original(*arguments)
        ended.append(1)

    monkeypatch.setattr(owner, method, slow)
    io = IoThread()
    job = io.submit(loader.load(chunk, Buffer(buffer_bytes(chunk, loader.dtypes)), priority=0))
    assert began.wait(60)
    job.cancel()
    job.cancel()
    io.run(asyncio.sleep(0))
    assert not job.done()
    may_end.set()
    with pytest.raises(CancelledError):
        job.result(60)
    io.close()
    return len(ended)


def test_one_chunk_at_a_time_is_cast_in_memory_that_is_told() -> None:
    made = [toy_chunk(f"c{i}", [("F32", (2000 * (i + 1),))], seed=i) for i in range(3)]
    manifest, source = toy_model_of(made)
    running = most = 0

    class Counting(Loader):
        async def _read(self, *arguments: Any, **options: Any) -> int:
            nonlocal running, most
            running += 1
            most = max(most, running)
            await asyncio.sleep(0)
            try:
                return await super()._read(*arguments, **options)
            finally:
                running -= 1

    loader = Counting(source, manifest, {f"c{i}.t0": torch.float16 for i in range(3)})
    taken = [scratch_bytes(chunk, loader.dtypes) for chunk, _ in made]
    assert taken == [8192, 16384, 24576]  # values of 4 bytes, in pages
    assert scratch_bytes(made[0][0], {}) == 0

    async def main() -> None:
        loads = (loader.load(chunk, Buffer(buffer_bytes(chunk, loader.dtypes)), priority=0) for chunk, _ in made)
        assert [form.stored_bytes for form in await asyncio.gather(*loads)] == [8000, 16000, 24000]

    asyncio.run(main())
    assert most == 1


class Mapped(ToySource):
    """A source whose payloads are at page boundaries in memory, like mapped files."""

    async def view(self, manifest: Manifest, chunk: Chunk, form: Form) -> View:
        memory = mmap.mmap(-1, form.stored_bytes)
        memory[:] = self.payloads[chunk.id]
        return View(memoryview(memory), lambda: None)


def mapped(chunk: Chunk, payload: bytes, dtypes: Mapping[str, torch.dtype] | None = None) -> tuple[Loader, Any]:
    manifest = toy_manifest([chunk])
    loader = Loader(Mapped({"toy": manifest}, {chunk.id: payload}), manifest, dtypes)
    return loader, asyncio.run(loader.map(chunk))


@settings(deadline=None)
@given(tensors)
def test_mapped_tensors_have_the_same_bytes_at_multiples_of_64(shapes: list[tuple[str, tuple[int, ...]]]) -> None:
    chunk, payload = toy_chunk("c", shapes)
    if not payload:
        return
    loader, buffer = mapped(chunk, payload)
    for info, tensor in zip(chunk.tensors, loader.tensors(chunk, buffer).values(), strict=True):
        assert (tuple(tensor.shape), tensor.dtype) == (info.shape, torch_dtype(info.dtype))
        assert raw(tensor) == payload[info.offset : info.offset + info.nbytes]
        assert not tensor.numel() or tensor.data_ptr() % 64 == 0


def test_only_mapped_tensors_that_lie_elsewhere_are_copied() -> None:
    chunk, payload = toy_chunk("c", [("F32", (16,)), ("BF16", (3,)), ("F32", (4, 2)), ("U8", (26,)), ("F32", (5,))])
    assert [info.offset for info in chunk.tensors] == [0, 64, 70, 102, 128]
    loader, buffer = mapped(chunk, payload)
    found = loader.tensors(chunk, buffer)
    buffer.memory[:] = bytes(len(payload))
    zeros = [not any(raw(tensor)) for tensor in found.values()]
    assert zeros == [True, True, False, False, True], "those that are views have changed"


def test_what_cannot_be_used_as_it_is_stored_is_not_mapped() -> None:
    chunk, payload = toy_chunk("c", [("F32", (16,)), ("F32", (16,))])
    assert isinstance(mapped(chunk, payload)[1], View)
    assert mapped(chunk, payload, {"c.t1": torch.bfloat16})[1] is None
    packed = replace(chunk, forms=(replace(chunk.forms[0], codec="future"),))
    loader = Loader(Mapped({"toy": toy_manifest([packed])}, {}), toy_manifest([packed]))
    with pytest.raises(ManifestError, match="is stored as future; this surfw decodes none, lossless"):
        asyncio.run(loader.map(packed))
    manifest = toy_manifest([chunk])
    assert asyncio.run(Loader(ToySource({"toy": manifest}, {}), manifest).map(chunk)) is None
