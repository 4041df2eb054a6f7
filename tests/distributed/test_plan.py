"""The plan of reads: every byte of every slice is read, no block is read twice, and ranks read what they hold."""

import math
from collections.abc import Sequence
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from surfw.config import BLOCK_BYTES, MIB
from surfw.distributed.load import gather
from surfw.distributed.plan import LoadPlan, Need, Run, choose_window, make_slice, plan_load, runs_of
from surfw.distributed.stages import cut_evenly
from surfw.manifest import Chunk, Form, TensorInfo, nbytes

ITEM = 2


def chunk_of(name: str, shapes: Sequence[tuple[int, ...]]) -> Chunk:
    """A chunk of bfloat16 tensors, without a payload."""
    tensors, at = [], 0
    for index, shape in enumerate(shapes):
        tensors.append(TensorInfo(f"{name}.{index}", "BF16", shape, at))
        at += nbytes("BF16", shape)
    return Chunk(name, "layer", "", at, tuple(tensors), (Form("none", at, "", b""),))


def halves(size: int, ranks: int, rank: int) -> list[Run]:
    """The part of a dimension that a rank holds; torch gives larger parts to the first ranks."""
    step = -(-size // ranks)
    low, high = min(size, rank * step), min(size, (rank + 1) * step)
    return [(low, high)] if low < high else []


def check_whole(plan: LoadPlan) -> None:
    """Check that every byte of every slice is in one piece, in a unit that names the rank, with the right offsets."""
    got: list[dict[int, list[Run]]] = [{} for _ in plan.needs]
    for units in plan.units:
        for unit in units:
            assert unit.start % BLOCK_BYTES == 0
            assert unit.stop - unit.start <= plan.window_bytes
            for rank in range(len(plan.needs)):
                pieces = list(plan.pieces(unit, rank))
                if rank in unit.ranks:
                    for piece in pieces:
                        got[rank].setdefault(piece.need, []).append((piece.at, piece.end))
    for rank, needs in enumerate(plan.needs):
        for place, (_, held) in enumerate(needs):
            runs = sorted(got[rank].get(place, []))
            assert sum(stop - start for start, stop in runs) == held.nbytes
            assert all(one[1] == other[0] for one, other in pairwise(runs))
    assert [unit for round_ in plan.rounds for queue in round_ for unit in queue if unit.stop <= unit.start] == []
    assert sum(len(queue) for round_ in plan.rounds for queue in round_) == sum(map(len, plan.units))


def read_once(plan: LoadPlan) -> bool:
    """Whether no block is read twice."""
    blocks = [
        (unit.chunk.name, at)
        for units in plan.units
        for unit in units
        for at in range(unit.start, unit.stop, BLOCK_BYTES)
    ]
    return len(blocks) == len(set(blocks))


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("ranks", [2, 4, 7])
def test_rows_or_columns_of_a_large_model_are_read_once_and_by_those_who_hold_them(dim: int, ranks: int) -> None:
    """A LLaMA of 1.1 billion weights: a rank reads at most 2 % more than it holds."""
    layer = [(2048,), (2048, 2048), (256, 2048), (256, 2048), (2048, 2048), (2048,), *[(5632, 2048)] * 2, (2048, 5632)]
    chunks = [chunk_of("embed", [(32000, 2048)]), *(chunk_of(f"layer{at}", layer) for at in range(22))]
    needs: list[list[Need]] = []
    for rank in range(ranks):
        mine = []
        for chunk in chunks:
            for tensor in chunk.tensors:
                cut = {
                    min(dim, len(tensor.shape) - 1): halves(tensor.shape[min(dim, len(tensor.shape) - 1)], ranks, rank)
                }
                mine.append((tensor.name, make_slice(tensor, cut)))
        needs.append(mine)
    plan = plan_load(chunks, needs, ["here"] * ranks, window_bytes=choose_window(needs, 16 * MIB))
    held = [sum(one.nbytes for _, one in mine) for mine in needs]
    assert sum(held) == sum(chunk.payload_bytes for chunk in chunks)
    assert sum(map(plan.read_bytes, range(ranks))) == sum(held)
    assert read_once(plan)
    for rank in range(ranks):
        assert plan.shares[rank] == pytest.approx(held[rank])
        assert plan.read_bytes(rank) == pytest.approx(held[rank], rel=0.02)


def test_what_all_ranks_hold_is_read_once_on_each_machine_by_all_in_turn() -> None:
    chunk = chunk_of("whole", [(64, BLOCK_BYTES // ITEM // 2)])
    whole = make_slice(chunk.tensors[0], {})
    needs = [[("whole.0", whole)]] * 4
    plan = plan_load([chunk], needs, ["a", "a", "b", "b"], window_bytes=4 * MIB)
    check_whole(plan)
    assert [plan.read_bytes(rank) for rank in range(4)] == [16 * MIB] * 4
    assert [plan.shares[rank] for rank in range(4)] == [16 * MIB] * 4
    assert {unit.ranks for units in plan.units[:2] for unit in units} == {(0, 1)}


def test_columns_for_several_machines_are_read_once_and_sent_where_that_moves_less() -> None:
    chunk = chunk_of("wide", [(1024, 16384)])
    needs = [[("wide.0", make_slice(chunk.tensors[0], {1: halves(16384, 4, rank)}))] for rank in range(4)]
    plan = plan_load([chunk], needs, ["a", "b", "c", "d"], window_bytes=8 * MIB)
    check_whole(plan)
    assert sum(map(plan.read_bytes, range(4))) == chunk.payload_bytes
    assert {unit.ranks for units in plan.units for unit in units} == {(0, 1, 2, 3)}


def test_rows_of_several_machines_stay_apart_but_for_the_blocks_between_them() -> None:
    chunk = chunk_of("rows", [(3,), (4096, 2048)])
    needs = [
        [
            ("rows.0", make_slice(chunk.tensors[0], {})),
            ("rows.1", make_slice(chunk.tensors[1], {0: halves(4096, 2, rank)})),
        ]
        for rank in range(2)
    ]
    plan = plan_load([chunk], needs, ["a", "b"], window_bytes=8 * MIB)
    check_whole(plan)
    shared = [unit for units in plan.units for unit in units if len(unit.ranks) > 1]
    assert sum(unit.stop - unit.start for unit in shared) <= 2 * BLOCK_BYTES


def test_a_stage_reads_its_chunks_alone_and_what_nobody_needs_is_not_read() -> None:
    chunks = [chunk_of(f"c{at}", [(1024, 1024)]) for at in range(4)]
    needs = [[(f"c{at}.0", make_slice(chunks[at].tensors[0], {})) for at in mine] for mine in ((0, 1), (2,))]
    plan = plan_load(chunks, needs, ["here"] * 2, window_bytes=2 * MIB)
    check_whole(plan)
    assert [[unit.chunk.name for unit in units] for units in plan.units] == [["c0", "c1"], ["c2"]]
    assert plan_load(chunks, [[], []], ["here"] * 2, window_bytes=MIB).rounds == []


SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)


@given(shape=SHAPES, data=st.data())
def test_a_slice_is_what_indexing_gives_wherever_blocks_cut_it(shape: tuple[int, ...], data: st.DataObject) -> None:
    """Any indices of any dimensions; blocks may end anywhere, even within an element."""
    tensor = TensorInfo("t", "BF16", shape, 0)
    values = np.arange(math.prod(shape), dtype=np.uint16).reshape(shape)
    indices = [
        sorted(data.draw(st.sets(st.integers(0, size - 1)))) if data.draw(st.booleans()) else list(range(size))
        for size in shape
    ]
    held = make_slice(tensor, {dim: runs_of(some) for dim, some in enumerate(indices)})
    expected = values[np.ix_(*indices)].tobytes()
    assert held.nbytes == len(expected)
    raw = np.frombuffer(values.tobytes(), np.uint8)
    cuts = [0, *sorted(data.draw(st.sets(st.integers(1, raw.size - 1), max_size=4))), raw.size]
    found = b""
    for start, stop in pairwise(cuts):
        assert held.before(start) == len(found)
        if held.before(start) < held.before(stop):
            found += gather(raw[start:stop], held, start, stop).tobytes()
    assert found == expected


@given(
    ranks=st.integers(1, 5),
    shapes=st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 3000)), min_size=1, max_size=3),
    dims=st.lists(st.sampled_from([0, 1, None]), min_size=3, max_size=3),
    hosts=st.lists(st.sampled_from("ab"), min_size=5, max_size=5),
)
def test_every_byte_of_every_slice_comes_once(
    ranks: int, shapes: list[tuple[int, int]], dims: list[int | None], hosts: list[str]
) -> None:
    chunks = [chunk_of("one", shapes), chunk_of("two", shapes[:1])]
    needs: list[list[Need]] = []
    for rank in range(ranks):
        cuts = {
            tensor.name: {} if dim is None else {dim: halves(tensor.shape[dim], ranks, rank)}
            for chunk in chunks
            for tensor, dim in zip(chunk.tensors, dims, strict=False)
        }
        needs.append(
            [(tensor.name, make_slice(tensor, cuts[tensor.name])) for chunk in chunks for tensor in chunk.tensors]
        )
    plan = plan_load(chunks, needs, hosts[:ranks], window_bytes=choose_window(needs, 4 * MIB))
    check_whole(plan)
    if len(set(hosts[:ranks])) == 1:
        assert read_once(plan)
        most = max(abs(plan.shares[rank] - plan.read_bytes(rank)) for rank in range(ranks))
        assert most <= 2 * BLOCK_BYTES


@given(sizes=st.lists(st.integers(0, 20), min_size=1, max_size=7), data=st.data())
def test_stages_are_as_equal_as_they_can_be(sizes: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(sizes)))
    runs = cut_evenly(sizes, count)
    assert [at for low, high in runs for at in range(low, high)] == list(range(len(sizes)))
    assert len(runs) == count
    assert all(low < high for low, high in runs)
    ways = [[0, *cuts, len(sizes)] for cuts in combinations(range(1, len(sizes)), count - 1)]
    least = min(max(sum(sizes[low:high]) for low, high in pairwise(way)) for way in ways)
    assert max(sum(sizes[low:high]) for low, high in runs) == least
