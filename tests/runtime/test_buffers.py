"""Memory for chunks: aligned and large enough, every tensor at a multiple of 64, every byte in its place."""

import ctypes
import mmap
from itertools import accumulate, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surfw.config import ALIGNMENT
from surfw.runtime.buffers import Buffer, plan_layout, spread

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


sizes = st.lists(st.integers(0, 300) | st.sampled_from([0, 1, 63, 64, 65, 128]), max_size=12)


@given(sizes)
def test_places_are_aligned_in_order_and_apart(sizes: list[int]) -> None:
    places, end = plan_layout(sizes)
    assert len(places) == len(sizes)
    assert all(place % ALIGNMENT == 0 for place in places)
    ends = [place + size for place, size in zip(places, sizes, strict=True)]
    assert all(before <= place for before, place in zip(ends, places[1:], strict=False))
    assert end == (ends[-1] if ends else 0)
    assert end <= sum(sizes) + (ALIGNMENT - 1) * len(sizes)


@given(sizes)
def test_spreading_preserves_every_byte(sizes: list[int]) -> None:
    stored = bytes(index % 251 for index in range(sum(sizes)))
    places, end = plan_layout(sizes)
    memory = bytearray(max(end, len(stored)))
    memory[: len(stored)] = stored
    spread(memoryview(memory), sizes)
    starts = accumulate(sizes, initial=0)
    for place, size, (start, stop) in zip(places, sizes, pairwise(starts), strict=True):
        assert memory[place : place + size] == stored[start:stop]


@pytest.mark.parametrize(
    ("sizes", "places", "end"),
    [([], [], 0), ([64, 128, 3], [0, 64, 192], 195), ([3, 64], [0, 64], 128), ([1, 0, 1], [0, 64, 64], 65)],
)
def test_places_of_examples(sizes: list[int], places: list[int], end: int) -> None:
    assert plan_layout(sizes) == (places, end)


def test_aligned_tensors_stay_where_they_are() -> None:
    memory = bytearray(range(200))
    spread(memoryview(memory), [64, 128, 8])
    assert memory == bytearray(range(200))
