"""BLAKE3 of stored bytes: of the whole, and of each 1 MiB block, so that any range of blocks can be verified."""

import json
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from blake3 import blake3

from surfw.config import BLOCK_BYTES
from surfw.errors import ManifestError

_DIGEST = re.compile(r"[0-9a-f]{64}")


def payload_digest(data: bytes | memoryview) -> str:
    """Return the BLAKE3 of the bytes, in hex."""
    return blake3(data).hexdigest()


class Digests(NamedTuple):
    """The BLAKE3 of stored bytes, in hex, and the raw BLAKE3s of their blocks, joined."""

    digest: str
    blocks: bytes

    def document(self) -> dict[str, str]:
        """Return the digests as a JSON object, for `read_digests`."""
        return {"digest": self.digest, "blocks": self.blocks.hex()}


def is_digest(value: object) -> bool:
    """Whether a value is a BLAKE3 in hex."""
    return isinstance(value, str) and bool(_DIGEST.fullmatch(value))


def read_digests(document: Any, stored_bytes: int) -> Digests:
    """Read digests for `stored_bytes` bytes from decoded JSON.

    Raises:
        ValueError: the document has no digests, or digests for another number of bytes.
    """
    if not isinstance(document, dict) or not is_digest(document.get("digest")):
        raise ValueError("there is no BLAKE3")
    blocks = bytes.fromhex(document["blocks"]) if isinstance(document.get("blocks"), str) else b""
    if len(blocks) != 32 * count_blocks(stored_bytes):
        raise ValueError(f"there are not {count_blocks(stored_bytes)} digests of blocks")
    return Digests(document["digest"], blocks)


def parse_digests(data: bytes, stored_bytes: int, *, where: str) -> Digests:
    """Parse the digests for `stored_bytes` bytes from untrusted JSON; `where` names its source in errors.

    Raises:
        ManifestError: the JSON is not valid.
    """
    try:
        return read_digests(json.loads(data), stored_bytes)
    except (ValueError, RecursionError) as exc:
        raise ManifestError(f"{where} cannot be read: {str(exc)[:200]}; try again, or read from another place") from exc


def encode_line(document: Any) -> bytes:
    """Encode one line of a log of JSON documents: the BLAKE3 of the text, and the text.

    It begins with a newline, so that it stays intact after a line that was only partly written.
    """
    text = json.dumps(document).encode()
    return f"\n{payload_digest(text)} ".encode() + text + b"\n"


def decode_line(line: bytes) -> Any:
    """Decode the document of one line.

    Raises:
        ValueError: the line is empty, damaged or truncated.
    """
    digest, _, text = line.partition(b" ")
    if digest != payload_digest(text).encode():
        raise ValueError("the line is not what was written")
    return json.loads(text)


def count_blocks(stored_bytes: int) -> int:
    """Return the number of blocks of `stored_bytes` bytes."""
    return -(-stored_bytes // BLOCK_BYTES)


class Digester:
    """Digests bytes incrementally, in parts of any length."""

    def __init__(self) -> None:
        self._whole, self._block = blake3(), blake3()
        self._blocks = bytearray()
        self._left_bytes = BLOCK_BYTES  # of the current block

    def update(self, part: memoryview | bytes) -> None:
        """Digest the next bytes."""
        self._whole.update(part)
        view = memoryview(part)
        while view:
            taken = view[: self._left_bytes]
            self._block.update(taken)
            self._left_bytes -= len(taken)
            view = view[len(taken) :]
            if not self._left_bytes:
                self._end_block()

    def _end_block(self) -> None:
        self._blocks += self._block.digest()
        self._block, self._left_bytes = blake3(), BLOCK_BYTES

    def result(self) -> Digests:
        """Return the digests of all bytes; call it once, at the end."""
        if self._left_bytes < BLOCK_BYTES:
            self._end_block()
        return Digests(self._whole.hexdigest(), bytes(self._blocks))


def digest_blocks(parts: Iterable[bytes | memoryview]) -> Digests:
    """Return the digests of the joined parts."""
    digester = Digester()
    for part in parts:
        digester.update(part)
    return digester.result()
