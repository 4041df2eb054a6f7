"""A store: the layout of chunked models in a storage.

    surfw.json                             marks a store, with its version
    models/NAME.json                       a manifest behind its digest; a model is visible when this exists
    blobs/ab/abcdef….safetensors           a chunk's payload behind a safetensors header
    blobs/ab/abcdef….json                  a tokenizer file, with the suffix of its name
    partial/                               work in progress; only the `chunk` that wrote it reads it
    leases/, prunes/                       files by which writers and pruners coordinate: see `housekeeping.leases`

Blobs are named by their content and written first; the manifest is written last. Half a model is never visible.
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
        """Name the backend, which is adapted if it is a custom one. Nothing is read yet.

        Args:
            backend: where the store lies.
            origin_options: storage options for the origins of models that were not copied.
        """
        self.backend = adapt_backend(backend)
        self.objects = Objects(self.backend, MARKER, origin_options)
        """The objects that the manifests point to, named as in the manifests that this returns."""
        self.reloads = 0
        """How many documents were loaded again because they arrived damaged."""
        self.learned = LearnedDigests()
        """Digests of chunks whose manifests lack them."""
        self._given = backend
        self.url = display_url(self.backend.url)
        self._strays: set[str] = set()

    async def close(self, *, owned: bool) -> None:
        """Close the storages of origins, and the backend if it is `owned`.

        Of a backend that stays open, what was loaded for this store alone is dropped.
        """
        await self.objects.close()
        if owned:
            await self.backend.close()
        elif isinstance(self.backend, AdaptedBackend) and self.backend is not self._given:
            await self.backend.let_go()

    async def check(self) -> None:
        """Check that this place is a store.

        Raises:
            NotAStoreError: it is not.
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
        """Why this is not a store, and what to do."""
        is_web = self.url.startswith("http")  # a web server need not list what it has
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
        """Make this place a store, if it is not one yet.

        Raises:
            NotAStoreError: the place is used for something else.
        """
        if not await self.check_place():
            document = {"format": FORMAT, "version": STORE_VERSION}
            await self.backend.save(MARKER, json.dumps(document).encode())

    async def check_place(self) -> bool:
        """Whether this place is a store already; if not, `create` makes it one.

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
        """A key that a store would not have before it has its marker."""
        found = await self.backend.find_foreign_key(_PARTIAL)
        if found is not None and found.startswith(_IN_PROGRESS):
            found = next((key for key in await self.backend.list() if not key.startswith(_IN_PROGRESS)), None)
        return found

    async def models(self) -> list[str]:
        """Return the names of the models, sorted. Files with names that a model cannot have are left out."""
        names = set(await self.listed())
        strays = {name for name in names if not _is_model_name(name)}
        for name in sorted(strays - self._strays):
            logger.warning("%s holds %a, which cannot be a model's name; it is left out", self.url, name[:80])
        self._strays = strays
        return sorted(names - strays)

    async def listed(self) -> list[str]:
        """Return the names of all manifests, also those that a model cannot have."""
        keys = await self.backend.list(MODELS)
        return [key.removeprefix(MODELS).removesuffix(".json") for key in keys if key.endswith(".json")]

    async def resolve(self, model: str) -> str:
        """Return the full name of a model, given in full or by a unique last part.

        Raises:
            UnknownModelError: no model or several models match.
        """
        if _is_model_name(model) and await self.backend.exists(manifest_key(model)):
            return model  # a web server need not list the others
        return find_model(model, await self.models(), where=self.url)

    async def expect_name(self, model: str) -> None:
        """Check that a model may have this name.

        Raises:
            UnknownModelError: it may not, so there is no such model.
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
        """Return the manifest as it is stored: no origin is opened, and its objects are named as in the stored bytes.

        Raises:
            UnknownModelError: there is no such model.
            ManifestError: its manifest is not valid.
        """
        return await self.read_manifest(model, partial(self._parse, model))

    async def read_manifest(self, model: str, parse: Callable[[bytes], T]) -> T:
        """Return what `parse`, called in a thread, makes of the model's manifest as it is stored.

        It is read again if it is not valid: it may have been damaged on its way.

        Raises:
            UnknownModelError: there is no such model.
            Exception: what `parse` raises.
        """
        return await self.load_right(
            lambda: self.manifest_bytes(model), parse, forget=lambda: self.backend.forget(manifest_key(model))
        )

    async def load_right(
        self, load: Callable[[], Awaitable[bytes]], parse: Callable[[bytes], T], *, forget: Callable[[], None]
    ) -> T:
        """Return what `parse`, called in a thread, makes of a document, which is loaded again if it arrives damaged.

        Args:
            load: loads it.
            parse: raises `IntegrityError` or `ManifestError` if it is damaged.
            forget: drops what is cached of it, before it is loaded again.

        Raises:
            IntegrityError, ManifestError: it stays damaged; the message says whether it was the same each time.
            Exception: what `load` and `parse` raise.
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
                        raise  # it is stored like this, and the parser knows best what that means
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
            return await self.backend.load_capped(key, MANIFEST_BYTES)  # published meanwhile, or a broken link
        except StorageError as exc:
            is_movable = self.backend.local_path(key) is not None and not is_denial(exc)
            advice = "; move it away, and chunk the model again" * is_movable
            raise StorageError(f"the manifest of model {model} cannot be read: {exc}{advice}") from exc

    async def manifest_revision(self, model: str) -> str | None:
        """Return a string that changes whenever the model's manifest does; None if the storage has no such thing."""
        return await self.backend.revision(manifest_key(model))

    def parse_manifest(self, model: str, data: bytes) -> Manifest:
        """Return the manifest for its stored bytes. A large one takes long: call this in a thread.

        Raises:
            ManifestError: it is damaged, or not valid.
            StorageError: it is another model's.
        """
        return self.objects.mount(self._parse(model, data), where=self.url)

    def _parse(self, model: str, data: bytes) -> Manifest:
        manifest = parse_stored_manifest(data, where=f"{self.url}, model {model}")
        if manifest.name != model:
            raise StorageError(f"{manifest_key(model)} in {self.url} is the manifest of {manifest.name!r}")
        return manifest

    def with_digests(self, manifest: Manifest) -> Manifest:
        """Return the manifest with the digests that are known by now (see `digests`); reads a file."""
        return self.learned.complete(manifest)

    async def publish(self, manifest: Manifest) -> None:
        """Make a model visible. All its blobs have to be written already.

        Raises:
            ManifestError: the manifest could not be read again.
        """
        try:
            data = encode_stored_manifest(manifest)
        except ValueError as exc:
            raise ManifestError(f"the configuration of {manifest.name} cannot be written as JSON: {exc}") from exc
        parse_stored_manifest(data, where=manifest.name)
        await self.backend.save(manifest_key(manifest.name), data)


async def is_checkpoint(backend: StorageBackend) -> bool:
    """Whether a place holds a plain checkpoint; else it holds a store.

    Raises:
        NotAStoreError: it holds neither.
        StorageError: the storage cannot be read.
    """
    if await backend.exists(MARKER):
        return False
    if await backend.exists(_CONFIG) or await backend.exists(_ADAPTER_CONFIG):  # the second is refused, with the reason
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
    """Return the key of the blob with this content."""
    return f"{BLOBS}{digest[:2]}/{digest}{suffix}"


def is_blob(key: str) -> bool:
    """Return whether the key is one of a blob."""
    return bool(_BLOB.fullmatch(key))


def belongs(key: str) -> bool:
    """Return whether a key is part of a store's layout; a storage may hold others too."""
    return key == MARKER or key.startswith(_IN_PROGRESS) or is_blob(key) or model_of(key) is not None


def model_of(key: str) -> str | None:
    """Return the model whose manifest has this key; None if it is not the key of a manifest."""
    name = key.removeprefix(MODELS).removesuffix(".json")
    return name if key == f"{MODELS}{name}.json" and _is_model_name(name) else None


def objects_of(manifest: Manifest) -> dict[str, int]:
    """Return the store's objects with a model's bytes, and how long each is at least; {} for a model in an origin."""
    if manifest.origin is not None:
        return {}
    found: dict[str, int] = {}
    for chunk in manifest.chunks:
        for form in chunk.forms:
            for at in form.locations:
                found[at.object] = max(found.get(at.object, 0), at.stop)
    return found | {file.object: file.size for file in manifest.files if file.object}


def segments(locations: Sequence[Location], start: int, stop: int) -> list[tuple[str, int, int]]:
    """Return the object ranges with stored bytes `start` to `stop` of a form: (object, start, length) in order."""
    found, at = [], 0
    for location in locations:
        length = location.stop - location.start
        low, high = max(start, at), min(stop, at + length)
        if low < high:
            found.append((location.object, location.start + low - at, high - low))
        at += length
    return found
