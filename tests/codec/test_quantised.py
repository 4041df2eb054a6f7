"""int8 and int4: the exact stored bytes, the largest error of a weight, and what is refused."""

import random
import re
import tracemalloc
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surfw.codec.quantised import PackedEncoder, decode_tensor
from surfw.config import MIB
from surfw.errors import CheckpointError
from surfw.manifest import GROUP, PANEL, Kind, Part, TensorInfo, fits, nbytes, packed_bytes, payload_digest, plan_parts

DTYPES = ["F32", "F16", "BF16"]
KINDS: list[Kind] = ["int8", "int4"]


def infos_of(*tensors: tuple[str, tuple[int, ...]]) -> list[TensorInfo]:
    """Tensors of these dtypes and shapes, one after another."""
    infos, offset = [], 0
    for index, (dtype, shape) in enumerate(tensors):
        infos.append(TensorInfo(f"t{index}", dtype, shape, offset))
        offset += nbytes(dtype, shape)
    return infos


def encode(parts: Sequence[Part], payload: bytes, *, piece: int = 1 << 30) -> bytes:
    """The stored bytes of a payload that comes in pieces of this size."""
    stored = bytearray()
    encoder = PackedEncoder(parts, stored.extend)
    for start in range(0, len(payload), piece):
        encoder.update(memoryview(payload)[start : start + piece])
    encoder.finish()
    assert len(stored) == packed_bytes(parts)
    return bytes(stored)


def encode_matrix(kind: Kind, weights: np.ndarray, dtype: str = "F32", *, piece: int = 1 << 30) -> tuple[Part, bytes]:
    """Encode one matrix, which must be quantised."""
    (part,) = plan_parts(infos_of((dtype, weights.shape)), [kind])
    assert part.kind == kind
    return part, encode([part], in_dtype(weights, dtype).tobytes(), piece=piece)


def in_dtype(weights: np.ndarray, dtype: str) -> np.ndarray:
    """Convert to the payload's dtype; bfloat16 is truncated."""
    if dtype == "BF16":
        return (weights.astype("<f4").view("<u4") >> 16).astype("<u2")
    return weights.astype({"F32": "<f4", "F16": "<f2"}[dtype])


def as_floats(stored: np.ndarray) -> np.ndarray:
    return (stored.astype("<u4") << 16).view("<f4") if stored.dtype == np.uint16 else stored.astype(np.float32)


def scales_of(part: Part, stored: bytes) -> np.ndarray:
    """The scale of each weight, in the matrix's shape, as the format's description defines it."""
    rows, columns = part.shape
    scales = np.frombuffer(stored[part.scales : part.stop], "<f4" if part.kind == "int8" else "<u2")
    if part.kind == "int8":
        return np.repeat(scales[:, None], columns, axis=1)
    of_groups = as_floats(scales).reshape(columns // GROUP, -1)[:, :rows]
    return np.repeat(of_groups.T, GROUP, axis=1)


def random_weights(seed: int, rows: int, columns: int, *, size: float = 0.02) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((rows, columns)) * size).astype(np.float32)


@pytest.mark.parametrize(
    ("dtype", "shape", "int8", "int4"),
    [
        ("BF16", (64, 64), "int8", "int4"),
        ("F16", (33, 128), "int8", "int4"),
        ("F32", (512, 16), "int8", "raw"),
        ("F32", (512, 72), "raw", "raw"),
        ("F32", (63, 64), "raw", "raw"),  # too small
        ("F32", (64, 1, 64), "raw", "raw"),
        ("F32", (1 << 20,), "raw", "raw"),
        ("F32", (0, 64), "raw", "raw"),
        ("F32", (64, 0), "raw", "raw"),
        ("F64", (64, 64), "raw", "raw"),
        ("F8_E4M3", (64, 64), "raw", "raw"),
        ("I32", (64, 64), "raw", "raw"),
    ],
)
def test_what_is_quantised(dtype: str, shape: tuple[int, ...], int8: Kind, int4: Kind) -> None:
    (info,) = infos_of((dtype, shape))
    assert fits(info, "int8") == (int8 == "int8")
    assert fits(info, "int4") == (int4 == "int4")
    assert fits(info, "raw")


def test_every_part_has_its_place() -> None:
    infos = infos_of(("BF16", (100, 128)), ("BF16", (7,)), ("BF16", (100, 128)), ("F32", (0,)), ("U8", (3,)))
    parts = plan_parts(infos, ["int4", *["raw"] * 4])
    assert [(part.kind, part.start, part.scales, part.stop) for part in parts] == [
        ("int4", 0, 128 * 128 // 2, 128 * 128 // 2 + 128 * 128 // GROUP * 2),
        ("raw", 9216, 9230, 9230),
        ("raw", 9280, 34880, 34880),
        ("raw", 34880, 34880, 34880),
        ("raw", 34880, 34883, 34883),
    ]
    assert packed_bytes(parts) == 34883
    assert packed_bytes(plan_parts([], [])) == 0


def test_the_layout_is_the_one_described() -> None:
    weights = random_weights(1, 70, 128)
    part, stored = encode_matrix("int4", weights)
    decoded, scales = decode_tensor(part, stored), scales_of(part, stored)
    for row, column in [(0, 0), (31, 5), (32, 5), (63, 127), (64, 0), (69, 64)]:
        byte = stored[row // PANEL * 128 * 32 + column * 32 + row % 32]
        code = (byte >> 4 if row % PANEL >= 32 else byte & 15) - 8
        assert decoded[row, column] == code * scales[row, column]
    part, stored = encode_matrix("int8", weights)
    decoded, scales = decode_tensor(part, stored), scales_of(part, stored)
    for row, column in [(0, 0), (1, 0), (69, 127)]:
        code = int.from_bytes(stored[row * 128 + column :][:1], signed=True)
        assert decoded[row, column] == code * scales[row, column]


@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(64, 200),
    columns=st.sampled_from([64, 128, 256]),
    size=st.sampled_from([1e-30, 1e-4, 0.02, 1.0, 1e30]),
    piece=st.sampled_from([1, 100, 5000, 1 << 30]),
    seed=st.integers(0, 9),
)
def test_a_weight_gets_the_nearest_code(
    kind: Kind, dtype: str, rows: int, columns: int, size: float, piece: int, seed: int
) -> None:
    rows = min(rows, 70) if piece == 1 else rows
    if dtype == "F16":
        size = min(max(size, 1e-4), 1.0)
    payload = in_dtype(random_weights(seed, rows, columns, size=size), dtype)
    weights = as_floats(payload)
    (part,) = plan_parts(infos_of((dtype, weights.shape)), [kind])
    stored = encode([part], payload.tobytes(), piece=piece)
    decoded, scales = decode_tensor(part, stored), scales_of(part, stored)
    lowest, highest = (-127, 127) if kind == "int8" else (-8, 7)
    codes = decoded / scales
    assert ((codes >= lowest) & (codes <= highest)).all()
    is_cut = (codes == highest) | (codes == lowest) if kind == "int4" else np.zeros(weights.shape, bool)
    assert (np.abs(weights - decoded) <= np.abs(scales) * 0.50001)[~is_cut].all()
    assert (np.abs(weights) >= np.abs(decoded))[is_cut & (np.abs(weights - decoded) > np.abs(scales) * 0.50001)].all()


def relative_error(kind: Kind, weights: np.ndarray) -> float:
    part, stored = encode_matrix(kind, weights)
    return float(np.linalg.norm(weights - decode_tensor(part, stored)) / np.linalg.norm(weights))


def test_how_near_normal_weights_come() -> None:
    weights = random_weights(1, 256, 1024)
    assert relative_error("int8", weights) < 0.0082
    assert relative_error("int4", weights) < 0.0840


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_and_numbers_next_to_them(kind: Kind, dtype: str) -> None:
    weights = np.zeros((64, 128), np.float32)
    weights[5, 7], weights[6, 8] = -0.0, 2.0**-126  # the smallest normal float32
    weights[7, 9] = 2.0**-149
    part, stored = encode_matrix(kind, weights, dtype)
    assert (np.abs(decode_tensor(part, stored)) <= 2.0**-100).all()
    assert (scales_of(part, stored)[0] >= 2.0**-101).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_numbers(kind: Kind) -> None:
    weights = random_weights(1, 64, 128, size=1e37)
    weights[0, 0], weights[1, 1] = np.nextafter(np.float32(2.0**127), np.float32(0)), -(2.0**126)
    part, stored = encode_matrix(kind, weights)
    decoded = decode_tensor(part, stored)
    assert np.isfinite(decoded).all()
    assert (np.abs(weights - decoded) <= np.abs(scales_of(part, stored)) * 1.01)[:2, :2].all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "wrong"), [("F32", "nan"), ("BF16", "inf"), ("F16", "-inf"), ("F32", "1.8e+38")])
def test_weights_that_are_no_numbers_are_refused(kind: Kind, dtype: str, wrong: str) -> None:
    weights = random_weights(1, 200, 128)
    weights[171, 127] = float(wrong)
    with pytest.raises(
        CheckpointError, match=rf"t0 has the weight {re.escape(wrong)}; {kind} takes finite ones below 2\^127"
    ):
        encode_matrix(kind, weights, dtype)


def test_other_tensors_stay_as_they_are() -> None:
    infos = infos_of(("BF16", (64, 64)), ("F32", (3, 5)), ("F32", (0, 4)), ("BOOL", (7,)), ("F32", (64, 64)))
    payload = random.Random(1).randbytes(8192) + b"\xff" * 60 + b"1234567" + bytes(4 * 64 * 64)
    parts = plan_parts(infos, [*["raw"] * 4, "int8"])
    for piece in (1, 333, 1 << 20):
        stored = encode(parts, payload, piece=piece)
        for info, part in zip(infos[:4], parts, strict=False):
            assert stored[part.start : part.stop] == payload[info.offset : info.offset + info.nbytes]


DIGESTS = {
    ("int8", "F32"): "9cbfbdb7d4e4ace1",
    ("int8", "F16"): "4f4c70ee3cd2afb7",
    ("int8", "BF16"): "5945f8d9dd688207",
    ("int4", "F32"): "e8f57eb25ccf77fa",
    ("int4", "F16"): "cee431ce109adbe9",
    ("int4", "BF16"): "8a6e2bab16648b73",
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bytes_are_the_same_on_every_machine(kind: Kind, dtype: str) -> None:
    source = random.Random(5)
    weights = np.array([sum(source.choices(range(-999, 1000), k=4)) for _ in range(200 * 192)], np.float32)
    _, stored = encode_matrix(kind, weights.reshape(200, 192) / np.float32(2**15), dtype)
    assert payload_digest(stored)[:16] == DIGESTS[kind, dtype]


@pytest.mark.parametrize("kind", KINDS)
def test_encoding_takes_little_memory(kind: Kind) -> None:
    parts = plan_parts(infos_of(("F32", (4096, 4096))), [kind])
    piece = memoryview(random_weights(1, 64, 4096).tobytes())
    encoder = PackedEncoder(parts, lambda _: None)
    tracemalloc.start()
    try:
        for _ in range(64):
            encoder.update(piece)
        encoder.finish()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 16 * MIB
