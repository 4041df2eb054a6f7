"""A store: the layout of chunked models in a storage.

    surfw.json                             marks a store, with its version
    models/NAME.json                       a digest line, then the manifest; a model is visible when this exists
    blobs/ab/abcdef….safetensors           a safetensors header, then a chunk's payload
    blobs/ab/abcdef….json                  a tokenizer file, with the suffix of its name
    partial/                               work in progress; read only by the `chunk` command that wrote it
    leases/, prunes/                       coordination of writers and pruners: see `housekeeping.leases`

Blobs are named by their content and written first; the manifest is written last. A partial model is never visible.
"""

import asyncio
import json
import logging
import re
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import TypeVar

from surfw.config import DAMAGE_RETRIES, KIB, MANIFEST_BYTES, default_store, display_url, printable
from surfw.errors import (
    IntegrityError,
    ManifestError,
    NotAStoreError,
    NotFoundError,
    StorageError,
    UnknownModelError,
)
from surfw.manifest import (
    Location,
    Manifest,
    check_model_name,
    encode_stored_manifest,
    parse_stored_manifest,
    payload_digest,
)
from surfw.source import find_model, locate_damage
from surfw.storage.base import StorageBackend
from surfw.storage.custom import AdaptedBackend, adapt_backend
from surfw.storage.digests import LearnedDigests
from surfw.storage.fsspec_backend import is_denial
from surfw.storage.origins import Objects, PlacedOptions

logger = logging.getLogger("surfw.storage")

T = TypeVar("T")

MARKER = "surfw.json"
FORMAT = "surfw.store"
STORE_VERSION = 1
_MARKER_BYTES = 64 * KIB
_MEND = f'; if one lies there, write {{"format": "{FORMAT}", "version": {STORE_VERSION}}} into that file'
MODELS, BLOBS = "models/", "blobs/"
LEASES, PRUNES = "leases/", "prunes/"
OR_SERVER = ", or a server's address, which begins with ws:// or wss://"
_PARTIAL = "partial/"
_CONFIG, _ADAPTER_CONFIG, _DISTRIBUTED = "config.json", "adapter_config.json", ".metadata"
_IN_PROGRESS = (_PARTIAL, LEASES, PRUNES)
_BLOB = re.compile(r"blobs/([0-9a-f]{2})/\1[0-9a-f]{62}(\.[A-Za-z0-9._-]+)?")


class Store:
    """Chunked models in a storage backend."""

    def __init__(self, backend: StorageBackend, origin_options: PlacedOptions | None = None) -> None:
        """Set the backend, which is wrapped if it is a custom one. Nothing is read yet.

        Args:
            backend: the storage that holds the store.
            origin_options: storage options for the origins of models that were not copied.
        """
        self.backend = adapt_backend(backend)
        self.objects = Objects(self.backend, MARKER, origin_options)
        """The objects that manifests refer to, under the names used in the manifests that this store returns."""
        self.reloads = 0
        """How many documents were reloaded because they arrived damaged."""
        self.learned = LearnedDigests()
        """Digests of chunks whose manifests lack them."""
        self._given = backend
        self.url = display_url(self.backend.url)
        self._strays: set[str] = set()

    async def close(self, *, owned: bool) -> None:
        """Close the storages of origins, and the backend if it is `owned`.

        A custom backend that stays open loses the objects that this store's adapter cached.
        """
        await self.objects.close()
        if owned:
            await self.backend.close()
        elif isinstance(self.backend, AdaptedBackend) and self.backend is not self._given:
            await self.backend.let_go()

    async def check(self) -> None:
        """Check that the backend holds a store.

        Raises:
            NotAStoreError: it does not.
        """
        try:
            data = await self.backend.load_capped(MARKER, _MARKER_BYTES)
        except NotFoundError as exc:
            raise NotAStoreError(await self._explain_lack()) from exc
        try:
            document = json.loads(data)
            kind, version = document["format"], document["version"]
        except (ValueError, KeyError, TypeError, RecursionError) as exc:
            raise NotAStoreError(f"{self.url} is not a surfw store: its {MARKER} cannot be read{_MEND}") from exc
        if kind != FORMAT:
            raise NotAStoreError(
                f"{self.url} is not a surfw store: its {MARKER} says {str(kind)[:80]!r}, not {FORMAT!r}{_MEND}"
            )
        if version != STORE_VERSION:
            raise NotAStoreError(
                f"{self.url} is a store of version {printable(str(version)[:40])}; this surfw reads {STORE_VERSION}"
            )

    async def _explain_lack(self) -> str:
        """The error message when the marker is missing."""
        is_web = self.url.startswith("http")  # a web server may not list its objects
        with suppress(StorageError):
            if not is_web and await self._foreign_key() is None:
                option = "" if self.url == default_store() else f" --store {self.url}"
                return (
                    f"{self.url} is not a surfw store yet: nothing was chunked into it; "
                    f"'surfw chunk MODEL{option}' does that, or name another place"
                )
        return (
            f"{self.url} is not a surfw store ({MARKER} is missing); name the folder or URL that "
            f"'surfw chunk --store' wrote to{OR_SERVER if is_web else ''}"
        )

    async def create(self) -> None:
        """Create the store if it does not exist yet.

        Raises:
            NotAStoreError: the place is used for something else.
        """
        if not await self.check_place():
            document = {"format": FORMAT, "version": STORE_VERSION}
            await self.backend.save(MARKER, json.dumps(document).encode())

    async def check_place(self) -> bool:
        """Return whether the store exists already; if not, `create` can create it.

        Raises:
            NotAStoreError: the place is used for something else.
        """
        if await self.backend.exists(MARKER):
            await self.check()
            return True
        if foreign := await self._foreign_key():
            raise NotAStoreError(
                f"{self.url} holds other things (such as {foreign}) and no {MARKER}; "
                "choose an empty place for the store"
            )
        return False

    async def _foreign_key(self) -> str | None:
        """The first key outside `partial/`, `leases/` and `prunes/`, if any."""
        found = await self.backend.find_foreign_key(_PARTIAL)
        if found is not None and found.startswith(_IN_PROGRESS):
            found = next((key for key in await self.backend.list() if not key.startswith(_IN_PROGRESS)), None)
        return found

    async def adapters_of(self, model: str) -> list[str]:
        """Return the names of the adapters whose base is this model; unreadable manifests are skipped."""
        found = []
        for name in await self.listed():
            with suppress(ManifestError, StorageError, UnknownModelError):
                facts = await self.facts(name)
                if facts.base is not None and facts.base.name == model:
                    found.append(name)
        return found

    async def models(self) -> list[str]:
        """Return the sorted names of the models. Files whose names are not valid model names are skipped."""
        names = set(await self.listed())
        strays = {name for name in names if not _is_model_name(name)}
        for name in sorted(strays - self._strays):
            logger.warning("%s holds %a, which cannot be a model's name; it is left out", self.url, name[:80])
        self._strays = strays
        return sorted(names - strays)

    async def listed(self) -> list[str]:
        """Return the names of all manifests, including invalid model names."""
        keys = await self.backend.list(MODELS)
        return [key.removeprefix(MODELS).removesuffix(".json") for key in keys if key.endswith(".json")]

    async def resolve(self, model: str) -> str:
        """Return the full name of a model, given in full or by a unique last part.

        Raises:
            UnknownModelError: no model or several models match.
        """
        if _is_model_name(model) and await self.backend.exists(manifest_key(model)):
            return model  # works without a listing, which a web server may not offer
        return find_model(model, await self.models(), where=self.url)

    async def expect_name(self, model: str) -> None:
        """Check that this is a valid model name.

        Raises:
            UnknownModelError: it is not, so there is no such model.
            NotAStoreError: this is not a store.
        """
        if not _is_model_name(model):
            await self.check()
            raise UnknownModelError(model, await self.models(), where=self.url)

    async def manifest(self, model: str) -> Manifest:
        """Return the manifest of the model with exactly this name.

        Raises:
            UnknownModelError: there is no such model.
            ManifestError: its manifest is not valid.
        """
        manifest = await self.read_manifest(model, partial(self.parse_manifest, model))
        return await asyncio.to_thread(self.with_digests, manifest)

    async def facts(self, model: str) -> Manifest:
        """Return the manifest as stored: without opening its origin, and with the stored object names.

        Raises:
            UnknownModelError: there is no such model.
            ManifestError: its manifest is not valid.
        """
        return await self.read_manifest(model, partial(self._parse, model))

    async def read_manifest(self, model: str, parse: Callable[[bytes], T]) -> T:
        """Return `parse(data)`, called in a thread, for the stored bytes of the model's manifest.

        An invalid manifest is read again, because it may have been damaged in transit.

        Raises:
            UnknownModelError: there is no such model.
            Exception: any error of `parse`.
        """
        return await self.load_right(
            lambda: self.manifest_bytes(model), parse, forget=lambda: self.backend.forget(manifest_key(model))
        )

    async def load_right(
        self, load: Callable[[], Awaitable[bytes]], parse: Callable[[bytes], T], *, forget: Callable[[], None]
    ) -> T:
        """Load a document and return `parse(data)`, called in a thread. A damaged document is loaded again.

        Args:
            load: loads the document.
            parse: raises `IntegrityError` or `ManifestError` if the document is damaged.
            forget: drops cached bytes of the document, before it is loaded again.

        Raises:
            IntegrityError, ManifestError: it stays damaged; the message says whether the bytes were the same each time.
            Exception: any other error of `load` or `parse`.
        """
        seen: list[str] = []
        while True:
            data = await load()
            try:
                return await asyncio.to_thread(parse, data)
            except (IntegrityError, ManifestError) as exc:
                seen.append(await asyncio.to_thread(payload_digest, data))
                if len(seen) > DAMAGE_RETRIES:
                    where = locate_damage(seen, stored=self.url)
                    if isinstance(exc, IntegrityError):
                        raise IntegrityError(f"{exc}; {where}") from exc
                    if len(set(seen)) == 1:
                        raise  # it is stored like this: the parser has the best message
                    raise ManifestError(exc.complaint, advice=where) from exc
            self.reloads += 1
            forget()

    async def manifest_bytes(self, model: str) -> bytes:
        """Return the bytes of the model's manifest; see `parse_manifest`.

        Raises:
            UnknownModelError: there is no such model.
            StorageError: the manifest could not be read.
        """
        key = manifest_key(model)
        try:
            with suppress(NotFoundError):
                return await self.backend.load_capped(key, MANIFEST_BYTES)
            if model not in await self.listed():
                raise UnknownModelError(model, await self.models(), where=self.url)
            return await self.backend.load_capped(key, MANIFEST_BYTES)  # published meanwhile, or a broken symlink
        except StorageError as exc:
            is_movable = self.backend.local_path(key) is not None and not is_denial(exc)
            advice = "; move it away, and chunk the model again" * is_movable
            raise StorageError(f"the manifest of model {model} cannot be read: {exc}{advice}") from exc

    async def manifest_revision(self, model: str) -> str | None:
        """Return a string that changes with the model's manifest; None if the storage has no revisions."""
        return await self.backend.revision(manifest_key(model))

    def parse_manifest(self, model: str, data: bytes) -> Manifest:
        """Parse the stored bytes of a manifest. Call this in a thread: a large manifest takes long.

        Raises:
            ManifestError: it is damaged or invalid.
            StorageError: it is the manifest of another model.
        """
        return self.objects.mount(self._parse(model, data), where=self.url)

    def _parse(self, model: str, data: bytes) -> Manifest:
        manifest = parse_stored_manifest(data, where=f"{self.url}, model {model}")
        if manifest.name != model:
            raise StorageError(f"{manifest_key(model)} in {self.url} is the manifest of {manifest.name!r}")
        return manifest

    def with_digests(self, manifest: Manifest) -> Manifest:
        """Return the manifest with all digests learned so far (see `digests`); reads a file."""
        return self.learned.complete(manifest)

    async def publish(self, manifest: Manifest) -> None:
        """Make a model visible. All its blobs must have been written before.

        Raises:
            ManifestError: the manifest is invalid, or cannot be written as JSON.
        """
        try:
            data = encode_stored_manifest(manifest)
        except ValueError as exc:
            raise ManifestError(f"the configuration of {manifest.name} cannot be written as JSON: {exc}") from exc
        parse_stored_manifest(data, where=manifest.name)
        await self.backend.save(manifest_key(manifest.name), data)


async def is_checkpoint(backend: StorageBackend) -> bool:
    """Return whether a storage holds a plain checkpoint (True) or a store (False).

    Raises:
        NotAStoreError: it holds neither.
        StorageError: the storage cannot be read.
    """
    if await backend.exists(MARKER):
        return False
    if await backend.exists(_CONFIG) or await backend.exists(_ADAPTER_CONFIG):  # adapters are refused later
        return True
    for name in (MARKER, _CONFIG):
        path = backend.local_path(name)
        if path is not None and (path.exists() or path.is_symlink()):
            raise NotAStoreError(
                f"{path} is no regular file, expected one; put the file itself there, or name another place"
            )
    url, file = display_url(backend.url), backend.local_path(MARKER)
    if file is not None and not await asyncio.to_thread(file.parent.is_dir):
        raise NotAStoreError(
            f"there is no folder {url}; name that of a checkpoint, or of a store, which 'surfw chunk MODEL' makes; "
            "a model of the hub is hf://org/name"
        )
    if file is not None and await asyncio.to_thread((file.parent / _DISTRIBUTED).is_file):
        raise NotAStoreError(
            f"{url} has weights that torch.distributed.checkpoint saved, which are not run or served as they are; "
            "chunk them: surfw chunk FOLDER --config-from MODEL_FOLDER"
        )
    raise NotAStoreError(
        f"{url} is neither a surfw store ({MARKER}) nor a checkpoint ({_CONFIG}): both files are missing; name "
        f"the folder or URL that 'surfw chunk --store' wrote to, or that of a checkpoint"
        f"{OR_SERVER if url.startswith('http') else ''}"
    )


def _is_model_name(name: str) -> bool:
    try:
        check_model_name(name)
    except ManifestError:
        return False
    return True


def manifest_key(model: str) -> str:
    """Return the key of a model's manifest."""
    return f"{MODELS}{check_model_name(model)}.json"


def blob_key(digest: str, suffix: str) -> str:
    """Return the key of the blob with this digest."""
    return f"{BLOBS}{digest[:2]}/{digest}{suffix}"


def is_blob(key: str) -> bool:
    """Return whether the key is that of a blob."""
    return bool(_BLOB.fullmatch(key))


def belongs(key: str) -> bool:
    """Return whether a key is part of a store's layout; a storage may also hold foreign keys."""
    return key == MARKER or key.startswith(_IN_PROGRESS) or is_blob(key) or model_of(key) is not None


def model_of(key: str) -> str | None:
    """Return the name of the model whose manifest has this key; None for any other key."""
    name = key.removeprefix(MODELS).removesuffix(".json")
    return name if key == f"{MODELS}{name}.json" and _is_model_name(name) else None


def objects_of(manifest: Manifest) -> dict[str, int]:
    """Return the blobs of a model, each with its least length in bytes; {} for a model that was not copied."""
    if manifest.origin is not None:
        return {}
    found: dict[str, int] = {}
    for chunk in manifest.chunks:
        for form in chunk.forms:
            for at in form.locations:
                found[at.object] = max(found.get(at.object, 0), at.stop)
    return found | {file.object: file.size for file in manifest.files if file.object}


def segments(locations: Sequence[Location], start: int, stop: int) -> list[tuple[str, int, int]]:
    """Return the ranges that hold stored bytes `start` to `stop` of a form: (object, start, length), in order."""
    found, at = [], 0
    for location in locations:
        length = location.stop - location.start
        low, high = max(start, at), min(stop, at + length)
        if low < high:
            found.append((location.object, location.start + low - at, high - low))
        at += length
    return found
