"""Where chunks rest: storage backends, and the layout of a store in one."""

from pathlib import Path

from surfw.storage.base import StorageBackend
from surfw.storage.custom import adapt_backend
from surfw.storage.filesystem import FilesystemBackend
from surfw.storage.fsspec_backend import FsspecBackend
from surfw.storage.s3 import S3Backend
from surfw.storage.store import Store

__all__ = [
    "FilesystemBackend",
    "FsspecBackend",
    "S3Backend",
    "StorageBackend",
    "Store",
    "adapt_backend",
    "open_backend",
]


def open_backend(url: str | Path) -> StorageBackend:
    """The backend for a local path or a storage URL; the scheme decides. Nothing is made yet."""
    text = str(url)
    if "://" not in text or text.startswith("file://"):
        return FilesystemBackend(text.removeprefix("file://"), create=False)
    if text.startswith("s3://"):
        bucket, _, prefix = text.removeprefix("s3://").partition("/")
        return S3Backend(bucket, prefix)
    return FsspecBackend(text)
