"""The models of a store as a server knows them. The names in requests are looked up here.

Names, chunk ids and file names from clients are only compared with the store's listing and its manifests. Nothing that
is not listed there becomes a storage key.

Concurrent requests for a manifest share one read; it is parsed in a thread. The result is kept until the stored bytes
change. The store is listed again for an unknown name, and when the listing is older than `FRESH_SECONDS`.
"""

import asyncio
import gc
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from surfw.config import MIB, count
from surfw.errors import ManifestError, RefusedError, StorageError, SurfwError, UnknownModelError
from surfw.manifest import Chunk, Form, Location, Manifest, payload_digest
from surfw.server.cache import LruCache
from surfw.server.fairness import Reader, SingleFlight
from surfw.server.journal import Journal, Sparse
from surfw.server.sending import Document
from surfw.storage import Store
from surfw.wire import Get, GetFile

FRESH_SECONDS = 2.0
"""The maximum age of the listing when a chunk or a file is looked up; a removed model disappears within this time."""

_CACHE_BYTES = 64 * MIB
"""The most memory for cached models."""
_LEAST_KEPT = 4
"""The fewest models that are cached, however large: models in use at the same time must not evict each other."""
_MOST_NOTED = 3
"""The most models that an event names."""
_READS = 2
"""The most manifests read at a time: parsing one takes many times its size in memory."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A model as it is in the store.

    Attributes:
        manifest: the stored manifest with locations, without what is not looked up here, such as tensors.
        chunks: its chunks by id: by the one in the stored manifest, and by the one with learned digests.
        public: the manifest that clients receive, encoded.
        digest: the BLAKE3 of `public`.
        revision: the storage's revision of the stored manifest, if the storage has revisions.
        stored: the BLAKE3 of the stored manifest.
        kept_bytes: the memory used by all of this.
    """

    manifest: Manifest
    chunks: Mapping[str, Chunk]
    public: bytes
    digest: str
    revision: str | None
    stored: str
    kept_bytes: int


class Catalog:
    """Looks up what requests name.

    Names that the store does not have raise `RefusedError`, with a code and a text for the client. All lookups raise
    `StorageError` or `ManifestError` if the manifest cannot be read. `reader` waits and pays for reads; None stands for
    the server itself.
    """

    def __init__(self, store: Store, journal: Journal | None = None, *, fresh_seconds: float = FRESH_SECONDS) -> None:
        """Use this store; nothing is read yet. The journal notes which models are added and removed."""
        self.names: Sequence[str] = ()
        """The models in the last listing."""
        self._store = store
        self._journal = journal or Journal()
        self._outages = Sparse(self._journal, "storage", logging.WARNING)
        self._was_listed = False
        self._fresh_seconds = fresh_seconds
        self._listed = float("-inf")
        self._entries: LruCache[str, Entry] = LruCache(
            _CACHE_BYTES, lambda entry: min(entry.kept_bytes, _CACHE_BYTES // _LEAST_KEPT)
        )
        self._reads = SingleFlight(self._read, _READS)
        self._listings = SingleFlight(self._list, 1)

    def known(self) -> list[Manifest]:
        """Return the cached manifests, least recently used first."""
        return [self._entries[name].manifest for name in list(self._entries)]

    async def models(self, reader: Reader | None = None) -> Sequence[str]:
        """List the models in the store now, and drop cached models that are gone.

        A listing in progress may already be out of date: callers meanwhile share the next one.
        """
        self._listings.detach("models")
        return await self._listings.join("models", reader)

    async def _list(self, *_: object) -> Sequence[str]:
        before, self.names = self.names, tuple(await self._store.models())
        self._listed = time.monotonic()
        self._outages.flush()
        if self._was_listed:
            self._note_changes(before)
        self._was_listed = True
        for name in set(self._entries) - set(self.names):
            del self._entries[name]
        return self.names

    async def reload(self) -> str:
        """List the models and reread all cached manifests; return a summary in words.

        Raises:
            SurfwError: something could not be read; it is kept as it was.
        """
        await self.models()
        failures = []
        for name in list(self._entries):
            try:
                await self._reads.join(name)
            except SurfwError as exc:
                failures.append(exc)
        if failures:
            raise failures[0]
        return count(len(self.names), "model")

    def _note_changes(self, before: Sequence[str]) -> None:
        """Note which models were added and removed since the previous listing."""
        if before == self.names:
            return
        for names, what in (
            (set(self.names) - set(before), "new in the store"),
            (set(before) - set(self.names), "gone"),
        ):
            if names:
                few = ", ".join(sorted(names)[:_MOST_NOTED])
                more = f" and {len(names) - _MOST_NOTED} more" if len(names) > _MOST_NOTED else ""
                self._journal.note("models", f"{count(len(names), 'model')} {what}: {few}{more}")

    def pass_bytes(self, model: str) -> tuple[int, int]:
        """Return the fewest and the most bytes that one pass over a model reads; 0 if not known at the moment."""
        entry = self._entries.get(model)
        sizes = [[form.stored_bytes for form in chunk.forms] for chunk in (entry.manifest.chunks if entry else ())]
        return sum(map(min, sizes)), sum(map(max, sizes))

    async def read(self, model: str, reader: Reader | None = None) -> Entry:
        """Return the model as it is in the store now."""
        if model in self.names or model in await self.models(reader):
            try:
                return await self._reads.join(model, reader)
            except UnknownModelError:  # removed since it was listed
                await self.models(reader)
        raise RefusedError(f"there is no model {model[:80]!a} here", code="unknown-model")

    async def document(self, model: str, reader: Reader | None = None) -> Document:
        """Return the model's current manifest, to be sent. Loading it raises `StorageError` if it was replaced."""
        entry = await self.read(model, reader)
        name, size, digest = entry.manifest.name, len(entry.public), entry.digest

        async def load() -> bytes:
            now = await self.entry(name, reader)
            if now.digest != digest:
                raise StorageError(f"the manifest of {name} was replaced while it was sent; ask for it again")
            return now.public

        return Document(size, digest, load)

    async def entry(self, model: str, reader: Reader | None = None) -> Entry:
        """Return the cached model, or else the model as it is now."""
        if time.monotonic() - self._listed >= self._fresh_seconds:
            self._listed = time.monotonic()  # one request lists; the others continue
            try:
                await self.models(reader)
            except StorageError as exc:  # cached data can be served without the storage
                self._outages.note("the models of the store cannot be listed", str(exc))
        return self._entries.get(model) or await self.read(model, reader)

    async def _read(self, name: str, _: Reader) -> Entry:
        kept = self._entries.get(name)
        revision = await self._store.manifest_revision(name)
        if kept and revision and kept.revision == revision and not await asyncio.to_thread(self._has_learned, kept):
            return kept
        size, entry = await self._store.read_manifest(
            name, lambda data: (len(data), self._make_entry(name, data, revision, kept))
        )
        self._reads.read_bytes += size
        self._entries[name] = entry
        return entry

    def _make_entry(self, name: str, data: bytes, revision: str | None, kept: Entry | None) -> Entry:
        """Parse a stored manifest, unless it is the cached one; runs in a thread."""
        stored = payload_digest(data)
        if kept and kept.stored == stored and not self._has_learned(kept):
            return replace(kept, revision=revision)
        manifest = self._store.parse_manifest(name, data)
        known = self._store.with_digests(manifest)
        public = known.public().encode()
        own = _without_details(manifest)
        chunks = (own if known is manifest else _without_details(known)).by_id | own.by_id
        kept_bytes = _footprint(own.__dict__, chunks, public)
        return Entry(own, chunks, public, payload_digest(public), revision, stored, kept_bytes)

    def _has_learned(self, kept: Entry) -> bool:
        """Whether more digests are known than when it was parsed; may read a file."""
        return not self._store.with_digests(kept.manifest).by_id.keys() <= kept.chunks.keys()

    async def close(self) -> None:
        """Stop reading, and clear the cache."""
        await self._listings.close()
        await self._reads.close()
        self._outages.flush()
        self._entries.clear()

    async def chunk(self, request: Get, reader: Reader | None = None) -> Form:
        """Return the requested form of a chunk, with the locations of its stored bytes."""
        manifest, chunk = await self.find(request.model, request.chunk, reader)
        form = chunk.form(request.form)
        if form is None:
            raise RefusedError(f"chunk {chunk.name} has no form {request.form[:80]!a}", code="unknown-form")
        if not request.start <= request.stop <= form.stored_bytes:
            raise RefusedError(
                f"chunk {chunk.name} has {form.stored_bytes} bytes, not {request.start} to {request.stop}",
                code="bad-range",
            )
        if not form.locations:
            raise ManifestError(f"the manifest of {manifest.name} does not say where chunk {chunk.name} lies")
        return form

    async def find(self, model: str, identity: str, reader: Reader | None = None) -> tuple[Manifest, Chunk]:
        """Return the model's manifest, and the chunk with this id."""
        entry = await self.entry(model, reader)
        chunk = entry.chunks.get(identity)
        if chunk is None:
            raise RefusedError(f"{entry.manifest.name} has no chunk {identity[:80]!a}", code="unknown-chunk")
        return entry.manifest, chunk

    async def file(self, request: GetFile, reader: Reader | None = None) -> tuple[Location, str]:
        """Return the location of a file of the model, and its digest."""
        manifest = (await self.entry(request.model, reader)).manifest
        for file in manifest.files:
            if file.path == request.path:
                return Location(file.object, 0, file.size), file.digest
        raise RefusedError(f"{manifest.name} has no file {request.path[:80]!a}", code="unknown-file")


def _without_details(manifest: Manifest) -> Manifest:
    """Return the part of a manifest that requests are looked up in; the rest, most of a large one, is only sent."""
    chunks = tuple(
        replace(chunk, tensors=(), forms=tuple(replace(form, frames=()) for form in chunk.forms))
        for chunk in manifest.chunks
    )
    return replace(manifest, config={}, generation_config=None, ties={}, chunks=chunks, order=())


def _footprint(*roots: Any) -> int:
    """Return the memory used by objects and all that they refer to, each counted once."""
    total, seen, rest = 0, set[int](), list(roots)
    while rest:
        one = rest.pop()
        if id(one) not in seen and not isinstance(one, type):
            seen.add(id(one))
            total += sys.getsizeof(one)
            rest.extend(gc.get_referents(one))
    return total
