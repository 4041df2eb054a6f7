"""Remove models, and the blobs that no manifest and no writer needs.

If a manifest or a lease cannot be parsed, nothing is removed. Objects whose keys are not part of a store's layout are
listed, but never removed. `leases` describes the protocol with writers.
"""

import asyncio
import fcntl
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from surfw.config import count
from surfw.errors import ConfigurationError, ManifestError, NotFoundError, StorageError, UnknownModelError
from surfw.manifest import Manifest, check_model_name
from surfw.storage.base import StorageBackend
from surfw.storage.fsspec_backend import is_denial, translate_errors
from surfw.storage.housekeeping.leases import ABANDONED_SECONDS, LeaseRecord, PruneLease, in_batches, read_leases
from surfw.storage.store import MODELS, PRUNES, Store, belongs, is_blob, manifest_key, objects_of
from surfw.threads import to_its_end

Steps = Callable[[int, int, str], object]
"""Called with the bytes done, the total bytes, and the name of the current item."""

_WORK = re.compile(r"[0-9a-f]{32}")
_SCRATCH = re.compile(r"[0-9a-f]{32}\.tmp|[0-9a-f]{64}\.lock")


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """What `prune` removed, or would remove.

    Attributes:
        store: the address of the store.
        blobs: how many blobs.
        blob_bytes: their size.
        leftover_bytes: the size of unfinished work on this machine that was not resumed for a week.
        left_alone: keys that are not part of a store's layout; they are not removed.
        dry_run: whether this was a dry run, which removes nothing.
    """

    store: str
    blobs: int
    blob_bytes: int
    leftover_bytes: int
    left_alone: tuple[str, ...]
    dry_run: bool


@dataclass(frozen=True, kw_only=True)
class Removed:
    """The result of `remove`. The blobs remain until the store is pruned.

    Attributes:
        model: the model's name.
        published: whether the model existed.
        given_up: how many unfinished runs of it were abandoned.
    """

    model: str
    published: bool
    given_up: int


@dataclass(frozen=True, kw_only=True)
class Survey:
    """The contents of a store, and which blobs are needed.

    Attributes:
        leases: the writers' leases; empty if one of them cannot be parsed.
        manifests: all readable manifests.
        unneeded: the blobs that no model and no writer needs, with their sizes in bytes; empty if `unclear` is not.
        left_alone: keys that are not part of a store's layout.
        unclear: descriptions of unreadable manifests and leases, each with the error to raise instead of pruning.
    """

    leases: Sequence[LeaseRecord]
    manifests: Sequence[Manifest]
    unneeded: Mapping[str, int]
    left_alone: Sequence[str]
    unclear: Mapping[str, StorageError]

    def expect_clear(self) -> None:
        """Raise StorageError if it is unknown which blobs are needed."""
        for error in self.unclear.values():
            raise error


async def survey(store: Store) -> Survey:
    """Survey a store. The protocol requires reading the leases before the manifests."""
    unclear: dict[str, StorageError] = {}
    leases, manifests = list[LeaseRecord](), list[Manifest]()
    try:
        leases = await read_leases(store.backend)
    except StorageError as exc:
        unclear[str(exc)] = exc
    unknown = f"which blobs of {store.url} are needed cannot be told"
    for name in await store.listed():
        try:
            manifests.append(await store.facts(name))
        except UnknownModelError:  # removed since it was listed
            continue
        except (ManifestError, StorageError) as exc:
            key = f"{MODELS}{name}.json"
            seen = str(exc) if str(exc).startswith(key) else f"{key}: {exc}"
            advice = "" if is_denial(exc) else ". Use the surfw that wrote it, or move it away"
            unclear[seen] = StorageError(f"{unknown}, because of {seen}; nothing is removed{advice}")
            unclear[seen].__cause__ = exc
    keys = await store.backend.list()
    left_alone = [key for key in keys if not belongs(key)]
    if not unclear:
        for key in left_alone:
            if key.startswith(MODELS) and not await store.backend.exists(key):
                error = StorageError(
                    f"{unknown}: {key} leads to nothing, and models may be missing there; nothing is removed. Mend the "
                    "link, or move it away"
                )
                unclear[str(error)] = error
    needed = {key for lease in leases if lease.holds for key in lease.objects}
    needed.update(key for manifest in manifests for key in objects_of(manifest))
    unneeded = [key for key in keys if is_blob(key) and key not in needed and not unclear]
    sizes = await _sizes(store.backend, unneeded)
    return Survey(leases=leases, manifests=manifests, unneeded=sizes, left_alone=left_alone, unclear=unclear)


async def _sizes(backend: StorageBackend, keys: Sequence[str]) -> dict[str, int]:
    """The size of each object in bytes; 0 for one that is gone."""

    async def size(key: str) -> int:
        with suppress(NotFoundError):
            return await backend.size(key)
        return 0

    found = [one for part in in_batches(keys) for one in await asyncio.gather(*map(size, part))]
    return dict(zip(keys, found, strict=True))


async def prune(store: Store, *, dry_run: bool, progress: Steps) -> Pruned:
    """Remove unneeded blobs, and leftovers of killed runs on this machine; see `Housekeeping.prune`."""
    await store.check()
    if dry_run:
        seen = await survey(store)
        seen.expect_clear()
    else:
        lease = PruneLease(store.backend)
        async with lease.held():
            seen = await survey(store)
            seen.expect_clear()
            await _remove_blobs(lease, seen.unneeded, progress)
            expired = [one.key for one in seen.leases if not one.holds]
            silent = [one.key for one in await read_leases(store.backend, PRUNES) if not one.at_work]
            await _remove_all(lease, [*expired, *silent])
    leftovers = await asyncio.to_thread(_remove_leftovers, store.backend.spool(), dry_run=dry_run)
    return Pruned(
        store=store.url,
        blobs=len(seen.unneeded),
        blob_bytes=sum(seen.unneeded.values()),
        leftover_bytes=leftovers,
        left_alone=tuple(seen.left_alone),
        dry_run=dry_run,
    )


async def _remove_blobs(lease: PruneLease, sizes: Mapping[str, int], progress: Steps) -> None:
    done, total = 0, sum(sizes.values())
    for part in in_batches(list(sizes)):
        progress(done, total, part[0])
        await _remove_all(lease, part)
        done += sum(sizes[key] for key in part)
        progress(done, total, part[0])


async def _remove_all(lease: PruneLease, keys: Sequence[str]) -> None:
    """Remove objects concurrently. However this ends, no removal is in flight afterwards."""
    if keys and not lease.is_trusted:
        raise StorageError(
            f"pruning {lease.backend.url} was interrupted for so long that writers do not wait for it; start again"
        )

    for failure in await to_its_end(asyncio.gather(*map(lease.backend.remove, keys), return_exceptions=True)):
        if failure is not None:
            raise failure


async def remove_model(store: Store, model: str) -> Removed:
    """See `Housekeeping.remove`."""
    key = manifest_key(check_model_name(model))
    await store.check()
    lease = PruneLease(store.backend)
    async with lease.held():  # a writer that resumes now waits, then writes its lease again
        writers = [one for one in await read_leases(store.backend) if one.model == model]
        writing = next((one for one in writers if one.at_work), None)
        if writing is not None:
            raise StorageError(
                f"{model} is being written into {store.url} by {writing}; stop that first, or wait for it"
            )
        published = await store.backend.exists(key)
        given_up = sum(one.holds for one in writers)
        if not published and not given_up:
            raise UnknownModelError(model, await store.models(), where=store.url)
        if adapters := await store.adapters_of(model):
            raise ConfigurationError(
                f"{model} is the base of {count(len(adapters), 'adapter')} in {store.url}, such as {adapters[0]}; "
                "remove these first"
            )
        await _remove_all(lease, [key, *(one.key for one in writers)])
    return Removed(model=model, published=published, given_up=given_up)


def _remove_leftovers(spool: Path, *, dry_run: bool) -> int:
    """Remove leftovers of killed runs from a spool that were not resumed for a week. Returns their size in bytes."""
    freed = 0
    with translate_errors(f"looking for leftovers in {spool}"):
        for path in sorted(spool.iterdir()) if spool.is_dir() else ():
            with suppress(FileNotFoundError), _claimed(path) as ours:
                if not ours:
                    continue
                files = [path, *path.rglob("*")]
                if time.time() - max(one.stat().st_mtime for one in files) <= ABANDONED_SECONDS:
                    continue
                freed += sum(one.stat().st_size for one in files if one.is_file())
                if dry_run:
                    continue
                if path.is_file():
                    path.unlink()
                else:
                    shutil.rmtree(path)
    return freed


@contextmanager
def _claimed(path: Path) -> Iterator[bool]:
    """Yield whether a path is named like a leftover and unused; it is locked during the context.

    A folder of unfinished work belongs to the process that holds the lock in it (see `chunking.write`).
    """
    if path.is_symlink() or not (_SCRATCH if path.is_file() else _WORK).fullmatch(path.name):
        yield False
    elif path.is_file():
        yield True
    else:
        with (path / "lock").open("r+b", buffering=0) as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True
