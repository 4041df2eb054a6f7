"""Digests of chunks whose manifests lack them, computed by reading all bytes of a chunk through the server's cache.

A chunk is read once for all clients that wait for it, and its digests are kept for good (`storage.digests`).
Invariants: at most `_READS` chunks are read for this at a time, and one page of each is in use while it is digested.
"""

import contextlib
import json
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field, replace

from surfw.errors import RefusedError
from surfw.manifest import Chunk, Digests, Manifest, payload_digest
from surfw.server.catalog import Catalog
from surfw.server.fairness import Account
from surfw.server.pages import PageCache, Reader
from surfw.server.pieces import plan_pieces, use_ahead
from surfw.server.single_flight import SingleFlight
from surfw.storage import Store
from surfw.wire import GetDigests

_READS = 2


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A chunk of an origin, identified by its provisional id, and the account that pays for reading it.

    It keeps only what reading needs of the manifest and the chunk, since many may wait for long.
    """

    origin: str
    identity: str
    manifest: Manifest = field(compare=False, repr=False)
    chunk: Chunk = field(compare=False, repr=False)
    account: Account = field(compare=False, repr=False)


class DigestsDocument:
    """Digests as they cross the wire: a piece of a response that keeps no encoded bytes while it waits."""

    def __init__(self, digests: Digests) -> None:
        """Encode it once, for its size and digest."""
        data = _encode(digests)
        self.size = len(data)
        self.digest = payload_digest(data)
        self._digests = digests

    async def use(self) -> None:
        """Nothing to do."""

    async def view(self, start: int, stop: int) -> memoryview:
        """Bytes `start` to `stop` of it."""
        return memoryview(_encode(self._digests))[start:stop]


class LateDigests:
    """Computes digests.

    Attributes:
        digested_bytes: how many bytes were read for them so far.
    """

    def __init__(self, store: Store, pages: PageCache, catalog: Catalog) -> None:
        """Name the store, the cache its objects are read through, and the catalog of its models."""
        self.digested_bytes = 0
        self._store = store
        self._pages = pages
        self._catalog = catalog
        self._reads = SingleFlight(self._read, _READS)
        self._waiting: dict[Reader, _Wanted] = {}
        self._readers: dict[_Wanted, Reader] = {}

    async def document(self, request: GetDigests, reader: Reader) -> DigestsDocument:
        """Return the digests of a chunk; the reader's account pays if the chunk has to be read for them.

        Raises:
            RefusedError: there is no such chunk, or the manifest has its digests.
            StorageError: its bytes cannot be read, or were changed.
        """
        wanted = await self._look_up(request, reader.account)
        digests = self._store.learned.get(wanted.manifest, wanted.chunk)
        if digests is None:
            self._waiting[reader], reader.seen_bytes = wanted, self.digested_bytes
            try:
                digests = await self._reads.join(wanted, reader.account, wanted.chunk.forms[0].stored_bytes)
            finally:
                del self._waiting[reader]
        return DigestsDocument(digests)

    def progress(self, reader: Reader) -> int:
        """Return how far the storage has got for a reader that waits for digests, in bytes that only rise.

        They are those of its chunk or, while it is queued, those of the chunks before it.
        """
        wanted = self._waiting.get(reader)
        if wanted is None:
            return reader.read_bytes
        if (own := self._readers.get(wanted)) is not None:
            return reader.read_bytes + self._pages.progress(own)
        reader.read_bytes += self.digested_bytes - reader.seen_bytes
        reader.seen_bytes = self.digested_bytes
        return reader.read_bytes

    async def _look_up(self, request: GetDigests, account: Account) -> _Wanted:
        manifest, chunk = await self._catalog.find(request.model, request.chunk, account)
        if chunk.forms[0].is_known or manifest.origin is None:
            raise RefusedError(f"chunk {chunk.name} has its digests in the manifest", code="unknown-chunk")
        return _Wanted(manifest.origin.key, chunk.id, replace(manifest, files=(), chunks=()), chunk, account)

    async def _read(self, wanted: _Wanted) -> Digests:
        reader = self._readers[wanted] = Reader(wanted.account)
        try:
            return await self._store.learned.learn(wanted.manifest, wanted.chunk, self._views(wanted.chunk, reader))
        finally:
            del self._readers[wanted]

    async def _views(self, chunk: Chunk, reader: Reader) -> AsyncGenerator[memoryview]:
        """The chunk's bytes in order, a piece at a time, each of which has to be released before the next one."""
        (form,) = chunk.forms
        pieces = plan_pieces(self._pages, form.locations, 0, form.stored_bytes, reader)
        async with contextlib.aclosing(use_ahead(pieces, self._pages.read_ahead, self._pages.most_ahead)) as ready:
            async for piece in ready:
                yield await piece.view(0, piece.size)
                self.digested_bytes += piece.size

    async def close(self) -> None:
        """Stop reading."""
        await self._reads.close()


def _encode(digests: Digests) -> bytes:
    return json.dumps(digests.document()).encode()
