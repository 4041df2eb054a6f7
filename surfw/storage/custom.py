"""The adapter for custom storages: through it they behave like surfw's own.

Invariants: every key and prefix is checked before a custom backend sees it; every foreign exception is translated to
one of surfw's, with the backend's class and the key; the types of all results are checked; a backend that can only load
whole objects loads each object once for all its ranges (see `SharedLoads`).
"""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from inspect import isawaitable
from pathlib import Path
from typing import Any, BinaryIO

from surfw.config import SHARED_LOADS_BYTES
from surfw.errors import ConfigurationError, NotFoundError, StorageError
from surfw.storage.base import (
    RangedBackend,
    StorageBackend,
    check_key,
    check_prefix,
    expect_length,
    refuse_size,
)
from surfw.storage.fsspec_backend import translate_all_errors
from surfw.threads import cancel_all, to_its_end


def adapt_backend(backend: StorageBackend) -> RangedBackend:
    """Return surfw's own backends unchanged, and any other wrapped in an adapter that enforces surfw's rules.

    Raises:
        ConfigurationError: it is not a backend.
    """
    if isinstance(backend, RangedBackend):
        return backend
    _expect_backend(backend)
    return AdaptedBackend(backend)


def _expect_backend(given: object) -> None:
    if not isinstance(given, StorageBackend):
        seen = f"the class {given.__name__}" if isinstance(given, type) else f"{type(given).__name__} object"
        raise ConfigurationError(f"{seen} is no storage backend; give an instance of a subclass of StorageBackend")


class AdaptedBackend(RangedBackend):
    """A custom backend behind the adapter that `adapt_backend` makes."""

    def __init__(self, inner: StorageBackend) -> None:
        """Wrap `inner`; nothing is called yet."""
        self.inner = inner
        self.url = str(inner.url)
        self._shared = SharedLoads(self.load, SHARED_LOADS_BYTES)
        self._pinned: dict[str, str] = {}
        self.parallel_reads = max(1, inner.parallel_reads)
        self.silence_timeout = inner.silence_timeout

    def _own(self, method: str) -> bool:
        """Whether the custom backend implements this optional method."""
        return getattr(type(self.inner), method) is not getattr(StorageBackend, method)

    def _call(self, method: str, about: str = "") -> str:
        return f"{type(self.inner).__name__}.{method}({about})"

    @contextmanager
    def _translate(self, method: str, about: str = "") -> Iterator[None]:
        """Translate foreign exceptions; surfw's own pass through."""
        with translate_all_errors(f"{self._call(method, about)} in {self.url}"):
            yield

    @contextmanager
    def _changing(self, method: str, key: str) -> Iterator[None]:
        """Check the key, translate errors, and always drop the cached object."""
        with self._translate(method, check_key(key)):
            try:
                yield
            finally:
                self._shared.forget(key)

    def _expect_awaitable(self, method: str, given: object) -> Awaitable[Any]:
        if not isawaitable(given):
            name = f"{type(self.inner).__name__}.{method}"
            raise StorageError(
                f"{name} gave {type(given).__name__}, and nothing to await; write it as 'async def {method}'"
            )
        return given

    async def _ask(self, method: str, key: str, *arguments: Any) -> Any:
        """Call a method for one object; a `KeyError` means that the object does not exist."""
        with self._translate(method, check_key(key)):
            try:
                return await self._expect_awaitable(method, getattr(self.inner, method)(key, *arguments))
            except KeyError as exc:
                raise NotFoundError(f"{key} in {self.url}: not found") from exc

    async def _ask_bytes(self, method: str, key: str, *arguments: Any) -> bytes:
        data = await self._ask(method, key, *arguments)
        if not isinstance(data, bytes | bytearray | memoryview):
            raise StorageError(f"{self._call(method, key)} gave {type(data).__name__}, expected bytes")
        return bytes(data)

    async def load(self, key: str) -> bytes:
        """Return the whole object."""
        return await self._ask_bytes("load", key)

    async def load_capped(self, key: str, most_bytes: int) -> bytes:
        """Return the whole object, which may have at most `most_bytes`; checked after loading if there is no `size`."""
        if not self._own("load_capped"):
            if self._own("size"):
                refuse_size(await self.size(key), most_bytes, f"{key} in {self.url}")
            return await super().load_capped(key, most_bytes)
        data = await self._ask_bytes("load_capped", key, most_bytes)
        refuse_size(len(data), most_bytes, f"{key} in {self.url}")
        return data

    def forget(self, key: str) -> None:
        """Drop the cached object, so that the next range asks the custom backend again."""
        self._shared.forget(check_key(key))
        with self._translate("forget", key):
            self.inner.forget(key)

    async def save(self, key: str, data: bytes | BinaryIO) -> None:
        """Write an object."""
        with self._changing("save", key):
            await self._expect_awaitable("save", self.inner.save(key, data))

    async def exists(self, key: str) -> bool:
        """Return whether the object exists."""
        with suppress(NotFoundError):
            return bool(await self._ask("exists", key))
        return False

    async def list(self, prefix: str = "") -> list[str]:
        """Return the sorted keys that start with the prefix."""
        with self._translate("list", check_prefix(prefix)):
            found: object = await self._expect_awaitable("list", self.inner.list(prefix))
        if isinstance(found, str | bytes) or not isinstance(found, Collection):
            raise StorageError(f"{self._call('list', prefix)} gave {type(found).__name__}, expected a list of keys")
        for key in found:
            if not isinstance(key, str) or not key.startswith(prefix):
                raise StorageError(
                    f"{self._call('list', prefix)} gave {str(key)[:80]!r} ({type(key).__name__}), "
                    "expected whole keys as strings that start with the prefix"
                )
        return sorted(found)

    async def remove(self, key: str) -> None:
        """Remove an object; a missing one is no error."""
        with suppress(NotFoundError), self._changing("remove", key), suppress(KeyError):
            await self._expect_awaitable("remove", self.inner.remove(key))

    async def size(self, key: str) -> int:
        """Return the object's length in bytes."""
        if not self._own("size"):
            return len(await self._shared.get(check_key(key)))
        with self._translate("size", key):
            return int(await self._ask("size", key))

    async def revision(self, key: str) -> str | None:
        """Return a string that changes whenever the object does; None if the custom backend has none."""
        told: object = await self._ask("revision", key)
        if told is not None and not isinstance(told, str):
            raise StorageError(f"{self._call('revision', key)} gave {type(told).__name__}, expected a text or None")
        return told

    async def load_range(self, key: str, start: int, stop: int) -> bytes:
        """Return bytes `start` to `stop` (end-exclusive) of an object."""
        if not self._own("load_range"):
            return await self._load_through_read_into(key, start, stop)
        data = await self._ask_bytes("load_range", key, start, stop)
        return expect_length(data, stop - start, key, self.url)

    async def read_into(self, key: str, start: int, destination: memoryview, *, revision: str | None = None) -> None:
        """Fill `destination` with the object's bytes from `start` on; cached bytes of another revision are dropped."""
        stop = start + destination.nbytes
        if revision is not None and self._pinned.get(check_key(key)) != revision:
            self._shared.forget(key)
            self._pinned[key] = revision
        if self._own("read_into"):
            await to_its_end(self._ask("read_into", key, start, destination))
        elif self._own("load_range"):
            destination[:] = await self.load_range(key, start, stop)
        else:
            whole = memoryview(await self._shared.get(check_key(key), stop))
            destination[:] = expect_length(whole[start:stop], stop - start, key, self.url)
        if revision is not None:
            await self.expect_revision(key, revision)

    async def find_foreign_key(self, known: str) -> str | None:
        """Return a key that does not start with `known`, if any."""
        if not self._own("find_foreign_key"):
            return await super().find_foreign_key(known)
        with self._translate("find_foreign_key", check_prefix(known)):
            return await self.inner.find_foreign_key(known)

    def check_rights(self) -> None:
        """Check early that a store can be written here."""
        with self._translate("check_rights"):
            self.inner.check_rights()

    def local_path(self, key: str) -> Path | None:
        """Return the object's path if objects are local files, otherwise None."""
        with self._translate("local_path", check_key(key)):
            return self.inner.local_path(key)

    def spool(self) -> Path:
        """Return the local spool folder."""
        with self._translate("spool"):
            return self.inner.spool()

    async def adopt(self, key: str, path: Path) -> None:
        """Move a finished local file into the storage."""
        with self._changing("adopt", key):
            await (self.inner.adopt(key, path) if self._own("adopt") else super().adopt(key, path))

    async def let_go(self) -> None:
        """Stop loading and drop all cached objects; the custom backend stays open."""
        await self._shared.close()

    async def close(self) -> None:
        """Drop all cached objects, and close the custom backend."""
        await self.let_go()
        with self._translate("close"):
            await self.inner.close()


class SharedLoads:
    """A cache for a storage that can only load whole objects: all ranges of an object share one load.

    Invariants:

    - Ranges of an object that is being loaded join that load (*single-flight*); later ones find it in the cache.
    - An object is evicted when its last byte has been read, or when others need the memory. The cache never exceeds its
      budget, except for a single object: the one that was loaded last.
    - When a load fails, all ranges that wait for it fail; the next range loads again. Cancelling a range does not
      cancel the load.
    - A task belongs to an event loop. A task of another loop is never awaited, so loops may be used in succession.
    """

    def __init__(self, load: Callable[[str], Awaitable[bytes]], budget_bytes: int) -> None:
        """Start empty; `load` loads a whole object by its key."""
        self.kept_bytes = 0
        self._load = load
        self._budget_bytes = budget_bytes
        self._kept: OrderedDict[str, bytes] = OrderedDict()
        self._loading: dict[str, asyncio.Task[bytes]] = {}

    async def get(self, key: str, stop: int | None = None) -> bytes:
        """Return the whole object. `stop` is the end of the bytes that the caller reads; None if it reads none yet."""
        data = self._kept.get(key)
        if data is None:
            data = await asyncio.shield(self._task(key))
        else:
            self._kept.move_to_end(key)
        if stop is not None and stop >= len(data) and self._kept.get(key) is data:
            self._drop(key)
        return data

    def forget(self, key: str) -> None:
        """Drop an object that may have changed in the storage."""
        self._loading.pop(key, None)
        self._drop(key)

    async def close(self) -> None:
        """Cancel all loads, and drop all objects."""
        loop = asyncio.get_running_loop()
        await cancel_all(task for task in self._loading.values() if task.get_loop() is loop)
        self._loading.clear()
        self._kept.clear()
        self.kept_bytes = 0

    def _task(self, key: str) -> asyncio.Task[bytes]:
        task = self._loading.get(key)
        if task is None or task.get_loop() is not asyncio.get_running_loop():
            task = asyncio.create_task(self._run(key), name=f"surfw load {key}")
            task.add_done_callback(_retrieve_exception)
            self._loading[key] = task
        return task

    async def _run(self, key: str) -> bytes:
        task = asyncio.current_task()
        try:
            data = await self._load(key)
        finally:
            current = self._loading.get(key) is task
            if current:  # not forgotten, and not replaced by another loop's
                del self._loading[key]
        if current:
            self._keep(key, data)
        return data

    def _keep(self, key: str, data: bytes) -> None:
        self._drop(key)
        self._kept[key] = data
        self.kept_bytes += len(data)
        while self.kept_bytes > self._budget_bytes and len(self._kept) > 1:
            self._drop(next(iter(self._kept)))

    def _drop(self, key: str) -> None:
        self.kept_bytes -= len(self._kept.pop(key, b""))


def _retrieve_exception(task: asyncio.Task[bytes]) -> None:
    """Mark the exception of a load as retrieved: without waiting ranges, asyncio would log it."""
    if not task.cancelled():
        task.exception()
