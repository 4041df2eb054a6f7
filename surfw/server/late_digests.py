"""Digests of chunks that lack them, found out by reading all their bytes, through the server's cache.

A chunk is read once for all who ask meanwhile, and what was found out is kept for good (`storage.digest_log`).
Invariants: at most `_READS` chunks are read for this at a time, and of each a few pages are held.
"""

import asyncio
import contextlib
import json
from dataclasses import dataclass, field

from surfw.errors import RefusedError
from surfw.manifest import Chunk, Digester, Digests, Manifest
from surfw.server.pages import PageCache
from surfw.server.pieces import plan_pieces, use_ahead
from surfw.server.single_flight import SingleFlight
from surfw.storage import Store

_READS = 2


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A chunk of an origin, known by its provisional identity alone."""

    origin: str
    identity: str
    manifest: Manifest = field(compare=False, repr=False)
    chunk: Chunk = field(compare=False, repr=False)


class LateDigests:
    """Finds digests out.

    Attributes:
        digested_bytes: what was read for them so far.
    """

    def __init__(self, store: Store, pages: PageCache) -> None:
        """Name the store, and the cache its objects are read through."""
        self.digested_bytes = 0
        self._store = store
        self._pages = pages
        self._reads = SingleFlight(self._read, _READS)

    async def document(self, manifest: Manifest, chunk: Chunk) -> bytes:
        """The digests of a chunk, as they cross the wire.

        Raises:
            RefusedError: the manifest has them.
            StorageError: its bytes cannot be read, or were changed.
        """
        form = chunk.forms[0]
        if form.is_known or manifest.origin is None:
            raise RefusedError(f"chunk {chunk.name} has its digests in the manifest", code="unknown-chunk")
        digests = self._store.digests(manifest, chunk)
        if digests is None:
            digests = await self._reads.join(_Wanted(manifest.origin.key, chunk.id, manifest, chunk))
        return json.dumps(digests.document()).encode()

    async def _read(self, wanted: _Wanted) -> Digests:
        (form,) = wanted.chunk.forms
        digester = Digester()
        pieces = plan_pieces(self._pages, form.locations, 0, form.stored_bytes)
        async with contextlib.aclosing(use_ahead(pieces, self._pages.read_ahead, self._pages.most_ahead)) as ready:
            async for piece in ready:
                await asyncio.to_thread(digester.update, await piece.view())
                self.digested_bytes += piece.size
        digests = digester.result()
        await asyncio.to_thread(self._store.learn, wanted.manifest, wanted.chunk, digests)
        return digests

    async def close(self) -> None:
        """Stop reading."""
        await self._reads.close()
