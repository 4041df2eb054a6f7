"""Any file system that fsspec knows, as a storage. Local files have a few shorter ways: see `filesystem`.

fsspec's synchronous calls run in threads: its remote file systems are asynchronous underneath, on a loop of their own.
Foreign exceptions become surfw's here and nowhere else.
"""

import asyncio
import errno
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import fsspec

from surfw.config import display_text, display_url
from surfw.errors import ConfigurationError, NotFoundError, StorageError, StorageFullError, SurfwError
from surfw.storage.base import StorageBackend, check_key, check_prefix, expect_length, spool_folder

T = TypeVar("T")
_COPY_BYTES = 8 << 20


@contextmanager
def translate_errors(what: str) -> Iterator[None]:
    """Foreign exceptions as surfw's, naming what was being done."""
    try:
        yield
    except FileNotFoundError as exc:
        raise NotFoundError(f"{what}: not found") from exc
    except PermissionError as exc:
        raise StorageError(f"{what}: permission denied ({exc.strerror or exc})") from exc
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFullError(f"{what}: no space is left; free some and run the same command again") from exc
        raise StorageError(f"{what}: {display_text(exc.strerror or str(exc)) or type(exc).__name__}") from exc
    except ImportError as exc:
        raise ConfigurationError(f"{what}: {exc}") from exc


@contextmanager
def translate_all_errors(what: str) -> Iterator[None]:
    """As `translate_errors`, and also what a library, or a backend of others, raises of its own."""
    try:
        with translate_errors(what):
            yield
    except SurfwError:
        raise
    except Exception as exc:
        text = display_text(" ".join(str(exc).split()))[:300]
        raise StorageError(f"{what}: {type(exc).__name__}: {text}") from exc


class FsspecBackend(StorageBackend):
    """Objects under a URL of any scheme fsspec knows, such as `s3://bucket/prefix` or `memory://name`."""

    def __init__(self, url: str, **options: Any) -> None:
        """Open the file system; `options` are the storage options of fsspec's implementation."""
        self.url = display_url(url)
        self._address = url  # with what is not shown
        self.fs, self.root = self._open(**options)

    def _open(self, **options: Any) -> tuple[Any, str]:
        try:
            with translate_errors(f"storage {self.url}"):
                fs, root = fsspec.core.url_to_fs(self._address, **options)
                return fs, str(root)
        except ValueError as exc:
            reason = str(exc).replace(self._address, self.url)
            raise ConfigurationError(f"storage {self.url} cannot be opened: {reason}") from exc

    def spool(self) -> Path:
        """A local folder for files on their way into this storage; URLs that are shown alike may be other places."""
        return spool_folder(self._address)

    def path(self, key: str) -> str:
        """The key's path in the file system."""
        return f"{self.root.rstrip('/')}/{check_key(key)}"

    async def _call(self, key: str, function: Callable[[str], T]) -> T:
        path = self.path(key)

        def call() -> T:
            with self._translate(f"{key} in {self.url}"):
                return function(path)

        return await asyncio.to_thread(call)

    @contextmanager
    def _translate(self, what: str) -> Iterator[None]:
        """All errors as surfw's; a backend adds what its library says in its own way."""
        with translate_all_errors(what):
            yield

    async def load(self, key: str) -> bytes:
        """The whole object."""
        return bytes(await self._call(key, self.fs.cat_file))

    async def load_range(self, key: str, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop` of an object."""
        data = await self._call(key, lambda path: bytes(self.fs.cat_file(path, start=start, end=stop)))
        return expect_length(data, stop - start, key, self.url)

    async def save(self, key: str, data: bytes | BinaryIO) -> None:
        """Write an object; object stores show it only once it is whole."""

        def write(path: str) -> None:
            if isinstance(data, bytes):
                self.fs.pipe_file(path, data)
                return
            with tempfile.NamedTemporaryFile(prefix="surfw-") as whole:  # a stream that breaks leaves no half object
                shutil.copyfileobj(data, whole, _COPY_BYTES)
                whole.flush()
                self.fs.put_file(whole.name, path)

        await self._call(key, write)

    async def adopt(self, key: str, path: Path) -> None:
        """Upload a finished local file, and remove it."""

        def move(target: str) -> None:
            self.fs.put_file(str(path), target)
            path.unlink()

        await self._call(key, move)

    async def exists(self, key: str) -> bool:
        """Whether the object is there; a storage that does not say is an error."""

        def look(path: str) -> bool:
            with suppress(NotADirectoryError):
                return bool(self.fs.info(path)["type"] == "file")
            return False

        try:
            return await self._call(key, look)
        except NotFoundError:
            return False

    async def remove(self, key: str) -> None:
        """Remove an object; where there is none, nothing is to be done."""

        def remove(path: str) -> None:
            try:
                self.fs.rm_file(path)
            except NotImplementedError as exc:
                raise StorageError(f"{key} in {self.url} cannot be removed: this kind of storage is only read") from exc

        with suppress(NotFoundError):
            await self._call(key, remove)

    async def size(self, key: str) -> int:
        """The object's length."""
        return int(await self._call(key, self.fs.size))

    async def list(self, prefix: str = "") -> list[str]:
        """The keys that start with the prefix."""
        folder = check_prefix(prefix).rpartition("/")[0]

        def find() -> list[str]:
            root = self.root.rstrip("/")
            try:
                with self._translate(f"listing {self.url}"):
                    paths = self.fs.find(f"{root}/{folder}" if folder else root)
            except NotFoundError:
                return []
            keys = (path.removeprefix(root).lstrip("/") for path in paths)
            return sorted(key for key in keys if key.startswith(prefix))

        return await asyncio.to_thread(find)
