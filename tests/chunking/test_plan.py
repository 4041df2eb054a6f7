"""A plan contains every tensor once, in order and without gaps, and a chunk's file is plain safetensors."""

import json
import random
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load

from surfw.chunking.plan import ChunkPlan, PlannedChunk, PlannedTensor, UnitFacts, plan_chunks
from surfw.config import ALIGNMENT
from surfw.manifest import DTYPE_BITS, TensorInfo, Use
from surfw.safetensors_header import HEADER_ALIGNMENT, encode_header
from surfw.skeleton.dtypes import torch_dtype

shapes = st.lists(st.integers(0, 40), max_size=3).map(tuple)
dtypes = st.sampled_from(sorted(set(DTYPE_BITS) - {"F8_E8M0"}))
"""All except those that safetensors cannot represent."""


@st.composite
def models(draw: st.DrawFn) -> tuple[list[UnitFacts], dict[str, PlannedTensor], dict[str, str]]:
    """Units, the tensors to store, and the ties between them."""
    units, tensors, ties = [], {}, {}
    for index in range(draw(st.integers(1, 5))):
        names = []
        for leaf in range(draw(st.integers(0, 4))):
            name = f"u{index}.t{leaf}"
            names.append(name)
            kind = draw(st.sampled_from(["stored", "tied", "computed"]))
            if kind == "tied" and tensors:
                ties[name] = draw(st.sampled_from(sorted(tensors)))
            elif kind != "computed":
                tensors[name] = PlannedTensor(TensorInfo(name, draw(dtypes), draw(shapes), 0), f"source of {name}")
        units.append(UnitFacts(f"u{index}", draw(st.sampled_from(["layer", "part", "own"])), tuple(names)))
    return units, tensors, ties


@given(models())
def test_every_tensor_is_stored_once_in_the_chunk_of_its_unit(
    model: tuple[list[UnitFacts], dict[str, PlannedTensor], dict[str, str]],
) -> None:
    units, tensors, ties = model
    plan = plan_chunks(units, tensors, ties)
    stored = [tensor.info.name for chunk in plan.chunks for tensor in chunk.tensors]
    assert sorted(stored) == sorted(tensors)
    for chunk in plan.chunks:
        unit = next(unit for unit in units if unit.path == chunk.name)
        assert chunk.kind == unit.kind
        assert {tensor.info.name for tensor in chunk.tensors} == set(unit.tensors) & set(tensors)
    assert [chunk.name for chunk in plan.chunks] == [unit.path for unit in units if set(unit.tensors) & set(tensors)]


@given(models())
def test_payloads_have_no_gaps_and_aligned_tensors_come_first(
    model: tuple[list[UnitFacts], dict[str, PlannedTensor], dict[str, str]],
) -> None:
    plan = plan_chunks(*model)
    for chunk in plan.chunks:
        end = 0
        for tensor in chunk.tensors:
            assert tensor.info.offset == end
            end += tensor.info.nbytes
        assert end == chunk.payload_bytes
        odd = [tensor.info.nbytes % ALIGNMENT != 0 for tensor in chunk.tensors]
        assert odd == sorted(odd)
    assert plan.payload_bytes == sum(tensor.info.nbytes for tensor in model[1].values())


@given(models())
def test_the_order_names_the_chunks_that_each_unit_needs(
    model: tuple[list[UnitFacts], dict[str, PlannedTensor], dict[str, str]],
) -> None:
    units, tensors, ties = model
    plan = plan_chunks(units, tensors, ties)
    homes = {tensor.info.name: chunk.name for chunk in plan.chunks for tensor in chunk.tensors}
    expected = {}
    for unit in units:
        needed = {homes[ties.get(name, name)] for name in unit.tensors if ties.get(name, name) in homes}
        if needed:
            expected[unit.path] = needed
    assert {use.module: set(use.chunks) for use in plan.order} == expected
    assert [use.module for use in plan.order] == [unit.path for unit in units if unit.path in expected]


def test_a_small_model() -> None:
    def tensor(name: str, *shape: int) -> PlannedTensor:
        return PlannedTensor(TensorInfo(name, "F32", shape, 0), name)

    units = [
        UnitFacts("embed", "part", ("embed.weight",)),
        UnitFacts("layers.0", "layer", ("layers.0.scale", "layers.0.weight", "layers.0.bias")),
        UnitFacts("head", "part", ("head.weight", "head.bias")),
    ]
    tensors = {
        one.info.name: one
        for one in (
            tensor("embed.weight", 10, 16), tensor("layers.0.scale", 3), tensor("layers.0.weight", 16, 16),
            tensor("layers.0.bias", 16), tensor("head.bias", 10),
        )
    }  # fmt: skip
    plan = plan_chunks(units, tensors, {"head.weight": "embed.weight"})
    assert [[(t.info.name, t.info.offset) for t in chunk.tensors] for chunk in plan.chunks] == [
        [("embed.weight", 0)],
        [("layers.0.weight", 0), ("layers.0.bias", 1024), ("layers.0.scale", 1088)],
        [("head.bias", 0)],
    ]
    assert plan.order == (
        Use("embed", ("embed",)),
        Use("layers.0", ("layers.0",)),
        Use("head", ("embed", "head")),
    )
    assert plan.payload_bytes == 640 + 1024 + 64 + 12 + 40


def test_a_model_without_tensors_has_no_chunks() -> None:
    assert plan_chunks([UnitFacts("u", "part", ("x",))], {}, {}) == ChunkPlan((), ())


def info(names: list[str], shapes: list[tuple[str, tuple[int, ...]]]) -> list[TensorInfo]:
    infos, offset = [], 0
    for name, (dtype, shape) in zip(names, shapes, strict=False):
        infos.append(TensorInfo(name, dtype, shape, offset))
        offset += infos[-1].nbytes
    return infos


names = st.lists(st.text('abc.é"\\ ', min_size=1, max_size=8), max_size=6, unique=True)


@settings(deadline=None)
@given(names, st.lists(st.tuples(dtypes, shapes), max_size=6), st.integers(0, 2**32))
def test_a_chunks_file_is_safetensors_with_its_payload_at_a_multiple_of_4096(
    names: list[str], shapes: list[tuple[str, tuple[int, ...]]], seed: int
) -> None:
    infos = info(names, shapes)
    header = encode_header(infos)
    assert len(header) % HEADER_ALIGNMENT == 0
    assert int.from_bytes(header[:8], "little") == len(header) - 8
    payload = random.Random(seed).randbytes(sum(one.nbytes for one in infos))
    loaded = load(header + payload)
    assert set(loaded) == {one.name for one in infos}
    for one in infos:
        tensor = loaded[one.name]
        assert tensor.dtype == torch_dtype(one.dtype)
        assert tuple(tensor.shape) == one.shape
        assert tensor.numel() == prod(one.shape)
        raw = bytes(tensor.reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b""
        assert raw == payload[one.offset : one.offset + one.nbytes]


@pytest.mark.parametrize("count", [0, 1, 30, 31, 60, 1000])
def test_headers_of_all_lengths_end_on_a_page(count: int) -> None:
    infos = [
        TensorInfo(f"layers.{number:04}.self_attn.q_proj.weight", "F32", (1,), 4 * number) for number in range(count)
    ]
    header = encode_header(infos)
    assert len(header) % 4096 == 0
    text = header[8:].rstrip(b" ")
    assert len(header) - 8 - len(text) < 4096
    assert len(json.loads(text)) == count


@pytest.mark.parametrize(("rows", "kind"), [(8, "int8"), (35, "int8"), (36, "int4"), (64, "int4"), (65, "int8")])
def test_int4_takes_no_more_bytes_than_int8_would(rows: int, kind: str) -> None:
    weight = PlannedTensor(TensorInfo("weight", "BF16", (rows, 1024), 0), "weight", is_matrix=True)
    assert PlannedChunk("layer", "layer", (weight,)).kinds("int4") == (kind,)
