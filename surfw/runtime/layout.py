"""Where the tensors of a chunk lie in memory: every one at a multiple of 64 bytes. Pure.

Stored payloads have no gaps. Their tensors are ordered so that the aligned ones come first and stay where they are; the
few others are moved apart after the payload has been verified, from the last to the first, within the same buffer.
Alignment is not only speed: some kernels give other bits for weights at odd addresses.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from surfw.manifest import Chunk

ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Layout:
    """Offsets in memory of a chunk's tensors, by name, and the bytes that all of them take."""

    offsets: Mapping[str, int]
    memory_bytes: int
    moves: tuple[tuple[int, int, int], ...]
    """(from, to, length), to be carried out in this order; each moves bytes to a higher place."""


def plan_layout(chunk: Chunk) -> Layout:
    """The layout of a chunk."""
    offsets, moves, end = {}, [], 0
    for tensor in chunk.tensors:
        at = -(-max(end, tensor.offset) // ALIGNMENT) * ALIGNMENT
        offsets[tensor.name] = at
        if at != tensor.offset and tensor.nbytes:
            moves.append((tensor.offset, at, tensor.nbytes))
        end = at + tensor.nbytes
    return Layout(offsets, end, tuple(reversed(moves)))
