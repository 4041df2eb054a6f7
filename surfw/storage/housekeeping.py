"""Keeping a store in order: seeing what lies in it, removing models and what nobody needs, reading all of it anew."""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from surfw.config import display_url, expect
from surfw.errors import ManifestError, StorageError, UnknownModelError
from surfw.manifest import Manifest
from surfw.storage.base import StorageBackend
from surfw.storage.notices import LEASES, Notice, read_notices
from surfw.storage.origins import PlacedOptions
from surfw.storage.prune import Pruned, Removed, Steps, prune, remove_model, survey, total_size
from surfw.storage.store import MODELS, Store, belongs, objects_of
from surfw.storage.verify import Verified, verify


@dataclass(frozen=True, kw_only=True)
class StoredModel:
    """A model in a store.

    Attributes:
        name: its name.
        class_name: the class that is built to run it.
        dtype: the dtype it is built with.
        layers: how many of its chunks are layers.
        chunks: how many chunks it has.
        payload_bytes: the size of all its weights.
        stored_bytes: what its blobs take.
        shared_bytes: how much of that other models need as well.
        origin: where its weights lie, if they were not copied.
    """

    name: str
    class_name: str
    dtype: str
    layers: int
    chunks: int
    payload_bytes: int
    stored_bytes: int
    shared_bytes: int
    origin: str | None


@dataclass(frozen=True, kw_only=True)
class UnfinishedModel:
    """A model that is being written, or was until its writer ended.

    Attributes:
        name: its name.
        host: the machine that writes it.
        pid: the process there.
        at_work: whether that may still be at work.
        idle_seconds: how long ago it said so.
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
        unneeded_blobs: how many blobs `prune` would remove; None if that cannot be told.
        unneeded_bytes: their size.
        left_alone: keys that are not of a store's layout.
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
    """A store, to be kept in order. Use it as an async context manager, or close it."""

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
            ConfigurationError: it is none of these.
        """
        expect("store", store, str | os.PathLike | StorageBackend, "a folder, a storage URL or a StorageBackend")
        self._owned = not isinstance(store, StorageBackend)
        if not isinstance(store, StorageBackend):
            from surfw.storage import open_backend

            store = open_backend(os.fspath(store), storage_options)
        self._store = Store(store, PlacedOptions(store.url, storage_options or {}))

    async def contents(self) -> StoreContents:
        """What lies in the store.

        Raises:
            NotAStoreError: no store lies there.
            StorageError: it cannot be read.
        """
        await self._store.check()
        complaints: list[str] = []
        manifests = await self._manifests(complaints)
        needs = [objects_of(manifest) for manifest in manifests]
        uses = Counter(key for objects in needs for key in objects)
        unneeded, sizes = None, list[int]()
        try:
            leases = await read_notices(self._store.backend, LEASES)
            if not complaints:
                unneeded = (await survey(self._store)).unneeded
                sizes = await total_size(self._store.backend, unneeded)
        except StorageError as exc:
            leases, complaints = [], [*complaints, str(exc)]
        together = {key: size for objects in needs for key, size in objects.items()}
        return StoreContents(
            store=self._store.url,
            models=tuple(_describe(one, objects, uses) for one, objects in zip(manifests, needs, strict=True)),
            unfinished=tuple(_unfinished(lease) for lease in leases if lease.holds),
            stored_bytes=sum(together.values()),
            unneeded_blobs=None if unneeded is None else len(unneeded),
            unneeded_bytes=None if unneeded is None else sum(sizes),
            left_alone=tuple(key for key in await self._store.backend.list() if not belongs(key)),
            complaints=tuple(complaints),
        )

    async def remove(self, model: str) -> Removed:
        """Remove a model, and give up unfinished work on it. Its blobs stay until `prune`.

        Servers notice within seconds, and refuse it from then on.

        Raises:
            UnknownModelError: there is no such model.
            StorageError: it is being written at the moment, or cannot be removed.
        """
        await self._store.expect_name(model)
        return await remove_model(self._store, model)

    async def prune(self, *, dry_run: bool = False, progress: Steps | None = None) -> Pruned:
        """Remove the blobs that no model needs, finished or not; beside servers and writers on any machine.

        Args:
            dry_run: only tell what would be removed.
            progress: called with the bytes done, the bytes in all, and a key.

        Raises:
            StorageError: a manifest or a lease is not understood, so that nothing is removed, or a removal failed.
        """
        return await prune(self._store, dry_run=dry_run, progress=progress or (lambda *_: None))

    async def verify(self, model: str | None = None, *, progress: Steps | None = None) -> Verified:
        """Read every byte of one model, or of all, and compare every digest.

        Args:
            model: its name in full; default: all.
            progress: called with the bytes done, the bytes in all, and the part that was read.

        Raises:
            UnknownModelError: there is no such model.
            StorageError: the storage does not answer. What is damaged or missing is no error, but told in the result.
        """
        if model is not None:
            await self._store.expect_name(model)
        return await verify(self._store, model, progress=progress or (lambda *_: None))

    async def close(self) -> None:
        """Close the storage, unless it is the caller's."""
        await self._store.objects.close()
        if self._owned:
            await self._store.backend.close()
        else:
            await self._store.let_go()

    async def __aenter__(self) -> Self:
        """Nothing to do yet."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        """Close."""
        await self.close()

    async def _manifests(self, complaints: list[str]) -> list[Manifest]:
        found = []
        for name in await self._store.listed():
            try:
                found.append(await self._store.facts(name))
            except UnknownModelError:  # removed since it was listed
                continue
            except (ManifestError, StorageError) as exc:
                complaints.append(f"{MODELS}{name}.json: {exc}")
        return found


def _describe(manifest: Manifest, objects: dict[str, int], uses: "Counter[str]") -> StoredModel:
    return StoredModel(
        name=manifest.name,
        class_name=manifest.class_name,
        dtype=manifest.dtype,
        layers=manifest.layer_count,
        chunks=len(manifest.chunks),
        payload_bytes=manifest.payload_bytes,
        stored_bytes=sum(objects.values()),
        shared_bytes=sum(size for key, size in objects.items() if uses[key] > 1),
        origin=None if manifest.origin is None else display_url(manifest.origin.url),
    )


def _unfinished(lease: Notice) -> UnfinishedModel:
    return UnfinishedModel(
        name=lease.model,
        host=lease.host,
        pid=lease.pid,
        at_work=lease.at_work,
        idle_seconds=max(0.0, lease.age_seconds),
        blobs=len(lease.objects),
    )
