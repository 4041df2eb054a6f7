"""Leases: small objects in a store through which processes on any machine coordinate.

    leases/ID.json    a writer: its model, and every blob that it relies on
    prunes/ID.json    a pruner: while it exists, no writer starts to rely on another blob

They keep `prune` from removing a blob of a model that is being written. The storage needs no locks and no renames; a
read or a listing only has to show every write that finished before it began.

- **A writer** adds a blob to its lease and writes the lease. *Then* it looks for pruners. If there is none, the blob is
  safe, and only now may the writer check whether the blob exists, or write it. If there is one, the writer waits until
  the pruner is gone, writes its lease again and looks again. When all blobs are written, it renews its lease in this
  way once more, checks that every blob exists, publishes the manifest, and only then releases the lease.
- **A pruner** writes its lease. *Then* it reads the writers' leases, *then* the manifests, and removes the blobs that
  neither names. It releases its lease only after the last removal has ended.

Both write before they look, so at least one of the two sees the other. A writer's lease disappears only after its
manifest was published, so reading the manifests after the leases misses neither. Several pruners at once are as safe as
one. Removing leases counts as pruning.

Processes die, and machines sleep:

- A lease is renewed every minute (`RENEW_SECONDS`). A process that could not renew its lease for `TRUSTED_SECONDS`, by
  a clock that runs during sleep, no longer relies on it: a pruner stops removing, and a writer renews the lease and
  checks everything again before it publishes.
- A pruner counts as gone if it did not renew its lease for `SILENT_SECONDS`, or if it ran on this machine and its
  process has ended. The former compares the clocks of machines, which must agree to within
  `SILENT_SECONDS - TRUSTED_SECONDS`.
- A writer's lease protects its blobs for `ABANDONED_SECONDS` after its last renewal, so that a killed writer can be
  resumed. Its name is stored with the unfinished work, so that the next run continues with the same lease.
- A lease that cannot be removed is overwritten with one that is marked as over.
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
    """A lease as read from the store.

    Attributes:
        kernel: identifies the running kernel and the process's PID namespace; empty if unknown.
        renewed: when it was last written, in seconds since 1970.
        model: the model that is being written; empty for a pruner.
        objects: the blobs that the writer relies on.
        over: whether it was released.
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
        """Seconds since it was written."""
        return time.time() - self.renewed

    @property
    def at_work(self) -> bool:
        """Whether its process may still be running."""
        gone = bool(self.kernel) and self.kernel == _kernel() and not Path(f"/proc/{self.pid}").exists()
        return not self.over and not gone and self.age_seconds < SILENT_SECONDS

    @property
    def holds(self) -> bool:
        """Whether it still protects its blobs."""
        return not self.over and self.age_seconds < ABANDONED_SECONDS

    def __str__(self) -> str:
        """Name the process, for display."""
        return f"process {self.pid} on {self.host}"


async def read_leases(backend: StorageBackend, prefix: str = LEASES) -> list[LeaseRecord]:
    """Read all leases of a kind (`LEASES` or `PRUNES`), including those that are over.

    Raises:
        StorageError: a lease cannot be parsed by this version of surfw.
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
    """Split keys into the batches that housekeeping requests at a time."""
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
        """Whether other processes still respect it."""
        return _clock() - self._written < TRUSTED_SECONDS

    async def write(self) -> None:
        """Write or renew the lease."""
        await to_its_end(self._write())  # a write that lands late would look like a renewal

    async def release(self) -> None:
        """Release the lease permanently."""
        if self.key:
            await to_its_end(self._release())

    @asynccontextmanager
    async def renewed(self) -> AsyncIterator[None]:
        """Renew the lease every minute during the context, from its first write until its release."""
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
        await self.backend.remove(self.key)  # does not exist yet: fails first if the storage cannot remove
        async with self.renewed():
            try:
                await self.write()
                yield
            finally:
                await self.release()


class WriteLease(Lease):
    """The lease of a writer. If the writer fails or is killed, it remains for the run that resumes the work."""

    def __init__(self, backend: StorageBackend, model: str, folder: Path) -> None:
        """`folder` is the local folder with the model's unfinished work."""
        super().__init__(backend, "", model=model)
        self._folder = folder
        self._held: set[str] = set()

    async def hold(self, objects: Iterable[str]) -> None:
        """Protect blobs; call it before checking whether they exist and before writing them. Waits for pruners.

        Raises:
            StorageError: the lease cannot be written.
        """
        added = set(objects) - self._held
        if added:
            await self._write_unpruned(added)
            self._held |= added

    async def confirm(self, objects: Collection[str]) -> None:
        """Check that all these blobs exist and are protected; publish right afterwards.

        Raises:
            StorageError: a blob is gone, because the lease was removed, or this process slept for a week.
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
        """Write the lease until no pruner was active after the write: every later pruner sees it."""
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
        """The lease name of the run that is resumed, or a new one."""
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
    """A monotonic clock that also runs during sleep, where the platform has one."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _kernel() -> str:
    """An id that is equal for processes that share a PID namespace."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    return ""
