"""The models of a store, as a server knows them: what a name from the wire may be looked up in.

Names, chunk ids and file names from clients are only ever keys of dictionaries: of the store's own listing, and of
manifests that were read from it. Nothing that a client says becomes a storage key.

A manifest is read once for all who ask meanwhile, and parsed in a thread; what was parsed is kept as long as the stored
bytes stay as they are. The listing is looked at again for a name that is not in it, and when it is no longer fresh.
"""

import asyncio
import gc
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from surfw.config import MIB
from surfw.errors import ManifestError, RefusedError, StorageError, UnknownModelError
from surfw.manifest import Chunk, Location, Manifest, payload_digest
from surfw.server.cache import LruCache
from surfw.server.fairness import Reader, SingleFlight
from surfw.server.sending import Document
from surfw.storage import Store
from surfw.wire import Get, GetFile

log = logging.getLogger("surfw.server")

FRESH_SECONDS = 2.0
"""How old a listing may be when a chunk or a file is looked up: after that long, a removed model is gone here too."""

_CACHE_BYTES = 64 * MIB
"""What all models may take that are kept."""
_LEAST_KEPT = 4
"""How many models are kept at least, however large: those that are used at the same time must not evict each other."""
_READS = 2
"""The most manifests that are read at a time: one that is being parsed takes many times its size."""
_LISTING = ""
"""What stands for the list of models, among the manifests that are read: no model has that name."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A model as it is in the store.

    Attributes:
        manifest: with locations, as it is stored, but only what is looked up here: no tensors, no digests of blocks.
        chunks: its chunks by the identities they are asked for with: those of the stored manifest, and those that
            they got when their digests became known.
        public: the manifest as it may cross the wire, encoded.
        digest: the BLAKE3 of `public`.
        revision: what the storage said of the stored manifest, if it can tell.
        stored: the BLAKE3 of the stored manifest.
        kept_bytes: what all of this takes in memory.
        is_complete: whether it has the digests of all chunks.
    """

    manifest: Manifest
    chunks: Mapping[str, Chunk]
    public: bytes
    digest: str
    revision: str | None
    stored: str
    kept_bytes: int
    is_complete: bool = True


class Catalog:
    """Looks up what requests name. Whatever is not there is refused, with a code and a text for the client."""

    def __init__(self, store: Store, *, fresh_seconds: float = FRESH_SECONDS) -> None:
        """Name the store; nothing is read yet."""
        self.names: Sequence[str] = ()
        """The models there were when last looked."""
        self._store = store
        self._fresh_seconds = fresh_seconds
        self._listed = float("-inf")
        self._entries: LruCache[str, Entry] = LruCache(
            _CACHE_BYTES, lambda entry: min(entry.kept_bytes, _CACHE_BYTES // _LEAST_KEPT)
        )
        self._reads = SingleFlight(self._read, _READS)
        self._listings = SingleFlight(self._list, 1)

    async def models(self, reader: Reader | None = None) -> Sequence[str]:
        """The names of the models there are now; what is kept of others is forgotten.

        Whoever asks while they are being listed waits for the next listing, together with all who do.
        """
        if _LISTING in self._listings:
            self._listings.detach(_LISTING)
        return await self._listings.join(_LISTING, reader)

    async def _list(self, *_: object) -> Sequence[str]:
        self.names = tuple(await self._store.models())
        self._listed = time.monotonic()
        for name in set(self._entries) - set(self.names):
            del self._entries[name]
        return self.names

    async def read(self, model: str, reader: Reader | None = None) -> Entry:
        """The model as it is in the store now.

        Args:
            model: its name.
            reader: who waits for it, and pays; None for the server itself.

        Raises:
            RefusedError: the store has no such model.
            StorageError, ManifestError: it cannot be read.
        """
        name = _own(model, self.names) or _own(model, await self.models(reader))
        if name is None:
            raise _unknown(model)
        try:
            return await self._reads.join(name, reader)
        except UnknownModelError as exc:  # it was removed since it was listed
            await self.models(reader)
            raise _unknown(model) from exc

    async def document(self, model: str, reader: Reader | None = None) -> Document:
        """The model's manifest as it is now, to be sent; raises as `read` does.

        Loading it later raises `StorageError` if it is another one by then.
        """
        entry = await self.read(model, reader)
        name, size, digest = entry.manifest.name, len(entry.public), entry.digest

        async def load() -> bytes:
            now = await self.entry(name, reader)
            if now.digest != digest:
                raise StorageError(f"the manifest of {name} was replaced while it was sent; ask for it again")
            return now.public

        return Document(size, digest, load)

    async def entry(self, model: str, reader: Reader | None = None) -> Entry:
        """The model as it was when its manifest was last asked for, or as it is now."""
        if time.monotonic() - self._listed >= self._fresh_seconds:
            self._listed = time.monotonic()  # one of those who ask looks, and the others go on
            try:
                await self.models(reader)
            except StorageError as exc:  # what is in the cache can be served without the storage
                log.warning("the models of %s cannot be listed: %s", self._store.url, exc)
        return self._entries.get(model) or await self.read(model, reader)

    async def _read(self, name: str, _: Reader) -> Entry:
        kept = self._entries.get(name)
        revision = await self._store.manifest_revision(name)
        if kept is not None and revision is not None and kept.revision == revision:
            if kept.is_complete or not await asyncio.to_thread(_has_learned, self._store, kept):
                return kept
            kept = None
        size, entry = await self._store.read_manifest(
            name, lambda data: (len(data), _make_entry(self._store, name, data, revision, kept))
        )
        self._reads.read_bytes += size
        self._entries[name] = entry
        return entry

    async def close(self) -> None:
        """Stop reading, and forget everything."""
        await self._listings.close()
        await self._reads.close()
        self._entries.clear()

    async def chunk(self, request: Get, reader: Reader | None = None) -> Sequence[Location]:
        """Where the stored bytes that are asked for lie.

        Raises:
            RefusedError: the model's manifest does not list such bytes.
            StorageError, ManifestError: the manifest cannot be read.
        """
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
        return form.locations

    async def find(self, model: str, identity: str, reader: Reader | None = None) -> tuple[Manifest, Chunk]:
        """A chunk of a model, by one of its identities, and the model's manifest.

        Raises:
            RefusedError: the model has no such chunk.
            StorageError, ManifestError: the manifest cannot be read.
        """
        entry = await self.entry(model, reader)
        chunk = entry.chunks.get(identity)
        if chunk is None:
            raise RefusedError(f"{entry.manifest.name} has no chunk {identity[:80]!a}", code="unknown-chunk")
        return entry.manifest, chunk

    async def file(self, request: GetFile, reader: Reader | None = None) -> tuple[Location, str]:
        """Where a file of the model lies, and its digest.

        Raises:
            RefusedError: the model's manifest does not list it.
            StorageError, ManifestError: the manifest cannot be read.
        """
        manifest = (await self.entry(request.model, reader)).manifest
        for file in manifest.files:
            if file.path == request.path:
                return Location(file.object, 0, file.size), file.digest
        raise RefusedError(f"{manifest.name} has no file {request.path[:80]!a}", code="unknown-file")


def _make_entry(store: Store, name: str, data: bytes, revision: str | None, kept: Entry | None) -> Entry:
    """Parse a stored manifest, unless it is the one that was kept; runs in a thread."""
    stored = payload_digest(data)
    if kept is not None and kept.stored == stored and kept.is_complete:
        return replace(kept, revision=revision)
    manifest = store.parse_manifest(name, data)
    known = store.with_digests(manifest)
    public = known.public().encode()
    own = _without_details(manifest)
    chunks = (own if known is manifest else _without_details(known)).by_id | own.by_id
    kept_bytes = _footprint(own.__dict__, chunks, public)
    return Entry(own, chunks, public, payload_digest(public), revision, stored, kept_bytes, known.is_known)


def _without_details(manifest: Manifest) -> Manifest:
    """What requests are looked up in; the rest, most of a large manifest, is only ever sent."""
    chunks = tuple(
        replace(chunk, tensors=(), forms=tuple(replace(form, blocks=b"") for form in chunk.forms))
        for chunk in manifest.chunks
    )
    return replace(manifest, config={}, generation_config=None, ties={}, chunks=chunks, order=())


def _footprint(*roots: Any) -> int:
    """What objects take in memory with all that they hold, each counted once."""
    total, seen, rest = 0, set[int](), list(roots)
    while rest:
        one = rest.pop()
        if id(one) not in seen and not isinstance(one, type):
            seen.add(id(one))
            total += sys.getsizeof(one)
            rest.extend(gc.get_referents(one))
    return total


def _has_learned(store: Store, kept: Entry) -> bool:
    """Whether digests were found out since; reads a file."""
    return not store.with_digests(kept.manifest).by_id.keys() <= kept.chunks.keys()


def _own(model: str, names: Sequence[str]) -> str | None:
    """The store's own spelling of a name from the wire."""
    return next((name for name in names if name == model), None)


def _unknown(model: str) -> RefusedError:
    return RefusedError(f"there is no model {model[:80]!a} here", code="unknown-model")
