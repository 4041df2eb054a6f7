"""The objects that a store's manifests refer to: its own blobs, and objects of *origins*, which were not copied.

Objects of an origin are named `origins/KEY/NAME` here, where KEY is the origin's key. Invariants:

- Every byte returned from an origin was read from the revision that the manifest pins.
- A manifest is data. It can make this machine read folders, S3, the web and the hub, but runs no code. A store on
  another machine cannot make this machine read its own local files.
- Storage options, which may hold secrets, are sent only to the server for which they were given.
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
"""The schemes that origins may have; a manifest of a store on this machine may also name a folder."""


@dataclass(frozen=True, slots=True)
class Found:
    """The location of an object: its storage and key; for a pinned object, also its required revision and size."""

    backend: RangedBackend
    key: str
    revision: str | None = None
    size: int | None = None


@dataclass(frozen=True)
class PlacedOptions:
    """Storage options, and the place for which they were given: a store, or a checkpoint that is served in place."""

    place: str
    options: Mapping[str, Any]

    @classmethod
    def of_chunking(cls, model: str, store: str, options: Mapping[str, Any]) -> "PlacedOptions":
        """Assign the options of a chunking run to the store, or to the checkpoint if the store is a folder."""
        return cls(model if is_local_url(store) else store, options)

    def for_url(self, url: str) -> Mapping[str, Any]:
        """Return the options for another address: all of them for the same server, otherwise none.

        S3 options belong to an endpoint with all its buckets, and no address changes the endpoint. Folders have none.
        """
        scheme, own_scheme = scheme_of(url), scheme_of(self.place)
        if scheme == "s3":
            return self.options if own_scheme == scheme or is_local_url(self.place) else {}
        same_host = bool(scheme) and _host_of(url) == _host_of(self.place)
        return self.options if same_host and scheme == own_scheme else {}


class Objects:
    """Read access to a store's own objects and those of its manifests' origins, in one key space."""

    def __init__(self, own: RangedBackend, marker: str, options: PlacedOptions | None = None) -> None:
        """Set the store's backend, its marker, and the storage options of origins; nothing is opened yet."""
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
        """How many reads to keep in flight: the largest value of all storages."""
        return max(backend.parallel_reads for backend in self._backends())

    @property
    def buffered_bytes(self) -> int:
        """The most memory that reading takes, not counting its destinations; local files are read in place."""
        return max(
            0 if backend.local_path(_ANY) and backend.parallel_reads == 1 else backend.buffered_bytes
            for backend in self._backends()
        )

    @property
    def has_local_origin(self) -> bool:
        """Whether an origin is a folder. Tensors in its shards may begin at any byte."""
        return any(is_local_url(origin.url) for origin, _ in self._mounted.values())

    def _backends(self) -> list[RangedBackend]:
        return [self._own, *(backend for _, backend in self._mounted.values())]

    def mount(self, manifest: Manifest, *, where: str) -> Manifest:
        """Open the manifest's origin, and return the manifest with object names of this key space.

        A manifest without an origin is returned unchanged.

        Raises:
            ManifestError: this store may not have such an origin.
            ConfigurationError: no storage supports the scheme of the origin.
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
        """Raise ManifestError if a manifest of this store may not name such an origin."""
        if self._is_local if is_local_url(origin.url) else scheme_of(origin.url) in _FROM_AFAR:
            return
        whose = "no manifest may say" if self._is_local else "a store that is not on this machine may not say"
        raise ManifestError(
            f"the manifest from {where} says that its weights lie in {origin.url[:200]!a}, which {whose}; "
            f"expected one of {', '.join(sorted(_FROM_AFAR))}; chunk the model without --in-place"
        )

    def find(self, key: str) -> Found:
        """Return the location of an object.

        Raises:
            StorageError: the key names an unknown origin.
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
        """Fill `destination` with the object's bytes from `start` on; a changed object is an error."""
        found = self.find(key)
        pinned = {} if found.revision is None else {"revision": found.revision}  # not all custom backends take one
        with explain_change(is_pinned=found.revision is not None):
            await found.backend.read_into(found.key, start, destination, **pinned)

    def run_bytes(self, key: str) -> int:
        """See `RangedBackend.run_bytes`."""
        found = self.find(key)
        return found.backend.run_bytes(found.key)

    async def read_pieces(
        self, key: str, start: int, pieces: Iterable[memoryview], on_filled: Callable[[int], object]
    ) -> None:
        """See `RangedBackend.read_pieces`; a changed object is an error."""
        found = self.find(key)
        with explain_change(is_pinned=found.revision is not None):
            await found.backend.read_pieces(found.key, start, pieces, on_filled, revision=found.revision)

    async def read_all(self, reads: Sequence[ObjectRead]) -> None:
        """See `RangedBackend.read_all`. All reads must be of one model, whose bytes are in one storage."""
        if first := next((part for read in reads for part in read.parts), None):
            found = self.find(first.key)
            with explain_change(is_pinned=found.revision is not None):
                await found.backend.read_all([replace(read, parts=self._find_parts(read)) for read in reads])

    def _find_parts(self, read: ObjectRead) -> list[ObjectRange]:
        """The ranges of a read, with the keys and pins of their storage."""
        parts = []
        for part in read.parts:
            found = self.find(part.key)
            pin = part.pin if found.revision is None else Pin(found.revision)
            parts.append(ObjectRange(found.key, part.start, part.length, pin))
        return parts

    async def load_capped(self, key: str, most_bytes: int) -> bytes:
        """Return the whole object, which may have at most `most_bytes`."""
        found = self.find(key)
        if found.revision is None:
            return await found.backend.load_capped(found.key, most_bytes)
        size = await self.size(key)
        refuse_size(size, most_bytes, f"{key} in {self.url}")
        memory = bytearray(size)
        await self.read_into(key, 0, memoryview(memory))
        return bytes(memory)

    def forget(self, key: str) -> None:
        """Drop cached bytes of the object, so that the next read goes to its storage."""
        found = self.find(key)
        found.backend.forget(found.key)

    async def size(self, key: str) -> int:
        """Return the object's length; for a pinned object, the pinned length."""
        found = self.find(key)
        return await found.backend.size(found.key) if found.size is None else found.size

    def local_path(self, key: str) -> Path | None:
        """Return the object's path if it is a local file, otherwise None."""
        found = self.find(key)
        return found.backend.local_path(found.key)

    async def close(self) -> None:
        """Close the storages of origins; the store's own backend stays open."""
        with self._mounting:
            mounted, self._mounted = list(self._mounted.values()), {}
        await asyncio.gather(*(backend.close() for _, backend in mounted))


@contextmanager
def explain_change(*, is_pinned: bool = True) -> Iterator[None]:
    """Add advice to the error about a changed object, if a manifest pins the object."""
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
    """Return the folder of the private store with the manifest of a model that is served in place.

    Args:
        place: a folder, or a storage URL.
        options: storage options; the same URL at another endpoint is another place.
        stores: the folder of all private stores; default: `private_stores()`.
    """
    address = place if "://" in place else str(expand_home(place).absolute())
    identity = identify_place(address.rstrip("/"), options)
    return (stores or private_stores()) / blake3(identity.encode()).hexdigest()[:32]


def private_stores() -> Path:
    """Return the folder of private stores: `$SURFW_HOME/in-place`, or a temporary one if that cannot be written.

    A temporary folder belongs to this process, and is removed when the process ends.
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
