"""The decoder of `surfw.runtime.exponents` as a Triton kernel for CUDA devices."""

from typing import Any

import torch
import triton
import triton.language as tl

from surfw.runtime.exponents import BLOCK_WORDS, Piece


@triton.jit  # type: ignore[untyped-decorator]
def _decode_block(  # type: ignore[no-untyped-def]  # noqa: PLR0917 - a kernel has places for its arguments
    coded,
    low,
    middle,
    high,
    bases,
    counts,
    escapes,
    into,
    words,
    BLOCK: tl.constexpr,  # noqa: N803 - Triton's way
):
    block = tl.program_id(0)
    word = block * BLOCK + tl.arange(0, BLOCK)
    byte = word >> 3
    shift = word & 7
    code = (tl.load(low + byte).to(tl.int32) >> shift) & 1
    code |= ((tl.load(middle + byte).to(tl.int32) >> shift) & 1) << 1
    code |= ((tl.load(high + byte).to(tl.int32) >> shift) & 1) << 2
    is_escape = code == 7
    rank = tl.cumsum(is_escape.to(tl.int32), 0) - 1
    other = tl.load(escapes + tl.load(counts + block) + rank, mask=is_escape, other=0).to(tl.int32)
    exponent = tl.where(is_escape, other, code + tl.load(bases + block).to(tl.int32))
    half = tl.load(coded + word).to(tl.int32)
    found = ((half & 0x80) << 8) | (exponent << 7) | (half & 0x7F)
    tl.store(into + word, found.to(tl.int16), mask=word < words)


def decode(coded: torch.Tensor, piece: Piece, into: torch.Tensor) -> None:
    """As `exponents.decode`, on the current stream."""
    low, middle, high, bases, counts, escapes = piece.places
    kernel: Any = _decode_block[(piece.blocks,)]
    kernel(
        coded, coded[low:], coded[middle:], coded[high:], coded[bases:],
        coded[counts : counts + 4 * piece.blocks].view(torch.int32), coded[escapes:], into, piece.words,
        BLOCK=BLOCK_WORDS, enable_fp_fusion=False,  # the kernel uses no floats; some Triton releases warn without this
    )  # fmt: skip
