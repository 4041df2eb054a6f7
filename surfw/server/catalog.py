"""The models of a store, as a server knows them. Here the names that requests give are looked up.

Names, chunk ids and file names from clients are only ever compared with the store's own listing, and with what its
manifests list. Nothing that is not listed there becomes a storage key.

A manifest is read once for all who ask meanwhile, and parsed in a thread. The result is kept until the stored bytes
change. The store is listed again for a name that is not in the listing, and when that is older than `FRESH_SECONDS`.
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
"""How old the listing may be when a chunk or a file is looked up. So much later, a removed model is gone here too."""

_CACHE_BYTES = 64 * MIB
"""What all models that are kept may take."""
_LEAST_KEPT = 4
"""The fewest models that are kept, however large: those that are used at the same time must not evict each other."""
_MOST_NOTED = 3
"""How many models that have come or gone are named in one event."""
_READS = 2
"""The most manifests that are read at a time: while it is parsed, one takes many times its size."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A model as it is in the store.

    Attributes:
        manifest: as it is stored, with locations, but without what is not looked up here, such as tensors.
        chunks: its chunks by identity: that in the stored manifest, and that which it has with its digests.
        public: the manifest as it may cross the wire, encoded.
        digest: the BLAKE3 of `public`.
        revision: the storage's revision of the stored manifest, if it can tell.
        stored: the BLAKE3 of the stored manifest.
        kept_bytes: what all of this takes in memory.
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

    What the store does not have is refused: a `RefusedError` has a code and a text for the client. All lookups raise
    `StorageError` or `ManifestError` if the manifest cannot be read. `reader` is who waits, and pays; None for the
    server itself.
    """

    def __init__(self, store: Store, journal: Journal | None = None, *, fresh_seconds: float = FRESH_SECONDS) -> None:
        """Look up in this store; nothing is read yet. The journal notes which models come and go."""
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
        """Return the models whose manifests are kept, those that were asked for last at the end."""
        return [self._entries[name].manifest for name in list(self._entries)]

    async def models(self, reader: Reader | None = None) -> Sequence[str]:
        """List the models that the store has now, and forget what is kept of others.

        A listing that is under way may be too old already: those who ask meanwhile share the next one.
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
        """List the models anew, read the manifests anew that are kept, and return what is there now in words.

        Raises:
            SurfwError: something could not be read, and is kept as it was.
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
        """Note which models have come, and which have gone, since the listing before."""
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

    def pass_bytes(self, model: str) -> int:
        """Return the least that a client reads of a whole model; 0 if that is not known at the moment."""
        entry = self._entries.get(model)
        chunks = entry.manifest.chunks if entry else ()
        return sum(min(form.stored_bytes for form in chunk.forms) for chunk in chunks)

    async def read(self, model: str, reader: Reader | None = None) -> Entry:
        """Return the model as it is in the store now."""
        if model in self.names or model in await self.models(reader):
            try:
                return await self._reads.join(model, reader)
            except UnknownModelError:  # it was removed since it was listed
                await self.models(reader)
        raise RefusedError(f"there is no model {model[:80]!a} here", code="unknown-model")

    async def document(self, model: str, reader: Reader | None = None) -> Document:
        """Return the model's manifest as it is now, to be sent. Loading it raises `StorageError` if it was replaced."""
        entry = await self.read(model, reader)
        name, size, digest = entry.manifest.name, len(entry.public), entry.digest

        async def load() -> bytes:
            now = await self.entry(name, reader)
            if now.digest != digest:
                raise StorageError(f"the manifest of {name} was replaced while it was sent; ask for it again")
            return now.public

        return Document(size, digest, load)

    async def entry(self, model: str, reader: Reader | None = None) -> Entry:
        """Return the model as it was when its manifest was last asked for, or else as it is now."""
        if time.monotonic() - self._listed >= self._fresh_seconds:
            self._listed = time.monotonic()  # one request lists, and the others go on
            try:
                await self.models(reader)
            except StorageError as exc:  # what is in the cache can be served without the storage
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
        """Parse a stored manifest, unless it is the one that is kept; runs in a thread."""
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
        """Stop reading, and forget everything."""
        await self._listings.close()
        await self._reads.close()
        self._outages.flush()
        self._entries.clear()

    async def chunk(self, request: Get, reader: Reader | None = None) -> Form:
        """Return the form of a chunk whose stored bytes are asked for: it says where they lie."""
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
        """Return the model's manifest, and the chunk that has this identity."""
        entry = await self.entry(model, reader)
        chunk = entry.chunks.get(identity)
        if chunk is None:
            raise RefusedError(f"{entry.manifest.name} has no chunk {identity[:80]!a}", code="unknown-chunk")
        return entry.manifest, chunk

    async def file(self, request: GetFile, reader: Reader | None = None) -> tuple[Location, str]:
        """Return where a file of the model lies, and its digest."""
        manifest = (await self.entry(request.model, reader)).manifest
        for file in manifest.files:
            if file.path == request.path:
                return Location(file.object, 0, file.size), file.digest
        raise RefusedError(f"{manifest.name} has no file {request.path[:80]!a}", code="unknown-file")


def _without_details(manifest: Manifest) -> Manifest:
    """The part of a manifest that requests are looked up in; the rest, most of a large one, is only ever sent."""
    chunks = tuple(
        replace(chunk, tensors=(), forms=tuple(replace(form, frames=()) for form in chunk.forms))
        for chunk in manifest.chunks
    )
    return replace(manifest, config={}, generation_config=None, ties={}, chunks=chunks, order=())


def _footprint(*roots: Any) -> int:
    """What objects take in memory, with all that they refer to, each counted once."""
    total, seen, rest = 0, set[int](), list(roots)
    while rest:
        one = rest.pop()
        if id(one) not in seen and not isinstance(one, type):
            seen.add(id(one))
            total += sys.getsizeof(one)
            rest.extend(gc.get_referents(one))
    return total
