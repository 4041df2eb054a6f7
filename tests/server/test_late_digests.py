"""Digests that are computed by reading: the progress is reported to every client that waits for them."""

import asyncio
from pathlib import Path
from typing import Any

from surfw.manifest import Chunk, Form, Location, Manifest, Origin
from surfw.metrics import Metrics
from surfw.server.fairness import Reader
from surfw.server.late_digests import LateDigests
from surfw.server.pages import MIN_CACHE_BYTES, PageCache
from surfw.storage.digests import LearnedDigests
from surfw.wire import GetDigests
from tests.peers import until
from tests.server.backends import GatedBackend

SIZE = 100


def unread(index: int) -> Chunk:
    place = Location("blobs/x", index * SIZE, (index + 1) * SIZE)
    return Chunk(f"layers.{index}", "layer", str(index), SIZE, (), (Form("none", SIZE, "", b"", (place,)),))


class Unread:
    """A catalog and a store of one model that has not been read yet."""

    def __init__(self) -> None:
        self.learned = LearnedDigests()

    manifest = Manifest("a", "Toy", "uint8", {}, None, (), {}, tuple(map(unread, range(3))), (), Origin("/x", {}))

    async def find(self, model: str, identity: str, account: object) -> tuple[Manifest, Chunk]:
        del model, account
        return self.manifest, self.manifest.by_id[identity]


def test_progress_is_what_is_read_of_a_chunk_or_of_those_before_it_in_line(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs/x").write_bytes(bytes(3 * SIZE))

    async def main() -> None:
        backend = GatedBackend(tmp_path)
        pages = PageCache(backend, MIN_CACHE_BYTES, Metrics())
        unread: Any = Unread()
        late = LateDigests(unread, pages, unread)
        readers = [Reader() for _ in range(3)]
        waiting = [
            asyncio.create_task(late.document(GetDigests(index, "a", str(index)), reader))
            for index, reader in enumerate(readers)
        ]
        await until(lambda: len(list(pages.reads.running())) == 2)
        late._reads.read_bytes += 5  # as if other chunks were read
        assert [reader.progress_bytes for reader in readers] == [0, 0, 5]
        next(own for page, own in pages.reads.running() if page.start == 0).read_bytes += 7
        assert [reader.progress_bytes for reader in readers] == [7, 0, 5]
        backend.gate.set()
        assert len(await asyncio.gather(*waiting)) == 3
        assert late._reads.read_bytes == 5 + 3 * SIZE
        await late.close()
        await pages.close()

    asyncio.run(main())
