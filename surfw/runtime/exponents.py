"""Codes bfloat16 bit-exactly in about 0.70 of the bytes for copies to a device: exponents in three bits. Torch only.

Weights use few exponents: in a block, some 98 % have one of seven consecutive exponents. A chunk is treated as 16-bit
words, whatever its tensors are, and cut into *pieces* of about `PIECE_WORDS`, which are coded, copied and decoded one
after another. A piece is cut into blocks of `BLOCK_WORDS`, the last one padded, and is coded as

- signs and mantissas: a byte for each word;
- three planes of one bit per word: the exponent's distance from the block's base, 0 to 6, or 7 for any other exponent,
  an *escape*. Word i is in bit i % 8 of byte i // 8;
- the base of each block, one byte;
- the number of the piece's escapes before each block, as int32;
- the exponents of the escapes in order, one byte each.

The parts follow one another, each at a multiple of 64. A device decodes one block at a time: the number of escapes
before a word gives the place of its exponent. Any 16-bit word is restored exactly.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from surfw.config import aligned

BLOCK_WORDS = 1024
PIECE_WORDS = 16 << 20
"""Copies of 32 MiB reach the full rate of a bus, and the decoding after a chunk's last copy takes hardly any time."""

MOST_SHARE = 0.85
"""What does not shrink below this share of its size is not coded."""

_ESCAPE = 7
_WINDOWS = 256 - _ESCAPE + 1
_STEP_WORDS = 1 << 20
_STEP_BYTES = 48
"""Memory that coding takes per word of a step."""


@dataclass(frozen=True, slots=True)
class Piece:
    """The coded form of some words of a chunk.

    Attributes:
        start: the first word.
        words: the number of words.
        escapes: how many of them are escapes.
    """

    start: int
    words: int
    escapes: int

    @property
    def blocks(self) -> int:
        """The number of blocks; the last one is padded."""
        return -(-self.words // BLOCK_WORDS)

    @property
    def places(self) -> tuple[int, int, int, int, int, int]:
        """The offsets of the three planes, bases, counts, and exponents of escapes; signs and mantissas are at 0."""
        words = self.blocks * BLOCK_WORDS
        low, middle, high, bases = (words + plane * (words // 8) for plane in range(4))
        counts = aligned(bases + self.blocks)
        return low, middle, high, bases, counts, aligned(counts + 4 * self.blocks)

    @property
    def nbytes(self) -> int:
        """The size of the coded piece."""
        return self.places[-1] + self.escapes


class Decode(Protocol):
    """Decodes a piece on the device that holds its bytes, in the current stream."""

    def __call__(self, coded: torch.Tensor, piece: Piece, into: torch.Tensor) -> None:
        """Decode.

        Args:
            coded: uint8, of shape (`piece.nbytes`, or more).
            piece: describes it.
            into: int16, of shape (`piece.words`,).
        """


def cut(words: int) -> list[tuple[int, int]]:
    """Cut this many words into pieces of almost equal size: the start and the number of words of each."""
    count = max(1, -(-words // PIECE_WORDS))
    size = -(-words // (count * BLOCK_WORDS)) * BLOCK_WORDS
    return [(start, min(size, words - start)) for start in range(0, words, size)]


def room_bytes(words: int) -> int:
    """The most bytes that a coded piece of a chunk of this many words may take; a larger one is not coded."""
    largest = max((size for _, size in cut(words)), default=0)
    return max(Piece(0, largest, 0).nbytes, int(MOST_SHARE * 2 * largest))


def scratch_bytes(words: int) -> int:
    """Device memory that coding a chunk takes besides the chunk."""
    step = min(words, _STEP_WORDS)
    return room_bytes(words) + _STEP_BYTES * (-(-step // BLOCK_WORDS) * BLOCK_WORDS)


def encode(words: torch.Tensor, start: int, into: torch.Tensor) -> Piece | None:
    """Code a piece.

    Args:
        words: int16, of shape (words,), on any device.
        start: the place of the first word in the chunk.
        into: uint8, of shape (`room_bytes`, or more), on the same device.

    Returns:
        The piece; None if it does not fit there.
    """
    count = len(words)
    low, middle, high, bases, counts, escapes = Piece(start, count, 0).places
    bits = 1 << torch.arange(8, dtype=torch.uint8, device=words.device)
    before = 0
    for first in range(0, count, _STEP_WORDS):
        step = words[first : first + _STEP_WORDS].to(torch.int32)
        if missing := -len(step) % BLOCK_WORDS:
            step = torch.cat([step, step[-1:].expand(missing)])
        exponents = ((step >> 7) & 0xFF).view(-1, BLOCK_WORDS)
        base = _find_bases(exponents)
        codes = exponents - base[:, None]
        is_escape = (codes < 0) | (codes >= _ESCAPE)
        codes.masked_fill_(is_escape, _ESCAPE)
        escaped = exponents[is_escape].to(torch.uint8)
        if escapes + before + len(escaped) > len(into):
            return None
        stop = first + len(step)
        into[first:stop] = (((step >> 8) & 0x80) | (step & 0x7F)).to(torch.uint8)
        for bit, plane in enumerate((low, middle, high)):
            ones = ((codes.view(-1, 8) >> bit) & 1).to(torch.uint8)
            into[plane + first // 8 : plane + stop // 8] = (ones * bits).sum(1, dtype=torch.uint8)
        block, blocks = first // BLOCK_WORDS, len(base)
        into[bases + block : bases + block + blocks] = base.to(torch.uint8)
        found = is_escape.sum(1, dtype=torch.int32)
        place = counts + 4 * block
        into[place : place + 4 * blocks].view(torch.int32).copy_(before + found.cumsum(0, dtype=torch.int32) - found)
        into[escapes + before : escapes + before + len(escaped)] = escaped
        before += len(escaped)
    return Piece(start, count, before)


def decode(coded: torch.Tensor, piece: Piece, into: torch.Tensor) -> None:
    """Decode with torch, as the reference for kernels; see `Decode`."""
    low, middle, high, bases, counts, escapes = piece.places
    shifts = torch.arange(8, dtype=torch.uint8, device=coded.device)
    befores = coded[counts : counts + 4 * piece.blocks].view(torch.int32)
    for first in range(0, piece.words, _STEP_WORDS):
        stop = min(first + _STEP_WORDS, piece.blocks * BLOCK_WORDS)
        codes = torch.zeros(stop - first, dtype=torch.int32, device=coded.device)
        for bit, plane in enumerate((low, middle, high)):
            ones = (coded[plane + first // 8 : plane + stop // 8, None] >> shifts) & 1
            codes |= ones.view(-1).to(torch.int32) << bit
        is_escape = codes == _ESCAPE
        block, last = first // BLOCK_WORDS, stop // BLOCK_WORDS
        base = coded[bases + block : bases + last].to(torch.int32)
        exponents = (codes.view(-1, BLOCK_WORDS) + base[:, None]).view(-1)
        place = escapes + int(befores[block])
        exponents[is_escape] = coded[place : place + int(is_escape.sum())].to(torch.int32)
        halves = coded[first:stop].to(torch.int32)
        found = ((halves & 0x80) << 8) | (exponents << 7) | (halves & 0x7F)
        stop = min(stop, piece.words)
        into[first:stop] = found[: stop - first].to(torch.int16)


def _find_bases(exponents: torch.Tensor) -> torch.Tensor:
    """The base with the fewest escapes for each block: int32, of shape (blocks,)."""
    seen = torch.zeros(len(exponents), 256, dtype=torch.int32, device=exponents.device)
    seen.scatter_add_(1, exponents.long(), torch.ones_like(exponents))
    below = torch.nn.functional.pad(seen.cumsum(1, dtype=torch.int32), (1, 0))
    return (below[:, _ESCAPE:] - below[:, :_WINDOWS]).argmax(1).to(torch.int32)
