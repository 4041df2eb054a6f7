"""A store as a source that counts requests."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from surfw.config import BLOCK_BYTES
from surfw.manifest import Chunk, Form, Manifest, count_blocks
from surfw.source import ChunkSource, Read
from surfw.storage import FilesystemBackend
from surfw.storage.store_source import StorageSource


class CountedSource(StorageSource):
    """A source that maps nothing, as if it were remote.

    Attributes:
        asked: how often each block of each chunk was requested.
        files: the files that were requested.
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
    """A read of a chunk's whole form, by default the first one."""
    form = form or chunk.forms[0]
    return Read(chunk, form, 0, form.stored_bytes, memoryview(bytearray(form.stored_bytes)))


async def read_all(source: ChunkSource, manifest: Manifest) -> dict[str, bytes]:
    """The stored bytes of every chunk, fetched concurrently."""
    reads = [whole(chunk) for chunk in manifest.chunks]
    await source.fetch(manifest, reads)
    return {read.chunk.name: bytes(read.destination) for read in reads}
