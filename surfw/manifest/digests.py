"""BLAKE3 of stored bytes: of the whole, and of each block of 1 MiB, so that any run of blocks can be verified alone."""

from collections.abc import Iterator
from itertools import pairwise

from blake3 import blake3

from surfw.config import BLOCK_BYTES


def payload_digest(data: bytes | memoryview) -> str:
    """BLAKE3 of the bytes, in hex."""
    return blake3(data).hexdigest()


def digest_blocks(parts: Iterator[bytes | memoryview]) -> tuple[str, bytes]:
    """The digest of joined parts and the digests of their 1 MiB blocks; every part but the last is whole blocks."""
    whole, blocks = blake3(), bytearray()
    for part in parts:
        whole.update(part)
        blocks += block_digests(part)
    return whole.hexdigest(), bytes(blocks)


def block_digests(part: bytes | memoryview) -> bytes:
    """The joined digests of a run of blocks."""
    view = memoryview(part)
    edges = [*range(0, len(view), BLOCK_BYTES), len(view)]
    return b"".join(blake3(view[start:stop]).digest() for start, stop in pairwise(edges))
