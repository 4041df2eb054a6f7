"""Rows equal those of the whole table, wherever blocks end; only their blocks are read, and verified."""

import asyncio
import threading
import weakref
from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import embedding

from surfw.config import BLOCK_BYTES, MIB
from surfw.errors import IntegrityError, ManifestError, ModelClosedError, ModelError
from surfw.manifest import Manifest
from surfw.runtime.buffers import Buffer
from surfw.runtime.rows import form_in_parts, plan_groups, plan_runs
from surfw.source import Read
from tests.runtime.nets import raw
from tests.runtime.parts import Parts, parts_of
from tests.toys import Gate, damage, toy_manifest

KIB = 1024


def table(rows: int, width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(rows)).to(dtype)


@settings(deadline=None, max_examples=40)
@given(
    before=st.sampled_from([0, 4, MIB - 8, MIB, 3 * MIB + 12]),
    width=st.sampled_from([1, 96 * KIB, 256 * KIB, 300 * KIB, 700 * KIB]),
    rows=st.integers(1, 9),
    ids=st.lists(st.integers(0, 8), max_size=12),
    scratch=st.sampled_from([1, 2, 16]),
    keep=st.sampled_from([0, 1, 8]),
    target=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_rows_are_those_of_the_whole_table(
    before: int, width: int, rows: int, ids: list[int], scratch: int, keep: int, target: torch.dtype
) -> None:
    wanted = torch.tensor([one % rows for one in ids], dtype=torch.int64)
    whole = table(rows, width)
    with parts_of(torch.zeros(before, dtype=torch.uint8), whole, torch.ones(5)) as parts:
        reader = parts.reader(dtypes={"t1": target}, scratch_bytes=scratch * MIB, keep_bytes=keep * MIB)
        for _ in range(2):
            seen = reader.lookup("t1", wanted)
            assert seen.dtype == target
            assert raw(seen) == raw(embedding(wanted, whole.to(target)))
        assert raw(reader.tensor("t2")) == raw(torch.ones(5))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(), (0,), (6,), (2, 3), (1, 2, 3)])
def test_ids_have_any_shape(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    ids = torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    with parts_of(table(50, 8)) as parts:
        assert torch.equal(parts.reader().lookup("t0", ids), embedding(ids, parts.tensors[0]))


@pytest.mark.parametrize("bad", [-1, 50, 1 << 40])
def test_ids_out_of_range_are_refused_as_torch_does_before_anything_is_read(bad: int) -> None:
    ids = torch.tensor([3, bad])
    with parts_of(table(50, 8)) as parts:
        with pytest.raises(IndexError, match="index out of range in self") as theirs:
            embedding(ids, parts.tensors[0])
        with pytest.raises(IndexError, match="index out of range in self") as ours:
            parts.reader().lookup("t0", ids)
        assert str(ours.value) == str(theirs.value)
        assert parts.reads == []


def test_neighbouring_blocks_are_one_read_and_all_reads_one_fetch() -> None:
    fetches = []
    with parts_of(table(12, 256 * KIB)) as parts:  # a row is a block
        fetch = parts.source.fetch

        async def counted(*arguments: object, **options: object) -> None:
            fetches.append(1)
            await fetch(*arguments, **options)  # type: ignore[arg-type]

        parts.source.fetch = counted  # type: ignore[method-assign]
        parts.reader().lookup("t0", torch.tensor([7, 2, 3, 4, 7, 11, 10]))
        assert parts.blocks_read() == [[2, 3, 4], [7], [10, 11]]
        assert len(fetches) == 1
        assert parts.metrics.count("fetched_bytes") == 6 * MIB
        assert parts.metrics.count("row_reads") == 1


def test_a_long_prompt_goes_through_the_table_piece_by_piece() -> None:
    with parts_of(table(9, 256 * KIB)) as parts:
        reader = parts.reader(scratch_bytes=4 * MIB, keep_bytes=0)
        assert torch.equal(reader.lookup("t0", torch.arange(9)), parts.tensors[0])
        assert parts.blocks_read() == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]
        assert reader.buffer_bytes == 4 * MIB


def test_a_group_is_under_way_while_the_one_before_is_waited_for_in_the_same_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, alive, most = Buffer.__init__, [0], [0]

    def counted(self: Buffer, size_bytes: int) -> None:
        made(self, size_bytes)
        alive[0] += self.capacity_bytes
        most[0] = max(most[0], alive[0])
        weakref.finalize(self, lambda size: alive.__setitem__(0, alive[0] - size), self.capacity_bytes)

    monkeypatch.setattr(Buffer, "__init__", counted)
    with parts_of(table(13, 256 * KIB)) as parts:  # a row is a block
        fetch, begun = parts.source.fetch, list[int]()
        second = asyncio.Event()

        async def met(manifest: Manifest, reads: Sequence[Read], *, priority: int = 0) -> None:
            begun.append(reads[0].start // BLOCK_BYTES)
            if len(begun) == 1:
                await asyncio.wait_for(second.wait(), 60)  # the first one ends after the second one has begun
            if len(begun) == 2:
                second.set()
            await fetch(manifest, reads, priority=priority)

        parts.source.fetch = met  # type: ignore[method-assign]
        reader = parts.reader(scratch_bytes=2 * MIB, keep_bytes=2 * MIB)
        assert torch.equal(reader.lookup("t0", torch.arange(13)), parts.tensors[0])
        assert begun == list(range(0, 13, 2))
        assert most == [reader.buffer_bytes] == [4 * MIB]
        assert alive == [2 * MIB]
        parts.reads.clear()
        assert torch.equal(reader.lookup("t0", torch.tensor([12])), parts.tensors[0][12:])
        assert parts.reads == []  # it was kept


def test_a_long_prompt_after_a_short_one_has_a_scratch_buffer_that_is_large_enough() -> None:
    with parts_of(table(13, 256 * KIB)) as parts:
        reader = parts.reader(scratch_bytes=4 * MIB, keep_bytes=4 * MIB)
        for ids in (torch.tensor([1]), torch.arange(13), torch.tensor([12])):
            assert torch.equal(reader.lookup("t0", ids), parts.tensors[0][ids])


def test_damage_in_many_groups_leaves_nothing_under_way() -> None:
    with parts_of(table(9, 256 * KIB)) as parts:
        whole, manifest = parts.chunk, toy_manifest([parts.chunk])
        reader = parts.reader(manifest, scratch_bytes=2 * MIB, keep_bytes=2 * MIB)
        manifest.home["t0"] = damage(whole)
        with pytest.raises(IntegrityError, match="chunk c from toys is damaged"):
            reader.lookup("t0", torch.arange(9))
        assert (reader._scratch, len(reader._kept)) == (None, 0)
        manifest.home["t0"] = whole
        assert torch.equal(reader.lookup("t0", torch.arange(9)), parts.tensors[0])


def test_a_row_across_two_blocks_needs_both_and_a_larger_one_all_of_its_own() -> None:
    with parts_of(torch.zeros(MIB - 4, dtype=torch.uint8), table(100, 2)) as parts:
        assert torch.equal(parts.reader().lookup("t1", torch.tensor([0])), parts.tensors[1][:1])
        assert parts.blocks_read() == [[0, 1]]
    with parts_of(table(3, 600 * KIB)) as parts:  # 2.34 blocks
        reader = parts.reader(scratch_bytes=MIB)
        assert torch.equal(reader.lookup("t0", torch.tensor([1])), parts.tensors[0][1:2])
        assert parts.blocks_read() == [[2, 3, 4]]


def test_blocks_used_last_stay() -> None:
    with parts_of(table(6, 256 * KIB)) as parts:
        reader = parts.reader(keep_bytes=2 * MIB)

        def look_up(*ids: int) -> list[list[int]]:
            assert torch.equal(reader.lookup("t0", torch.tensor(ids)), parts.tensors[0][list(ids)])
            return parts.blocks_read()

        assert look_up(0) == [[0]]
        assert look_up(1) == [[1]]
        assert look_up(0) == []
        assert look_up(2) == [[2]]
        assert look_up(0) == []
        assert look_up(1) == [[1]]
        assert look_up(3, 0, 5) == [[3], [5]]
        assert look_up(3, 5) == []
        reader.clear()
        assert look_up(3) == [[3]]


def test_damage_is_reported_and_nothing_damaged_stays() -> None:
    with parts_of(table(40, 256)) as parts:
        whole, manifest = parts.chunk, toy_manifest([parts.chunk])
        reader = parts.reader(manifest)
        manifest.home["t0"] = damage(whole)
        with pytest.raises(IntegrityError, match="chunk c from toys is damaged: block 0 has BLAKE3"):
            reader.lookup("t0", torch.tensor([1]))
        manifest.home["t0"] = whole
        assert torch.equal(reader.lookup("t0", torch.tensor([1])), parts.tensors[0][1:2])
        assert len(parts.blocks_read()) == 2


def interrupted(parts: Parts, gate: Gate) -> None:
    gate.wait_for("c")
    parts.run.interrupt(ModelError("no longer wanted"))


def test_an_interrupted_run_ends_and_memory_still_written_to_is_not_used_again() -> None:
    gate = Gate(stubborn=True)
    with parts_of(table(40, 256)) as parts:
        parts.source.gate = gate
        reader = parts.reader()
        thread = threading.Thread(target=interrupted, args=(parts, gate))
        thread.start()
        with pytest.raises(ModelError, match="no longer wanted"):
            reader.lookup("t0", torch.tensor([1]))
        thread.join()
        assert reader._scratch is None
        gate.open("c")


ranges = st.lists(st.tuples(st.integers(0, 5 * MIB), st.integers(1, 3 * MIB)), max_size=8).map(
    lambda pairs: sorted((start, start + length) for start, length in pairs)
)


@given(ranges, st.integers(1, 4))
def test_groups_hold_every_range_once_in_few_blocks(wanted: list[tuple[int, int]], most: int) -> None:
    groups = list(plan_groups(wanted, most))
    assert [one for group, _ in groups for one in group] == wanted
    for group, blocks in groups:
        touched = {block for start, stop in group for block in range(start // BLOCK_BYTES, -(-stop // BLOCK_BYTES))}
        assert blocks == sorted(touched)
        assert len(blocks) <= most or len(group) == 1


@given(st.sets(st.integers(0, 30)).map(sorted))
def test_runs_are_neighbours_and_nothing_else(blocks: list[int]) -> None:
    runs = list(plan_runs(blocks))
    assert [block for first, last in runs for block in range(first, last + 1)] == blocks
    assert all(second[0] > first[1] + 1 for first, second in pairwise(runs))


WIDTH = 4
SIZE = 3 * MIB + 100
TABLE = (torch.arange(SIZE) * 7919 >> 5).to(torch.uint8).reshape(-1, WIDTH)


def after_fetches(parts: Parts, ended: Callable[[BaseException | None], None]) -> None:
    """Report how each fetch of the source ended, just before it ends."""
    fetch = parts.source.fetch

    async def watched(manifest: Manifest, reads: Sequence[Read], *, priority: int = 0) -> None:
        try:
            await fetch(manifest, reads, priority=priority)
        except BaseException as exc:
            ended(exc)
            raise
        ended(None)

    parts.source.fetch = watched  # type: ignore[method-assign]


def test_runs_arrive_in_one_fetch_and_are_counted() -> None:
    with parts_of(TABLE) as parts:
        fetches: list[BaseException | None] = []
        after_fetches(parts, fetches.append)
        ids = torch.tensor([3 * MIB + 96, 4, 2 * MIB]) // WIDTH
        assert torch.equal(parts.reader().lookup("t0", ids), embedding(ids, TABLE))
        assert parts.blocks_read() == [[0], [2, 3]]
        assert fetches == [None]
        assert parts.metrics.count("fetched_bytes") == 2 * MIB + 100
        assert parts.metrics.latency("fetch").count == 1


def test_a_run_that_is_not_whole_blocks_is_refused() -> None:
    with parts_of(TABLE) as parts, pytest.raises(ValueError, match="range 0-5 of chunk c is not made of whole blocks"):
        Read(parts.chunk, form_in_parts(parts.chunk), 0, 5, memoryview(bytearray(5)))


def test_damage_is_reported_to_who_waits_and_not_counted() -> None:
    with parts_of(TABLE) as parts:
        with pytest.raises(IntegrityError, match="chunk c from toys is damaged: block 0 has BLAKE3"):
            parts.reader(toy_manifest([damage(parts.chunk)])).lookup("t0", torch.tensor([0]))
        assert parts.metrics.count("fetched_bytes") == 0


def test_waiting_is_a_stall_and_ends_when_the_run_is_interrupted() -> None:
    gate, ends = Gate(), threading.Semaphore(0)
    with parts_of(TABLE) as parts:
        parts.source.gate = gate
        ended: list[BaseException | None] = []
        after_fetches(parts, lambda exc: (ended.append(exc), ends.release())[1])

        def interrupt() -> None:
            gate.wait_for("c")
            parts.run.interrupt(ModelError("no longer wanted"))

        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(ModelError, match="no longer wanted"):
            parts.reader().lookup("t0", torch.tensor([0]))
        thread.join()
        assert ends.acquire(timeout=60)
        assert [type(exc) for exc in ended] == [asyncio.CancelledError]
        assert "stall" in parts.metrics.snapshot()["seconds"]
        assert parts.metrics.count("fetched_bytes") == 0


def test_an_interrupted_run_does_not_even_take_what_is_there() -> None:
    with parts_of(TABLE) as parts:
        after_fetches(parts, lambda _: parts.run.interrupt(ModelError("no longer wanted")))
        with pytest.raises(ModelError, match="no longer wanted"):
            parts.reader().lookup("t0", torch.tensor([0]))
        assert parts.blocks_read() == [[0]]


def test_a_source_that_is_closed_is_a_clear_error() -> None:
    gate = Gate()
    with parts_of(TABLE) as parts:
        parts.source.gate = gate

        def close() -> None:
            gate.wait_for("c")
            parts.io.close()

        thread = threading.Thread(target=close)
        thread.start()
        with pytest.raises(ModelClosedError, match="the source of toy was closed while it was read"):
            parts.reader().lookup("t0", torch.tensor([0]))
        thread.join()
        with pytest.raises(ModelClosedError, match="the client has been closed; open it again"):
            parts.reader().lookup("t0", torch.tensor([0]))


def test_a_chunk_that_is_stored_otherwise_has_no_parts() -> None:
    error = "chunk c is stored as lossless, expected the form 'none' too: its parts cannot be read alone"
    with parts_of(TABLE, codec="lossless") as parts:
        with pytest.raises(ManifestError, match=error):
            form_in_parts(parts.chunk)
        with pytest.raises(ManifestError, match=error):
            parts.reader().lookup("t0", torch.tensor([0]))
