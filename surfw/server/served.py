"""What a server serves from start to stop: a store, its models, a cache of its pages, and the counters.

The store is in a storage that the caller opened, or at a folder or URL. A plain checkpoint there is served in place,
through a private store that a child process creates, so that this process never loads torch.
"""

import asyncio
import json
import logging
import sys
from asyncio.subprocess import PIPE
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from surfw import errors
from surfw.config import MB, CachePolicy, display_url, format_size
from surfw.errors import ConfigurationError, SurfwError
from surfw.metrics import Metrics
from surfw.server.catalog import Catalog
from surfw.server.journal import Journal, Sparse
from surfw.server.late_digests import LateDigests
from surfw.server.pages import MIN_CACHE_BYTES, PageCache
from surfw.server.recording import Recording
from surfw.server.redis_tier import RedisTier
from surfw.storage import StorageBackend, Store, open_backend
from surfw.storage.backends import refuse_file
from surfw.storage.origins import PlacedOptions, private_stores
from surfw.storage.store import is_checkpoint
from surfw.wire import CacheShortage

_CHECK_SECONDS = 2
"""Less than the time limit of a plain request, which must be answered even while the storage hangs."""

_MB_STEP = 10
"""Recommended cache sizes are multiples of this."""


class ServedStore:
    """A store as a server reads it. It is opened anew for each start, with an empty cache and counters at zero.

    Attributes:
        url: the location of the store, without credentials.
        metrics: the counters.
        catalog: its models.
        pages: its cached pages.
        digests: computes digests that manifests lack.
        recording: the recording of what clients read, if there is one.
        cache_shortage: by how much the cache is too small for the largest model read so far; None if it is not.
    """

    def __init__(
        self,
        source: StorageBackend | str | Path,
        options: Mapping[str, Any],
        cache_bytes: int,
        journal: Journal,
        *,
        policy: CachePolicy = "schedule",
        record: Path | None = None,
    ) -> None:
        """Open the storage; nothing is read yet. A storage that was passed in stays open afterwards.

        The options are for the storage at the folder or URL, and for the origins of models that are served in place.

        Raises:
            ConfigurationError: the storage cannot be opened.
        """
        self._source = source
        self._options = options
        self._cache_bytes = cache_bytes
        self._policy = policy
        self._record = record
        self.recording: Recording | None = None
        self._journal = journal
        self._redis: RedisTier | None = None
        self._open()

    def put_behind(self, redis: RedisTier) -> None:
        """Ask this Redis before the storage from now on. The caller opens and closes it."""
        self._redis = self.pages.redis = redis

    def _open(self, private: Path | None = None) -> None:
        """Open the storage or, if given, the private store for the checkpoint there."""
        source = self._source
        if isinstance(source, StorageBackend):
            backend, place = source, str(source.url)
        else:
            refuse_file(source)
            backend, place = open_backend(private or source, {} if private else self._options), str(source)
        self.store = Store(backend, PlacedOptions(place, self._options))
        self.url = display_url(place) if private else self.store.url
        self.metrics = Metrics()
        self.catalog = Catalog(self.store, self._journal)
        self.pages = PageCache(self.store.objects, self._cache_bytes, self.metrics, self._journal, policy=self._policy)
        self.pages.redis = self._redis
        self.cache_shortage: CacheShortage | None = None
        self._absences = Sparse(self._journal, "storage", logging.WARNING)
        self.digests = LateDigests(self.store, self.pages, self.catalog)
        self._closed = False

    async def start(self) -> None:
        """Reopen the storage if it was closed, create a private store for a plain checkpoint, and look for models.

        Raises:
            SurfwError: there is neither a store nor a checkpoint, or it cannot be read.
        """
        if self._closed:
            self._open()
        if not isinstance(self._source, StorageBackend) and await is_checkpoint(self.store.backend):
            place = str(self._source)
            private = await make_private_store(place, self._options)
            await self.close()
            self._journal.note("models", f"{display_url(place)} is a plain checkpoint, and is served from where it is")
            self._open(private)
        await self.look()
        if self._record:
            self.recording = Recording(self._record, self._journal)

    async def look(self) -> None:
        """Check that the store exists and can be read, and look for new models."""
        await self.store.check()
        await self.catalog.models()

    async def reload(self) -> str:
        """Reload all models and return a summary in words; what cannot be read stays as it was.

        Raises:
            SurfwError: something cannot be read.
        """
        await self.store.check()
        return await self.catalog.reload()

    async def is_ready(self) -> bool:
        """Check the store as `look` does; return whether the storage is reachable, and log why not."""
        try:
            async with asyncio.timeout(_CHECK_SECONDS):
                await self.look()
            self._absences.flush()
            if not self.pages.healthy:
                self._journal.note("storage", f"the storage {self.url} answers again")
            self.pages.healthy = True
        except (SurfwError, TimeoutError) as exc:
            reason = str(exc) or f"no answer within {_CHECK_SECONDS} seconds"
            self._absences.note(f"the storage {self.url} cannot be reached", reason)
            self.pages.healthy = False
        return self.pages.healthy

    def note_reading(self, model: str) -> None:
        """Note that a client reads this model, and report if the cache is too small for it and was not for others."""
        (size, most), known = self.catalog.pass_bytes(model), self.cache_shortage
        if size <= max(self.pages.cache.capacity_bytes, known["pass_bytes"] if known else 0):
            return
        helpful_mb = -(-(most + MIN_CACHE_BYTES) // (_MB_STEP * MB)) * _MB_STEP
        self.cache_shortage = {"model": model, "pass_bytes": size, "cache_mb": helpful_mb}
        self._journal.note(
            "cache",
            f"the cache of {format_size(self.pages.cache.capacity_bytes)} is smaller than one pass over {model} "
            f"({format_size(size)}), so every pass reads from the storage; --cache-mb {helpful_mb} would hold it",
        )

    async def close(self) -> None:
        """Stop reading, and close the storage if it was opened here."""
        self._closed = True
        if self.recording:
            self.recording.close()
            self.recording = None
        self._absences.flush()
        await self.catalog.close()
        await self.digests.close()
        await self.pages.close()
        await self.store.close(owned=not isinstance(self._source, StorageBackend))


async def make_private_store(place: str, options: Mapping[str, Any]) -> Path:
    """Create a store whose one model is the checkpoint at a folder or URL, and return its folder.

    Exceptions of the child process are raised here.
    """
    command = (sys.executable, "-P", "-m", "surfw.chunking.in_place")  # -P: import nothing from the current folder
    try:
        stores = str(await asyncio.to_thread(private_stores))
        work = json.dumps({"place": place, "options": dict(options), "stores": stores}).encode()
    except (TypeError, ValueError) as exc:
        raise ConfigurationError(
            f"the storage options of {display_url(place)} cannot be handed to another process ({exc}); give plain "
            "values, or run surfw chunk --in-place, and serve that store"
        ) from exc
    # In its own session: a terminal's Ctrl-C must reach only this process, which then ends the child.
    child = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE, start_new_session=True)
    try:
        written, _ = await child.communicate(work)
    except BaseException:
        with suppress(ProcessLookupError):
            child.kill()
        await child.wait()
        raise
    try:
        answer = json.loads(written)
    except ValueError as exc:
        raise SurfwError(
            f"the process that reads {display_url(place)} ended with exit code {child.returncode}; what it wrote "
            "before says why, or run surfw chunk --in-place, and serve that store"
        ) from exc
    if "store" in answer:
        return Path(answer["store"])
    kind: type[SurfwError] = getattr(errors, answer["error"], SurfwError)
    raise (kind if kind.__init__ is SurfwError.__init__ else SurfwError)(answer["text"])
