"""Keeping a store in order: list what lies in it, remove models, prune what nobody needs, verify every byte.

`leases` has the protocol by which writers and pruners on any machines stay out of each other's way; `prune` and
`verify` do what their names say.
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
        class_name: the class that is built to run it.
        dtype: the dtype it is built with.
        codecs: the forms that it can be run in.
        layers: how many of its chunks are layers.
        chunks: how many chunks it has.
        payload_bytes: the size of all its weights.
        stored_bytes: what its blobs take.
        shared_bytes: how much of that other models need as well.
        origin: where its weights lie, if they were not copied.
        base: of an adapter, the model that it changes.
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
    """A model that is being written, or whose writer ended before it was complete.

    Attributes:
        name: its name.
        host: the machine that writes it.
        pid: the process there.
        at_work: whether that process may still be running.
        idle_seconds: how long ago it gave its last sign of life.
        blobs: how many blobs are kept for it.
    """

    name: str
    host: str
    pid: int
    at_work: bool
    idle_seconds: float
    blobs: int


@dataclass(frozen=True, kw_only=True)
class StoreContents:
    """What lies in a store.

    Attributes:
        store: where.
        models: by name.
        unfinished: models that are not complete; they hold their blobs for a week after their last sign of life.
        stored_bytes: what the blobs of all models take.
        unneeded_blobs: how many blobs `prune` would remove; None if that is unknown.
        unneeded_bytes: their size.
        left_alone: keys that are not part of a store's layout.
        complaints: manifests and leases that are not understood; while there is one, nothing can be pruned.
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
    """Lists, prunes and verifies a store. Use it as an async context manager, or close it."""

    def __init__(
        self,
        store: str | os.PathLike[str] | StorageBackend,
        *,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        """Name the store; nothing is read yet.

        Args:
            store: its folder, its storage URL, or the storage itself, which stays the caller's to close.
            storage_options: for the storage that a URL names, such as `{"endpoint_url": "http://…"}`.

        Raises:
            ConfigurationError: it is something else.
        """
        expect("store", store, str | os.PathLike | StorageBackend, "a folder, a storage URL or a StorageBackend")
        self._owned = not isinstance(store, StorageBackend)
        if not isinstance(store, StorageBackend):
            store = open_backend(os.fspath(store), storage_options)
        self._store = Store(store, PlacedOptions(store.url, storage_options or {}))

    async def contents(self) -> StoreContents:
        """What lies in the store.

        Raises:
            NotAStoreError: no store lies there.
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
        """Remove the model with exactly this name, and give up unfinished work on it. Its blobs stay until `prune`.

        Servers notice within seconds, and refuse it from then on.

        Raises:
            UnknownModelError: there is no such model.
            ConfigurationError: adapters need it.
            StorageError: it is being written at the moment, or cannot be removed.
        """
        await self._store.expect_name(model)
        return await remove_model(self._store, model)

    async def prune(self, *, dry_run: bool = False, progress: Steps | None = None) -> Pruned:
        """Remove the blobs that no model needs, finished or not. Servers and writers on any machine may go on.

        Args:
            dry_run: only report what would be removed.
            progress: called with the bytes done, the bytes in all, and a key.

        Raises:
            StorageError: a manifest or a lease is not understood, so that nothing is removed, or a removal failed.
        """
        return await prune(self._store, dry_run=dry_run, progress=progress or (lambda *_: None))

    async def verify(self, model: str | None = None, *, progress: Steps | None = None) -> Verified:
        """Read every byte of one model, or of all, and compare every digest.

        Args:
            model: its name, in full or a unique last part; default: all.
            progress: called with the bytes done, the bytes in all, and the part that was read.

        Raises:
            UnknownModelError: there is no such model.
            StorageError: the storage does not answer. Damaged or missing parts are not an error: the
                result lists them.
        """
        return await verify(self._store, model, progress=progress or (lambda *_: None))

    async def close(self) -> None:
        """Close the storage, unless it is the caller's."""
        await self._store.close(owned=self._owned)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()


def summarise(manifest: Manifest, objects: Mapping[str, int], uses: Counter[str]) -> StoredModel:
    """What is listed of a model.

    Args:
        manifest: the model.
        objects: its blobs, and their sizes in bytes.
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
