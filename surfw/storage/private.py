"""Where the private stores lie: each has the manifest of one model that is served from where it is."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blake3 import blake3

from surfw.config import surfw_home
from surfw.storage_options import identify_place


def private_store(place: str, options: Mapping[str, Any]) -> Path:
    """The folder of the store for the one model that lies at a place and is not copied.

    Args:
        place: a folder, or a storage URL.
        options: storage options: the same URL at another endpoint is another place.
    """
    address = place if "://" in place else str(Path(place).expanduser().absolute())
    identity = identify_place(address.rstrip("/"), options)
    return surfw_home() / "in-place" / blake3(identity.encode()).hexdigest()[:32]
