"""Telling a store from a plain checkpoint, which can be served from where it is."""

import asyncio

from surfw.config import display_url
from surfw.errors import NotAStoreError
from surfw.storage.base import StorageBackend
from surfw.storage.store import MARKER, OR_SERVER

_CONFIG = "config.json"


async def is_checkpoint(backend: StorageBackend) -> bool:
    """Whether a place holds a plain checkpoint; else it holds a store.

    Raises:
        NotAStoreError: it holds neither.
        StorageError: the storage cannot be read.
    """
    if await backend.exists(MARKER):
        return False
    if await backend.exists(_CONFIG):
        return True
    for name in (MARKER, _CONFIG):
        path = backend.local_path(name)
        if path is not None and (path.exists() or path.is_symlink()):
            raise NotAStoreError(
                f"{path} is no regular file, expected one; put the file itself there, or name another place"
            )
    url, file = display_url(backend.url), backend.local_path(MARKER)
    if file is not None and not await asyncio.to_thread(file.parent.is_dir):
        raise NotAStoreError(
            f"there is no folder {url}; name that of a checkpoint, or of a store, which 'surfw chunk MODEL' makes; "
            "a model of the hub is hf://org/name"
        )
    raise NotAStoreError(
        f"{url} is neither a surfw store ({MARKER}) nor a checkpoint ({_CONFIG}): both files are missing; name "
        f"the folder or URL that 'surfw chunk --store' wrote to, or that of a checkpoint"
        f"{OR_SERVER if url.startswith('http') else ''}"
    )
