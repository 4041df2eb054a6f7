"""Digests of chunks whose manifests lack them: computed by reading all bytes of a chunk once, and kept.

Models that are served in place may be published before they have been read. `LearnedDigests` is what a store knows of
their chunks by now. To verify such a chunk, ask it, and have it read the chunk if it does not know the digests yet.

They are kept in `$SURFW_HOME/digests`, one file per origin and its pins, with one line per chunk: JSON with its
provisional id, behind the BLAKE3 of the JSON. Lines are appended in one write each, so that several processes may do it
at once. A line that is cut off or damaged is skipped, and its digests are computed again. A file grows to `_MOST_BYTES`
and no further. Where it cannot be written, the next process computes the digests again.
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
    """Computed digests of the chunks of all models of a store."""

    def __init__(self) -> None:
        """Nothing is read yet."""
        self._logs: dict[tuple[str, str], _DigestLog] = {}
        self._reading: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    def complete(self, manifest: Manifest) -> Manifest:
        """Return the manifest with all digests that are known by now; reads a file, so call it in a thread."""
        if manifest.origin is None or manifest.is_known:
            return manifest
        sizes = {chunk.id: form.stored_bytes for chunk in manifest.chunks for form in chunk.forms if not form.is_known}
        return manifest.with_digests(self._log(manifest).refresh(sizes))

    def get(self, manifest: Manifest, chunk: Chunk) -> Digests | None:
        """Return the digests of a chunk whose manifest lacks them, if `complete` or `learn` found them."""
        return self._log(manifest).known.get(chunk.id)

    async def find(self, manifest: Manifest, chunk: Chunk, pieces: Callable[[], AsyncGenerator[memoryview]]) -> Digests:
        """As `get`; a chunk with unknown digests is read now (see `learn`), once for all callers that wait for it."""
        async with self._reading[chunk.id]:
            return self.get(manifest, chunk) or await self.learn(manifest, chunk, pieces())

    async def learn(self, manifest: Manifest, chunk: Chunk, pieces: AsyncGenerator[memoryview]) -> Digests:
        """Read all stored bytes of a chunk, and keep their digests.

        Args:
            manifest: the model.
            chunk: one of its chunks.
            pieces: its stored bytes in order; each piece is released before the next one is requested.
        """
        digester = Digester()
        async with aclosing(pieces):
            async for piece in pieces:
                await in_thread(digester.update, piece)
                del piece  # it may be a page of a cache: none may be kept while the next one is read
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
        """Name the origin by its key. Nothing is read yet."""
        self.known: dict[str, Digests] = {}
        self._path = surfw_home() / "digests" / f"{key}.jsonl"
        self._read_bytes = 0
        self._has_failed = False
        self._lock = threading.Lock()

    def refresh(self, sizes: Mapping[str, int]) -> Mapping[str, Digests]:
        """Read what any process has added since, and return all that is known; `sizes` are the chunks' stored bytes."""
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
        """Keep the digests of a chunk, instead of any that were kept before."""
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
                if not self._has_failed:  # once is enough
                    why = exc.strerror
                    logger.warning("%s cannot be written, so digests are computed again next time: %s", self._path, why)
                self._has_failed = True
