"""Storage backends, and the layout of a store in a backend."""

from surfw.storage.backends import open_backend
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
