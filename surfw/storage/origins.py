"""The objects that a store's manifests point to: its own blobs, and objects of *origins*, which were not copied.

Objects of an origin are named `origins/KEY/NAME` here, after the origin's key. Invariants:

- Every byte of an origin that is returned was read from the revision that the manifest pinned.
- A manifest is data. It can make this machine read folders, S3, the web and the hub, and it runs no code. A store on
  another machine never makes this one read its own files.
- Storage options, which may hold secrets, go to no other server than the one they were given for.
- Origins are read, never written to.
"""

import asyncio
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from blake3 import blake3

from surfw.config import surfw_home
from surfw.errors import ManifestError, StorageError
from surfw.files import expand_home
from surfw.manifest import Form, Manifest, Origin
from surfw.storage.backends import open_backend
from surfw.storage.base import ChangedObjectError, RangedBackend, refuse_size
from surfw.storage.custom import adapt_backend
from surfw.storage.ranges import ObjectRange, ObjectRead, Pin
from surfw.storage_options import identify_place, scheme_of

logger = logging.getLogger("surfw.storage")

_MOUNT, _ANY = "origins/", "any"
_FROM_AFAR = {"s3", "http", "https", "hf"}
"""Schemes of origins that manifests may name; those of stores on this machine may also name folders."""


@dataclass(frozen=True, slots=True)
class Found:
    """Where an object is: its storage and its key there; revision and size that it has to have, if it is pinned."""

    backend: RangedBackend
    key: str
    revision: str | None = None
    size: int | None = None


@dataclass(frozen=True)
class PlacedOptions:
    """Storage options, and the place that they were given for: a store, or a checkpoint that is not copied."""

    place: str
    options: Mapping[str, Any]

    @classmethod
    def of_chunking(cls, model: str, store: str, options: Mapping[str, Any]) -> "PlacedOptions":
        """Those given where a checkpoint is chunked: a folder takes none, so beside one they are the other's."""
        return cls(model if is_local_url(store) else store, options)

    def for_url(self, url: str) -> Mapping[str, Any]:
        """Return the options for another address: all if it is of the same server, none otherwise.

        Options of S3 are for one endpoint and all its buckets, which no address can change; folders have no options.
        """
        scheme, own_scheme = scheme_of(url), scheme_of(self.place)
        if scheme == "s3":
            return self.options if own_scheme == scheme or is_local_url(self.place) else {}
        same_host = bool(scheme) and _host_of(url) == _host_of(self.place)
        return self.options if same_host and scheme == own_scheme else {}


class Objects:
    """A store's own objects and those of its manifests' origins, in one space of keys, to be read."""

    def __init__(self, own: RangedBackend, marker: str, options: PlacedOptions | None = None) -> None:
        """Name the store's backend, its marker, and the storage options of origins; nothing is opened yet."""
        self.url = own.url
        self._own = own
        self._is_local = own.local_path(marker) is not None
        self._options = options or PlacedOptions(own.url, {})
        self._mounted: Mapping[
            str, tuple[Origin, RangedBackend]
        ] = {}  # replaced as a whole: other threads may be iterating over it
        self._mounting = threading.Lock()

    @property
    def parallel_reads(self) -> int:
        """How many reads are worth having under way: as many as for the storage that gains most from it."""
        return max(backend.parallel_reads for backend in self._backends())

    @property
    def buffered_bytes(self) -> int:
        """The most memory that reading takes besides its destinations; files are read in place."""
        return max(
            0 if backend.local_path(_ANY) and backend.parallel_reads == 1 else backend.buffered_bytes
            for backend in self._backends()
        )

    @property
    def has_local_origin(self) -> bool:
        """Whether an origin is a folder, in whose shards tensors begin at any byte."""
        return any(is_local_url(origin.url) for origin, _ in self._mounted.values())

    def _backends(self) -> list[RangedBackend]:
        return [self._own, *(backend for _, backend in self._mounted.values())]

    def mount(self, manifest: Manifest, *, where: str) -> Manifest:
        """Return the manifest with its objects named as they are here; without an origin, as it is.

        Raises:
            ManifestError: its origin is not one that this store may have.
            ConfigurationError: no storage has the scheme of its origin.
        """
        origin = manifest.origin
        if origin is None:
            if not manifest.is_known:
                raise ManifestError(
                    f"the manifest from {where} lacks digests, and names no origin", advice="chunk the model again"
                )
            return manifest
        self._refuse(origin, where)
        with self._mounting:
            if origin.key not in self._mounted:
                options = self._options.for_url(origin.url)
                backend = adapt_backend(open_backend(origin.url, options, silence_timeout=self._own.silence_timeout))
                self._mounted = {**self._mounted, origin.key: (origin, backend)}

        def place(form: Form) -> Form:
            return replace(form, locations=tuple(replace(at, object=mount + at.object) for at in form.locations))

        mount = f"{_MOUNT}{origin.key}/"
        chunks = tuple(replace(chunk, forms=tuple(map(place, chunk.forms))) for chunk in manifest.chunks)
        files = tuple(replace(file, object=mount + file.object) for file in manifest.files)
        return replace(manifest, chunks=chunks, files=files)

    def _refuse(self, origin: Origin, where: str) -> None:
        """Raise ManifestError if no manifest, or no manifest of a store on another machine, may name such an origin."""
        if self._is_local if is_local_url(origin.url) else scheme_of(origin.url) in _FROM_AFAR:
            return
        whose = "no manifest may say" if self._is_local else "a store that is not on this machine may not say"
        raise ManifestError(
            f"the manifest from {where} says that its weights lie in {origin.url[:200]!a}, which {whose}; "
            f"expected one of {', '.join(sorted(_FROM_AFAR))}; chunk the model without --in-place"
        )

    def find(self, key: str) -> Found:
        """Find out where the object is.

        Raises:
            StorageError: its key names an origin that no manifest of this store has.
        """
        if not key.startswith(_MOUNT):
            return Found(self._own, key)
        mount, _, name = key.removeprefix(_MOUNT).partition("/")
        with suppress(KeyError):
            origin, backend = self._mounted[mount]
            pin = origin.pins[name]
            return Found(backend, name, pin.revision, pin.size)
        raise StorageError(f"{key[:200]} in {self.url} belongs to no origin; chunk the model again")

    async def read_into(self, key: str, start: int, destination: memoryview) -> None:
        """Fill `destination` with the object's bytes from `start` on, if it is unchanged."""
        found = self.find(key)
        pinned = {} if found.revision is None else {"revision": found.revision}  # some custom backends know none
        with explain_change(is_pinned=found.revision is not None):
            await found.backend.read_into(found.key, start, destination, **pinned)

    def run_bytes(self, key: str) -> int:
        """As `RangedBackend.run_bytes`."""
        found = self.find(key)
        return found.backend.run_bytes(found.key)

    async def read_pieces(
        self, key: str, start: int, pieces: Iterable[memoryview], on_filled: Callable[[int], object]
    ) -> None:
        """As `RangedBackend.read_pieces`, if the object is unchanged."""
        found = self.find(key)
        with explain_change(is_pinned=found.revision is not None):
            await found.backend.read_pieces(found.key, start, pieces, on_filled, revision=found.revision)

    async def read_all(self, reads: Sequence[ObjectRead]) -> None:
        """Fill the destinations of reads of one model, as `RangedBackend.read_all`. Its bytes are in one storage."""
        if first := next((part for read in reads for part in read.parts), None):
            found = self.find(first.key)
            with explain_change(is_pinned=found.revision is not None):
                await found.backend.read_all([replace(read, parts=self._find_parts(read)) for read in reads])

    def _find_parts(self, read: ObjectRead) -> list[ObjectRange]:
        """The ranges of a read as their storage names and pins them."""
        parts = []
        for part in read.parts:
            found = self.find(part.key)
            pin = part.pin if found.revision is None else Pin(found.revision)
            parts.append(ObjectRange(found.key, part.start, part.length, pin))
        return parts

    async def load_capped(self, key: str, most_bytes: int) -> bytes:
        """The whole object, if it is no larger."""
        found = self.find(key)
        if found.revision is None:
            return await found.backend.load_capped(found.key, most_bytes)
        size = await self.size(key)
        refuse_size(size, most_bytes, f"{key} in {self.url}")
        memory = bytearray(size)
        await self.read_into(key, 0, memoryview(memory))
        return bytes(memory)

    def forget(self, key: str) -> None:
        """The next read asks its storage."""
        found = self.find(key)
        found.backend.forget(found.key)

    async def size(self, key: str) -> int:
        """The object's length; for a pinned one, the length that was pinned."""
        found = self.find(key)
        return await found.backend.size(found.key) if found.size is None else found.size

    def local_path(self, key: str) -> Path | None:
        """The object's file, if it is on this machine."""
        found = self.find(key)
        return found.backend.local_path(found.key)

    async def close(self) -> None:
        """Close the origins; the store's own backend stays open."""
        with self._mounting:
            mounted, self._mounted = list(self._mounted.values()), {}
        await asyncio.gather(*(backend.close() for _, backend in mounted))


@contextmanager
def explain_change(*, is_pinned: bool = True) -> Iterator[None]:
    """Say what to do about a changed object, if a manifest pins it."""
    try:
        yield
    except ChangedObjectError as exc:
        if not is_pinned:
            raise
        advice = (
            ": it belongs to a model that is served in place, and none of its weights is used; start the server again, "
            "or run surfw chunk --in-place again"
        )
        raise ChangedObjectError(exc.name, exc.expected, exc.seen, advice) from exc


def is_local_url(url: str) -> bool:
    """Return whether an address is that of a folder on this machine."""
    return scheme_of(url) in {"", "file"}


def _host_of(url: str) -> str:
    return url.partition("://")[2].partition("/")[0]


def private_store(place: str, options: Mapping[str, Any], stores: Path | None = None) -> Path:
    """Return the folder of the private store that describes the model at a place, which is served without a copy.

    Args:
        place: a folder, or a storage URL.
        options: storage options: the same URL at another endpoint is another place.
        stores: the folder of all private stores; default: `private_stores()`.
    """
    address = place if "://" in place else str(expand_home(place).absolute())
    identity = identify_place(address.rstrip("/"), options)
    return (stores or private_stores()) / blake3(identity.encode()).hexdigest()[:32]


def private_stores() -> Path:
    """The folder of private stores: `$SURFW_HOME/in-place`, or, where that cannot be written, a temporary one.

    The temporary one is this process's own, and is removed at its end.
    """
    folder = surfw_home() / "in-place"
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    return Path(_temporary_stores().name)


@cache
def _temporary_stores() -> "tempfile.TemporaryDirectory[str]":
    logger.info("%s cannot be written; what is served in place is described in a temporary folder", surfw_home())
    return tempfile.TemporaryDirectory(prefix="surfw-in-place-")
