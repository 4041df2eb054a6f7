"""What lies at a place: a store, or a plain checkpoint that can be served from where it is."""

from pathlib import Path

from blake3 import blake3

from surfw.config import surfw_home
from surfw.storage.base import StorageBackend
from surfw.storage.store import MARKER

_CONFIG = "config.json"


async def is_checkpoint(backend: StorageBackend) -> bool:
    """Whether a plain checkpoint lies there, and no store.

    Raises:
        StorageError: that cannot be found out.
    """
    return not await backend.exists(MARKER) and await backend.exists(_CONFIG)


def private_store(place: str) -> Path:
    """The folder of the store for the one model that lies at a place and is not copied."""
    address = place if "://" in place else str(Path(place).expanduser().absolute())
    return surfw_home() / "in-place" / blake3(address.rstrip("/").encode()).hexdigest()[:32]
