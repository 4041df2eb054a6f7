"""Digests of chunks that lack them, found out by reading all their bytes, through the server's cache.

A chunk is read once for all who ask meanwhile, and what was found out is kept for good (`storage.digest_log`).
Invariants: at most `_READS` chunks are read for this at a time, and of each one page is held while it is digested.
"""

import asyncio
import contextlib
import json
from dataclasses import dataclass, field, replace

from surfw.errors import RefusedError
from surfw.manifest import Chunk, Digester, Digests, Manifest, payload_digest
from surfw.server.catalog import Catalog
from surfw.server.fairness import Reader, SingleFlight
from surfw.server.pages import PageCache
from surfw.server.sending import Document
from surfw.storage import Store
from surfw.wire import GetDigests

_READS = 2


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A chunk of an origin, known by its provisional identity alone.

    Of its manifest and the chunk, only what reading it needs: many may wait for long.
    """

    origin: str
    identity: str
    manifest: Manifest = field(compare=False, repr=False)
    chunk: Chunk = field(compare=False, repr=False)


class LateDigests:
    """Finds digests out."""

    def __init__(self, store: Store, pages: PageCache, catalog: Catalog) -> None:
        """Name the store, the cache its objects are read through, and what knows its models."""
        self._store = store
        self._pages = pages
        self._catalog = catalog
        self._reads = SingleFlight(self._read, _READS)

    async def document(self, request: GetDigests, reader: Reader) -> Document:
        """The digests of a chunk, as they cross the wire; the reader's account pays if it has to be read for them.

        Raises:
            RefusedError: there is no such chunk, or the manifest has its digests.
            StorageError: its bytes cannot be read, or were changed.
        """
        wanted = await self._look_up(request, Reader(reader.account))
        digests = self._store.digests(wanted.manifest, wanted.chunk)
        if digests is None:
            digests = await self._reads.join(wanted, reader, wanted.chunk.forms[0].stored_bytes)
        return _document(digests)

    async def _look_up(self, request: GetDigests, reader: Reader) -> _Wanted:
        manifest, chunk = await self._catalog.find(request.model, request.chunk, reader)
        if chunk.forms[0].is_known or manifest.origin is None:
            raise RefusedError(f"chunk {chunk.name} has its digests in the manifest", code="unknown-chunk")
        return _Wanted(manifest.origin.key, chunk.id, replace(manifest, files=(), chunks=()), chunk)

    async def _read(self, wanted: _Wanted, reader: Reader) -> Digests:
        (form,) = wanted.chunk.forms
        digester = Digester()
        async with contextlib.aclosing(self._pages.read(form.locations, 0, form.stored_bytes, reader)) as pieces:
            async for piece in pieces:
                await asyncio.to_thread(digester.update, await piece.view(0, piece.size))
                self._reads.read_bytes += piece.size
        digests = digester.result()
        await asyncio.to_thread(self._store.learn, wanted.manifest, wanted.chunk, digests)
        return digests

    async def close(self) -> None:
        """Stop reading."""
        await self._reads.close()


def _document(digests: Digests) -> Document:
    """Digests as they cross the wire."""

    async def load() -> bytes:
        return json.dumps(digests.document()).encode()

    data = json.dumps(digests.document()).encode()
    return Document(len(data), payload_digest(data), load)
