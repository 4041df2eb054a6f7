"""Removing the blobs that no manifest and no writer needs, and giving models up. `notices` has the protocol.

What is not understood is never touched: if one manifest or one lease cannot be read, nothing is removed at all;
objects whose keys are not of a store's layout are named, and stay.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from surfw.errors import ManifestError, NotFoundError, StorageError, UnknownModelError
from surfw.manifest import check_model_name
from surfw.storage.base import StorageBackend
from surfw.storage.notices import LEASES, PRUNES, Notice, Pruning, read_notices
from surfw.storage.spools import remove_leftovers
from surfw.storage.store import MODELS, Store, belongs, is_blob, manifest_key, objects_of
from surfw.threads import to_its_end

Steps = Callable[[int, int, str], object]
"""Called with what is done, of how much, in bytes, and with the name of what is next."""

_AT_ONCE = 16


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """What `prune` removed, or would remove.

    Attributes:
        store: where.
        blobs: how many blobs.
        blob_bytes: their size.
        leftover_bytes: the size of unfinished work on this machine that nobody resumed for a week.
        left_alone: keys that are not of a store's layout; they stay.
        dry_run: whether all of it is still there.
    """

    store: str
    blobs: int
    blob_bytes: int
    leftover_bytes: int
    left_alone: tuple[str, ...]
    dry_run: bool


@dataclass(frozen=True, kw_only=True)
class Removed:
    """What `remove` did; the blobs stay until the store is pruned.

    Attributes:
        model: the name.
        published: whether there was such a model.
        given_up: how many unfinished runs of it were given up.
    """

    model: str
    published: bool
    given_up: int


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What lies in a store, by who needs it: leases were read first, then manifests."""

    leases: Sequence[Notice]
    unneeded: Sequence[str]
    strangers: Sequence[str]


async def survey(store: Store) -> Survey:
    """Look which blobs nobody needs.

    Raises:
        StorageError: that cannot be told, because something is not understood.
    """
    leases = await read_notices(store.backend, LEASES)
    needed = {key for lease in leases if lease.holds for key in lease.objects}
    for name in await store.listed():
        needed.update(await _needs_of(store, name))
    keys = await store.backend.list()
    strangers = [key for key in keys if not belongs(key)]
    for key in strangers:
        if key.startswith(MODELS) and not await store.backend.exists(key):
            raise StorageError(
                f"which blobs of {store.url} are needed cannot be told: {key} leads to nothing, and models may be "
                "missing there; nothing is removed. Mend the link, or move it away"
            )
    unneeded = [key for key in keys if is_blob(key) and key not in needed]
    return Survey(leases=leases, unneeded=unneeded, strangers=strangers)


async def _needs_of(store: Store, name: str) -> Sequence[str]:
    try:
        return list(objects_of(await store.facts(name)))
    except UnknownModelError:  # removed since it was listed
        return ()
    except (ManifestError, StorageError) as exc:
        raise StorageError(
            f"which blobs of {store.url} are needed cannot be told, because of {MODELS}{name}.json: {exc}; "
            "nothing is removed. Use the surfw that wrote it, or move it away"
        ) from exc


async def total_size(backend: StorageBackend, keys: Sequence[str]) -> list[int]:
    """The length of each object in bytes; 0 for one that is gone."""

    async def size(key: str) -> int:
        try:
            return await backend.size(key)
        except NotFoundError:
            return 0

    found: list[int] = []
    for start in range(0, len(keys), _AT_ONCE):
        found += await asyncio.gather(*(size(key) for key in keys[start : start + _AT_ONCE]))
    return found


async def prune(store: Store, *, dry_run: bool, progress: Steps) -> Pruned:
    """Remove what nobody needs.

    Raises:
        StorageError: what is needed cannot be told, or something cannot be removed.
    """
    await store.check()
    if dry_run:
        seen = await survey(store)
        sizes = await total_size(store.backend, seen.unneeded)
    else:
        pruning = Pruning(store.backend)
        await store.backend.remove(pruning.key)  # nothing there: this says first if nothing can be removed at all
        async with pruning.posted():
            seen = await survey(store)
            sizes = await total_size(store.backend, seen.unneeded)
            await _remove_blobs(pruning, seen.unneeded, sizes, progress)
            expired = [lease.key for lease in seen.leases if not lease.holds]
            silent = [one.key for one in await read_notices(store.backend, PRUNES) if not one.at_work]
            await _remove_all(pruning, [*expired, *silent])
    leftovers = await asyncio.to_thread(remove_leftovers, store.backend.spool(), dry_run=dry_run)
    return Pruned(
        store=store.url,
        blobs=len(seen.unneeded),
        blob_bytes=sum(sizes),
        leftover_bytes=leftovers,
        left_alone=tuple(seen.strangers),
        dry_run=dry_run,
    )


async def _remove_blobs(pruning: Pruning, keys: Sequence[str], sizes: Sequence[int], progress: Steps) -> None:
    done, total = 0, sum(sizes)
    for start in range(0, len(keys), _AT_ONCE):
        progress(done, total, keys[start])
        await _remove_all(pruning, keys[start : start + _AT_ONCE])
        done += sum(sizes[start : start + _AT_ONCE])
        progress(done, total, keys[start])


async def _remove_all(pruning: Pruning, keys: Sequence[str]) -> None:
    """Remove objects at once; no removal is under way any more when this ends, however it does."""
    if keys and not pruning.trusted:
        raise StorageError(
            f"pruning {pruning.backend.url} was interrupted for so long that writers do not wait for it; start again"
        )

    async def remove() -> list[BaseException | None]:
        return await asyncio.gather(*(pruning.backend.remove(key) for key in keys), return_exceptions=True)

    for failure in await to_its_end(remove()):
        if failure is not None:
            raise failure


async def remove_model(store: Store, model: str) -> Removed:
    """Remove a model, and give up unfinished work on it. A server that serves it notices within seconds.

    Raises:
        UnknownModelError: there is neither.
        StorageError: it is being written, or cannot be removed.
    """
    key = manifest_key(check_model_name(model))
    await store.check()
    pruning = Pruning(store.backend)
    await store.backend.remove(pruning.key)
    async with pruning.posted():  # a writer that resumes just now writes its lease anew once this is over
        leases = [lease for lease in await read_notices(store.backend, LEASES) if lease.model == model]
        writing = next((lease for lease in leases if lease.at_work), None)
        if writing is not None:
            raise StorageError(
                f"{model} is being written into {store.url} by {writing}; stop that first, or wait for it"
            )
        published = await store.backend.exists(key)
        given_up = sum(lease.holds for lease in leases)
        if not published and not given_up:
            raise UnknownModelError(model, await store.models(), where=store.url)
        await _remove_all(pruning, [key, *(lease.key for lease in leases)])
    return Removed(model=model, published=published, given_up=given_up)
