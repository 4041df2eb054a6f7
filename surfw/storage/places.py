"""What lies at a place: a store, or a plain checkpoint that can be served from where it is."""

from surfw.storage.base import StorageBackend
from surfw.storage.store import MARKER

_CONFIG = "config.json"


async def is_checkpoint(backend: StorageBackend) -> bool:
    """Whether a plain checkpoint lies there, and no store.

    Raises:
        StorageError: that cannot be found out.
    """
    return not await backend.exists(MARKER) and await backend.exists(_CONFIG)
