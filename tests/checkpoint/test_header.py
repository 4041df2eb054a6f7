"""The safetensors header: headers of the library are read alike, and invalid ones are refused by name."""

import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from safetensors.torch import save

from checkpoint.samples import entry, pack
from surfw.checkpoint.shard import read_tensors
from surfw.errors import CheckpointError, UnsupportedModelError
from surfw.manifest import DTYPE_BITS
from surfw.safetensors_header import MAX_HEADER_BYTES, UNSUPPORTED_DTYPES, Header, header_length, parse_header

_DTYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2", torch.uint16: "U16", torch.int16: "I16", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.uint32: "U32", torch.int32: "I32", torch.float32: "F32", torch.complex64: "C64",
    torch.uint64: "U64", torch.int64: "I64", torch.float64: "F64",
}  # fmt: skip


def parse(file: bytes) -> Header:
    """Parse the file's header, with errors like those of a checkpoint's shard."""

    def read(start: int, destination: memoryview) -> None:
        destination[:] = file[start : start + len(destination)]

    tensors = read_tensors(Path("x.safetensors"), len(file), read, where="x.safetensors")
    header = parse_header(file[8 : 8 + header_length(file[:8], len(file))], len(file))
    assert {(tensor.name, tensor.start) for tensor in tensors} == {(one.name, one.start) for one in header.tensors}
    return header


@st.composite
def safetensors_files(draw: st.DrawFn) -> tuple[bytes, dict[str, tuple[str, list[int], bytes]]]:
    """A file from the library, and each tensor's dtype, shape and bytes."""
    text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__")
    tensors, expected = {}, {}
    for name in draw(st.lists(text, unique=True, min_size=1, max_size=6)):
        dtype = draw(st.sampled_from(list(_DTYPES)))
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        size = math.prod(shape) * DTYPE_BITS[_DTYPES[dtype]] // 8
        data = draw(st.binary(min_size=size, max_size=size))
        raw = torch.tensor(list(data), dtype=torch.uint8)
        tensors[name] = raw.view(dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)
        expected[name] = (_DTYPES[dtype], shape, data)
    return save(tensors, draw(st.none() | st.dictionaries(text, text, max_size=2))), expected


@settings(deadline=None)
@given(safetensors_files())
def test_reads_what_the_library_writes(sample):
    file, expected = sample
    seen = {
        tensor.name: (tensor.dtype, list(tensor.shape), file[tensor.start : tensor.stop])
        for tensor in parse(file).tensors
    }
    assert seen == expected


@settings(deadline=None)
@given(safetensors_files(), st.data())
def test_a_mutated_header_is_refused_or_means_to_us_what_it_means_to_the_library(sample, data):
    file, _ = sample
    mutated = bytearray(file)
    end = 8 + int.from_bytes(file[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        mutated[data.draw(st.integers(0, end - 1))] = data.draw(
            st.integers(0, 255) | st.sampled_from(b'"{}[],:-0129eE.\\')
        )
    file = bytes(mutated[: data.draw(st.just(len(mutated)) | st.integers(0, len(mutated)))])
    try:
        header = parse(file)
    except (CheckpointError, UnsupportedModelError):
        return
    assume(b"-0" not in file[:end])  # an integer for Python, a fraction for the library
    theirs = {name: (tensor["dtype"], tensor["shape"], bytes(tensor["data"])) for name, tensor in deserialize(file)}
    ours = {
        tensor.name: (tensor.dtype, list(tensor.shape), file[tensor.start : tensor.stop]) for tensor in header.tensors
    }
    assert ours == theirs


@settings(deadline=None)
@given(st.binary(max_size=64))
def test_any_bytes_parse_or_are_refused(file):
    try:
        parse(file)
    except CheckpointError as refused:
        assert str(refused).startswith("x.safetensors")  # noqa: PT017


def test_values_of_a_header():
    file = pack(
        {"__metadata__": {"format": "pt"}, "b": entry("F32", [2], 6, 14), "a": entry("BF16", [3, 1], 0, 6)}, bytes(14)
    )
    header = parse(file)
    start = len(file) - 14
    assert header.metadata == {"format": "pt"}
    assert [(t.name, t.dtype, t.shape, t.start, t.stop) for t in header.tensors] == [
        ("a", "BF16", (3, 1), start, start + 6),
        ("b", "F32", (2,), start + 6, start + 14),
    ]


def test_scalars_empty_tensors_and_trailing_blanks_are_allowed():
    file = pack(json.dumps({"s": entry("F32", [], 0, 4), "e": entry("F32", [0, 7], 4, 4)}).encode() + b"   ", bytes(4))
    assert [(t.name, t.shape, t.stop - t.start) for t in parse(file).tensors] == [("s", (), 4), ("e", (0, 7), 0)]


ONE = {"a": entry("U8", [4], 0, 4)}
ATTACKS = {
    "no file at all": (b"", "it has 0 bytes, expected at least 8"),
    "a prefix cut off": (b"\x01\x00\x00", "it has 3 bytes, expected at least 8"),
    "a length of 2^63": (struct.pack("<Q", 1 << 63) + b"{}", f"claims {1 << 63} bytes, the format allows 100000000"),
    "a length just over the limit": (struct.pack("<Q", MAX_HEADER_BYTES + 1), "claims 100000001 bytes"),
    "a length beyond the file": (struct.pack("<Q", 50) + b"{}", "is truncated: expected 58 bytes, the file has 10"),
    "no header": (pack(b""), "starts with b'', expected '{'"),
    "no JSON": (pack(b"{nothing}"), "not the JSON"),
    "two documents": (pack(b"{}{}"), "not the JSON"),
    "no object": (pack(b"[1]"), "starts with b'[1]', expected '{'"),
    "a blank in front": (pack(b" {}"), "expected '{'"),
    "no UTF-8": (pack(b'{"\xff": 1}'), "not the JSON"),
    "half a surrogate": (pack(rb'{"\ud800": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}'), "not the JSON"),
    "huge nesting": (pack(b'{"a":' + b"[" * 200_000), "nested too deeply"),
    "a huge number": (pack(b'{"a":' + b"1" * 5000 + b"}"), "not the JSON"),
    "NaN": (pack(b'{"a": NaN}'), "NaN is not JSON"),
    "infinity in a shape": (pack({"a": entry("U8", [float("inf")], 0, 4)}, bytes(4)), "Infinity is not JSON"),
    "a key twice": (pack(b'{"__metadata__": {"k": "1", "k": "2"}}'), "the key 'k' stands there twice"),
    "a tensor twice": (
        pack(
            b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
        ),
        "the key 'a' stands there twice",
    ),
    "metadata with a number": (pack({"__metadata__": {"k": 1}}), "__metadata__ is not an object of texts"),
    "metadata that is a list": (pack({"__metadata__": []}), "__metadata__ is not an object of texts"),
    "a tensor that is a text": (pack({"a": "F32"}), "tensor 'a' is described by 'F32', expected an object"),
    "a tensor without dtype": (pack({"a": {"shape": [4], "data_offsets": [0, 4]}}, bytes(4)), "has dtype 'None'"),
    "an unknown dtype": (pack({"a": entry("F33", [1], 0, 4)}, bytes(4)), "has dtype 'F33', expected one of BOOL"),
    "a dtype that is a list": (pack({"a": entry([], [1], 0, 4)}, bytes(4)), "has dtype '[]'"),
    "a shape that is a number": (pack({"a": entry("U8", 4, 0, 4)}, bytes(4)), "has shape '4'"),
    "a negative size": (
        pack({"a": entry("U8", [-4, -1], 0, 4)}, bytes(4)),
        "has shape '[-4, -1]', expected integers from 0",
    ),
    "a boolean size": (pack({"a": entry("U8", [True], 0, 1)}, bytes(1)), "has shape '[True]'"),
    "a fraction as size": (pack({"a": entry("U8", [4.0], 0, 4)}, bytes(4)), "has shape '[4.0]'"),
    "a shape of 2^64 elements": (
        pack({"a": entry("U8", [1 << 32, 1 << 32], 0, 0)}),
        "more elements than 64 bits can count",
    ),
    "too many elements times none": (
        pack({"a": entry("U8", [0, 1 << 32, 1 << 32], 0, 0)}),
        "more elements than 64 bits",
    ),
    "negative offsets": (pack({"a": entry("U8", [4], -4, 0)}, bytes(4)), "has data_offsets '[-4, 0]'"),
    "offsets backwards": (pack({"a": entry("U8", [4], 4, 0)}, bytes(4)), "has data_offsets '[4, 0]'"),
    "one offset": (pack({"a": {"dtype": "U8", "shape": [4], "data_offsets": [4]}}, bytes(4)), "has data_offsets '[4]'"),
    "a boolean offset": (pack({"a": entry("U8", [1], False, True)}, bytes(1)), "has data_offsets '[False, True]'"),
    "a size that the shape does not have": (pack({"a": entry("F32", [2], 0, 4)}, bytes(4)), "has 4 bytes, expected 8"),
    "a hole before the first": (pack({"a": entry("U8", [4], 1, 5)}, bytes(5)), "leaves a hole before it"),
    "a hole between": (pack(ONE | {"b": entry("U8", [1], 5, 6)}, bytes(6)), "tensor 'b' begins at byte"),
    "an overlap": (pack(ONE | {"b": entry("U8", [2], 3, 5)}, bytes(5)), "it overlaps the one before"),
    "the same bytes twice": (pack(ONE | {"b": entry("U8", [4], 0, 4)}, bytes(4)), "it overlaps the one before"),
    "an empty tensor within another": (
        pack(ONE | {"b": entry("U8", [0], 2, 2)}, bytes(4)),
        "it overlaps the one before",
    ),
    "bytes that no tensor has": (pack(ONE, bytes(5)), "its header describes"),
    "a payload cut off": (pack(ONE, bytes(3)), "download the shard again"),
    "a name that breaks lines": (
        pack({"a\nb\x1b[2J": entry("U8", [4], 1, 5)}, bytes(5)),
        r"tensor 'a\nb\x1b[2J' begins",
    ),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_attack(name):
    file, complaint = ATTACKS[name]
    with pytest.raises(CheckpointError) as refused:
        parse(file)
    text = str(refused.value)
    assert text.startswith("x.safetensors is ")
    assert complaint in text
    assert text.isprintable()
    assert len(text) < 500


WE_ARE_STRICTER = {"a blank in front", "a key twice", "a tensor twice", "too many elements times none"}


@pytest.mark.parametrize("name", [name for name in ATTACKS if name not in WE_ARE_STRICTER])
def test_the_library_refuses_the_same(name):
    with pytest.raises(SafetensorError):
        deserialize(ATTACKS[name][0])


def test_a_truncated_file_says_how_many_bytes_are_missing():
    file = pack({"a": entry("F32", [1000], 0, 4000)}, bytes(4000))
    with pytest.raises(CheckpointError) as refused:
        parse(file[:-1])
    assert str(refused.value) == (
        f"x.safetensors is truncated: expected {len(file)} bytes, the file has {len(file) - 1}; "
        "download the shard again"
    )


@pytest.mark.parametrize("dtype", sorted(UNSUPPORTED_DTYPES))
def test_types_that_are_not_read_are_unsupported_not_damaged(dtype):
    with pytest.raises(UnsupportedModelError, match=f"tensor 'a.scale' has dtype {dtype}, which surfw does not read"):
        parse(pack({"a.scale": entry(dtype, [8], 0, 8)}, bytes(8)))


def test_a_long_name_is_cut():
    with pytest.raises(CheckpointError) as refused:
        parse(pack({"n" * 100_000: entry("U8", [1], 1, 2)}, bytes(2)))
    assert len(str(refused.value)) < 500


def test_a_thousand_tensors_in_any_order_are_sorted_by_offset():
    order = np.random.default_rng(0).permutation(1000).tolist()
    header = parse(pack({f"t{i}": entry("U8", [1], i, i + 1) for i in order}, bytes(1000)))
    assert [tensor.name for tensor in header.tensors] == [f"t{i}" for i in range(1000)]
