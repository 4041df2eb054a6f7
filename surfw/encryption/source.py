"""A source of encrypted models, as one of plain weights: blocks are decrypted where they lie, once they are verified.

The source behind says which blocks are right as it finds out (`Read.on_verified`), in the threads that verify; they are
decrypted there and then, while others arrive. What it does not tell of is decrypted in the end, in a thread. Nothing is
mapped: plaintext is in private memory only, that of the reader, which counts it.
"""

import logging
import threading
from collections.abc import Sequence
from dataclasses import replace

from surfw.config import BLOCK_BYTES
from surfw.encryption.keys import EncryptionKey, WrongSealError
from surfw.errors import ConfigurationError, IntegrityError
from surfw.manifest import Chunk, Digests, Form, Manifest
from surfw.source import ChunkSource, Read, View, Waiting
from surfw.threads import in_thread

logger = logging.getLogger("surfw.encryption")


class DecryptingSource(ChunkSource):
    """A source, and the key of its encrypted models; models that are not encrypted are read as they are."""

    def __init__(self, source: ChunkSource, key: EncryptionKey) -> None:
        """Read from a source, which is closed with this."""
        self._source = source
        self._key = key
        self._told: set[str] = set()  # models that the key is not needed for

    @property
    def url(self) -> str:  # type: ignore[override]
        """The place that the bytes come from."""
        return self._source.url

    async def models(self) -> list[str]:
        """The names of all models."""
        return await self._source.models()

    async def resolve(self, name: str | None) -> str:
        """The full name of a model."""
        return await self._source.resolve(name)

    async def manifest(self, model: str) -> Manifest:
        """The manifest of a model."""
        return await self._source.manifest(model)

    async def digests(self, manifest: Manifest, chunk: Chunk) -> Digests | None:
        """The digests of a chunk that its manifest lacks."""
        return await self._source.digests(manifest, chunk)

    async def keep(self, manifest: Manifest, chunk: Chunk, form: Form, *, priority: int = 0) -> bool:
        """Have the form near by, encrypted, if the source can."""
        return await self._source.keep(manifest, chunk, form, priority=priority)

    def near(self, manifest: Manifest, chunk: Chunk) -> tuple[Form, ...]:
        """The forms of a chunk that are near by."""
        return self._source.near(manifest, chunk)

    @property
    def waiting(self) -> Waiting | None:
        """What keeps the source waiting."""
        return self._source.waiting

    async def file(self, manifest: Manifest, path: str) -> bytes:
        """A tokenizer file; those are not encrypted."""
        return await self._source.file(manifest, path)

    def expect_readable(self, manifest: Manifest) -> None:
        """Check that this is the key of a model; say so where a model is not encrypted at all.

        Raises:
            ConfigurationError: it is encrypted with another.
        """
        if not manifest.key_id:
            if manifest.name not in self._told:
                self._told.add(manifest.name)
                logger.warning("%s is not encrypted: the %s is not used for it", manifest.name, self._key.where)
        elif manifest.key_id != self._key.id:
            raise ConfigurationError(
                f"{manifest.name} is encrypted with key {manifest.key_id}, and the {self._key.where} holds key "
                f"{self._key.id}; name the file with the right one (encryption_key_file, --encryption-key-file)"
            )

    def identify(self, manifest: Manifest, payload: memoryview) -> str:
        """The id of a chunk with this payload; keyed, where the model is encrypted."""
        found = self._source.identify(manifest, payload)
        return self._key.hide(found) if manifest.key_id else found

    async def fetch(self, manifest: Manifest, reads: Sequence[Read], *, priority: int = 0) -> None:
        """Fill every read's destination with decrypted bytes.

        Raises:
            ConfigurationError: the model is encrypted with another key.
            IntegrityError: bytes do not match the manifest, or do not decrypt.
        """
        if not manifest.key_id:
            await self._source.fetch(manifest, reads, priority=priority)
            return
        self.expect_readable(manifest)
        works = [_Opening(self._key, read) for read in reads]
        await self._source.fetch(manifest, [work.read for work in works], priority=priority)
        if any(not work.is_done for work in works):
            await in_thread(_finish, works)
        for work in works:
            work.expect_right(self.url)

    async def announce(self, manifest: Manifest, cycle: Sequence[Chunk], kept: Sequence[Chunk]) -> None:
        """Tell the source."""
        await self._source.announce(manifest, cycle, kept)

    async def view(self, manifest: Manifest, chunk: Chunk, form: Form) -> View | None:
        """The form's bytes where they are stored; None where they are encrypted."""
        return None if form.seals else await self._source.view(manifest, chunk, form)

    @property
    def buffered_bytes(self) -> int:
        """The most memory that fetching takes besides the destinations."""
        return self._source.buffered_bytes

    @property
    def refetched_blocks(self) -> int:
        """Blocks that arrived damaged and were fetched again."""
        return self._source.refetched_blocks

    @property
    def fetched_bytes(self) -> int:
        """Stored bytes delivered so far."""
        return self._source.fetched_bytes

    async def close(self) -> None:
        """Close the source."""
        await self._source.close()


def _finish(works: Sequence["_Opening"]) -> None:
    for work in works:
        work.finish()


class _Opening:
    """The blocks of one read, on their way from ciphertext to plaintext. Several threads may tell of them at once.

    Attributes:
        read: what to ask the source for.
    """

    def __init__(self, key: EncryptionKey, read: Read) -> None:
        self._key = key
        self._read = read
        self._first = read.start // BLOCK_BYTES
        self._lock = threading.Lock()
        self._opened: set[int] = set()
        self._wrong: int | None = None
        self.read = replace(read, on_verified=self._open)

    @property
    def is_done(self) -> bool:
        """Whether all blocks are decrypted."""
        return len(self._opened) == -(-len(self._read.destination) // BLOCK_BYTES)

    def finish(self) -> None:
        """Decrypt what the source did not tell of."""
        for index, start in enumerate(range(0, len(self._read.destination), BLOCK_BYTES), self._first):
            if index not in self._opened:
                self._open(index, self._read.destination[start : start + BLOCK_BYTES])

    def expect_right(self, where: str) -> None:
        """Check, in the end, that all blocks could be decrypted.

        Raises:
            IntegrityError: one could not.
        """
        if self._wrong is not None:
            raise IntegrityError(
                f"block {self._wrong} of chunk {self._read.chunk.name} from {where} is what its digest promises, and "
                "does not decrypt with the key of the model: whoever wrote it had another one; chunk the model again"
            )
        assert self.is_done, "every block is decrypted, or an error was raised"

    def _open(self, index: int, block: memoryview) -> None:
        """Decrypt a block that was verified: it is ciphertext, even if it was decrypted before and came again."""
        try:
            self._key.open(block, self._read.form.seal(index))
        except WrongSealError:
            self._wrong = index
        with self._lock:
            self._opened.add(index)
