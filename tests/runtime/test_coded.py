"""Chunks in coded forms: the same tensors in the same memory, and never those of another payload."""

import asyncio
import mmap
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any

import pytest
import torch

from surfw.codec.lossless import FrameDecoder
from surfw.config import BLOCK_BYTES, MIB
from surfw.errors import IntegrityError, ModelClosedError
from surfw.manifest import Chunk, Form, Manifest, TensorInfo, digest_blocks
from surfw.metrics import Metrics
from surfw.runtime.buffers import Buffer
from surfw.runtime.forms import FormChoice
from surfw.runtime.loader import Loader, buffer_bytes
from surfw.runtime.rows import RowReader
from surfw.runtime.run import IoThread
from surfw.source import View
from tests.runtime.engines import running
from tests.runtime.test_loader import cancel_within
from tests.toys import ToySource, code, coded_model, toy_chunk


def weights(name: str, elements: int, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> tuple[Chunk, bytes]:
    """A chunk like a model's: a large tensor, a small one of another dtype, and one at an odd offset."""
    chunk, _ = toy_chunk(name, [])
    values = torch.randn(elements, generator=torch.Generator().manual_seed(seed)) * 0.02
    big = values.to(dtype).view(torch.uint8).numpy().tobytes()
    parts = [("w", "BF16" if dtype is torch.bfloat16 else "F32", (elements,), big)]
    parts += [("n", "F32", (16,), values[:16].numpy().tobytes()), ("odd", "U8", (5,), b"12345")]
    tensors, payload = [], b""
    for tensor, kind, shape, data in parts:
        tensors.append(TensorInfo(f"{name}.{tensor}", kind, shape, len(payload)))
        payload += data
    digest, blocks = digest_blocks([payload])
    form = replace(chunk.forms[0], stored_bytes=len(payload), digest=digest, blocks=blocks)
    return replace(chunk, id=digest, payload_bytes=len(payload), tensors=tuple(tensors), forms=(form,)), payload


@pytest.fixture
def new_loader() -> Iterator[Callable[..., Loader]]:
    """Makes loaders whose threads have ended after the test."""
    with ExitStack() as last:

        def made(*args: Any, **options: Any) -> Loader:
            loader = Loader(*args, **options)
            last.callback(loader.close)
            return loader

        yield made


def raw(tensors: Mapping[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: bytes(tensor.view(torch.uint8).numpy()) for name, tensor in tensors.items()}


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("in_pieces", [True, False])
def test_a_coded_chunk_is_loaded_as_the_plain_one(
    in_pieces: bool, plain: bool, new_loader: Callable[..., Loader]
) -> None:
    made = chunk, payload = weights("c", 13 * MIB + 77)
    manifest, source = coded_model([made], plain=plain)
    loader = new_loader(source, manifest, forms=FormChoice("lossless"))
    (stored,) = manifest.chunks
    buffer = Buffer(buffer_bytes(chunk, {}))
    form = asyncio.run(loader.load(stored, buffer, priority=0, in_pieces=in_pieces))
    assert form == stored.forms[-1]
    assert form.stored_bytes < 0.75 * len(payload)
    expected = {one.name: payload[one.offset : one.offset + one.nbytes] for one in chunk.tensors}
    tensors = loader.tensors(chunk, buffer)
    assert raw(tensors) == expected
    assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors.values())


def test_a_coded_chunk_is_cast_as_the_plain_one(new_loader: Callable[..., Loader]) -> None:
    made = chunk, _ = weights("c", 3 * MIB, dtype=torch.float32)
    loaded = []
    for codec in ("none", "lossless"):
        manifest, source = coded_model([made])
        loader = new_loader(source, manifest, {"c.w": torch.bfloat16}, FormChoice(codec))
        buffer = Buffer(buffer_bytes(chunk, loader.dtypes))
        asyncio.run(loader.load(manifest.chunks[0], buffer, priority=0))
        loaded.append(raw(loader.tensors(chunk, buffer)))
    assert loaded[0] == loaded[1]


def test_coded_bytes_that_are_mapped_are_decoded_from_there(new_loader: Callable[..., Loader]) -> None:
    made = chunk, payload = weights("c", 3 * MIB)
    manifest, source = coded_model([made])
    form, stored = code(*made)

    class Mapping(ToySource):
        async def view(self, manifest, chunk, wanted):
            return View(memoryview(stored), lambda: None) if wanted == form else None

    mapping = Mapping(source.manifests, {})  # all fetches fail
    loader = new_loader(mapping, manifest, forms=FormChoice("lossless"))
    buffer = Buffer(buffer_bytes(chunk, {}))
    asyncio.run(loader.load(manifest.chunks[0], buffer, priority=0, may_map=True))
    assert raw(loader.tensors(chunk, buffer))["c.w"] == payload[: 6 * MIB]


def test_a_form_that_decodes_to_another_payload_is_refused(new_loader: Callable[..., Loader]) -> None:
    one, other = weights("c", 2 * MIB), weights("c", 2 * MIB, seed=1)
    manifest, source = coded_model([one])
    form, stored = code(*other)
    chunk = replace(manifest.chunks[0], forms=(form,))
    source.payloads[form.digest] = stored
    loader = new_loader(source, manifest, forms=FormChoice("lossless"))
    with pytest.raises(
        IntegrityError, match="chunk c from toys decodes from its form 'lossless' to a payload with BLAKE3"
    ):
        asyncio.run(loader.load(chunk, Buffer(buffer_bytes(chunk, {})), priority=0))


def test_each_chunk_is_compared_with_its_id_also_where_two_have_the_same(new_loader: Callable[..., Loader]) -> None:
    one, other = weights("a", 2 * MIB), weights("b", 2 * MIB, seed=1)
    manifest, source = coded_model([one])
    form, stored = code(*other)
    impostor = replace(manifest.chunks[0], name="b", forms=(form,))
    source.payloads[form.digest] = stored
    loader = new_loader(source, manifest, forms=FormChoice("lossless"))
    asyncio.run(_load(loader, manifest.chunks[0]))
    with pytest.raises(IntegrityError, match="chunk b from toys decodes"):
        asyncio.run(_load(loader, impostor))


async def _load(loader: Loader, chunk: Chunk) -> None:
    await loader.load(chunk, Buffer(buffer_bytes(chunk, {})), priority=0)


def test_coded_bytes_arrive_at_a_page_so_that_a_device_can_write_there(new_loader: Callable[..., Loader]) -> None:
    made = weights("c", 5 * MIB + 3)
    manifest, source = coded_model([made])
    places = []
    source.before_fetch = lambda read: places.append(torch.frombuffer(read.destination, dtype=torch.uint8).data_ptr())
    asyncio.run(_load(new_loader(source, manifest, forms=FormChoice("lossless")), manifest.chunks[0]))
    assert len(places) == 2
    assert all(place % mmap.PAGESIZE == 0 for place in places)


def test_frames_that_are_none_are_named(new_loader: Callable[..., Loader]) -> None:
    made = weights("c", 2 * MIB)
    manifest, source = coded_model([made])
    form, stored = code(*made)
    spoilt = stored[: form.frames[0]] + bytes(form.stored_bytes - form.frames[0])
    digest, blocks = digest_blocks([spoilt])
    chunk = replace(manifest.chunks[0], forms=(replace(form, digest=digest, blocks=blocks),))
    source.payloads[digest] = spoilt
    loader = new_loader(source, manifest, forms=FormChoice("lossless"))
    with pytest.raises(IntegrityError, match=r"chunk c from toys: frame [1-3] is not what the codec 'lossless' writes"):
        asyncio.run(loader.load(chunk, Buffer(buffer_bytes(chunk, {})), priority=0))


def test_a_load_that_is_cancelled_ends_only_when_nothing_is_decoded_any_more(
    monkeypatch: pytest.MonkeyPatch, new_loader: Callable[..., Loader]
) -> None:
    manifest, source = coded_model([weights("c", 12 * MIB)])
    loader = new_loader(source, manifest, forms=FormChoice("lossless"))
    assert cancel_within(FrameDecoder, "decode", loader, manifest.chunks[0], monkeypatch) > 0


MADE = weights("c", 2 * MIB)
CHUNK = coded_model([MADE])[0].chunks[0]
GB = 10**9


def choice(*, reading: float | None, decoding: float | None, computing: float = 0.0, is_far: bool = False) -> str:
    """The codec chosen for these rates in bytes per second; `computing` in seconds per GB."""
    metrics = Metrics()
    metrics.add_seconds("forward", computing + 1)
    metrics.add_seconds("stall", 1)
    made = FormChoice(is_far=is_far, metrics=metrics)
    if reading:
        made.reading.add(reading, 1)
    if decoding:
        made.decoding.add(decoding, 1)
    made.loaded(GB)
    return made.form(CHUNK).codec


@pytest.mark.parametrize(
    ("reading", "decoding", "computing", "expected"),
    [
        (0.117 * GB, 3.4 * GB, 0.05, "lossless"),  # a link of 1 Gbit/s
        (2.5 * GB, 2.0 * GB, 0.05, "none"),  # a fast disk, and a slow decoder
        (1.0 * GB, 6.6 * GB, 0.05, "lossless"),  # a slower disk, and a fast decoder
        (20 * GB, 3.4 * GB, 0.05, "none"),  # a page cache
        (0.117 * GB, 0.1 * GB, 0.05, "none"),  # a tiny CPU
        (2.5 * GB, 6.6 * GB, 2.0, "none"),  # computing takes longest, and decoding would add to it
    ],
)
def test_the_form_is_taken_that_a_run_is_faster_with(
    reading: float, decoding: float, computing: float, expected: str
) -> None:
    assert choice(reading=reading, decoding=decoding, computing=computing) == expected


@pytest.mark.parametrize("is_far", [True, False])
def test_each_form_is_tried_before_there_are_rates(is_far: bool) -> None:
    assert choice(reading=None, decoding=None, is_far=is_far) == ("lossless" if is_far else "none")
    assert choice(reading=GB, decoding=None, is_far=is_far) == "lossless"


@pytest.mark.parametrize("codec", ["none", "lossless"])
def test_a_codec_that_is_asked_for_is_taken_wherever_it_is_there(codec: str) -> None:
    assert FormChoice(codec).form(CHUNK).codec == codec
    assert FormChoice(codec).form(MADE[0]).codec == "none"


def test_of_many_plain_loads_one_tries_whether_decoding_has_become_faster() -> None:
    made = FormChoice()
    made.reading.add(100 * GB, 1)
    made.decoding.add(GB, 1)
    chosen = [made.form(CHUNK).codec for _ in range(100)]
    assert chosen.count("lossless") == 2


def test_a_form_is_kept_where_the_other_one_is_hardly_faster() -> None:
    def choose(is_far: bool) -> str:
        made = FormChoice(is_far=is_far)
        ratio = CHUNK.forms[1].stored_bytes / CHUNK.forms[0].stored_bytes
        made.reading.add(GB, 1)
        made.decoding.add(GB / (0.96 - ratio), 1)
        assert ratio < 0.96
        return made.form(CHUNK).codec

    assert (choose(True), choose(False)) == ("lossless", "none")


def test_a_rate_counts_the_time_in_which_anything_went_on() -> None:
    now = 0.0
    made = FormChoice().reading.__class__(clock=lambda: now)
    with made.transfer(10 * MIB):
        now = 1.0
        with made.transfer(20 * MIB):
            now = 1.5
    now = 100.0
    assert (made.bytes, made.seconds) == (30 * MIB, 1.5)
    with suppress(RuntimeError), made.transfer(BLOCK_BYTES):
        now = 100.25
        raise RuntimeError
    assert (made.bytes, made.seconds) == (30 * MIB, 1.75)


def test_a_chunk_is_shared_as_what_it_was_read_in() -> None:
    """It is shared in the form in which it was read and verified, not in the form that is chosen later."""
    made = chunk, payload = weights("c", 5 * MIB)
    honest, right = coded_model([made], plain=False)
    forged = bytes(len(payload))
    plain = replace(chunk.forms[0], blocks=digest_blocks([forged])[1])
    mixed = replace(honest.chunks[0], forms=(plain, *honest.chunks[0].forms))
    foreign = replace(honest, chunks=(mixed,))
    with running(foreign, ToySource({"toy": foreign}, {chunk.id: forged}), budget_bytes=64 * MIB) as first:
        (module,) = {use.module for use in foreign.order}
        assert not any(raw(first.acquire(module))["c.w"]), "the first chunk of a near source is read as it is"
        with running(honest, right, budget_bytes=64 * MIB) as second:
            assert raw(second.acquire(module))["c.w"] == payload[: 10 * MIB]


class OfflineCache(ToySource):
    """A cache that has only coded forms."""

    is_offline = True

    def near(self, manifest: Manifest, chunk: Chunk) -> tuple[Form, ...]:
        del manifest
        return (chunk.forms[-1],)


@pytest.mark.parametrize("is_pinned", [True, False])
@pytest.mark.parametrize("damage", ["", "payload", "frame"])
def test_rows_are_decoded_if_only_the_coded_form_is_cached(
    damage: str, is_pinned: bool, new_loader: Callable[..., Loader]
) -> None:
    """Nothing is used before the payload was compared with the chunk's id: digests cover only the coded bytes."""
    made = _, payload = weights("c", 5 * MIB + 77)
    manifest, source = coded_model([made])
    (chunk,) = manifest.chunks
    if damage == "payload":
        form, stored = code(*weights("c", 5 * MIB + 77, seed=1))
    else:
        form, stored = chunk.forms[-1], source.payloads[chunk.forms[-1].digest]
        if damage == "frame":
            start = sum(form.frames[:3])
            stored = stored[: start + 2] + b"\x55" + stored[start + 3 :]
            digest, blocks = digest_blocks([stored])
            form = replace(form, digest=digest, blocks=blocks)
    manifest = replace(manifest, chunks=(replace(chunk, forms=(chunk.forms[0], form)),))
    cache = OfflineCache(source.manifests, {form.digest: stored})
    loader, io, metrics = new_loader(cache, manifest, is_pinned=is_pinned), IoThread(), Metrics()
    try:
        reader = RowReader(
            cache, manifest, io, metrics,
            prove=loader.prove, read_frame=loader.read_frame, scratch_bytes=4 * MIB, keep_bytes=4 * MIB,
        )  # fmt: skip
        if damage:
            expected = {"payload": "decodes from its form 'lossless' to", "frame": "frame 3 is not what the codec"}
            with pytest.raises(IntegrityError, match=expected[damage]):
                reader.tensor("c.w")
            return
        for _ in range(2):  # the second time, some blocks are kept
            for tensor in chunk.tensors:
                seen = reader.tensor(tensor.name)
                assert bytes(seen.view(torch.uint8).numpy()) == payload[tensor.offset : tensor.offset + tensor.nbytes]
        loader.close()
        with pytest.raises(ModelClosedError, match="was closed while it was read"):
            reader.tensor("c.w")
    finally:
        io.close()
