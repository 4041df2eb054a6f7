"""BLAKE3 of stored bytes: of the whole, and of each block of 1 MiB, so that any run of blocks can be verified alone."""

import json
import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

from blake3 import blake3

from surfw.config import BLOCK_BYTES
from surfw.errors import ManifestError

_DIGEST = re.compile(r"[0-9a-f]{64}")


def payload_digest(data: bytes | memoryview) -> str:
    """BLAKE3 of the bytes, in hex."""
    return blake3(data).hexdigest()


class Digests(NamedTuple):
    """Of some stored bytes: the BLAKE3 of all of them in hex, and those of their blocks, raw and joined."""

    digest: str
    blocks: bytes

    def document(self) -> dict[str, str]:
        """As JSON has it; see `read_digests`."""
        return {"digest": self.digest, "blocks": self.blocks.hex()}


def is_digest(value: object) -> bool:
    """Whether it is a BLAKE3 in hex."""
    return isinstance(value, str) and bool(_DIGEST.fullmatch(value))


def read_digests(document: Any, stored_bytes: int) -> Digests:
    """The digests of so many stored bytes, from decoded JSON.

    Raises:
        ValueError: it is none, or not of so many bytes.
    """
    if not isinstance(document, dict) or not is_digest(document.get("digest")):
        raise ValueError("there is no BLAKE3")
    blocks = bytes.fromhex(document["blocks"]) if isinstance(document.get("blocks"), str) else b""
    if len(blocks) != 32 * count_blocks(stored_bytes):
        raise ValueError(f"there are not {count_blocks(stored_bytes)} digests of blocks")
    return Digests(document["digest"], blocks)


def parse_digests(data: bytes, stored_bytes: int, *, where: str) -> Digests:
    """As `read_digests`, from JSON that somebody else wrote. `where` names it in errors.

    Raises:
        ManifestError: it is not what it should be.
    """
    try:
        return read_digests(json.loads(data), stored_bytes)
    except (ValueError, RecursionError) as exc:
        raise ManifestError(f"{where} cannot be read: {str(exc)[:200]}; try again, or read from another place") from exc


def encode_line(document: Any) -> bytes:
    """One line of a log of JSON documents: the BLAKE3 of the text, and the text. It begins with an end of line.

    So it is whole even where whoever wrote before was stopped within a line.
    """
    text = json.dumps(document).encode()
    return f"\n{payload_digest(text)} ".encode() + text + b"\n"


def decode_line(line: bytes) -> Any:
    """The document of one line.

    Raises:
        ValueError: it was cut off or damaged, or there is none.
    """
    digest, _, text = line.partition(b" ")
    if digest != payload_digest(text).encode():
        raise ValueError("the line is not what was written")
    return json.loads(text)


def count_blocks(stored_bytes: int) -> int:
    """How many blocks so many bytes have."""
    return -(-stored_bytes // BLOCK_BYTES)


class Digester:
    """Digests bytes that come in parts of any length, in order."""

    def __init__(self) -> None:
        """Nothing was taken in yet."""
        self._whole, self._block = blake3(), blake3()
        self._blocks = bytearray()
        self._room = BLOCK_BYTES

    def update(self, part: memoryview | bytes) -> None:
        """Take the next bytes in."""
        self._whole.update(part)
        view = memoryview(part)
        while view:
            taken = view[: self._room]
            self._block.update(taken)
            self._room -= len(taken)
            view = view[len(taken) :]
            if not self._room:
                self._end_block()

    def _end_block(self) -> None:
        self._blocks += self._block.digest()
        self._block, self._room = blake3(), BLOCK_BYTES

    def result(self) -> Digests:
        """Those of all that was taken in; nothing more is."""
        if self._room < BLOCK_BYTES:
            self._end_block()
        return Digests(self._whole.hexdigest(), bytes(self._blocks))


def digest_blocks(parts: Iterator[bytes | memoryview]) -> Digests:
    """The digest of joined parts and the digests of their 1 MiB blocks; every part but the last is whole blocks."""
    whole, blocks = blake3(), bytearray()
    for part in parts:
        whole.update(part)
        blocks += block_digests(part)
    return Digests(whole.hexdigest(), bytes(blocks))


def block_digests(part: bytes | memoryview) -> bytes:
    """The joined digests of a run of blocks."""
    view = memoryview(part)
    edges = [*range(0, len(view), BLOCK_BYTES), len(view)]
    return b"".join(blake3(view[start:stop]).digest() for start, stop in pairwise(edges))
