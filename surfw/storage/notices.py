"""Notices: small objects in a store by which processes on any machines tell each other what they do.

    leases/ID.json    a writer: which model, and every blob that it relies on
    prunes/ID.json    a pruner: while this is here, no writer begins to rely on another blob

They keep `prune` from removing a blob of a model that is being written. Nothing is asked of the storage but that a
read or a listing shows every write that was finished before it began; there are no locks and no renames in it.

- **The writer** adds a blob to its lease and writes it. *Then* it looks for pruners. If there is none, the blob is
  safe, and only now may the writer look whether it exists, or put it in place. If there is one, the writer waits
  until there is none, and writes its lease and looks again. When all is there it renews its lease once more in this
  way, makes sure that every blob exists, publishes the manifest, and only then drops the lease.
- **The pruner** writes its notice. *Then* it reads the leases, *then* the manifests, and removes the blobs that
  neither of them names. Only when the last removal has ended does it drop its notice.

Each writes before it looks, so at least one of the two sees the other. A lease that is gone was dropped after its
manifest was published, so whoever reads manifests after leases misses neither. Any number of pruners is as safe as
one. Whoever removes leases is a pruner too.

Processes die, and machines sleep:

- A notice is renewed every minute (`RENEW_SECONDS`). Whoever could not do so for `TRUSTED_SECONDS`, by a clock that
  also counts sleep, acts on it no longer: a pruner removes nothing more, a writer renews and checks all again before
  it publishes.
- A pruner that was silent for `SILENT_SECONDS` counts as gone, as does one of this machine whose process is no more.
  The former compares clocks of machines: they have to agree to `SILENT_SECONDS - TRUSTED_SECONDS`.
- A lease holds its blobs for `ABANDONED_SECONDS` after its last renewal, so that a killed writer can be resumed.
- Where a notice cannot be removed, it is overwritten by one that says that it is over.
"""

import asyncio
import json
import logging
import math
import os
import socket
import time
import uuid
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surfw.errors import ManifestError, NotFoundError, StorageError, SurfwError
from surfw.manifest import check_model_name
from surfw.storage.base import StorageBackend
from surfw.threads import to_its_end

logger = logging.getLogger("surfw.storage")

LEASES, PRUNES = "leases/", "prunes/"
RENEW_SECONDS = 60
TRUSTED_SECONDS = 5 * 60
SILENT_SECONDS = 30 * 60
ABANDONED_SECONDS = 7 * 24 * 3600

_FORMAT, _VERSION = "surfw.notice", 1
_MAX_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class Notice:
    """What a process said of itself.

    Attributes:
        key: where it lies.
        host: the machine's name.
        pid: the process.
        kernel: identifies the running kernel and the process's namespace; empty if that cannot be told.
        renewed: when it was last written, in seconds since 1970.
        model: the model that is being written; empty for a pruner.
        objects: the blobs that the writer relies on.
        over: whether it counts no longer.
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
        """Whether its process may still be at work."""
        gone = bool(self.kernel) and self.kernel == _kernel() and not Path(f"/proc/{self.pid}").exists()
        return not self.over and not gone and self.age_seconds < SILENT_SECONDS

    @property
    def holds(self) -> bool:
        """Whether the blobs of a lease must stay."""
        return not self.over and self.age_seconds < ABANDONED_SECONDS

    def __str__(self) -> str:
        """Who it is, for people."""
        return f"process {self.pid} on {self.host}"


class Announcement:
    """This process's own notice."""

    def __init__(self, backend: StorageBackend, key: str, *, model: str = "") -> None:
        """Name the parts; nothing is written yet."""
        self.backend = backend
        self.key = key
        self._model = model
        self._objects: set[str] = set()
        self._writing = asyncio.Lock()
        self._posted = -math.inf
        self._over = False

    @property
    def trusted(self) -> bool:
        """Whether the others can be taken to know of it still."""
        return _clock() - self._posted < TRUSTED_SECONDS

    async def post(self) -> None:
        """Write it, or write it again."""
        await to_its_end(self._post())  # what is written later than one thinks would be read as a word of now

    async def withdraw(self) -> None:
        """Make it count no longer."""
        if self.key:
            await to_its_end(self._withdraw())

    @asynccontextmanager
    async def renewed(self) -> AsyncIterator[None]:
        """Write it again every minute meanwhile, once it was posted, until it is withdrawn."""
        stop = asyncio.Event()
        renewing = asyncio.create_task(self._renew(stop), name=f"surfw renew {self.key}")
        try:
            yield
        finally:
            stop.set()
            await to_its_end(renewing)

    async def _post(self) -> None:
        async with self._writing:
            if self._over:
                return
            now = _clock()
            await self.backend.save(self.key, self._encode())
            self._posted = now

    async def _withdraw(self) -> None:
        async with self._writing:
            self._over = True
            try:
                await self.backend.remove(self.key)
            except StorageError as exc:
                logger.info("%s cannot be removed, and is overwritten: %s", self.key, exc)
                await self.backend.save(self.key, self._encode())

    async def _renew(self, stop: asyncio.Event) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(RENEW_SECONDS):
                    await stop.wait()
                    return
            if self._posted > -math.inf:
                try:
                    await self._post()
                except SurfwError as exc:
                    logger.warning("%s in %s could not be renewed: %s", self.key, self.backend.url, exc)

    def _encode(self) -> bytes:
        document: dict[str, Any] = {
            "format": _FORMAT, "version": _VERSION, "host": socket.gethostname(), "pid": os.getpid(),
            "kernel": _kernel(), "renewed": time.time(), "over": self._over, "model": self._model,
            "objects": [] if self._over else sorted(self._objects),
        }  # fmt: skip
        return json.dumps(document).encode()


class Pruning(Announcement):
    """The notice of a pruner."""

    def __init__(self, backend: StorageBackend) -> None:
        """Name the storage."""
        super().__init__(backend, f"{PRUNES}{uuid.uuid4().hex}.json")

    @asynccontextmanager
    async def posted(self) -> AsyncIterator[None]:
        """Be announced meanwhile."""
        async with self.renewed():
            try:
                await self.post()
                yield
            finally:
                await self.withdraw()


async def read_notices(backend: StorageBackend, prefix: str) -> list[Notice]:
    """All notices of a kind, also those that are over.

    Raises:
        StorageError: one of them is none that this surfw understands.
    """
    found = []
    for key in await backend.list(prefix):
        with suppress(NotFoundError):  # dropped since it was listed
            found.append(_parse(key, await backend.load_capped(key, _MAX_BYTES), backend.url))
    return found


async def pruners(backend: StorageBackend) -> list[Notice]:
    """Those that may be at work."""
    return [notice for notice in await read_notices(backend, PRUNES) if notice.at_work]


def _parse(key: str, data: bytes, url: str) -> Notice:
    try:
        return _read(key, data)
    except (ValueError, KeyError, TypeError, RecursionError, ManifestError) as exc:
        raise StorageError(
            f"{key} in {url} is not understood ({type(exc).__name__}: {str(exc)[:200]}); a newer surfw may be at work "
            "there. Use that, or remove the object if nothing writes into this store"
        ) from exc


def _read(key: str, data: bytes) -> Notice:
    document = json.loads(data)
    if (document["format"], document["version"]) != (_FORMAT, _VERSION):
        raise ValueError(f"expected the format {_FORMAT!r}, version {_VERSION}")
    model = _text(document["model"])
    return Notice(
        key=key,
        host=_text(document["host"]),
        pid=int(document["pid"]),
        kernel=_text(document["kernel"]),
        renewed=float(document["renewed"]),
        model=model if key.startswith(PRUNES) else check_model_name(model),
        objects=frozenset(_text(one) for one in _list(document["objects"])),
        over=document["over"] is True,
    )


def _text(value: object) -> str:
    if not isinstance(value, str) or len(value) > 4096 or not value.isprintable():
        raise ValueError(f"{str(value)[:40]!a} is no printable text")
    return value


def _list(value: object) -> Iterable[object]:
    if not isinstance(value, list):
        raise TypeError("objects is no list")
    return value


def _clock() -> float:
    """Seconds that go on while the machine sleeps, where it can tell."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _kernel() -> str:
    """Equal for processes that see each other's numbers."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    return ""
