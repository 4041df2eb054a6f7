"""Codes the exponents of chunks in host memory, so that fewer bytes are copied and more chunks fit.

A chunk arrives uncoded, whatever form its source has, and is copied to the device uncoded. There it is coded and
decoded again; the coded form is used only if the same bits result. The coded pieces are copied back once to page-locked
host memory; no other data ever goes from the device to the host. From then on the pieces are copied through two staging
buffers on the device, and each is decoded into its place while the next one is copied.

Coding is used only where it pays: a chunk that hardly gets smaller stays uncoded, and so do all chunks if decoding the
first one takes the device longer than it saves in copying.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from surfw.errors import SurfwError
from surfw.manifest import Chunk
from surfw.runtime.buffers import Buffer, buffer_capacity
from surfw.runtime.coding_plan import USUAL_SHARE
from surfw.runtime.device import DEVICE_ALIGNMENT, Copy, Device
from surfw.runtime.exponents import MOST_SHARE, Piece, cut, encode, room_bytes, scratch_bytes
from surfw.runtime.loader import flat_view, held_bytes, packed_form
from surfw.skeleton.dtypes import torch_dtype

logger = logging.getLogger("surfw.runtime")

_LEAST_BYTES = 64 << 10
_LEAST_SHARE = 0.875
"""A chunk is coded only if at least this share of it is bfloat16."""

_STAGES = 2


@dataclass(frozen=True, slots=True, eq=False)
class Coded:
    """A chunk in host memory with coded exponents: its pieces, each with its buffer."""

    pieces: tuple[tuple[Piece, Buffer], ...]

    @property
    def nbytes(self) -> int:
        """How many bytes are copied."""
        return sum(piece.nbytes for piece, _ in self.pieces)

    @property
    def capacity_bytes(self) -> int:
        """The host memory that it takes."""
        return sum(buffer.capacity_bytes for _, buffer in self.pieces)


def usual_bytes(chunk: Chunk, dtypes: Mapping[str, torch.dtype]) -> int | None:
    """The expected coded size of a chunk; None if it is not to be coded."""
    size = held_bytes(chunk, dtypes)
    if packed_form(chunk) or size < _LEAST_BYTES:
        return None
    bfloat16 = sum(
        tensor.nbytes
        for tensor in chunk.tensors
        if torch_dtype(tensor.dtype) is torch.bfloat16 and tensor.name not in dtypes
    )
    return buffer_capacity(int(USUAL_SHARE * size)) if bfloat16 >= _LEAST_SHARE * chunk.payload_bytes else None


def most_bytes(size_bytes: int) -> int:
    """The most host memory that a chunk of this size takes in coded form."""
    pieces = len(cut(size_bytes // 2))
    return buffer_capacity(int(MOST_SHARE * size_bytes)) + pieces * buffer_capacity(1)


def coding_bytes(size_bytes: int) -> int:
    """Device memory, besides slots, for coding and decoding chunks up to this size."""
    words = size_bytes // 2
    stage, largest = _up(room_bytes(words)), max(size for _, size in cut(words))
    return _STAGES * stage + _up(scratch_bytes(words)) + _up(2 * largest)


class Coder:
    """Codes chunks on a device, and copies coded ones there.

    The caller has to ensure that one thread at a time copies, and one at a time codes.

    Attributes:
        pays: whether decoding takes less time than it saves; None before it was measured.
    """

    def __init__(self, device: Device) -> None:
        """Allocate no memory yet."""
        self.pays: bool | None = None
        self._device = device
        self._stages: list[tuple[torch.Tensor, Copy | None]] = []

    def copy(self, coded: Coded, into: torch.Tensor) -> tuple[list[Copy], Copy]:
        """Issue the copies of a coded chunk, and its decoding.

        Args:
            coded: from `encode`.
            into: memory of the device: uint8, of the chunk's size.

        Returns:
            The copies, and the last decoding, which is the one to wait for.
        """
        device = self._device
        with torch.inference_mode(mode=False):  # or other threads could not write to it
            words = into.view(torch.int16)
        room = _up(room_bytes(len(words)))
        if not self._stages or len(self._stages[0][0]) < room:
            self._stages.clear()  # only later copies reuse the memory of the old ones
            self._stages = [(device.allocate(room), None) for _ in range(_STAGES)]
        copies, decoded = [], None
        for piece, buffer in coded.pieces:
            stage, before = self._stages.pop(0)
            if before is not None:
                device.wait_for_decoding(before)
            copies.append(device.copy(stage[: piece.nbytes], flat_view(buffer)[: piece.nbytes]))
            decoded = device.decode(stage, piece, words[piece.start : piece.start + piece.words])
            self._stages.append((stage, decoded))
        assert decoded is not None, "a coded chunk has pieces"
        device.wait_for_decoding(decoded)  # before the next copy to this memory, or to that of the stages
        return copies, decoded

    def encode(self, memory: torch.Tensor, copied: Copy, is_gone: Callable[[], bool]) -> Coded | None:
        """Code a chunk that was copied.

        Args:
            memory: of the chunk on the device: uint8, of its size.
            copied: its copy, which is done.
            is_gone: whether its slot was evicted, in which case the coded bytes are worthless.

        Returns:
            The coded chunk; None if coding failed or does not pay.
        """
        device, words = self._device, memory.view(torch.int16)
        cuts = cut(len(words))
        pieces: list[tuple[Piece, Buffer]] = []
        try:
            out, again = device.allocate(_up(room_bytes(len(words)))), device.allocate(_up(2 * cuts[0][1]))
            for start, count in cuts:
                with device.between_copies():
                    part, back = words[start : start + count], again.view(torch.int16)[:count]
                    piece = None if is_gone() else encode(part, start, out)
                    if piece is None:
                        return None
                    self._decode(out, piece, back)
                    _expect_equal(back, part)
                if self.pays is None:
                    seconds = device.time(lambda: self._decode(out, piece, back))  # noqa: B023 - called here
                    saved = copied.seconds() * (2 * count - piece.nbytes) / memory.numel()
                    self.pays = seconds < saved
                if not self.pays:
                    return None
                pieces.append((piece, self._write_back(out, piece, again)))
        except Exception as exc:  # noqa: BLE001 - no memory, or no compiler for Triton: the uncoded chunk is usable
            if not is_gone():
                self.pays = False
                said = str(exc)[:300]  # not the error itself, which keeps memory alive
                logger.warning(
                    "weights are copied to %s as they are, since they cannot be coded there: %s", device.name, said
                )
            return None
        return Coded(tuple(pieces))

    def gave_up(self) -> bool:
        """Whether coding was found not to pay."""
        return self.pays is False

    def drop(self) -> None:
        """Free the memory."""
        self._stages.clear()

    def _write_back(self, out: torch.Tensor, piece: Piece, again: torch.Tensor) -> Buffer:
        """Copy a piece to host memory, and back to the device to check that it is the same."""
        buffer = Buffer(piece.nbytes)
        self._device.page_lock(buffer)
        there, here, back = (memory[: piece.nbytes] for memory in (out, flat_view(buffer), again))
        with self._device.between_copies():
            here.copy_(there)
            back.copy_(here)
            _expect_equal(back, there)
        return buffer

    def _decode(self, coded: torch.Tensor, piece: Piece, into: torch.Tensor) -> None:
        assert self._device.decoder is not None, f"{self._device.name} decodes nothing"
        self._device.decoder(coded, piece, into)


def _expect_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    if not torch.equal(found, expected):
        raise SurfwError("what was coded comes back as other bits")


def _up(size_bytes: int) -> int:
    return -(-size_bytes // DEVICE_ALIGNMENT) * DEVICE_ALIGNMENT
