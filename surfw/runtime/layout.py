"""Where the tensors of a chunk lie in memory: every one at a multiple of 64 bytes. Pure.

Stored payloads have no gaps. Their tensors are ordered so that the aligned ones come first and stay where they are; the
few others are moved apart after the payload has been verified, from the last to the first, within the same buffer.
Alignment is not only speed: some kernels give other bits for weights at odd addresses.
"""

from collections.abc import Sequence

ALIGNMENT = 64


def plan_layout(sizes_bytes: Sequence[int]) -> tuple[list[int], int]:
    """Where tensors of these sizes lie, each at a multiple of 64, and the bytes that all of them take."""
    offsets, end = [], 0
    for size in sizes_bytes:
        offsets.append(-(-end // ALIGNMENT) * ALIGNMENT)
        end = offsets[-1] + size
    return offsets, end


def spread(payload: memoryview, sizes_bytes: Sequence[int]) -> None:
    """Move the tensors of a payload without gaps to their places, within the same memory.

    Places lie at or behind where a tensor is stored, so going from the last to the first overwrites nothing.
    """
    stored = sum(sizes_bytes)
    for size, place in zip(reversed(sizes_bytes), reversed(plan_layout(sizes_bytes)[0]), strict=True):
        stored -= size
        if place != stored and size:
            payload[place : place + size] = payload[stored : stored + size]
