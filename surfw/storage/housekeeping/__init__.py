"""Maintain a store: list its contents, remove models, prune unneeded blobs, verify every byte.

`leases` implements the protocol that coordinates writers and pruners on any machine.
"""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from surfw.codec import whole_codecs
from surfw.config import display_url, expect
from surfw.manifest import Manifest
from surfw.storage.backends import open_backend
from surfw.storage.base import StorageBackend
from surfw.storage.housekeeping.prune import Pruned, Removed, Steps, prune, remove_model, survey
from surfw.storage.housekeeping.verify import Damage, Verified, verify
from surfw.storage.origins import PlacedOptions
from surfw.storage.store import Store, objects_of

__all__ = [
    "Damage",
    "Housekeeping",
    "Pruned",
    "Removed",
    "Steps",
    "StoreContents",
    "StoredModel",
    "UnfinishedModel",
    "Verified",
]


@dataclass(frozen=True, kw_only=True)
class StoredModel:
    """A model in a store.

    Attributes:
        name: its name.
        class_name: the model class that runs it.
        dtype: the dtype it is built with.
        codecs: the forms that it can be run in.
        layers: how many of its chunks are layers.
        chunks: how many chunks it has.
        payload_bytes: the size of all its weights.
        stored_bytes: the size of its blobs.
        shared_bytes: how much of that is shared with other models.
        origin: the address of its weights, if they were not copied.
        base: for an adapter, the name of its base model.
    """

    name: str
    class_name: str
    dtype: str
    codecs: tuple[str, ...]
    layers: int
    chunks: int
    payload_bytes: int
    stored_bytes: int
    shared_bytes: int
    origin: str | None
    base: str | None = None


@dataclass(frozen=True, kw_only=True)
class UnfinishedModel:
    """A model that is being written, or whose writer ended before completing it.

    Attributes:
        name: its name.
        host: the machine of its writer.
        pid: the process id of the writer.
        at_work: whether that process may still be running.
        idle_seconds: seconds since its lease was last renewed.
        blobs: how many blobs its lease protects.
    """

    name: str
    host: str
    pid: int
    at_work: bool
    idle_seconds: float
    blobs: int


@dataclass(frozen=True, kw_only=True)
class StoreContents:
    """The contents of a store.

    Attributes:
        store: the address of the store.
        models: the complete models.
        unfinished: incomplete models; their blobs are protected for a week after the last renewal of the lease.
        stored_bytes: the size of the blobs of all models.
        unneeded_blobs: how many blobs `prune` would remove; None if that is unknown.
        unneeded_bytes: their size; None if that is unknown.
        left_alone: keys that are not part of a store's layout.
        complaints: unreadable manifests and leases; as long as there is one, nothing can be pruned.
    """

    store: str
    models: tuple[StoredModel, ...]
    unfinished: tuple[UnfinishedModel, ...]
    stored_bytes: int
    unneeded_blobs: int | None
    unneeded_bytes: int | None
    left_alone: tuple[str, ...]
    complaints: tuple[str, ...]


class Housekeeping:
    """Lists, prunes and verifies a store. Use it as an async context manager, or call `close`."""

    def __init__(
        self,
        store: str | os.PathLike[str] | StorageBackend,
        *,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        """Set the store; nothing is read yet.

        Args:
            store: a folder, a storage URL, or a backend, which the caller has to close.
            storage_options: options for a storage URL, such as `{"endpoint_url": "http://…"}`.

        Raises:
            ConfigurationError: `store` is something else.
        """
        expect("store", store, str | os.PathLike | StorageBackend, "a folder, a storage URL or a StorageBackend")
        self._owned = not isinstance(store, StorageBackend)
        if not isinstance(store, StorageBackend):
            store = open_backend(os.fspath(store), storage_options)
        self._store = Store(store, PlacedOptions(store.url, storage_options or {}))

    async def contents(self) -> StoreContents:
        """Return the contents of the store.

        Raises:
            NotAStoreError: this is not a store.
            StorageError: it cannot be read.
        """
        await self._store.check()
        seen = await survey(self._store)
        needs = [objects_of(manifest) for manifest in seen.manifests]
        uses = Counter(key for objects in needs for key in objects)
        together = {key: size for objects in needs for key, size in objects.items()}
        return StoreContents(
            store=self._store.url,
            models=tuple(summarise(one, objects, uses) for one, objects in zip(seen.manifests, needs, strict=True)),
            unfinished=tuple(
                UnfinishedModel(
                    name=lease.model,
                    host=lease.host,
                    pid=lease.pid,
                    at_work=lease.at_work,
                    idle_seconds=max(0.0, lease.age_seconds),
                    blobs=len(lease.objects),
                )
                for lease in seen.leases
                if lease.holds
            ),
            stored_bytes=sum(together.values()),
            unneeded_blobs=None if seen.unclear else len(seen.unneeded),
            unneeded_bytes=None if seen.unclear else sum(seen.unneeded.values()),
            left_alone=tuple(seen.left_alone),
            complaints=tuple(seen.unclear),
        )

    async def remove(self, model: str) -> Removed:
        """Remove the model with exactly this name, and abandon unfinished work on it. Its blobs remain until `prune`.

        Servers notice within seconds, and refuse the model from then on.

        Raises:
            UnknownModelError: there is no such model.
            ConfigurationError: it is the base of adapters.
            StorageError: it is being written at the moment, or cannot be removed.
        """
        await self._store.expect_name(model)
        return await remove_model(self._store, model)

    async def prune(self, *, dry_run: bool = False, progress: Steps | None = None) -> Pruned:
        """Remove the blobs that no finished or unfinished model needs. Safe beside servers and writers on any machine.

        Args:
            dry_run: only report what would be removed.
            progress: called with the bytes done, the total bytes, and a key.

        Raises:
            StorageError: a manifest or lease cannot be parsed, so nothing is removed; or a removal failed.
        """
        return await prune(self._store, dry_run=dry_run, progress=progress or (lambda *_: None))

    async def verify(self, model: str | None = None, *, progress: Steps | None = None) -> Verified:
        """Read every byte of one model, or of all, and compare every digest.

        Args:
            model: its name, in full or a unique last part; default: all.
            progress: called with the bytes done, the total bytes, and the part being read.

        Raises:
            UnknownModelError: there is no such model.
            StorageError: the storage does not answer. Damaged or missing parts do not raise: the result lists them.
        """
        return await verify(self._store, model, progress=progress or (lambda *_: None))

    async def close(self) -> None:
        """Close the storage, unless it was passed in as a backend."""
        await self._store.close(owned=self._owned)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()


def summarise(manifest: Manifest, objects: Mapping[str, int], uses: Counter[str]) -> StoredModel:
    """Summarise a model for a listing.

    Args:
        manifest: the model.
        objects: its blobs, with their sizes in bytes.
        uses: how many models need each blob.
    """
    return StoredModel(
        name=manifest.name,
        class_name=manifest.class_name,
        dtype=manifest.dtype,
        codecs=whole_codecs(manifest),
        layers=manifest.layer_count,
        chunks=len(manifest.chunks),
        payload_bytes=manifest.payload_bytes,
        stored_bytes=sum(objects.values()),
        shared_bytes=sum(size for key, size in objects.items() if uses[key] > 1),
        origin=None if manifest.origin is None else display_url(manifest.origin.url),
        base=None if manifest.base is None else manifest.base.name,
    )
