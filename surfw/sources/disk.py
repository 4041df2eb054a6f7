"""The folder of a disk cache: its layout, its locks, and its budget. No asyncio, no network.

    surfw-cache                    marks the folder as a cache; surfw removes nothing from a folder without it
    lock                           held while blobs are created or evicted; its size counts the changes
    blobs/ab/DIGEST                a form's stored bytes, and which of its blocks are present (see `blob`)
    files/DIGEST                   a tokenizer file
    models/KEY.manifest            a manifest as in a store; KEY is its digest, which verifies it
    models/KEY.use                 locked by every process that uses the model; its mtime is the last use
    models/KEY.pinned              the model is never evicted
    models/KEY.log                 lines: the sources that had the model, and digests that its manifest lacks

Invariants: a block is marked present only after all of its bytes were written, and it is verified at every read, so
nothing here has to survive a crash. A blob counts at its full size from its creation, so later writes cannot exceed
the budget. Blobs are named by their content, so models that share chunks share blobs. Several processes may read and
remove files at the same time; a file that has vanished is a cache miss.
"""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surfw.config import MANIFEST_BYTES, MIB
from surfw.errors import ConfigurationError, ManifestError
from surfw.files import read_regular
from surfw.manifest import (
    Digests,
    Form,
    Manifest,
    count_blocks,
    decode_line,
    encode_line,
    encode_stored_manifest,
    parse_stored_manifest,
    read_digests,
)
from surfw.sources.blob import Blob, block_bytes

_MARKER = "surfw-cache"
_MARK = b"surfw disk cache 1\n"
_MOST_LOG_BYTES = 64 * MIB
_OLD_SECONDS = 3600


@dataclass(frozen=True, kw_only=True, slots=True)
class CachedModel:
    """A model in the cache.

    Attributes:
        manifest: the manifest as sent over the wire, without digests that were learned later.
        sources: the addresses of the sources that had the model.
        used: when it was last used, in seconds since 1970.
        pinned: whether it is never evicted.
        held_bytes: stored bytes of its cached blocks.
        complete: whether all files are cached, and every chunk in at least one form.
    """

    manifest: Manifest
    sources: tuple[str, ...]
    used: float
    pinned: bool
    held_bytes: int
    complete: bool


class CacheFolder:
    """A folder of cached models. Many processes may use it; within a process, one thread at a time.

    Attributes:
        path: the folder.
        budget_bytes: the most that all blobs together may take; None for no limit.
        evicted_blobs: how many blobs this instance evicted.
    """

    def __init__(self, path: Path, budget_bytes: int | None) -> None:
        """Set the folder and its budget; nothing is opened yet."""
        self.path = path
        self.budget_bytes = budget_bytes
        self.evicted_blobs = 0
        self._uses: dict[str, int] = {}  # descriptors of locked `.use` files, by model key
        self._usage: tuple[int, int] | None = None  # the change count, and the size of all blobs at that count

    @property
    def exists(self) -> bool:
        """Whether the folder is a disk cache."""
        return (self.path / _MARKER).is_file()

    def create(self) -> None:
        """Create the folder if it does not exist.

        Raises:
            ConfigurationError: the folder is used for something else.
            OSError: it cannot be created.
        """
        marker = self.path / _MARKER
        if not marker.exists():
            begun = f".{_MARKER}."  # a marker being written by another process, or left by a killed one
            others = self.path.is_dir() and any(not one.name.startswith(begun) for one in self.path.iterdir())
            if others and not marker.exists():  # another process creates the marker before anything else
                raise ConfigurationError(
                    f"{self.path} is no disk cache, and not empty; name another folder (cache_dir, --cache-dir)"
                )
            self.path.mkdir(parents=True, exist_ok=True)
            _write(marker, _MARK)
        for name in ("blobs", "files", "models"):
            (self.path / name).mkdir(exist_ok=True)
            for one in _entries(self.path / name):
                if one.name.startswith(".") and _mtime(Path(one.path)) < time.time() - _OLD_SECONDS:
                    Path(one.path).unlink(missing_ok=True)  # its writer was killed

    # Blobs

    def _blob(self, digest: str) -> Path:
        return self.path / "blobs" / digest[:2] / digest

    def open_blob(self, form: Form, *, create: bool) -> Blob | None:
        """Open the blob of a form that has digests; None if it does not exist, or does not fit into the budget.

        Args:
            form: the form.
            create: whether to create a missing blob, evicting others if needed.

        Raises:
            OSError: the folder cannot be read or written.
        """
        path, size = self._blob(form.digest), form.stored_bytes + count_blocks(form.stored_bytes)
        found = Blob.open(path, form)
        if found is None and create:
            with self._locked():
                found = Blob.open(path, form)
                if found is None and path.exists():  # truncated, or never finished
                    path.unlink(missing_ok=True)
                    self._usage = None
                if found is None and self._make_room(size):
                    self._note_change(size)
                    path.parent.mkdir(exist_ok=True)
                    path.touch(0o644)
                    os.truncate(path, size)
                    found = Blob.open(path, form)
        return found

    def _make_room(self, size: int) -> bool:
        """Evict blobs, least recently used models first, until `size` bytes fit. Returns whether they do."""
        if self.budget_bytes is None or self._used_bytes() + size <= self.budget_bytes:
            return True
        missing = self._used_bytes() + size - self.budget_bytes
        blobs = self._sizes()
        freed, victims = 0, list[str]()
        for digest in self._removable(blobs):
            if freed >= missing:
                break
            freed += blobs[digest]
            victims.append(digest)
        if freed < missing:
            return False
        for digest in victims:
            self._blob(digest).unlink(missing_ok=True)
            self._note_change(-blobs[digest])
            self.evicted_blobs += 1
        return True

    def _removable(self, blobs: Mapping[str, int]) -> Iterator[str]:
        """Yield the blobs that may be evicted, in order: orphans first, then those of the least recently used models.

        A blob that a pinned model or one in use needs is never evicted.
        """
        models = sorted(self._records(), key=lambda one: one[1])
        needed = {key: _digests_of(self.path / "models" / f"{key}.manifest") for key, _, _ in models}
        left = set(blobs)
        yield from sorted(left - set().union(*needed.values()))
        for at, (key, _, pinned) in enumerate(models):
            if pinned or self.in_use(key):
                continue
            others = set[str]().union(*(needed[other] for other, _, _ in models[at + 1 :]))
            kept = set[str]().union(
                *(needed[other] for other, _, is_pinned in models[:at] if is_pinned or self.in_use(other))
            )
            yield from sorted((left & needed[key]) - others - kept)

    def _used_bytes(self) -> int:
        changes = self._changes()
        if self._usage is None or self._usage[0] != changes:
            self._usage = changes, sum(self._sizes().values())
        return self._usage[1]

    def _sizes(self) -> dict[str, int]:
        """The size of each blob, by its digest."""
        found = {}
        for folder in _entries(self.path / "blobs"):
            for one in _entries(Path(folder.path)):
                with contextlib.suppress(OSError):
                    found[one.name] = one.stat().st_size
        return found

    def used_bytes(self) -> int:
        """Return the size of all blobs, counted afresh."""
        return sum(self._sizes().values())

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock under which blobs are created and evicted."""
        fd = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def _changes(self) -> int:
        with contextlib.suppress(OSError):
            return (self.path / "lock").stat().st_size
        return 0

    def _note_change(self, size: int) -> None:
        """Count a created or removed blob; the caller holds the lock."""
        changes = self._changes()
        is_known = self._usage is not None and self._usage[0] == changes
        os.truncate(self.path / "lock", changes + 1)  # a sparse file: it takes no disk space
        self._usage = (changes + 1, self._usage[1] + size) if self._usage and is_known else None

    # Models

    def _model(self, key: str, ending: str) -> Path:
        return self.path / "models" / f"{key}.{ending}"

    def _records(self) -> list[tuple[str, float, bool]]:
        """The key of each model, when it was last used, and whether it is pinned."""
        names = {one.name for one in _entries(self.path / "models")}
        keys = [name.removesuffix(".manifest") for name in names if name.endswith(".manifest")]
        return [(key, _mtime(self._model(key, "use")), f"{key}.pinned" in names) for key in keys]

    def keep_model(self, manifest: Manifest, source: str) -> None:
        """Store a manifest and the address of a source that has it.

        Raises:
            OSError: it cannot be written.
        """
        key, path = manifest.digest, self._model(manifest.digest, "manifest")
        if _read_manifest(path, key) is None:
            _write(path, encode_stored_manifest(manifest.public()))
        if source not in self._log(key)[0]:
            self._append(key, {"source": source})

    def use(self, manifest: Manifest) -> None:
        """Mark the model as in use until `close`, so that it is not evicted."""
        key = manifest.digest
        with contextlib.suppress(OSError):
            if key not in self._uses:
                self._uses[key] = os.open(self._model(key, "use"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
                fcntl.flock(self._uses[key], fcntl.LOCK_SH)  # `in_use` of another process may hold it for a moment
            os.utime(self._uses[key])

    def in_use(self, key: str) -> bool:
        """Return whether any process uses a model."""
        if key in self._uses:
            return True
        try:
            fd = os.open(self._model(key, "use"), os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
        finally:
            os.close(fd)
        return False

    def pin(self, manifest: Manifest) -> None:
        """Pin the model, so that it is never evicted."""
        _write(self._model(manifest.digest, "pinned"), b"")

    def models(self) -> list[CachedModel]:
        """Return all cached models, sorted by name."""
        found = []
        for key, used, pinned in self._records():
            manifest = _read_manifest(self._model(key, "manifest"), key)
            if manifest is not None:
                sources, digests = self._log(key)
                known = manifest.with_digests(_fitting(manifest, digests))
                held, complete = self._held(known)
                found.append(
                    CachedModel(
                        manifest=manifest, sources=tuple(sources), used=used, pinned=pinned, held_bytes=held,
                        complete=complete,
                    )
                )  # fmt: skip
        return sorted(found, key=lambda one: (one.manifest.name, -one.used))

    def manifests(self, source: str | None) -> list[Manifest]:
        """Return the manifests of a source's models, or of all sources' (None), the most recently used first."""
        found = []
        for key, used, _ in sorted(self._records(), key=lambda one: -one[1]):
            manifest = _read_manifest(self._model(key, "manifest"), key)
            if manifest is not None and (source is None or source in self._log(key)[0]):
                found.append((used, manifest))
        return [manifest for _, manifest in found]

    def remove(self, manifest: Manifest) -> int:
        """Remove a model and the blobs that no other model has. Returns the number of bytes freed."""
        key = manifest.digest
        with self._locked():
            others = [one for one, _, _ in self._records() if one != key]
            needed = set[str]().union(*(_digests_of(self._model(one, "manifest")) for one in others))
            sizes = self._sizes()
            freed = 0
            for digest in (_digests_of(self._model(key, "manifest")) - needed) & set(sizes):
                self._blob(digest).unlink(missing_ok=True)
                self._note_change(-sizes[digest])
                freed += sizes[digest]
            for ending in ("manifest", "use", "pinned", "log"):
                self._model(key, ending).unlink(missing_ok=True)
        return freed

    def _held(self, manifest: Manifest) -> tuple[int, bool]:
        held, complete = 0, True
        for chunk in manifest.chunks:
            whole = False
            for form in chunk.forms:
                flags = self.flags(form)
                whole |= b"\0" not in flags
                held += sum(block_bytes(form, block) for block, there in enumerate(flags) if there)
            complete &= whole
        return held, complete and all((self.path / "files" / file.digest).exists() for file in manifest.files)

    def flags(self, form: Form) -> bytes:
        """Return one byte per block of a form: 1 if the block is present."""
        count = count_blocks(form.stored_bytes)
        blob = None
        if form.is_known:
            with contextlib.suppress(OSError):
                blob = self.open_blob(form, create=False)
        if blob is None:
            return bytes(count) or (b"\1" if not count and form.is_known else b"")
        with contextlib.closing(blob):
            return blob.present()

    # Learned digests, and tokenizer files

    def digests(self, manifest: Manifest) -> dict[str, Digests]:
        """Return the learned digests that the manifest lacks, by the provisional ids of their chunks."""
        return _fitting(manifest, self._log(manifest.digest)[1])

    def learn(self, manifest: Manifest, chunk_id: str, digests: Digests) -> None:
        """Store digests of a chunk that the manifest lacks."""
        self._append(manifest.digest, {"chunk": chunk_id} | digests.document())

    def _append(self, key: str, document: Mapping[str, Any]) -> None:
        fd = os.open(self._model(key, "log"), os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            if os.fstat(fd).st_size < _MOST_LOG_BYTES:
                os.write(fd, encode_line(document))
        finally:
            os.close(fd)

    def _log(self, key: str) -> tuple[list[str], dict[str, dict[str, Any]]]:
        """The sources that had a model, and the learned digests of its chunks; damaged lines are skipped."""
        sources, digests = list[str](), dict[str, dict[str, Any]]()
        data = b""
        with contextlib.suppress(OSError):
            data = read_regular(self._model(key, "log"), 2 * _MOST_LOG_BYTES)
        for line in data.splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                document = decode_line(line)
                if isinstance(document, dict) and isinstance(document.get("source"), str):
                    sources.append(document["source"])
                elif isinstance(document, dict) and isinstance(document.get("chunk"), str):
                    digests[document["chunk"]] = document
        return list(dict.fromkeys(sources)), digests

    def read_file(self, digest: str, size: int) -> bytes | None:
        """Return a tokenizer file, unverified; None if it is not cached."""
        with contextlib.suppress(OSError):
            return read_regular(self.path / "files" / digest, size)
        return None

    def keep_file(self, digest: str, data: bytes) -> None:
        """Store a tokenizer file."""
        _write(self.path / "files" / digest, data)

    def close(self) -> None:
        """Release the models in use."""
        for fd in self._uses.values():
            with contextlib.suppress(OSError):
                os.utime(fd)
            os.close(fd)
        self._uses.clear()


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            return list(found)
    except OSError:
        return []


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _write(path: Path, data: bytes) -> None:
    """Write a file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}")
    try:
        part.write_bytes(data)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _read_manifest(path: Path, key: str) -> Manifest | None:
    """Read a manifest and check its digest against its name; None if it is missing or damaged."""
    try:
        data = read_regular(path, MANIFEST_BYTES)
        manifest = parse_stored_manifest(data, where=str(path))
    except (OSError, ManifestError):
        return None
    return manifest if manifest.digest == key else None


def _digests_of(path: Path) -> set[str]:
    """The digests of all forms of a model; empty if its manifest cannot be read."""
    try:
        document = json.loads(read_regular(path, MANIFEST_BYTES).partition(b"\n")[2])
        found = {form.get("digest", "") for chunk in document["chunks"] for form in chunk["forms"]}
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return set()
    return found | _learned(path.with_suffix(".log"))


def _learned(path: Path) -> set[str]:
    found = set()
    with contextlib.suppress(OSError):
        for line in read_regular(path, 2 * _MOST_LOG_BYTES).splitlines():
            with contextlib.suppress(ValueError, RecursionError, AttributeError):
                found.add(str(decode_line(line).get("digest")))
    return found


def _fitting(manifest: Manifest, documents: Mapping[str, Mapping[str, Any]]) -> dict[str, Digests]:
    """Select the well-formed digests of those chunks in the manifest that lack them."""
    found = {}
    for chunk in manifest.chunks:
        if not chunk.forms[0].is_known and chunk.id in documents:
            with contextlib.suppress(ValueError):
                found[chunk.id] = read_digests(documents[chunk.id], chunk.forms[0].stored_bytes)
    return found
