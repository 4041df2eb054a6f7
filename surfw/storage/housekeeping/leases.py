"""Leases: small objects in a store by which processes on any machines tell each other what they are doing.

    leases/ID.json    a writer: its model, and every blob that it relies on
    prunes/ID.json    a pruner: while this exists, no writer starts to rely on another blob

They keep `prune` from removing a blob of a model that is being written. All they need of the storage is that a read or
a listing shows every write that finished before it began; it has no locks and no renames.

- **A writer** adds a blob to its lease and writes the lease. *Then* it looks for pruners. If there is none, the blob is
  safe, and only now may the writer check whether it exists, or put it in place. If there is one, the writer waits until
  it is gone, writes its lease again and looks again. When all blobs are there, it renews its lease in this way once
  more, makes sure that every blob exists, publishes the manifest, and only then releases the lease.
- **A pruner** writes its lease. *Then* it reads the writers' leases, *then* the manifests, and removes the blobs that
  neither names. It releases its lease only when the last removal has ended.

Both write before they look, so at least one of the two sees the other. A writer's lease disappears only after its
manifest was published, so reading the manifests after the leases misses neither. Several pruners at once are as safe as
one. Removing leases counts as pruning.

Processes die, and machines sleep:

- A lease is renewed every minute (`RENEW_SECONDS`). A process that could not renew it for `TRUSTED_SECONDS`, by a clock
  that keeps counting during sleep, stops relying on it: a pruner removes nothing more, a writer renews and checks
  everything again before it publishes.
- A pruner that was silent for `SILENT_SECONDS` counts as gone, and so does one of this machine whose process has ended.
  The former compares the clocks of machines, which have to agree to `SILENT_SECONDS - TRUSTED_SECONDS`.
- A writer's lease protects its blobs for `ABANDONED_SECONDS` after its last renewal, so that a killed writer can be
  resumed. Its name is kept with the unfinished work, so that the next run continues with the same lease.
- A lease that cannot be removed is overwritten by one that says that it is over.
"""

import asyncio
import json
import logging
import math
import os
import re
import socket
import time
import uuid
from collections.abc import AsyncIterator, Collection, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surfw.errors import ManifestError, NotFoundError, StorageError, SurfwError
from surfw.files import read_regular
from surfw.manifest import check_model_name
from surfw.storage.base import StorageBackend
from surfw.storage.fsspec_backend import translate_errors
from surfw.storage.store import LEASES, PRUNES
from surfw.threads import to_its_end

logger = logging.getLogger("surfw.storage")

RENEW_SECONDS = 60
TRUSTED_SECONDS = 5 * 60
SILENT_SECONDS = 30 * 60
ABANDONED_SECONDS = 7 * 24 * 3600

_AT_ONCE = 16
_FORMAT, _VERSION = "surfw.notice", 1
_MAX_BYTES = 64 << 20
_LOOK_SECONDS = 1.0
_NAME_BYTES = 4096
_MOST_NUMBER = 1 << 53
_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, kw_only=True)
class LeaseRecord:
    """A lease as it was read: what some process on some host said of itself.

    Attributes:
        kernel: identifies the running kernel and the process's namespace; empty if unknown.
        renewed: when it was last written, in seconds since 1970.
        model: the model that is being written; empty for a pruner.
        objects: the blobs that the writer relies on.
        over: whether it no longer counts.
    """

    key: str
    host: str
    pid: int
    kernel: str
    renewed: float
    model: str
    objects: frozenset[str]
    over: bool

    @property
    def age_seconds(self) -> float:
        """How long ago it was written."""
        return time.time() - self.renewed

    @property
    def at_work(self) -> bool:
        """Whether its process may still be running."""
        gone = bool(self.kernel) and self.kernel == _kernel() and not Path(f"/proc/{self.pid}").exists()
        return not self.over and not gone and self.age_seconds < SILENT_SECONDS

    @property
    def holds(self) -> bool:
        """Whether its blobs have to stay."""
        return not self.over and self.age_seconds < ABANDONED_SECONDS

    def __str__(self) -> str:
        """Who it is, for people."""
        return f"process {self.pid} on {self.host}"


async def read_leases(backend: StorageBackend, prefix: str = LEASES) -> list[LeaseRecord]:
    """All leases of a kind (`LEASES` or `PRUNES`), including those that are over.

    Raises:
        StorageError: this surfw does not understand one of them.
    """
    found = []
    for key in await backend.list(prefix):
        with suppress(NotFoundError):  # released since it was listed
            data = await backend.load_capped(key, _MAX_BYTES)
            try:
                found.append(_parse(key, data))
            except (ValueError, KeyError, TypeError, RecursionError, ManifestError) as exc:
                raise StorageError(
                    f"{key} in {backend.url} is not understood ({type(exc).__name__}: {str(exc)[:200]}); a newer surfw "
                    "may be at work there. Use that, or remove the object if nothing writes into this store"
                ) from exc
    return found


def in_batches(keys: Sequence[str]) -> Iterator[Sequence[str]]:
    """The keys of objects, as many as housekeeping asks for at a time."""
    return (keys[start : start + _AT_ONCE] for start in range(0, len(keys), _AT_ONCE))


class Lease:
    """A lease of this process."""

    def __init__(self, backend: StorageBackend, key: str, *, model: str = "") -> None:
        self.backend = backend
        self.key = key
        self._model = model
        self._objects: set[str] = set()
        self._writing = asyncio.Lock()
        self._written = -math.inf
        self._over = False

    @property
    def is_trusted(self) -> bool:
        """Whether others can be assumed to respect it still."""
        return _clock() - self._written < TRUSTED_SECONDS

    async def write(self) -> None:
        """Write or renew it."""
        await to_its_end(self._write())  # a write that landed later than we think would be taken for a sign of life

    async def release(self) -> None:
        """End it, for good."""
        if self.key:
            await to_its_end(self._release())

    @asynccontextmanager
    async def renewed(self) -> AsyncIterator[None]:
        """Renew it every minute during the context, from its first write until it is released."""
        renewing = asyncio.create_task(self._renew(), name=f"surfw renew {self.key}")
        try:
            yield
        finally:
            renewing.cancel()
            await to_its_end(asyncio.wait([renewing]))
            if not renewing.cancelled():
                renewing.result()  # raises what ended it early

    async def _write(self) -> None:
        async with self._writing:
            if self._over:
                return
            now = _clock()
            await self.backend.save(self.key, self._encode())
            self._written = now

    async def _release(self) -> None:
        async with self._writing:
            self._over = True
            try:
                await self.backend.remove(self.key)
            except StorageError as exc:
                logger.info("%s cannot be removed, and is overwritten: %s", self.key, exc)
                await self.backend.save(self.key, self._encode())

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(RENEW_SECONDS)
            if self._written > -math.inf:
                try:
                    await self.write()
                except SurfwError as exc:
                    logger.warning("%s in %s could not be renewed: %s", self.key, self.backend.url, exc)

    def _encode(self) -> bytes:
        document: dict[str, Any] = {
            "format": _FORMAT, "version": _VERSION, "host": socket.gethostname(), "pid": os.getpid(),
            "kernel": _kernel(), "renewed": time.time(), "over": self._over, "model": self._model,
            "objects": [] if self._over else sorted(self._objects),
        }  # fmt: skip
        return json.dumps(document).encode()


class PruneLease(Lease):
    """The lease of a pruner."""

    def __init__(self, backend: StorageBackend) -> None:
        super().__init__(backend, f"{PRUNES}{uuid.uuid4().hex}.json")

    @asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        """Keep writers waiting during the context.

        Raises:
            StorageError: nothing can be removed from this storage.
        """
        await self.backend.remove(self.key)  # not there yet: a storage that cannot remove says so before anything else
        async with self.renewed():
            try:
                await self.write()
                yield
            finally:
                await self.release()


class WriteLease(Lease):
    """The lease of a writer. One whose writer failed or was killed stays, for the run that resumes the work."""

    def __init__(self, backend: StorageBackend, model: str, folder: Path) -> None:
        """`folder` is the local one of the model's unfinished work."""
        super().__init__(backend, "", model=model)
        self._folder = folder
        self._held: set[str] = set()

    async def hold(self, objects: Iterable[str]) -> None:
        """Protect blobs: call it before they are looked for or put in place. Waits while someone prunes.

        Raises:
            StorageError: the lease cannot be written.
        """
        added = set(objects) - self._held
        if added:
            await self._write_unpruned(added)
            self._held |= added

    async def confirm(self, objects: Collection[str]) -> None:
        """Make sure that all these blobs exist and stay; publish right afterwards.

        Raises:
            StorageError: one is gone, because the lease was given up, or this process slept for a week.
        """
        while True:
            await self._write_unpruned(objects)
            for part in in_batches(sorted(objects)):
                there = await asyncio.gather(*map(self.backend.exists, part))
                if not all(there):
                    raise StorageError(
                        f"{part[there.index(False)]} vanished from {self.backend.url} while {self._model} was written; "
                        "run the same command again"
                    )
            if self.is_trusted:
                return

    async def _write_unpruned(self, objects: Iterable[str]) -> None:
        """Write the lease, until it was written while nobody pruned: every later pruner sees such a lease."""
        self._objects.update(objects)
        if not self.key:
            self.key = f"{LEASES}{await asyncio.to_thread(self._name)}.json"
        waited = True
        while waited:
            await self.write()
            waited = False
            while found := [one for one in await read_leases(self.backend, PRUNES) if one.at_work]:
                if not waited:
                    logger.warning("waiting for 'surfw chunk --prune' (%s) in %s", found[0], self.backend.url)
                waited = True
                await asyncio.sleep(_LOOK_SECONDS)

    def _name(self) -> str:
        """The name of the lease of an earlier run, or a new one."""
        file = self._folder / "lease"
        with translate_errors(f"preparing {file}"):
            known = read_regular(file, _NAME_BYTES).decode(errors="replace") if file.exists() else ""
            if not _ID.fullmatch(known):
                known = uuid.uuid4().hex
                file.write_text(known)
        return known


def _parse(key: str, data: bytes) -> LeaseRecord:
    document = json.loads(data)
    if (document["format"], document["version"]) != (_FORMAT, _VERSION):
        raise ValueError(f"expected the format {_FORMAT!r}, version {_VERSION}")
    model, objects = _text(document["model"]), document["objects"]
    if not isinstance(objects, list):
        raise TypeError("objects is not a list")
    return LeaseRecord(
        key=key,
        host=_text(document["host"]),
        pid=int(_number(document["pid"])),
        kernel=_text(document["kernel"]),
        renewed=_number(document["renewed"]),
        model=model if key.startswith(PRUNES) else check_model_name(model),
        objects=frozenset(map(_text, objects)),
        over=document["over"] is True,
    )


def _text(value: object) -> str:
    if not isinstance(value, str) or len(value) > 4096 or not value.isprintable():
        raise ValueError(f"{str(value)[:40]!a} is not a printable text")
    return value


def _number(value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= _MOST_NUMBER:
        raise ValueError(f"{str(value)[:40]!a} is no number from 0 to 2^53")  # NaN would be neither old nor new
    return value


def _clock() -> float:
    """Seconds that also count while the machine sleeps, where it can tell."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _kernel() -> str:
    """Equal for processes that see each other's process ids."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    return ""
