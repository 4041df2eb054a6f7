"""Where chunks rest: storage backends, and the layout of a store in one."""

from pathlib import Path

from surfw.storage.base import StorageBackend
from surfw.storage.filesystem import FilesystemBackend
from surfw.storage.fsspec_backend import FsspecBackend
from surfw.storage.store import Store

__all__ = ["FilesystemBackend", "FsspecBackend", "StorageBackend", "Store", "open_backend"]


def open_backend(url: str | Path) -> StorageBackend:
    """The backend for a local path or a storage URL; the scheme decides."""
    text = str(url)
    if "://" not in text:
        return FilesystemBackend(text)
    if text.startswith("file://"):
        return FilesystemBackend(text.removeprefix("file://"))
    return FsspecBackend(text)
