"""Memory for chunks: aligned to pages, and large enough."""

import ctypes
import mmap

import pytest

from surfw.runtime.buffers import Buffer

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
