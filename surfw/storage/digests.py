"""Digests of chunks whose manifests lack them: computed once by reading the whole chunk, and stored.

Models that are served in place may be published before they have been read. `LearnedDigests` holds the digests of their
chunks that are known so far, and computes the others on request.

Digests are stored in `$SURFW_HOME/digests`, one file per origin and its pins, with one line per chunk: the BLAKE3 of a
JSON object, then the JSON, which has the chunk's provisional id. Each line is appended in one write, so that several
processes can append at once. A truncated or damaged line is skipped, and its digests are computed again. A file grows
to at most `_MOST_BYTES`. If it cannot be written, the next process computes the digests again.
"""

import asyncio
import logging
import os
import threading
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing, suppress

from surfw.config import MIB, surfw_home
from surfw.files import open_regular
from surfw.manifest import Chunk, Digester, Digests, Manifest, decode_line, encode_line, read_digests
from surfw.threads import in_thread

logger = logging.getLogger("surfw.storage")

_MOST_BYTES = 256 * MIB


class LearnedDigests:
    """The computed digests of all models of a store."""

    def __init__(self) -> None:
        self._logs: dict[tuple[str, str], _DigestLog] = {}
        self._reading: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    def complete(self, manifest: Manifest) -> Manifest:
        """Return the manifest with all digests known so far; reads a file, so call it in a thread."""
        if manifest.origin is None or manifest.is_known:
            return manifest
        sizes = {chunk.id: form.stored_bytes for chunk in manifest.chunks for form in chunk.forms if not form.is_known}
        return manifest.with_digests(self._log(manifest).refresh(sizes))

    def get(self, manifest: Manifest, chunk: Chunk) -> Digests | None:
        """Return the digests of a chunk whose manifest lacks them, if `complete` or `learn` found them."""
        return self._log(manifest).known.get(chunk.id)

    async def find(self, manifest: Manifest, chunk: Chunk, pieces: Callable[[], AsyncGenerator[memoryview]]) -> Digests:
        """Like `get`, but read a chunk with unknown digests (see `learn`), once for all waiting callers."""
        async with self._reading[chunk.id]:
            return self.get(manifest, chunk) or await self.learn(manifest, chunk, pieces())

    async def learn(self, manifest: Manifest, chunk: Chunk, pieces: AsyncGenerator[memoryview]) -> Digests:
        """Read all stored bytes of a chunk, compute their digests and store them.

        Args:
            manifest: the model.
            chunk: one of its chunks.
            pieces: its stored bytes in order; each piece is released before the next one is requested.
        """
        digester = Digester()
        async with aclosing(pieces):
            async for piece in pieces:
                await in_thread(digester.update, piece)
                del piece  # it may be a cache page, which must be released before the next one is read
        digests = digester.result()
        await in_thread(self._log(manifest).add, chunk.id, digests)
        return digests

    def _log(self, manifest: Manifest) -> "_DigestLog":
        assert manifest.origin is not None, "only what was not copied lacks digests"
        key = manifest.origin.key, manifest.name
        return self._logs.get(key) or self._logs.setdefault(key, _DigestLog(manifest.origin.key))


class _DigestLog:
    """The digests of the chunks of one origin, and their file. Usable from any thread."""

    def __init__(self, key: str) -> None:
        """Set the key of the origin; nothing is read yet."""
        self.known: dict[str, Digests] = {}
        self._path = surfw_home() / "digests" / f"{key}.jsonl"
        self._read_bytes = 0
        self._has_failed = False
        self._lock = threading.Lock()

    def refresh(self, sizes: Mapping[str, int]) -> Mapping[str, Digests]:
        """Read what other processes have added, and return all known digests; `sizes` are stored bytes by chunk id."""
        with self._lock:
            try:
                with os.fdopen(open_regular(self._path), "rb") as file:
                    file.seek(self._read_bytes)
                    added = file.read(_MOST_BYTES - self._read_bytes)
            except OSError:
                return self.known
            whole = added[: added.rfind(b"\n") + 1]  # another process may be writing the rest
            for line in whole.splitlines():
                with suppress(ValueError, KeyError, TypeError, RecursionError):
                    entry = decode_line(line)
                    chunk = entry["chunk"]
                    self.known[chunk] = read_digests(entry, sizes[chunk])
            self._read_bytes += len(whole)
            return self.known

    def add(self, chunk: str, digests: Digests) -> None:
        """Store the digests of a chunk, replacing earlier ones."""
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
                if not self._has_failed:  # warn once
                    why = exc.strerror
                    logger.warning("%s cannot be written, so digests are computed again next time: %s", self._path, why)
                self._has_failed = True
