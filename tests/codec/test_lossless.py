"""Frames of the codec `lossless`: exact round trips, and one clear error for anything else."""

import threading
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surfw.codec.lossless import FRAME_BYTES, FrameDecoder, decode_frame, encode_frame, item_bytes_of
from surfw.errors import IntegrityError
from surfw.manifest import TensorInfo

torch = pytest.importorskip("torch")

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.int64, torch.bool]


def weights(count: int, dtype: "torch.dtype" = torch.bfloat16, seed: int = 0) -> bytes:
    """Normally distributed values, like a model's."""
    values = torch.randn(count, generator=torch.Generator().manual_seed(seed)) * 0.02
    return values.to(dtype).view(torch.uint8).numpy().tobytes()


def encode(payload: bytes, item_bytes: int = 2) -> list[bytes]:
    view = memoryview(payload)
    return [bytes(encode_frame(view[at : at + FRAME_BYTES], item_bytes)) for at in range(0, len(payload), FRAME_BYTES)]


def decode(
    frames: list[bytes], size: int, *, in_place: bool, threads: int = 2, step: int = 2 * FRAME_BYTES, extra: int = 0
) -> bytes:
    """Decode as the loader does: the frames arrive in parts, and several threads decode each."""
    stored, place = b"".join(frames), bytearray(size + extra)
    into, lead = memoryview(place)[:size], size - len(stored) + extra
    coded = memoryview(place)[lead:] if in_place else memoryview(bytearray(len(stored)))
    decoder = FrameDecoder(coded, into, [len(frame) for frame in frames], lead=lead if in_place else None)
    for start in range(0, len(stored), step):
        part = stored[start : start + step]
        coded[start : start + len(part)] = part
        failures: list[BaseException] = []

        def work(arrived: int = start + len(part), failures: list[BaseException] = failures) -> None:
            try:
                decoder.decode(arrived)
            except BaseException as exc:  # noqa: BLE001 - raised below
                failures.append(exc)

        running = [threading.Thread(target=work) for _ in range(threads)]
        for one in running:
            one.start()
        for one in running:
            one.join()
        if failures:
            raise failures[0]
    return bytes(into)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_payload_of_several_frames_comes_back(threads: int, in_place: bool) -> None:
    payload = weights(5 * FRAME_BYTES + 1234)
    frames = encode(payload)
    assert sum(map(len, frames)) < 0.75 * len(payload)
    for extra in (0, 4095):
        assert decode(frames, len(payload), in_place=in_place, threads=threads, extra=extra) == payload


@given(
    dtype=st.sampled_from(DTYPES),
    count=st.integers(0, 4000),
    specials=st.lists(st.sampled_from([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-40, 5e-324])),
    seed=st.integers(0, 9),
)
@settings(max_examples=60, deadline=None)
def test_every_dtype_and_every_bit_comes_back(
    dtype: "torch.dtype", count: int, specials: list[float], seed: int
) -> None:
    ending = torch.tensor(specials, dtype=torch.float64).to(dtype).view(torch.uint8).numpy().tobytes()
    payload = weights(count, dtype, seed) + ending
    item_bytes = torch.empty(0, dtype=dtype).element_size()
    frames = encode(payload, item_bytes)
    assert decode(frames, len(payload), in_place=True) == payload
    assert all(len(frame) <= FRAME_BYTES for frame in frames)


@given(payload=st.binary(max_size=5000), item_bytes=st.sampled_from([1, 2, 4, 8]))
@settings(max_examples=60, deadline=None)
def test_any_bytes_come_back_also_those_that_hide_a_payload_in_a_nan(payload: bytes, item_bytes: int) -> None:
    assert decode(encode(payload, item_bytes), len(payload), in_place=True) == payload


@given(kinds=st.lists(st.booleans(), min_size=1, max_size=9), threads=st.integers(1, 4), step=st.integers(1, 3))
@settings(max_examples=15, deadline=None)
def test_frames_that_shrink_and_frames_that_do_not_share_one_memory(kinds: list[bool], threads: int, step: int) -> None:
    noise = torch.randint(0, 256, (FRAME_BYTES,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    parts = [bytes(FRAME_BYTES) if zeros else noise.numpy().tobytes() for zeros in kinds]
    payload = b"".join(parts)[: len(kinds) * FRAME_BYTES - 77]
    frames = encode(payload)
    assert decode(frames, len(payload), in_place=True, threads=threads, step=step * FRAME_BYTES) == payload


def test_what_does_not_shrink_is_stored_as_it_is() -> None:
    noise = torch.randint(0, 256, (FRAME_BYTES,), dtype=torch.uint8).numpy().tobytes()
    (frame,) = encode(noise)
    assert frame == noise


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda frame: frame[:10], "less than a header"),
        (lambda frame: frame[:-1], "its header says"),
        (lambda frame: frame + b"x", "its header says"),
        (
            lambda frame: frame[:4] + (1 << 30).to_bytes(4, "little") + frame[8:],
            "its header says 77[0-9]* bytes for 1073741824",
        ),
    ],
)
def test_a_frame_that_is_none_is_refused_before_blosc_sees_it(spoil, says: str) -> None:
    payload = weights(50_000)
    frame = spoil(bytes(encode_frame(memoryview(payload), 2)))
    with pytest.raises(ValueError, match=says):
        decode_frame(frame, memoryview(bytearray(len(payload))))


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_flipped_bytes_never_write_beyond_the_payload(data: st.DataObject) -> None:
    payload = weights(20_000)
    frame = bytearray(encode_frame(memoryview(payload), 2))
    for _ in range(data.draw(st.integers(1, 8))):
        at = data.draw(st.integers(0, len(frame) - 1))
        frame[at] ^= data.draw(st.integers(1, 255))
    fence = b"fence" * 1000
    memory = bytearray(fence + bytes(len(payload)) + fence)
    with suppress(ValueError, RuntimeError):
        decode_frame(bytes(frame), memoryview(memory)[len(fence) : -len(fence)])
    assert memory[: len(fence)] == fence
    assert memory[-len(fence) :] == fence


def test_a_damaged_frame_is_named() -> None:
    payload = weights(FRAME_BYTES)  # two frames of bfloat16
    first, second = encode(payload)
    with pytest.raises(IntegrityError, match=r"frame 1 is not what the codec 'lossless' writes"):
        decode([first, second[:16] + bytes(len(second) - 16)], len(payload), in_place=False)


def test_the_element_size_of_a_frame_is_that_of_most_of_it() -> None:
    tensors = [
        TensorInfo("a", "BF16", (512,), 0),
        TensorInfo("b", "F32", (1024,), 1024),
        TensorInfo("c", "U8", (7,), 5120),
    ]
    assert [item_bytes_of(tensors, *span) for span in [(0, 1024), (0, 5127), (1000, 1030), (5120, 5127)]] == [
        2,
        4,
        2,
        1,
    ]
    assert item_bytes_of([], 0, 10) == 1
