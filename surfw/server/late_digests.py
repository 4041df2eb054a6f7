"""Digests of chunks whose manifests lack them, computed by reading all of a chunk's bytes through the server's cache.

Concurrent requests for a chunk share one read, and the result is kept for good (`storage.digests`).
Invariants: at most `_READS` chunks are read for this at a time, holding one page each while it is digested.
"""

import contextlib
import json
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field, replace

from surfw.errors import RefusedError
from surfw.manifest import Chunk, Digests, Manifest, payload_digest
from surfw.server.catalog import Catalog
from surfw.server.fairness import Reader, SingleFlight
from surfw.server.pages import PageCache
from surfw.server.sending import Document
from surfw.storage import Store
from surfw.wire import GetDigests

_READS = 2


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A chunk of an origin, identified by its provisional id.

    It keeps only what reading needs of the manifest and the chunk, since many may be queued for long.
    """

    origin: str
    identity: str
    manifest: Manifest = field(compare=False, repr=False)
    chunk: Chunk = field(compare=False, repr=False)


class LateDigests:
    """Computes digests on demand."""

    def __init__(self, store: Store, pages: PageCache, catalog: Catalog) -> None:
        """Use this store, the cache that its objects are read through, and the catalog of its models."""
        self._store = store
        self._pages = pages
        self._catalog = catalog
        self._reads = SingleFlight(self._read, _READS)

    async def document(self, request: GetDigests, reader: Reader) -> Document:
        """Return the digests of a chunk, to be sent; the reader pays if the chunk has to be read for them.

        Raises:
            RefusedError: there is no such chunk, or the manifest has its digests.
        """
        manifest, chunk = await self._catalog.find(request.model, request.chunk, Reader(reader.account))
        if chunk.forms[0].is_known or manifest.origin is None:
            raise RefusedError(f"chunk {chunk.name} has its digests in the manifest", code="unknown-chunk")
        wanted = _Wanted(manifest.origin.key, chunk.id, replace(manifest, files=(), chunks=()), chunk)
        digests = self._store.learned.get(wanted.manifest, chunk)
        if digests is None:
            digests = await self._reads.join(wanted, reader, chunk.forms[0].stored_bytes)

        async def load() -> bytes:
            return json.dumps(digests.document()).encode()

        data = await load()
        return Document(len(data), payload_digest(data), load)

    async def _read(self, wanted: _Wanted, reader: Reader) -> Digests:
        return await self._store.learned.learn(wanted.manifest, wanted.chunk, self._views(wanted.chunk, reader))

    async def _views(self, chunk: Chunk, reader: Reader) -> AsyncGenerator[memoryview, None]:
        """Yield the chunk's bytes in order, in pieces; each has to be released before the next one."""
        (form,) = chunk.forms
        async with contextlib.aclosing(self._pages.read(form.locations, 0, form.stored_bytes, reader)) as pieces:
            async for piece in pieces:
                yield await piece.view(0, piece.size)
                self._reads.read_bytes += piece.size

    async def close(self) -> None:
        """Stop reading."""
        await self._reads.close()
