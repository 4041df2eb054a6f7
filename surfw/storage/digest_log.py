"""Digests that were found out by reading, kept in `$SURFW_HOME/digests`: nobody has to find them out again.

One file per origin and its pins, with one line per chunk: JSON with its provisional id, behind the BLAKE3 of the JSON.
Lines are appended in one write each, so that several processes may do it at once. A line that was cut off or damaged,
or is none, is passed over, and what it said is found out again. A file grows to `_MOST_BYTES` and no further. Where it
cannot be written, digests are found out anew by the next process.
"""

import logging
import os
import threading
from collections.abc import Mapping

from surfw.config import MIB, surfw_home
from surfw.files import open_regular
from surfw.manifest import Digests, Manifest, decode_line, encode_line, read_digests

logger = logging.getLogger("surfw.storage")

_MOST_BYTES = 256 * MIB


class DigestLog:
    """The digests of the chunks of one origin. Usable from any thread."""

    def __init__(self, key: str) -> None:
        """Name the origin by its key; nothing is read yet."""
        self.known: dict[str, Digests] = {}
        self._path = surfw_home() / "digests" / f"{key}.jsonl"
        self._read_bytes = 0
        self._lock = threading.Lock()

    def refresh(self, sizes: Mapping[str, int]) -> Mapping[str, Digests]:
        """Read what was added since, by whichever process, of chunks of these stored bytes; all that is known then."""
        with self._lock:
            try:
                with os.fdopen(open_regular(self._path), "rb") as file:
                    file.seek(self._read_bytes)
                    added = file.read(_MOST_BYTES - self._read_bytes)
            except OSError:
                return self.known
            whole = added[: added.rfind(b"\n") + 1]  # somebody may be writing what follows
            for line in whole.splitlines():
                self._take(line, sizes)
            self._read_bytes += len(whole)
            return self.known

    def _take(self, line: bytes, sizes: Mapping[str, int]) -> None:
        try:
            entry = decode_line(line)
            chunk = entry["chunk"]
            self.known[chunk] = read_digests(entry, sizes[chunk])
        except (ValueError, KeyError, TypeError, RecursionError):
            return

    def add(self, chunk: str, digests: Digests) -> None:
        """Keep what was found out; what is kept of the chunk already is replaced."""
        if self.known.get(chunk) == digests:
            return
        with self._lock:
            self.known[chunk] = digests
            line = encode_line({"chunk": chunk} | digests.document())
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
                try:
                    if os.fstat(fd).st_size + len(line) < _MOST_BYTES:
                        os.write(fd, line)
                finally:
                    os.close(fd)
            except OSError as exc:
                logger.warning("%s cannot be written, and digests are found out again next time: %s", self._path, exc)


def chunk_sizes(manifest: Manifest) -> dict[str, int]:
    """The stored bytes of the chunks whose digests are not known, by their provisional ids."""
    return {chunk.id: form.stored_bytes for chunk in manifest.chunks for form in chunk.forms if not form.is_known}
