"""Storage on any file system that fsspec supports. `filesystem` has faster paths for local files.

Most remote file systems in fsspec are asynchronous, on an event loop of their own. Their bytes are read on that loop,
in parallel ranges (see `far_reads`); all other calls are fsspec's synchronous ones, in threads. Foreign exceptions are
translated here and nowhere else.
"""

import asyncio
import errno
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TypeVar

import fsspec

from surfw.config import BLOCK_BYTES, DEFAULT_SILENCE_SECONDS, PIECE_BYTES, display_text, display_url
from surfw.errors import ConfigurationError, NotFoundError, StorageError, StorageFullError, SurfwError
from surfw.files import user_name
from surfw.storage.base import (
    ChangedObjectError,
    RangedBackend,
    check_key,
    check_prefix,
    expect_length,
    is_key,
    refuse_size,
    spool_folder,
)
from surfw.storage.far_reads import (
    CONNECTIONS,
    RANGE_RETRIES,
    Destination,
    FarReads,
    RangeReader,
    RangeResponse,
    TransientError,
)
from surfw.storage.ranges import Check, ObjectRange, ObjectRead, Pin
from surfw.storage_options import connections_of, identify_place, seconds_of

T = TypeVar("T")
_RESTARTS = 3
"""How often a load is restarted because the object was replaced meanwhile."""

_ROUNDS = 10
"""The time limit of a listing (many requests) and of loads that show no progress, in multiples of `silence_timeout`.

Over HTTP no single request may be silent for longer than `silence_timeout`.
"""

_TAGS = ("ETag", "etag", "checksum", "md5Hash", "content_md5", "blob_id")
_TIMES = ("mtime", "last_modified", "LastModified", "modified")
"""Keys under which file systems report an ETag or checksum, and a modification time."""


@contextmanager
def translate_errors(what: str) -> Iterator[None]:
    """Translate the exceptions of file systems; `what` names the operation in messages."""
    try:
        yield
    except FileNotFoundError as exc:
        raise NotFoundError(f"{what}: not found") from exc
    except PermissionError as exc:
        raise StorageError(f"{what}: permission denied{_explain_denial(exc)}") from exc
    except NotADirectoryError as exc:
        raise StorageError(f"{what}: a part of this path is a file, expected folders; name another place") from exc
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFullError(f"{what}: no space is left; free some and run the same command again") from exc
        raise StorageError(f"{what}: {display_text(exc.strerror or str(exc)) or type(exc).__name__}") from exc
    except ImportError as exc:
        raise ConfigurationError(f"{what}: {exc}") from exc


def _explain_denial(exc: PermissionError) -> str:
    """The details of a denial: for a local file, the user, the file and what to do; otherwise the storage's message.

    Using another folder is suggested only if the file cannot be seen.
    """
    if exc.filename is not None:
        other = "" if os.path.lexists(exc.filename) else ", or use another folder"
        return f": user {user_name()} may not use {display_text(str(exc.filename))}; give that user the rights{other}"
    why = display_text(exc.strerror or str(exc))
    return "" if why.lower() in {"", "permission denied"} else f" ({why})"


def is_denial(exc: BaseException | None) -> bool:
    """Return whether an error was caused by missing permissions, and not by damaged or missing data."""
    return exc is not None and (isinstance(exc, PermissionError) or is_denial(exc.__cause__))


@contextmanager
def translate_all_errors(what: str) -> Iterator[None]:
    """Like `translate_errors`, but for all exceptions, including those of libraries and custom backends."""
    try:
        with translate_errors(what):
            yield
    except SurfwError:
        raise
    except Exception as exc:
        text = display_text(" ".join(str(exc).split()))[:300]
        raise StorageError(f"{what}: {type(exc).__name__}: {text}") from exc


class FsspecBackend(RangedBackend):
    """Objects under a URL of any scheme that fsspec supports, such as `s3://bucket/prefix` or `memory://name`."""

    def __init__(self, /, url: str, *, silence_timeout: float = DEFAULT_SILENCE_SECONDS, **options: Any) -> None:
        """Open the file system.

        Args:
            url: the URL under which the objects are stored.
            silence_timeout: seconds without progress after which a read of an asynchronous file system fails.
            **options: options of fsspec's implementation, and `max_concurrency`: how many ranges to read at a time.

        Raises:
            ConfigurationError: an argument cannot be used, or a package is not installed.
        """
        self.url = display_url(url)
        self._address = url  # may hold secrets
        self._place = identify_place(url, options)
        self.silence_timeout = seconds_of(silence_timeout)
        connections = CONNECTIONS
        if "max_concurrency" in options:
            options["max_concurrency"] = connections = connections_of(options["max_concurrency"])
        self.fs, self.root = self._open(**options)
        reader = self._range_reader(connections)
        self._far: FarReads | None = None
        if reader is not None:
            self._far = FarReads(reader, RANGE_RETRIES)
            self.parallel_reads, self.reads_in_place = connections, reader.streams
        self._read_only = reader is not None and reader.read_only

    def _range_reader(self, connections: int) -> RangeReader | None:
        """Return the parallel range reader for this file system; None if it is local or synchronous."""
        if not getattr(self.fs, "async_impl", False):
            return None
        protocol = self.fs.protocol
        if "http" in ((protocol,) if isinstance(protocol, str) else protocol):
            from surfw.storage.http_ranges import HttpRanges

            return HttpRanges(self.fs, connections, self.silence_timeout)
        return _CatRanges(self.fs, connections, self.silence_timeout)

    def _open(self, **options: Any) -> tuple[Any, str]:
        """Return the file system for the address, and the path in it."""
        try:
            fs, root = fsspec.core.url_to_fs(self._address, **{"skip_instance_cache": True} | options)
        except ImportError as exc:
            name = getattr(exc.__cause__, "name", None) or exc.name or "the package that it names"
            raise ConfigurationError(
                f"storage {self.url} needs a package that is not installed ({exc}); run: pip install {name}"
            ) from exc
        except OSError:
            with translate_errors(f"storage {self.url}"):
                raise
        except (ValueError, TypeError) as exc:
            reason = str(exc).replace(self._address, self.url)
            if reason.startswith("Protocol not known"):
                reason += (
                    "; name a folder, or a URL such as s3://bucket/prefix, http://…, one of fsspec's other systems, or "
                    "of a package with an entry point 'surfw.storage'"
                )
            raise ConfigurationError(f"storage {self.url} cannot be opened: {reason}") from exc
        return fs, str(root)

    def spool(self) -> Path:
        """Return the local spool folder. It depends on the options too, which may make one URL several places."""
        return spool_folder(self._place)

    def path(self, key: str) -> str:
        """Return the key's path in the file system."""
        return f"{self.root.rstrip('/')}/{check_key(key)}"

    async def _call(self, key: str, function: Callable[[str], T]) -> T:
        path = self.path(key)
        return await asyncio.to_thread(self._translate(self._name(key))(function), path)

    @contextmanager
    def _translate(self, what: str) -> Iterator[None]:
        """Translate all errors; subclasses add those of their library."""
        with translate_all_errors(what):
            yield

    @asynccontextmanager
    async def _translating(self, key: str) -> AsyncIterator[None]:
        """Translate errors of remote reads, in a thread: a backend may ask the server for the reason."""
        try:
            yield
        except SurfwError:
            raise
        except Exception as exc:  # noqa: BLE001 - every one is translated
            await asyncio.to_thread(self._translate(self._name(key))(_raise), exc)

    def _name(self, key: str) -> str:
        return f"{key} in {self.url}"

    async def load(self, key: str) -> bytes:
        """Return the whole object."""
        return await self._load(key, sys.maxsize)

    async def load_capped(self, key: str, most_bytes: int) -> bytes:
        """Return the whole object, which may have at most `most_bytes`; its size is checked before it is read."""
        if type(self).load is not FsspecBackend.load:  # a custom subclass, which may transform the bytes
            return await super().load_capped(key, most_bytes)
        return await self._load(key, most_bytes)

    async def _load(self, key: str, most_bytes: int) -> bytes:
        if self._far is None or not self._far.reader.tells_revision:
            if most_bytes < sys.maxsize:
                refuse_size(await self.size(key), most_bytes, self._name(key))
            data = bytes(await self._call(key, lambda path: self._ask("cat_file", path, rounds=_ROUNDS)))
            refuse_size(len(data), most_bytes, self._name(key))
            return data
        for _ in range(_RESTARTS):
            with suppress(ChangedObjectError):  # the first range and the rest had different revisions: restart
                return await self._load_far(self._far, key, most_bytes)
        return await self._load_far(self._far, key, most_bytes)

    async def _load_far(self, far: FarReads, key: str, most_bytes: int) -> bytes:
        """Load an object. The first response says how large it is, so a small object takes a single request."""
        path, pin = self.path(key), Pin()
        async with self._translating(key):
            memory, done = await far.begin(path, name=self._name(key), pin=pin, most_bytes=most_bytes)
        rest = memoryview(memory)[done:]
        await self.read_all([ObjectRead([ObjectRange(key, done, len(rest), pin)], rest)])
        return bytes(memory)

    async def load_range(self, key: str, start: int, stop: int) -> bytes:
        """Return bytes `start` to `stop` (end-exclusive) of an object."""
        if self._far is None:
            data = await self._call(key, lambda path: bytes(self.fs.cat_file(path, start=start, end=stop)))
            return expect_length(data, stop - start, key, self.url)
        return await self._load_through_read_into(key, start, stop)

    async def read_into(self, key: str, start: int, destination: memoryview, *, revision: str | None = None) -> None:
        """Fill `destination` with the object's bytes from `start` on, in parallel ranges of one revision."""
        check_key(key)
        if self._far is None:
            await super().read_into(key, start, destination, revision=revision)
            return
        tells, pin = self._far.reader.tells_revision, Pin(revision)
        if not tells:
            if revision is None and destination.nbytes > self.range_bytes:
                revision = await self.revision(key)
            pin = Pin()  # the revision is checked once, after all ranges
        part = ObjectRange(key, start, destination.nbytes, pin)
        await self.read_all([ObjectRead([part], destination.cast("B"))])
        if not tells and revision is not None:
            await self.expect_revision(key, revision)

    @property
    def range_bytes(self) -> int:
        """The size of the largest range."""
        return super().range_bytes if self._far is None else self._far.reader.range_bytes

    async def read_range(self, part: ObjectRange, destination: memoryview, check: Check | None = None) -> None:
        """Fill the destination with one range, and verify it; for S3 and HTTP, while it arrives."""
        if self._far is None:
            await super().read_range(part, destination, check)
            return
        key, pin = part.key, part.pin
        async with self._translating(key):
            await self._far.read(self.path(key), part.start, destination, name=self._name(key), pin=pin, check=check)
        if not self._far.reader.tells_revision and pin.revision is not None:
            await self.expect_revision(key, pin.revision)

    def run_bytes(self, key: str) -> int:
        """Return the most bytes that one `read_pieces` should read; 0 if it has no advantage."""
        streams = self._far is not None and self._far.reader.streams and self._far.reader.tells_revision
        return self.range_bytes if streams else super().run_bytes(key)

    async def read_pieces(
        self,
        key: str,
        start: int,
        pieces: Iterable[memoryview],
        on_filled: Callable[[int], object],
        *,
        revision: str | None = None,
    ) -> None:
        """Fill pieces of memory with one request, as the bytes arrive."""
        if self._far is None or not self.run_bytes(key):
            await super().read_pieces(key, start, pieces, on_filled, revision=revision)
            return
        async with self._translating(key):
            await self._far.read_pieces(
                self.path(key), start, pieces, name=self._name(key), pin=Pin(revision), on_filled=on_filled
            )

    async def revision(self, key: str) -> str | None:
        """Return a string that changes with the object; None if the file system has none, or the object is missing."""
        try:
            if facts := await self._facts(key):
                return facts.revision
            return _revision_of(await self._call(key, self._info))
        except NotFoundError:
            return None

    async def save(self, key: str, data: bytes | BinaryIO) -> None:
        """Write an object. In object stores it becomes visible only when it is complete."""

        def write(path: str) -> None:
            if isinstance(data, bytes):
                self.fs.pipe_file(path, data, **self._upload_options(len(data)))
                return
            with tempfile.NamedTemporaryFile(prefix="surfw-") as whole:  # a broken stream leaves no partial object
                shutil.copyfileobj(data, whole, PIECE_BYTES)
                whole.flush()
                self._put_file(whole.name, path)

        self._expect_writable(key)
        await self._call(key, write)

    async def adopt(self, key: str, path: Path) -> None:
        """Upload a finished local file, then delete it."""

        def move(target: str) -> None:
            self._put_file(str(path), target)
            path.unlink()

        self._expect_writable(key)
        await self._call(key, move)

    def _put_file(self, local: str, path: str) -> None:
        self.fs.put_file(local, path, **self._upload_options(Path(local).stat().st_size))

    def _upload_options(self, size: int) -> Mapping[str, Any]:
        """Options of the file system for an upload of `size` bytes."""
        del size
        return {}

    def _expect_writable(self, key: str) -> None:
        if self._read_only:
            raise StorageError(
                f"{check_key(key)} cannot be written to {self.url}: it can only be read; write to a folder or a "
                "bucket, and have a server offer that"
            )

    async def exists(self, key: str) -> bool:
        """Return whether the object exists. A storage that does not answer is an error."""

        def look(path: str) -> bool:
            with suppress(NotADirectoryError):
                return bool(self._info(path)["type"] == "file")
            return False

        try:
            return bool(await self._facts(key)) or await self._call(key, look)
        except NotFoundError:
            return False

    async def remove(self, key: str) -> None:
        """Remove an object; a missing one is no error."""

        def remove(path: str) -> None:
            try:
                self._ask("rm_file", path)
            except NotImplementedError as exc:
                raise StorageError(
                    f"{self.url} can only be read, and nothing be removed there; do that in the folder or bucket that "
                    "it shows"
                ) from exc

        with suppress(NotFoundError):
            await self._call(key, remove)

    async def size(self, key: str) -> int:
        """Return the object's length in bytes."""
        if (facts := await self._facts(key)) and facts.size is not None:
            return facts.size
        return int(await self._call(key, lambda path: self._info(path)["size"]))

    async def _facts(self, key: str) -> RangeResponse | None:
        """Size and revision, if the range reader can query them; None otherwise."""
        path = self.path(key)
        if self._far is None:
            return None
        async with self._translating(key):
            return await self._far.facts(path, name=self._name(key))

    def _info(self, path: str) -> Mapping[str, Any]:
        """Current metadata of an object, bypassing fsspec's cache."""
        self.fs.invalidate_cache()
        facts: Mapping[str, Any] = self._ask("info", path)
        return facts

    def _ask(self, what: str, path: str, *, rounds: int = 1, **options: Any) -> Any:
        """Call a method of the file system. An asynchronous call may take `rounds` times `silence_timeout`."""
        if self._far is None:
            return getattr(self.fs, what)(path, **options)
        most = self.silence_timeout * rounds
        try:
            return fsspec.asyn.sync(self.fs.loop, getattr(self.fs, f"_{what}"), path, timeout=most, **options)
        except fsspec.asyn.FSTimeoutError as exc:
            one = exc.__cause__ is not None  # a single request was silent for too long
            waited = f"was silent for {self.silence_timeout:g}" if one else f"did not answer within {most:g}"
            raise StorageError(
                f"{self.url}: the storage {waited} seconds; check it and the network, or give it more time with a "
                "longer silence_timeout"
            ) from exc

    async def list(self, prefix: str = "") -> list[str]:
        """Return the keys that start with the prefix; other links of a web page are ignored."""
        folder = check_prefix(prefix).rpartition("/")[0]
        # by default fsspec treats a page that cannot be read, for example of a silent server, as an empty folder
        options = {"on_error": _unless_missing} if self._read_only else {}

        def find() -> list[str]:
            root = self.root.rstrip("/")
            try:
                with self._translate(f"listing {self.url}"):
                    self.fs.invalidate_cache()  # changes made by others must be visible
                    paths = self._ask("find", f"{root}/{folder}" if folder else root, rounds=_ROUNDS, **options)
            except NotFoundError:
                return []
            keys = (path.removeprefix(root).lstrip("/") for path in paths)
            return sorted(key for key in keys if key.startswith(prefix) and (not self._read_only or is_key(key)))

        return await asyncio.to_thread(find)


def _raise(error: Exception) -> NoReturn:
    raise error


def _unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def _revision_of(info: Mapping[str, Any]) -> str | None:
    """A revision from an object's metadata; None for local files, whose times are too coarse."""
    if info.get("type") != "file" or "ino" in info:
        return None
    if tag := next((info[name] for name in _TAGS if info.get(name)), None):
        return str(tag)
    time = next((info[name] for name in _TIMES if info.get(name)), None)
    return None if time is None else f"{time}, {info.get('size')} bytes"


class _CatRanges(RangeReader):
    """Ranges through `_cat_file` of an asynchronous file system: buffered in memory, without a revision."""

    streams = False
    tells_revision = False

    def __init__(self, fs: Any, connections: int, silence_timeout: float) -> None:
        """Set the file system; nothing is contacted."""
        super().__init__(connections, silence_timeout)
        self._fs = fs
        self.loop = fs.loop
        self._slots = asyncio.Semaphore(connections)

    async def get(self, path: str, into: Destination) -> None:
        """Read the range, then copy it into place."""
        fs, start, stop = self._fs, into.start, into.stop
        try:
            async with self._slots:
                into.patience.begin(blocks=-(-(stop - start) // BLOCK_BYTES))  # no progress is visible before the end
                data = await fs._cat_file(path, start=start, end=stop)  # noqa: SLF001 - fsspec's own systems call it
        except (ConnectionError, TimeoutError) as exc:
            raise TransientError from exc
        into.accept(RangeResponse(None, start, len(data), None))[:] = data
