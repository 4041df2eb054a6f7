"""A chunk source that decrypts encrypted models: blocks are decrypted in place once they are verified.

The wrapped source reports each verified block (`Read.on_verified`) in the thread that verified it; the block is
decrypted in that thread, while others arrive. Blocks that are not reported are decrypted at the end, in a thread.
Nothing is mapped: plaintext exists only in the reader's private memory, which the reader counts.
"""

import logging
import threading
from collections.abc import Sequence
from dataclasses import replace

from surfw.config import BLOCK_BYTES
from surfw.encryption.keys import EncryptionKey, WrongSealError
from surfw.errors import ConfigurationError, IntegrityError
from surfw.manifest import Chunk, Form, Manifest
from surfw.source import ChunkSource, Read, SourceInFront, View
from surfw.threads import in_thread

logger = logging.getLogger("surfw.encryption")


class DecryptingSource(SourceInFront):
    """Wraps a source and decrypts its encrypted models with a key; other models are passed through."""

    def __init__(self, source: ChunkSource, key: EncryptionKey) -> None:
        """Wrap `source`, which is closed together with this one."""
        super().__init__(source)
        self._key = key
        self._told: set[str] = set()  # unencrypted models that were warned about

    @property
    def url(self) -> str:  # type: ignore[override]
        """The URL of the wrapped source."""
        return self._source.url

    def expect_readable(self, manifest: Manifest) -> None:
        """Check that this is the key of a model; warn once if the model is not encrypted.

        Raises:
            ConfigurationError: the model is encrypted with another key.
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

    def identify(self, manifest: Manifest, digest: str) -> str:
        """Return the id of a chunk whose payload has this BLAKE3; keyed if the model is encrypted."""
        found = self._source.identify(manifest, digest)
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

    async def view(self, manifest: Manifest, chunk: Chunk, form: Form) -> View | None:
        """Return a view of the form's stored bytes; None if they are encrypted."""
        return None if form.seals else await self._source.view(manifest, chunk, form)


def _finish(works: Sequence["_Opening"]) -> None:
    for work in works:
        work.finish()


class _Opening:
    """Decrypts the blocks of one read. Several threads may report blocks at once.

    Attributes:
        read: the read to pass to the wrapped source.
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
        """Decrypt the blocks that the source did not report."""
        for index, start in enumerate(range(0, len(self._read.destination), BLOCK_BYTES), self._first):
            if index not in self._opened:
                self._open(index, self._read.destination[start : start + BLOCK_BYTES])

    def expect_right(self, where: str) -> None:
        """Check that all blocks have been decrypted.

        Raises:
            IntegrityError: a block could not be decrypted.
        """
        if self._wrong is not None:
            raise IntegrityError(
                f"block {self._wrong} of chunk {self._read.chunk.name} from {where} is what its digest promises, and "
                "does not decrypt with the key of the model: whoever wrote it had another one; chunk the model again"
            )
        assert self.is_done, "every block is decrypted, or an error was raised"

    def _open(self, index: int, block: memoryview) -> None:
        """Decrypt a verified block. It is always ciphertext: if it is reported again, it was fetched again."""
        try:
            self._key.open(block, self._read.form.seal(index))
        except WrongSealError:
            self._wrong = index
        with self._lock:
            self._opened.add(index)
