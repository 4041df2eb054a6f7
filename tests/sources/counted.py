"""A store as a source that counts what is asked of it."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from surfw.config import BLOCK_BYTES
from surfw.manifest import Chunk, Form, Manifest, count_blocks
from surfw.source import ChunkSource, Read
from surfw.storage import FilesystemBackend
from surfw.storage.store_source import StorageSource


class CountedSource(StorageSource):
    """As if it were far away: it maps nothing.

    Attributes:
        asked: how often each block of each chunk was asked for.
        files: the files that were asked for.
    """

    def __init__(self, store: Path) -> None:
        super().__init__(FilesystemBackend(store))
        self.asked: Counter[tuple[str, int]] = Counter()
        self.files: list[str] = []

    async def fetch(self, manifest: Manifest, reads: Sequence[Read], *, priority: int = 0) -> None:
        for read in reads:
            blocks = range(read.start // BLOCK_BYTES, count_blocks(read.stop))
            self.asked.update((read.chunk.name, block) for block in blocks)
        await super().fetch(manifest, reads, priority=priority)

    async def file(self, manifest: Manifest, path: str) -> bytes:
        self.files.append(path)
        return await super().file(manifest, path)

    async def view(self, manifest: Manifest, chunk: Chunk, form: Form) -> None:
        return None


def whole(chunk: Chunk, form: Form | None = None) -> Read:
    """A read of all of a chunk's form, the first one if none is named."""
    form = form or chunk.forms[0]
    return Read(chunk, form, 0, form.stored_bytes, memoryview(bytearray(form.stored_bytes)))


async def read_all(source: ChunkSource, manifest: Manifest) -> dict[str, bytes]:
    """The stored bytes of every chunk, fetched at once."""
    reads = [whole(chunk) for chunk in manifest.chunks]
    await source.fetch(manifest, reads)
    return {read.chunk.name: bytes(read.destination) for read in reads}
