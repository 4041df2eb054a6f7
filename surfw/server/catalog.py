"""The models of a store, as a server knows them: what a name from the wire may be looked up in.

Names, chunk ids and file names from clients are only ever keys of dictionaries: of the store's own listing, and of
manifests that were read from it. Nothing that a client says becomes a storage key.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from surfw.config import MIB
from surfw.errors import ManifestError, RefusedError
from surfw.manifest import Location, Manifest, payload_digest
from surfw.server.cache import LruCache
from surfw.storage import Store
from surfw.wire import Get, GetFile

_CACHE_BYTES = 64 * MIB


@dataclass(frozen=True, slots=True)
class Entry:
    """A model: its manifest with locations, and the manifest as it may cross the wire, with its digest."""

    manifest: Manifest
    public: bytes
    digest: str


class Catalog:
    """Looks up what requests name. Whatever is not there is refused, with a code and a text for the client."""

    def __init__(self, store: Store) -> None:
        """Name the store; nothing is read yet."""
        self.names: Sequence[str] = ()
        """The models there were when last looked."""
        self._store = store
        self._entries: LruCache[str, Entry] = LruCache(_CACHE_BYTES, lambda entry: len(entry.public))

    async def models(self) -> Sequence[str]:
        """The names of the models there are now."""
        self.names = tuple(await self._store.models())
        return self.names

    async def read(self, model: str) -> Entry:
        """The model as it is in the store now.

        Raises:
            RefusedError: the store has no such model.
            StorageError, ManifestError: it cannot be read.
        """
        known = {name: name for name in await self.models()}
        if model not in known:
            raise RefusedError(f"there is no model {model[:80]!a} here", code="unknown-model")
        manifest = await self._store.manifest(known[model])
        public = manifest.public().encode()
        entry = self._entries[known[model]] = Entry(manifest, public, payload_digest(public))
        return entry

    async def entry(self, model: str) -> Entry:
        """The model as it was when its manifest was last asked for, or as it is now."""
        return self._entries.get(model) or await self.read(model)

    async def chunk(self, request: Get) -> Sequence[Location]:
        """Where the stored bytes that are asked for lie.

        Raises:
            RefusedError: the model's manifest does not list such bytes.
            StorageError, ManifestError: the manifest cannot be read.
        """
        manifest = (await self.entry(request.model)).manifest
        chunk = manifest.by_id.get(request.chunk)
        if chunk is None:
            raise RefusedError(f"{manifest.name} has no chunk {request.chunk[:80]!a}", code="unknown-chunk")
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

    async def file(self, request: GetFile) -> tuple[Location, str]:
        """Where a file of the model lies, and its digest.

        Raises:
            RefusedError: the model's manifest does not list it.
            StorageError, ManifestError: the manifest cannot be read.
        """
        manifest = (await self.entry(request.model)).manifest
        for file in manifest.files:
            if file.path == request.path:
                return Location(file.object, 0, file.size), file.digest
        raise RefusedError(f"{manifest.name} has no file {request.path[:80]!a}", code="unknown-file")
