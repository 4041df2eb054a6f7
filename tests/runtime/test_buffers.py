"""Memory for chunks: aligned to pages, large enough, used again."""

import ctypes
import mmap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surfw.runtime.buffers import Buffer, BufferPool

HUGE = 2 << 20


@pytest.mark.parametrize(
    ("size", "capacity"),
    [
        (0, mmap.PAGESIZE),
        (1, mmap.PAGESIZE),
        (mmap.PAGESIZE + 1, 2 * mmap.PAGESIZE),
        (HUGE, HUGE),
        (HUGE + 1, HUGE + mmap.PAGESIZE),
    ],
)
def test_a_buffer_has_whole_pages_of_writable_zeros(size: int, capacity: int) -> None:
    buffer = Buffer(size)
    assert buffer.capacity_bytes == buffer.view.nbytes == capacity
    assert ctypes.addressof(ctypes.c_char.from_buffer(buffer.view)) % mmap.PAGESIZE == 0
    buffer.view[-1] = 7
    assert buffer.view[-1] == 7
    assert buffer.view[0] == 0


def test_the_smallest_free_buffer_that_fits_is_taken() -> None:
    pool = BufferPool()
    large, small = Buffer(3 * mmap.PAGESIZE), Buffer(1)
    pool.give_back(large)
    pool.give_back(small)
    assert pool.take(10) is small
    assert pool.take(10) is large
    assert pool.take(10) not in (small, large)


def test_a_buffer_that_is_too_small_makes_way_for_the_new_one() -> None:
    pool = BufferPool()
    small = Buffer(1)
    pool.give_back(small)
    assert pool.take(mmap.PAGESIZE + 1).capacity_bytes == 2 * mmap.PAGESIZE
    assert pool.take(1) is not small


def test_cleared_buffers_are_gone() -> None:
    pool = BufferPool()
    buffer = Buffer(1)
    pool.give_back(buffer)
    pool.clear()
    assert pool.take(1) is not buffer


@given(st.lists(st.integers(1, 5) | st.none(), max_size=30))
def test_there_are_never_more_buffers_than_were_out_at_once(steps: list[int | None]) -> None:
    pool = BufferPool()
    out: list[Buffer] = []
    seen: dict[int, Buffer] = {}
    most = 0
    for pages in steps:
        if pages is None:
            if out:
                pool.give_back(out.pop())
        else:
            out.append(pool.take(pages * mmap.PAGESIZE))
            assert out[-1].capacity_bytes >= pages * mmap.PAGESIZE
            seen[id(out[-1])] = out[-1]
        most = max(most, len(out))
        assert len({id(buffer) for buffer in out}) == len(out)
        assert len(out) + len(pool._free) <= most
